"""Threads, batches of results and budgets, each by itself."""

import threading
import time

import pytest

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
    before = threading.active_count()
    results = in_threads(lambda n: done.append(n) or n, iter(range(100_000)), threads=4)
    next(results)
    results.close()
    assert len(done) < 100_000
    # Of those that others left some may end meanwhile.
    assert threading.active_count() <= before


def test_batches_are_full_or_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "BATCH", 64)
    assert [len(batch) for batch in in_batches(iter(range(150)))] == [64, 64, 22]
    # Whatever the clock says, it is late.
    monkeypatch.setattr(flow, "_SECONDS", -1.0)
    assert list(in_batches(iter([1, None, 2]))) == [[1], [2]]


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
