"""A bound on the bytes that threads hold at the same time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """So many bytes may be held at once; one that is larger than all of it is held alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with self._freed:
            while self._held and self._held + size > self._most:
                self._freed.wait()
            self._held += size
        try:
            yield
        finally:
            with self._freed:
                self._held -= size
                self._freed.notify_all()
