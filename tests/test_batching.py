"""Requests of many threads, answered together."""

import threading
import time
from concurrent.futures import CancelledError

import pytest

from gun_detection.batching import Batcher
from gun_detection.scoring.flow import in_threads


def test_a_batcher_gathers_what_is_asked_at_the_same_time() -> None:
    sizes: list[int] = []

    def double(asked: list[int]) -> list[int]:
        sizes.append(len(asked))
        time.sleep(0.05)
        return [2 * number for number in asked]

    with Batcher(double, most=4) as batcher:
        answers = in_threads(lambda number: (number, batcher(number)), iter(range(20)), threads=10)
        assert all(b == 2 * a for a, b in filter(None, answers))
    assert sum(sizes) == 20
    assert 1 < max(sizes) <= 4


def test_a_batcher_waits_for_more_where_calls_are_dear() -> None:
    sizes: list[int] = []

    def note(asked: list[int]) -> list[int]:
        sizes.append(len(asked))
        return asked

    # Workers who find nothing left after their pause go on waiting.
    with Batcher(note, most=64, workers=3, pause=0.5) as batcher:
        for _ in range(2):
            assert len(list(in_threads(batcher, iter(range(10)), threads=10))) >= 10
    assert sum(sizes) == 20
    assert max(sizes) > 3


def test_a_batch_is_of_one_kind() -> None:
    batches: list[list[int]] = []

    def note(asked: list[int]) -> list[int]:
        batches.append(asked)
        time.sleep(0.02)
        return asked

    with Batcher(note, most=8, kind=lambda number: number % 2) as batcher:
        list(in_threads(batcher, iter(range(20)), threads=12))
    assert all(len({number % 2 for number in batch}) == 1 for batch in batches)
    assert sum(map(len, batches)) == 20


def test_an_error_reaches_everybody_of_its_batch_and_nobody_else() -> None:
    def fail(asked: list[int]) -> list[int]:
        if 1 in asked:
            raise ValueError("one")
        return asked

    with Batcher(fail, most=1) as batcher:
        with pytest.raises(ValueError, match="one"):
            batcher(1)
        assert batcher(2) == 2


class Held:
    """Answers when it is let go, and notes in which order it was asked."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, asked: list[int]) -> list[int]:
        self.order += asked
        self.begun.set()
        self.go.wait(10)
        return asked


def test_one_at_a_time_comes_in_order_whatever_its_kind() -> None:
    held = Held()
    with Batcher(held, most=1, kind=lambda number: number % 3) as batcher:
        futures = [batcher.submit(number) for number in range(12)]
        held.go.set()
        assert [future.result(10) for future in futures] == list(range(12))
    assert held.order == list(range(12))


def ordered(*numbers: int) -> list[int]:
    """In which order even and odd numbers, two at a time, are answered that wait together."""
    held = Held()
    with Batcher(held, most=2, kind=lambda number: number % 2) as batcher:
        batcher.submit(0)
        held.begun.wait(10)
        futures = [batcher.submit(number) for number in numbers]
        held.go.set()
        for future in futures:
            future.result(10)
    return held.order[1:]


def test_the_kind_that_most_wait_for_comes_first() -> None:
    assert ordered(1, 2, 4, 6) == [2, 4, 1, 6]


def test_a_rare_kind_has_its_turn() -> None:
    order = ordered(1, *range(2, 102, 2))
    assert 2 < order.index(1) < len(order) - 4


def test_what_is_cancelled_is_not_asked() -> None:
    held = Held()
    with Batcher(held, most=1) as batcher:
        first = batcher.submit(1)
        held.begun.wait(10)
        second, third = batcher.submit(2), batcher.submit(3)
        assert second.cancel()
        held.go.set()
        assert (first.result(10), third.result(10)) == (1, 3)
        with pytest.raises(CancelledError):
            second.result()
    assert held.order == [1, 3]
