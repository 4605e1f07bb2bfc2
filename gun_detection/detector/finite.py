"""Whether what a model computes for a picture are numbers.

Where they are none, torchvision leaves them out as it does weak scores and boxes without area: a
picture that nobody has looked at would be one without a gun.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gun_detection.errors import ImageError

# Of each thread the list that its sums go to; many look with the same model.
_THREADS = threading.local()


@contextmanager
def listening() -> Iterator[list[Tensor]]:
    """Sums of what the heads say meanwhile in this thread, which are numbers if all of it is."""
    sums: list[Tensor] = []
    _THREADS.sums = sums
    try:
        yield sums
    finally:
        _THREADS.sums = None


def hear(*said: Tensor) -> None:
    """Add up what is said, where this thread listens.

    In one step for each, also where there is nothing, and never waits for a GPU. In float32 no
    numbers that a head may say add up to what is none.
    """
    sums = getattr(_THREADS, "sums", None)
    if sums is not None:
        sums.extend(values.sum(dtype=torch.float32) for values in said)


def hear_head(head: nn.Module) -> None:
    """Have what a head of torchvision says of boxes be heard; once, however often it is asked for.

    It stays so: who does not listen pays nothing.
    """
    if _hear_output not in head._forward_hooks.values():
        head.register_forward_hook(_hear_output)


def _hear_output(_: nn.Module, __: object, said: Sequence[Tensor | list[Tensor]]) -> None:
    for some in said:
        hear(*(some if isinstance(some, list) else [some]))


def not_finite(pictures: Sequence[Tensor]) -> ImageError:
    """The error for pictures (3, H, W) for which a model computes what is no number."""
    sizes = ", ".join(f"{picture.shape[2]}x{picture.shape[1]}" for picture in pictures)
    return ImageError(
        f"the model computes what is no number for pictures of {sizes} pixels: see whether it does "
        "so for others, as a damaged model would",
        reason="NOT_FINITE",
    )
