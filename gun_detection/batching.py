"""Many threads ask for one thing each; what they ask for at the same time is done together."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from operator import itemgetter
from typing import Generic, Self, TypeVar

_Ask = TypeVar("_Ask")
_Answer = TypeVar("_Answer")

# How many batches of other kinds go before one.
_PASSED = 16


class Batcher(Generic[_Ask, _Answer]):
    """Gathers the requests of threads into batches of at most `most`, of equal `kind`.

    A worker takes what there is of the kind that most wait for, so batches are as large as the load
    allows; one at a time, requests come in their order. No request waits for ever: a kind is passed
    over a few times only. Before that it waits `pause` seconds for more, where a call of `function`
    costs more than it. A context manager; leaving it ends the workers once all is answered. An
    exception of `function` is raised for every request of its batch.
    """

    def __init__(
        self,
        function: Callable[[list[_Ask]], list[_Answer]],
        most: int,
        workers: int = 1,
        kind: Callable[[_Ask], Hashable] = lambda _: None,
        pause: float = 0.0,
    ) -> None:
        self._function, self._most, self._pause = function, most, pause
        self._kind = kind if most > 1 else lambda _: None
        self._waiting: dict[Hashable, list[tuple[_Ask, Future[_Answer]]]] = {}
        # Of each kind that is waited for: how many batches went before it.
        self._passed: Counter[Hashable] = Counter()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __call__(self, ask: _Ask) -> _Answer:
        return self.submit(ask).result()

    def submit(self, ask: _Ask) -> "Future[_Answer]":
        """The answer to be; what is cancelled before its batch begins is not asked."""
        future: Future[_Answer] = Future()
        with self._changed:
            self._waiting.setdefault(self._kind(ask), []).append((ask, future))
            self._changed.notify()
        return future

    def _work(self) -> None:
        while self._wait():
            time.sleep(self._pause)
            if batch := self._take():
                self._answer(batch)

    def _wait(self) -> bool:
        """Wait for a request; False when there will be none."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return bool(self._waiting)

    def _take(self) -> list[tuple[_Ask, "Future[_Answer]"]]:
        """A batch of one kind; nothing where another worker was quicker."""
        with self._changed:
            if not self._waiting:
                return []
            kind = self._next()
            queue = self._waiting.pop(kind)
            self._passed.update(self._waiting.keys())
            self._passed.pop(kind, None)
            batch, rest = queue[: self._most], queue[self._most :]
            if rest:
                self._waiting[kind] = rest
                self._changed.notify()
        return [(ask, future) for ask, future in batch if future.set_running_or_notify_cancel()]

    def _next(self) -> Hashable:
        """The kind that was passed over too often, or else the one that most wait for."""
        kind, times = max(((kind, self._passed[kind]) for kind in self._waiting), key=itemgetter(1))
        if times >= _PASSED:
            return kind
        return max(self._waiting, key=lambda kind: len(self._waiting[kind]))

    def _answer(self, batch: list[tuple[_Ask, "Future[_Answer]"]]) -> None:
        try:
            answers = self._function([ask for ask, _ in batch])
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)
