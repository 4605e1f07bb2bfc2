"""A proxy on loopback that breaks things when told to, between our clients and a real server.

Bytes pass as they are, so that the signature of an S3 request, which covers its Host, holds.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

_HOST = "127.0.0.1"
_CHUNK = 2**16
# With this option a socket that is closed sends a reset.
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Answer:
    """The server is not asked: the answer is this status and S3 error code."""

    status: int
    code: str


@dataclass(frozen=True)
class Cut:
    """The body ends after `after` bytes, its Content-Length unchanged: by a reset or in order."""

    after: int
    reset: bool = False


@dataclass(frozen=True)
class Flip:
    """A random bit of the body is another one."""


@dataclass(frozen=True)
class Drip:
    """The body comes byte by byte, `seconds` apart."""

    seconds: float


@dataclass(frozen=True)
class Delay:
    """The answer comes `seconds` late."""

    seconds: float


Fault = Answer | Cut | Flip | Drip | Delay


@dataclass
class _Link:
    """One connection of a client and its own to the server, with the fault of its request."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    fault: Fault | None = None
    head: bytes = b""
    passed: int = 0

    def reset(self) -> None:
        for writer in (self.client, self.server):
            connection = writer.get_extra_info("socket")
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


@dataclass
class Proxy:
    """Listens on `port`, also while it refuses, and passes on to a server on loopback.

    `fail` gives a fault to the next requests by GET; `drop`, `stall` and `refuse` are for any
    protocol. `requests` are the lines of all requests by GET, `connections` counts the clients',
    and `injected` the requests that got a fault.
    """

    server_port: int
    port: int = 0
    requests: list[str] = field(default_factory=list)
    connections: int = 0
    injected: int = 0
    _fault: Fault | None = None
    _times: int = 0
    _stalled: bool = False
    _links: list[_Link] = field(default_factory=list)

    def fail(self, fault: Fault, times: int = 1_000_000) -> None:
        """Let the fault befall the next `times` requests by GET."""
        self._fault, self._times = fault, times

    def drop(self) -> None:
        """Reset every connection that is open now."""
        self._run(self._drop())

    def stall(self) -> None:
        """Let no more bytes through, either way, without closing anything."""
        self._stalled = True

    def refuse(self) -> None:
        """Reset every connection and refuse new ones."""
        self._run(self._refuse())

    def heal(self) -> None:
        """Pass everything on again."""
        self._times, self._stalled = 0, False
        self._run(self._listen())

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._listener: asyncio.Server | None = None
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._run(self._stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._serve, _HOST, self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _drop(self) -> None:
        for link in self._links:
            link.reset()

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self._drop()

    async def _stop(self) -> None:
        await self._refuse()
        self._stalled = False
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        # Transports close their sockets in the loop's next round.
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.connections += 1
        async with self._link(client) as (link, answers):
            pumps = [
                asyncio.create_task(self._pass_requests(reader, link)),
                asyncio.create_task(self._pass_answers(answers, link)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    @asynccontextmanager
    async def _link(
        self, client: asyncio.StreamWriter
    ) -> AsyncIterator[tuple[_Link, asyncio.StreamReader]]:
        try:
            answers, server = await asyncio.open_connection(_HOST, self.server_port)
        except OSError:
            client.transport.abort()
            return
        link = _Link(client, server)
        self._links.append(link)
        try:
            yield link, answers
        finally:
            self._links.remove(link)
            client.close()
            server.close()

    async def _pass_requests(self, reader: asyncio.StreamReader, link: _Link) -> None:
        while chunk := await self._read(reader):
            if chunk.startswith(b"GET "):
                chunk += await _rest_of_head(reader, chunk)
                self.requests.append(chunk.split(b"\r\n")[0].decode())
                link.fault, link.head, link.passed = self._next_fault(), b"", 0
            if isinstance(link.fault, Answer):
                link.client.write(_error(link.fault))
            else:
                link.server.write(chunk)
                await link.server.drain()

    async def _pass_answers(self, reader: asyncio.StreamReader, link: _Link) -> None:
        while chunk := await self._read(reader):
            if link.fault is None:
                link.client.write(chunk)
                await link.client.drain()
            elif not await _spoil(chunk, link, link.fault):
                return

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        chunk = await reader.read(_CHUNK)
        while self._stalled:
            await asyncio.sleep(0.01)
        return chunk

    def _next_fault(self) -> Fault | None:
        if self._fault is None or self._times == 0:
            return None
        self._times -= 1
        self.injected += 1
        return self._fault


async def _rest_of_head(reader: asyncio.StreamReader, chunk: bytes) -> bytes:
    return b"" if b"\r\n\r\n" in chunk else await reader.readuntil(b"\r\n\r\n")


async def _spoil(chunk: bytes, link: _Link, fault: Fault) -> bool:
    """Pass on a part of an HTTP answer with its fault; False when the connection ends by it."""
    if isinstance(fault, Delay) and not link.head:
        await asyncio.sleep(fault.seconds)
    if b"\r\n\r\n" not in link.head:
        before = len(link.head)
        link.head += chunk
        end = link.head.find(b"\r\n\r\n") + 4
        if end < 4:
            end = len(link.head)
        link.client.write(chunk[: end - before])
        chunk = chunk[end - before :]
    ending = False
    if isinstance(fault, Cut):
        chunk = chunk[: fault.after - link.passed]
        ending = link.passed + len(chunk) == fault.after
    if isinstance(fault, Flip) and chunk and not link.passed:
        damaged = bytearray(chunk)
        damaged[random.randrange(len(chunk))] ^= 1 << random.randrange(8)
        chunk = bytes(damaged)
    link.passed += len(chunk)
    if isinstance(fault, Drip):
        for byte in chunk:
            if link.client.is_closing():
                return False
            link.client.write(bytes([byte]))
            await link.client.drain()
            await asyncio.sleep(fault.seconds)
    else:
        link.client.write(chunk)
        await link.client.drain()
    if ending and isinstance(fault, Cut) and fault.reset:
        # What was written has to be read before the reset, which throws it away.
        await asyncio.sleep(0.05)
        link.reset()
    return not ending


def _error(answer: Answer) -> bytes:
    body = f"<Error><Code>{answer.code}</Code><Message>{answer.code}</Message></Error>".encode()
    head = f"HTTP/1.1 {answer.status} Injected\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
