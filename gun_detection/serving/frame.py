"""Around every request: an id, a line in the log, figures, headers for browsers."""

import asyncio
import json
import logging
import time
import uuid
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gun_detection.serving.metrics import REQUEST_SECONDS, REQUESTS

logger = logging.getLogger(__name__)

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Answers are about pictures of people: no cache keeps them.
    "Cache-Control": "no-store",
}
MOST_HEAD_BYTES = 2**14
# Asked every few seconds by machines.
_PROBES = {"/health", "/ready", "/metrics"}


class Frame:
    """ASGI middleware, the outermost; nothing of a picture or a key goes into the log.

    A request that is refused before it was read is read to its end first, up to `most_bytes` and
    `most_seconds`: a client, or a proxy, that is still writing may never see an answer otherwise.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, most_seconds: float) -> None:
        self._app = app
        self._most_bytes, self._most_seconds = most_bytes, most_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        body = _Body(scope, receive)

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                if status >= 400 and headers.get("connection") != "close":
                    await body.drain(self._most_bytes, self._most_seconds)
                headers["X-Request-ID"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                message["headers"] = headers.raw
            await send(message)

        try:
            if _head_bytes(scope) > MOST_HEAD_BYTES:
                message = f"its head has more than {MOST_HEAD_BYTES:,} bytes"
                await _send_failure(send_framed, 431, "HEAD_TOO_LARGE", message)
            else:
                await self._app(scope, body.receive, send_framed)
        except Exception:
            logger.exception("a request failed", extra={"request_id": request_id})
            if not status:
                message = "this is a fault of the service: tell its operator"
                await _send_failure(send_framed, 500, "INTERNAL", message)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "none")
            REQUESTS.labels(route, status).inc()
            REQUEST_SECONDS.labels(route).observe(seconds)
            quiet = route in _PROBES and status == 200
            logger.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s",
                scope["method"],
                route,
                extra={
                    "status": status,
                    "ms": round(1000 * seconds, 1),
                    "request_id": request_id,
                    **scope["state"].get("log", {}),
                },
            )


class _Body:
    """What comes of a request, and whether all of it has come."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        # Who waits for a word before sending its body is not asked to send it.
        self._more = announced and "expect" not in headers

    async def receive(self) -> Message:
        message = await self._receive()
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def drain(self, most_bytes: int, most_seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(most_seconds):
                while self._more and most_bytes > 0:
                    most_bytes -= len((await self.receive()).get("body", b""))


def _head_bytes(scope: Scope) -> int:
    """uvicorn counts the head of a request only while some of it is still to come."""
    names_and_values = sum(len(name) + len(value) for name, value in scope["headers"])
    return len(scope["raw_path"]) + len(scope["query_string"]) + names_and_values


async def _send_failure(send: Send, status: int, reason: str, message: str) -> None:
    body = json.dumps({"error": {"reason": reason, "message": message}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
