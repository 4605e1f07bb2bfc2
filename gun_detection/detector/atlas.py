"""RoIAlign on all levels of a feature pyramid in one step of a GPU.

torchvision's `MultiScaleRoIAlign` goes through the levels one by one, waits for the GPU at each to
hear which regions belong to it, and puts the results together from four parts. Here the maps of all
levels are drawn on one large one, side by side like the pages of an atlas, and each region moves to
where its level is.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from gun_detection.detector.transfers import to_device

# Each map ends in a copy of its last row and column, as samples beyond the last pixel's centre are
# taken for it, and in one of zeros, as those beyond the map are.
_MARGIN = 2
# torchvision's kernel counts values with 32 bits.
_MOST_VALUES = 2**31 - 1


def align(pool: MultiScaleRoIAlign, maps: list[Tensor], regions: Tensor, width: int) -> Tensor:
    """The features of regions (N, R, 4) as (N · R, channels, height, width) in float32.

    `maps` are those of the pyramid (N, channels, H, W), the finest first, `width` is that of the
    padded pictures, pixels; regions lie within the pictures. As `pool`, but for regions of less
    than a pixel of their map at its right and lower edge, and with what is not a number as zero.
    He et al., "Mask R-CNN", 2017; the level of a region: Lin et al., "Feature Pyramid Networks",
    2017, equation 1.
    """
    places, tall, wide = _places(maps)
    exponents = [round(math.log2(width / level.shape[3])) for level in maps]
    regions = regions.nan_to_num()
    moved = _move(pool, regions, exponents, places)
    at_once = max(1, _MOST_VALUES // (maps[0].shape[1] * tall * wide))
    parts = [
        roi_align(
            _draw([level[start : start + at_once] for level in maps], places, tall, wide),
            _numbered(moved[start : start + at_once]),
            pool.output_size,
            sampling_ratio=pool.sampling_ratio,
        )
        for start in range(0, len(moved), at_once)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _places(maps: list[Tensor]) -> tuple[list[tuple[int, int]], int, int]:
    """(row, column) of each map, the finest above all others, and the height and width of all."""
    places, column, below = [(0, 0)], 0, maps[0].shape[2] + _MARGIN
    for level in maps[1:]:
        places.append((below, column))
        column += level.shape[3] + _MARGIN
    tall = max(row + level.shape[2] for (row, _), level in zip(places, maps, strict=True))
    return places, tall + _MARGIN, max(column, maps[0].shape[3] + _MARGIN)


def _draw(maps: list[Tensor], places: list[tuple[int, int]], tall: int, wide: int) -> Tensor:
    number, channels = maps[0].shape[:2]
    atlas = maps[0].new_zeros((number, channels, tall, wide), dtype=torch.float32)
    for level, (row, column) in zip(maps, places, strict=True):
        below, right = row + level.shape[2], column + level.shape[3]
        atlas[:, :, row:below, column:right] = level
        atlas[:, :, below, column:right] = level[:, :, -1]
        atlas[:, :, row : below + 1, right] = atlas[:, :, row : below + 1, right - 1]
    return atlas


def _move(
    pool: MultiScaleRoIAlign,
    regions: Tensor,
    exponents: list[int],
    places: list[tuple[int, int]],
) -> Tensor:
    """Regions (N, R, 4) in pixels of the atlas."""
    steps = [
        [2.0**-exponent, column, row, column, row]
        for exponent, (row, column) in zip(exponents, places, strict=True)
    ]
    sides = regions[..., 2:] - regions[..., :2]
    scale = (sides[..., 0] * sides[..., 1]).sqrt() / pool.canonical_scale
    wanted = (pool.canonical_level + scale.log2() + 1e-6).floor()
    level = wanted.clamp(exponents[0], exponents[-1]) - exponents[0]
    step = to_device(steps, regions.device)[level.long()]
    return torch.addcmul(step[..., 1:], regions, step[..., :1])


def _numbered(regions: Tensor) -> Tensor:
    """Regions (N, R, 4) as `roi_align` reads them: (N · R, 5), the number of the picture first."""
    numbers = torch.arange(len(regions), dtype=regions.dtype, device=regions.device)
    numbers = numbers[:, None, None].expand(-1, regions.shape[1], 1)
    return torch.cat([numbers, regions], 2).flatten(0, 1)
