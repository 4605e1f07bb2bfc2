"""Tells Airflow of new uploads, so that they are scored within a minute."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent

logger = logging.getLogger(__name__)

_LONGEST_PAUSE = 300.0


class UploadsTrigger(BaseEventTrigger):
    """Looks for uploads again and again; how far it has told of them lies in the database.

    An event counts as arrived at the next look, after Airflow had time to store it: one that was
    lost in a crash is told again, and a run too many does nothing.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{type(self).__module__}.{type(self).__qualname__}", {"seconds": self.seconds}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        from gun_detection import stages
        from gun_detection.errors import GunDetectionError
        from gun_detection.settings import load_settings

        while True:
            began = asyncio.get_running_loop().time()
            news = None
            try:
                settings = load_settings()
                news = await asyncio.to_thread(stages.look_for_uploads, settings)
            except GunDetectionError as error:
                # A trigger that ends is not started again: it waits for what is away.
                logger.warning("looking for uploads: %s", error.message)
            except Exception:
                logger.exception("looking for uploads")
            if news is not None and news["waiting"]:
                yield TriggerEvent(news["waiting"])  # type: ignore[no-untyped-call]
            # A listing that takes long shall not be all that the server does.
            took = asyncio.get_running_loop().time() - began
            times = 1 if news is not None and news["more"] else 5
            await asyncio.sleep(max(self.seconds, min(times * took, _LONGEST_PAUSE)))
            if news is not None:
                await self._told(news)

    async def _told(self, news: dict[str, Any]) -> None:
        from gun_detection import stages
        from gun_detection.errors import GunDetectionError
        from gun_detection.settings import load_settings

        try:
            await asyncio.to_thread(stages.told_of_uploads, load_settings(), news)
        except GunDetectionError as error:
            logger.warning("these uploads will be told of again: %s", error.message)
        except Exception:
            logger.exception("these uploads will be told of again")
