"""Many threads ask for one thing each; what they ask for at the same time is done together."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, Self, TypeVar

_Ask = TypeVar("_Ask")
_Answer = TypeVar("_Answer")


class Batcher(Generic[_Ask, _Answer]):
    """Gathers the requests of threads into batches of at most `most`, of equal `kind`.

    No request waits for others to come: a worker takes what there is, most of one kind first, so
    batches grow with the load. A context manager; leaving it ends the workers once all is
    answered. An exception of `function` is raised for every request of its batch.
    """

    def __init__(
        self,
        function: Callable[[list[_Ask]], list[_Answer]],
        most: int,
        workers: int = 1,
        kind: Callable[[_Ask], Hashable] = lambda _: None,
    ) -> None:
        self._function, self._most, self._kind = function, most, kind
        self._waiting: dict[Hashable, list[tuple[_Ask, Future[_Answer]]]] = {}
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
        future: Future[_Answer] = Future()
        with self._changed:
            self._waiting.setdefault(self._kind(ask), []).append((ask, future))
            self._changed.notify()
        return future.result()

    def _work(self) -> None:
        while batch := self._take():
            try:
                answers = self._function([ask for ask, _ in batch])
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(batch, answers, strict=True):
                    future.set_result(answer)

    def _take(self) -> list[tuple[_Ask, "Future[_Answer]"]]:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return []
            kind = max(self._waiting, key=lambda name: len(self._waiting[name]))
            queue = self._waiting.pop(kind)
            batch, rest = queue[: self._most], queue[self._most :]
            if rest:
                self._waiting[kind] = rest
                self._changed.notify()
            return batch
