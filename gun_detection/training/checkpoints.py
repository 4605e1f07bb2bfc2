"""The whole state of a training, to go on from after a crash.

A checkpoint is one safetensors file: the tensors, and as metadata the rest as JSON. Nothing in it
can run code. No random states are in it: they follow from the step (see `seeds`).
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gun_detection.errors import NotFoundError
from gun_detection.storage import Storage

logger = logging.getLogger(__name__)

# The one that is being written may be cut off, the one before it is whole.
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by name, `state` as JSON types; `state["step"]` is how many steps are done."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training in a bucket, under `checkpoints/<name>/`."""

    def __init__(self, storage: Storage, bucket: str, name: str) -> None:
        self._storage = storage
        self._bucket = bucket
        self._prefix = f"checkpoints/{name}/"

    def save(self, checkpoint: Checkpoint) -> None:
        """Store one, whole or not at all, and delete all but the last two."""
        step = int(checkpoint.state["step"])
        data = save(checkpoint.tensors, metadata={"state": json.dumps(checkpoint.state)})
        self._storage.put(self._bucket, f"{self._prefix}{step:09d}.safetensors", data)
        for key in self._keys()[_KEPT:]:
            self._storage.delete(self._bucket, key)
        logger.info("checkpoint at step %d, %.1f MB", step, len(data) / 1e6)

    def load(self) -> Checkpoint | None:
        """The last one that can be read, or None."""
        for key in self._keys():
            try:
                data = self._storage.get(self._bucket, key)
                return _read(data)
            except (SafetensorError, ValueError, KeyError, NotFoundError) as error:
                logger.warning(
                    "checkpoint %s cannot be read (%s): trying the one before", key, error
                )
        return None

    def delete(self) -> None:
        """Delete all of them."""
        for key in self._keys():
            self._storage.delete(self._bucket, key)

    def _keys(self) -> list[str]:
        """Newest first."""
        found = self._storage.list_objects(self._bucket, self._prefix)
        return sorted((item.key for item in found), reverse=True)


def _read(data: bytes) -> Checkpoint:
    tensors = load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return Checkpoint(tensors, json.loads(metadata["state"]))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each parameter, by `index/name`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": tensor if isinstance(tensor, Tensor) else torch.tensor(tensor)
        for index, values in state.items()
        for name, tensor in values.items()
        if tensor is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser back what `optimizer_tensors` took from it."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
