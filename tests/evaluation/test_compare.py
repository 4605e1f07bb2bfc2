import pytest

from gun_detection.errors import DatasetError
from gun_detection.evaluation.compare import compare
from tests.evaluation.conftest import GUN, OTHER, picture, sample


def test_a_clear_difference_and_none() -> None:
    good = [sample(picture([GUN], (GUN, 0.9)), str(i)) for i in range(40)]
    half = [
        sample(picture([GUN], (GUN, 0.9)) if i % 2 else picture([GUN], (OTHER, 0.9)), str(i))
        for i in range(40)
    ]
    by_name = {item.name: item for item in compare(half, good, (0.5, 0.5))}
    recall = by_name["recall"]
    assert (recall.first, recall.second, recall.difference) == (0.5, 1.0, 0.5)
    assert recall.clear
    assert by_name["specificity"].difference is None
    assert not by_name["specificity"].clear
    same = {item.name: item for item in compare(half, half, (0.5, 0.5))}
    assert same["recall"].interval == (0, 0), "what is hard for both cancels out"
    assert not same["recall"].clear


def test_each_model_is_judged_at_its_own_threshold() -> None:
    pictures = [sample(picture([GUN], (GUN, 0.6)), str(i)) for i in range(5)]
    by_name = {item.name: item for item in compare(pictures, pictures, (0.7, 0.5))}
    assert (by_name["recall"].first, by_name["recall"].second) == (0.0, 1.0)


def test_other_pictures_cannot_be_compared() -> None:
    with pytest.raises(DatasetError, match="other pictures"):
        compare([sample(picture([GUN]), "a")], [sample(picture([GUN]), "b")], (0.5, 0.5))
