"""uvicorn's protocol, with a limit on the time that a request's head or an answer may take."""

import asyncio
import fcntl
import struct
import termios

from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_SECONDS = 10.0
# In each such time a client has to take as much of its answer as this rate makes, or all of it.
_ANSWER_SECONDS = 20.0
_BYTES_PER_SECOND = 20_000

_open: set["Protocol"] = set()


def unsent_bytes() -> int:
    """Bytes of answers that wait in this process for their clients to take them."""
    return sum(one.transport.get_write_buffer_size() for one in _open)


class Protocol(H11Protocol):
    """Closes a connection whose next request does not begin, or whose head does not end, in time.

    So it does with one whose answer is not read, or too slowly. uvicorn alone would wait for ever:
    a few hundred such connections keep everybody out, and a few dozen large answers fill the
    memory.
    """

    _timer: asyncio.TimerHandle | None = None
    _answer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _open.add(self)
        # Writing is paused as soon as anything waits, however little.
        transport.set_write_buffer_limits(0)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        _open.discard(self)
        self._stop_timer()
        self._stop_answer_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._stop_answer_timer()
        super().resume_writing()

    def _expect_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expect_reading(self) -> None:
        left = self._not_taken()
        self._answer_timer = self.loop.call_later(_ANSWER_SECONDS, self._look_at_reading, left)

    def _look_at_reading(self, left: int) -> None:
        if left - self._not_taken() >= _BYTES_PER_SECOND * _ANSWER_SECONDS:
            self._expect_reading()
        else:
            self.transport.abort()

    def _not_taken(self) -> int:
        """Bytes, with those that the kernel holds: it takes megabytes at once, and then none."""
        connection = self.transport.get_extra_info("socket").fileno()
        [held] = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))
        size: int = held + self.transport.get_write_buffer_size()
        return size

    def _stop_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None
