"""Several processes that train one model: `torchrun` starts them, DDP averages their gradients.

In a single process every function is the trivial one.
"""

import os
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

_T = TypeVar("_T")
# Others wait this long for the first process to validate.
_PATIENCE = timedelta(hours=2)


def start(device: str) -> None:
    """Join the processes that `torchrun` started."""
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def stop() -> None:
    distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        distributed.barrier()


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean over the processes, the same in each."""
    if size() == 1:
        return values
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(numbers)
    return dict(zip(values, (numbers / size()).tolist(), strict=True))


def from_first(value: _T) -> _T:
    """What the first process has."""
    if size() == 1:
        return value
    box: list[_T] = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
