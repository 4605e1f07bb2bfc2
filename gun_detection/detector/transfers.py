"""Between the computer's memory and a GPU's, without keeping either waiting.

PyTorch's plain ways (`torch.tensor(..., device="cuda")`, an index given as a list) wait until the
GPU has done all that it was asked for before, which then has nothing to do until it is asked again.
"""

import torch
from torch import Tensor


def to_device(values: list[list[float]], device: torch.device) -> Tensor:
    """A table of numbers (rows, columns) as float32."""
    # What is never swapped out a GPU fetches on its own.
    table = torch.tensor(values, dtype=torch.float32, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """On the CPU; until it is there this thread sleeps, where PyTorch's would keep a core busy."""
    if tensor.is_cuda:
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        ready.record()
        ready.synchronize()
    return tensor.cpu()
