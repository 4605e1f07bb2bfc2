import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from gun_detection.detector import atlas

HEIGHT, WIDTH = 192, 256
NAMES = ["0", "1", "2", "3"]


def maps(number: int = 2, height: int = HEIGHT, width: int = WIDTH) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        torch.rand(number, 6, height // stride, width // stride, generator=random) - 0.5
        for stride in (4, 8, 16, 32)
    ]


def regions(number: int = 2, height: int = HEIGHT, width: int = WIDTH, least: int = 8) -> Tensor:
    """Of all levels, many of them at an edge, some as tall or wide as the picture."""
    random = torch.Generator().manual_seed(1)
    ends = torch.rand(number, 400, 2, 2, generator=random) * 1.4 - 0.2
    low, high = ends.clamp(0, 1).sort(dim=2).values.unbind(2)
    sizes = torch.tensor([width, height])
    low, high = low * (sizes - least), high * (sizes - least) + least
    return torch.cat([low, high], 2)


@pytest.mark.parametrize("scale", [20, 56, 224], ids=["coarse", "all levels", "fine"])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (32, 640), (640, 32)])
def test_regions_have_the_features_that_torchvision_gives_them(
    scale: int, size: tuple[int, int]
) -> None:
    pool = MultiScaleRoIAlign(NAMES, 7, 2, canonical_scale=scale)
    # None is smaller than a pixel of the map that it is pooled from.
    levels, boxes = maps(2, *size), regions(2, *size, least=8 if scale == 224 else 32)
    expected = pool(dict(zip(NAMES, levels, strict=True)), list(boxes), [size] * 2)
    found = atlas.align(pool, levels, boxes, size[1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_maps_of_half_precision_give_float32() -> None:
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    halves = [level.to(torch.bfloat16, memory_format=torch.channels_last) for level in maps()]
    found = atlas.align(pool, halves, regions(), WIDTH)
    expected = atlas.align(pool, [level.float() for level in halves], regions(), WIDTH)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_one_level_and_two_of_the_same_size() -> None:
    fine = maps()[0]
    for levels in ([fine], [fine, fine + 1]):
        names = NAMES[: len(levels)]
        pool = MultiScaleRoIAlign(names, 7, 2)
        features = dict(zip(names, levels, strict=True))
        expected = pool(features, list(regions()), [(HEIGHT, WIDTH)] * 2)
        found = atlas.align(pool, levels, regions(), WIDTH)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_more_values_than_can_be_counted_are_drawn_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    whole = atlas.align(pool, maps(5), regions(5), WIDTH)
    drawn = []
    draw = atlas._draw

    def watched(levels: list[Tensor], *where: object) -> Tensor:
        drawn.append(len(levels[0]))
        return draw(levels, *where)  # type: ignore[arg-type]

    monkeypatch.setattr(atlas, "_draw", watched)
    _, tall, wide = atlas._places(maps())
    monkeypatch.setattr(atlas, "_MOST_VALUES", 2 * 6 * tall * wide)
    assert torch.equal(atlas.align(pool, maps(5), regions(5), WIDTH), whole)
    assert drawn == [2, 2, 1]


def test_what_is_not_a_number_is_a_region_of_nothing() -> None:
    pool = MultiScaleRoIAlign(NAMES, 7, 2)
    broken = regions()
    broken[0, 3] = torch.nan
    zero = regions()
    zero[0, 3] = 0.0
    assert torch.equal(
        atlas.align(pool, maps(), broken, WIDTH), atlas.align(pool, maps(), zero, WIDTH)
    )
