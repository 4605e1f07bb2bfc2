from collections import Counter

import pytest

from gun_detection.datasets.manifest import Entry
from gun_detection.training.config import TrainingConfig
from gun_detection.training.order import Order, plan_order


def entry(index: int, source: str = "a", guns: int = 1, width: int = 100) -> Entry:
    boxes = ((1.0, 1.0, 9.0, 9.0),) * guns
    name = f"{source}/Images/{index}.jpeg"
    return Entry(f"{index:064d}", 1, width, 100, boxes, name, "0" * 16, str(index), "train")


def drawn(order: Order, epoch: int = 0) -> Counter[int]:
    return Counter(index for batch in order.batches(epoch) for _, index, _ in batch)


@pytest.mark.parametrize("by_aspect", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 8), (7, 2), (100, 8), (9, 9), (3, 1)])
def test_every_picture_is_in_every_epoch_once(count: int, batch_size: int, by_aspect: bool) -> None:
    order = Order([1.0] * count, [1.0] * count, batch_size, 0, by_aspect)
    for epoch in range(3):
        batches = order.batches(epoch)
        assert len(batches) == order.steps
        assert all(batches)
        assert max(map(len, batches)) <= batch_size + 1
        assert drawn(order, epoch) == Counter(range(count))


def test_the_order_follows_from_seed_and_epoch() -> None:
    order = Order([1.0] * 50, [1.5] * 50, 4, 0, True)
    assert order.batches(3) == order.batches(3)
    first, second = ([i for b in order.batches(epoch) for _, i, _ in b] for epoch in (0, 1))
    assert first != second
    other = Order([1.0] * 50, [1.5] * 50, 4, 1, True)
    assert other.batches(0) != order.batches(0)


def test_batches_are_of_one_shape() -> None:
    aspects = [0.5, 2.0] * 40
    order = Order(aspects, [1.0] * 80, 8, 0, True)
    mixed = sum(len({aspects[i] for _, i, _ in batch}) > 1 for batch in order.batches(0))
    assert mixed <= 1


def test_gun_free_pictures_are_repeated_to_their_share() -> None:
    entries = [entry(i) for i in range(90)] + [entry(i, guns=0) for i in range(90, 100)]
    config = TrainingConfig(negative_share=0.25, batch_size=4)
    counts = drawn(plan_order(entries, config))
    negatives = sum(count for index, count in counts.items() if index >= 90)
    assert negatives / counts.total() == pytest.approx(0.25, abs=0.03)
    assert all(counts[index] >= 2 for index in range(90, 100))
    assert all(counts[index] == 1 for index in range(90))


def test_enough_gun_free_pictures_are_not_repeated() -> None:
    entries = [entry(i) for i in range(10)] + [entry(i, guns=0) for i in range(10, 20)]
    config = TrainingConfig(negative_share=0.25)
    assert set(drawn(plan_order(entries, config)).values()) == {1}


def test_balanced_sources_are_drawn_equally_often() -> None:
    entries = [entry(i, "large") for i in range(90)] + [entry(i, "small") for i in range(90, 100)]
    config = TrainingConfig(source_balance=1.0)
    order = plan_order(entries, config)
    small = sum(count for e in range(10) for index, count in drawn(order, e).items() if index >= 90)
    assert small / 10 == pytest.approx(50, rel=0.1)


def test_repeats_that_are_not_whole_never_leave_a_batch_empty() -> None:
    order = Order([1.0] * 5, [0.5] * 5, 1, 0, False)
    for epoch in range(50):
        assert all(order.batches(epoch))


@pytest.mark.parametrize("repeat", [0.5, 1.0, 2.5, 25.0])
@pytest.mark.parametrize("by_aspect", [True, False])
def test_the_draws_of_a_picture_are_numbered(repeat: float, by_aspect: bool) -> None:
    order = Order([0.5, 2.0, 1.0], [repeat, 1.0, repeat], 2, 0, by_aspect)
    for epoch in range(20):
        draws = [draw for batch in order.batches(epoch) for draw in batch]
        counts = drawn(order, epoch)
        expected = {(epoch, index, n) for index, count in counts.items() for n in range(count)}
        assert (set(draws), len(draws)) == (expected, len(expected))
