"""Threads, batches and budgets, each by itself."""

import threading
import time

import pytest

from gun_detection.batching import Batcher
from gun_detection.scoring import flow
from gun_detection.scoring.budget import Budget
from gun_detection.scoring.flow import in_batches, in_threads


def test_every_item_gives_one_result() -> None:
    results = in_threads(lambda number: number * 2, iter(range(500)), threads=8)
    assert sorted(r for r in results if r is not None) == [n * 2 for n in range(500)]


def test_nothing_to_do_ends_at_once() -> None:
    assert list(in_threads(lambda number: number, iter([]), threads=3)) == []


def test_the_first_error_ends_all() -> None:
    started = []

    def work(number: int) -> int:
        started.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    with pytest.raises(ValueError, match="three"):
        list(in_threads(work, iter(range(10_000)), threads=2))
    assert len(started) < 10_000


def test_a_consumer_that_stops_stops_the_threads() -> None:
    done = []
    results = in_threads(lambda n: done.append(n) or n, iter(range(100_000)), threads=4)
    next(results)
    results.close()
    assert len(done) < 100_000
    assert threading.active_count() < 20


def test_batches_are_full_or_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "BATCH", 64)
    assert [len(batch) for batch in in_batches(iter(range(150)))] == [64, 64, 22]
    monkeypatch.setattr(flow, "_SECONDS", 0.0)
    assert list(in_batches(iter([1, None, 2]))) == [[1], [2]]


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


def test_a_budget_bounds_what_is_held_together() -> None:
    budget, held, most = Budget(100), 0, 0
    lock = threading.Lock()

    def work(size: int) -> None:
        nonlocal held, most
        with budget.hold(size):
            with lock:
                held += size
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= size

    list(in_threads(work, iter([30] * 60), threads=10))
    assert 30 < most <= 100


def test_what_is_larger_than_the_budget_is_held_alone() -> None:
    budget = Budget(10)
    with budget.hold(1000):
        pass
    entered = threading.Event()

    def large() -> None:
        with budget.hold(1000):
            entered.set()

    with budget.hold(1):
        waiting = threading.Thread(target=large)
        waiting.start()
        assert not entered.wait(0.05)
    waiting.join(10)
    assert entered.is_set()
