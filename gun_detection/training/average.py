"""The moving average of weights, which is validated and kept instead of the weights of a step.

Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
"""

import torch
from torch import Tensor, nn


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """What an average begins with."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def blend(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the model after a step, in place; counters are taken over.

    The decay is lower at first, so that the random start is soon forgotten.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor.to(average[name].dtype), weight)
        else:
            average[name].copy_(tensor)
