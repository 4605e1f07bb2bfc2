"""Guns cut out of pictures with a plain light ground, as in catalogues, set into other pictures.

Dwibedi, Misra, Hebert, "Cut, Paste and Learn", 2017. It shows guns at other sizes, in other light
and before other grounds than their own, and everyday pictures with a gun in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gun_detection.datasets.torch_dataset import ImageDataset, Target

# How many pictures are searched for guns to cut out, and how many guns are kept.
_SEARCHED, _KEPT = 2000, 200
_LONGEST = 512
_SMALLEST = 24
# From which value of its darkest channel on a pixel is plain ground; holes are stricter, as
# polished metal is light, too.
_GROUND, _EDGE, _HOLE = 232, 225, 240
_LEAST_HOLE = 0.004


@dataclass(frozen=True)
class Cutout:
    """`pixels` uint8 (H, W, 3) RGB, `mask` float32 (H, W): 1 where the gun is, 0 around it."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.float32]


def find_cutouts(dataset: ImageDataset, seed: int) -> list[Cutout]:
    """The guns of a data set that can be cut out: at most 200, of at most 2,000 pictures."""
    found: list[Cutout] = []
    for index in np.random.default_rng(seed).permutation(len(dataset))[:_SEARCHED]:
        image, target = dataset[int(index)]
        pixels = image.permute(1, 2, 0).numpy()
        cutouts = (cut_out(pixels, box) for box in target["boxes"].numpy())
        found += [cutout for cutout in cutouts if cutout is not None]
        if len(found) >= _KEPT:
            break
    return found[:_KEPT]


def cut_out(pixels: NDArray[np.uint8], box: NDArray[np.float32]) -> Cutout | None:
    """The gun in the box, where all around it is plain and light; otherwise None."""
    height, width = pixels.shape[:2]
    margin = max(2.0, 0.03 * float(max(box[2:] - box[:2])))
    left, top = (int(max(0.0, value - margin)) for value in box[:2])
    right, bottom = int(min(width, box[2] + margin)), int(min(height, box[3] + margin))
    part = np.ascontiguousarray(pixels[top:bottom, left:right])
    if min(part.shape[:2]) < _SMALLEST:
        return None
    darkest = part.min(axis=2)
    edge = np.concatenate([darkest[0], darkest[-1], darkest[:, 0], darkest[:, -1]])
    if np.percentile(edge, 15) < _EDGE:
        return None
    mask = _foreground(darkest)
    # A smear of ground or nothing but a frame is no gun.
    if not 0.2 < mask.mean() < 0.9:
        return None
    thin = cv2.erode(mask, np.ones((3, 3), np.uint8)).astype(np.float32)
    soft = cv2.GaussianBlur(thin, (3, 3), 0)
    scale = min(1.0, _LONGEST / max(part.shape[:2]))
    size = max(1, round(part.shape[1] * scale)), max(1, round(part.shape[0] * scale))
    return _cutout(*(cv2.resize(a, size, interpolation=cv2.INTER_AREA) for a in (part, soft)))


def _cutout(pixels: Any, mask: Any) -> Cutout:
    return Cutout(np.asarray(pixels, np.uint8), np.asarray(mask, np.float32))


def _foreground(darkest: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 (H, W): 1 on the largest thing that the ground, flooded from the edge, leaves."""
    ground = np.pad((darkest > _GROUND).astype(np.uint8), 1, constant_values=1)
    flooded = np.zeros((ground.shape[0] + 2, ground.shape[1] + 2), np.uint8)
    cv2.floodFill(ground, flooded, (0, 0), 2)
    things = np.asarray(ground[1:-1, 1:-1] != 2, np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(things)
    if count < 2:
        return np.zeros_like(things)
    mask: NDArray[np.uint8] = np.asarray(
        labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()), np.uint8
    )
    # The ground shows through the trigger guard.
    holes = ((darkest > _HOLE) & (mask > 0)).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(holes)
    for hole in range(1, count):
        if stats[hole, cv2.CC_STAT_AREA] > _LEAST_HOLE * mask.size:
            mask[labels == hole] = 0
    return mask


def paste(image: Tensor, target: Target, cutouts: Sequence[Cutout]) -> tuple[Tensor, Target]:
    """The picture with one of the guns somewhere beside those that it has, if there is room.

    Size, angle, side, brightness and place are random, by torch's generator.
    """
    random = np.random.default_rng(int(torch.randint(2**31, ())))
    cutout = cutouts[int(random.integers(len(cutouts)))]
    height, width = image.shape[-2:]
    turned = _turn(cutout, min(height, width), random)
    rows, columns = np.nonzero(turned.mask > 0.5)
    tall, wide = turned.mask.shape
    if len(rows) < _SMALLEST or tall >= height or wide >= width:
        return image, target
    inner = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
    boxes = target["boxes"].numpy()
    for _ in range(5):
        left, top = int(random.integers(width - wide)), int(random.integers(height - tall))
        box = inner + np.array([left, top, left, top], np.float32)
        if not _touches(box, boxes):
            break
    else:
        return image, target
    image = image.clone()
    window = image[:, top : top + tall, left : left + wide]
    ground = window.permute(1, 2, 0).numpy().astype(np.float32)
    gun = _light(turned.pixels, ground, random)
    share = turned.mask[..., None]
    blended = (ground * (1 - share) + gun * share).astype(np.uint8)
    window.copy_(torch.from_numpy(blended).permute(2, 0, 1))
    return image, target | {
        "boxes": torch.cat([target["boxes"], torch.from_numpy(box)[None]]),
        "labels": torch.cat([target["labels"], target["labels"].new_ones(1)]),
    }


def _turn(cutout: Cutout, side: int, random: np.random.Generator) -> Cutout:
    """Mirrored or not, turned and resized to a share of `side`."""
    layers: list[Any] = [cutout.pixels, cutout.mask]
    if random.random() < 0.5:
        layers = [np.ascontiguousarray(layer[:, ::-1]) for layer in layers]
    angle = random.normal(0, 25)
    height, width = cutout.mask.shape
    size = side * np.exp(random.uniform(np.log(0.15), np.log(0.7)))
    scale = size / max(height, width)
    cosine, sine = abs(np.cos(np.radians(angle))), abs(np.sin(np.radians(angle)))
    wide = int((width * cosine + height * sine) * scale) + 2
    tall = int((width * sine + height * cosine) * scale) + 2
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
    matrix[:, 2] += (wide / 2 - width / 2, tall / 2 - height / 2)
    if scale < 0.5:
        # Warping looks at four pixels only.
        layers = [cv2.blur(layer, (int(1 / scale), int(1 / scale))) for layer in layers]
    return _cutout(*(cv2.warpAffine(layer, matrix, (wide, tall)) for layer in layers))


def _light(
    pixels: NDArray[np.uint8], ground: NDArray[np.float32], random: np.random.Generator
) -> NDArray[np.float32]:
    """The gun nearer to the light of where it is put, with a random gain, tint and haze."""
    gain = random.uniform(0.5, 1.1) * random.uniform(0.9, 1.1, 3)
    gain *= np.clip((ground.mean() + 60) / 170, 0.5, 1.1)
    lit: NDArray[np.float32] = (pixels * gain + random.uniform(0, 30)).clip(0, 255)
    return lit.astype(np.float32)


def _touches(box: NDArray[np.float32], others: NDArray[np.float32]) -> bool:
    overlap = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return bool((overlap > 0).all(axis=1).any())
