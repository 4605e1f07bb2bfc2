"""Items go through threads, and results come out in batches."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# A commit for each batch costs more than its rows; after so many seconds it is written anyway.
BATCH = 1000
_SECONDS = 2.0
_QUEUE = 256


def in_threads(
    make: Callable[[_Item], _Result | None], items: Iterator[_Item], threads: int
) -> Iterator[_Result | None]:
    """What `make` gives for each item, as it comes, unless that is None; None from time to time
    where nothing comes.

    The first exception of a thread is raised, and the others stop after the item at hand.
    """
    results: queue.Queue[_Result | BaseException | None] = queue.Queue(_QUEUE)
    lock, stop = threading.Lock(), threading.Event()

    def put(result: _Result | BaseException | None) -> None:
        # A full queue means that the consumer is slow: no more work is taken on meanwhile.
        while not stop.is_set():
            try:
                results.put(result, timeout=0.5)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(items, None)
                if item is None:
                    break
                if (result := make(item)) is not None:
                    put(result)
        except BaseException as error:
            put(error)
        put(None)

    pool = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for thread in pool:
        thread.start()
    try:
        left = threads
        while left:
            try:
                result = results.get(timeout=_SECONDS)
            except queue.Empty:
                yield None
                continue
            if isinstance(result, BaseException):
                raise result
            if result is None:
                left -= 1
            else:
                yield result
    finally:
        stop.set()
        for thread in pool:
            thread.join()


def in_batches(results: Iterator[_Result | None]) -> Iterator[list[_Result]]:
    """Full batches, or what there is when a while has passed."""
    batch: list[_Result] = []
    began = time.monotonic()
    for result in results:
        if result is not None:
            batch.append(result)
        if len(batch) >= BATCH or time.monotonic() - began > _SECONDS:
            if batch:
                yield batch
            batch, began = [], time.monotonic()
    if batch:
        yield batch
