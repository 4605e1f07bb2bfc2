"""Weights in and out: safetensors with a sha256; nothing is ever unpickled unsafely."""

import hashlib
import io
import json
import pickle
import zipfile
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.architectures import (
    ARCHITECTURES,
    DetectorConfig,
    build_detector,
    fold_batch_norm,
)
from gun_detection.errors import ModelError, NotFoundError
from gun_detection.storage import Storage, parse_s3_uri

# Initial weights that are no file or object.
NAMED_WEIGHTS = ("none", "coco", "imagenet")
_PREDICTOR = "roi_heads.box_predictor."


def serialize(model: FasterRCNN, config: DetectorConfig) -> tuple[bytes, str]:
    """(safetensors file, its sha256); equal weights give equal bytes."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    data = save(tensors, metadata={"detector": config.model_dump_json()})
    return data, hashlib.sha256(data).hexdigest()


def deserialize(data: bytes, config: DetectorConfig, *, sha256: str | None = None) -> FasterRCNN:
    """The detector of a safetensors file, in evaluation mode on the CPU.

    Raises `ModelError` when the bytes are not the recorded ones or do not fit the architecture.
    """
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ModelError(
            "the weights are not the recorded ones (sha256 differs): restore them from a backup",
            reason="SHA256_MISMATCH",
        )
    model = build_detector(config)
    try:
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"the weights do not fit {config.architecture}: {_first_line(error)}"
        ) from error
    return model.eval()


def config_of(data: bytes) -> DetectorConfig | None:
    """The detector configuration that `serialize` wrote into a safetensors file, if it did."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        text = header.get("__metadata__", {}).get("detector")
        return DetectorConfig.model_validate_json(text) if text else None
    except (ValueError, AttributeError) as error:
        raise ModelError(f"this is not a safetensors file ({_first_line(error)})") from error


def initialize(
    model: FasterRCNN,
    config: DetectorConfig,
    source: str,
    storage: Storage | None,
    *,
    sha256: str | None = None,
) -> int:
    """Load initial weights in place; the number of tensors taken.

    `source` is `none`, `coco`, `imagenet`, or the path or S3 URI of a detector's or a backbone's
    weights (`.safetensors`, or a `.pth` state dict read with `weights_only=True`), which have to be
    those with this `sha256` if one is given.
    Raises `ModelError` or `NotFoundError`, saying what to set instead.
    """
    if source == "none":
        return 0
    if source in NAMED_WEIGHTS:
        state = _download(config, source)
    else:
        data = read_weights(source, storage)
        if sha256 not in (None, hashlib.sha256(data).hexdigest()):
            raise ModelError(
                f"{source} holds other weights than those that this training is to begin with "
                "(sha256 differs): put them back, or start the training anew",
                reason="SHA256_MISMATCH",
            )
        state = read_state_dict(data, source)
    if config.norm != "folded" or not _has_batch_norm(state):
        return _load_matching(model, config, state, source)
    # Pretrained weights have their batch norm still: it is folded once they are loaded.
    unfolded = config.model_copy(update={"norm": "frozen"})
    twin = build_detector(unfolded)
    twin.load_state_dict(model.state_dict(), strict=False)
    taken = _load_matching(twin, unfolded, state, source)
    fold_batch_norm(twin.backbone.body)
    model.load_state_dict(twin.state_dict())
    return taken


def _has_batch_norm(state: dict[str, Tensor]) -> bool:
    return any(name.endswith("running_mean") for name in state)


def read_state_dict(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a `.pth` state dict, never running its code."""
    try:
        if name.endswith(".safetensors"):
            return dict(load(data))
        return _unpickle(data)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"{name} is not a plain weights file ({_first_line(error)}): "
            "save the state dict alone, or convert it to safetensors"
        ) from error


def _unpickle(data: bytes) -> dict[str, Tensor]:
    # Older formats than the zip are read by a more forgiving, less predictable parser.
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise RuntimeError("it was not written by torch.save")
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise RuntimeError("it holds something else than tensors by name")
    return {str(name): tensor for name, tensor in content.items()}


def read_weights(source: str, storage: Storage | None) -> bytes:
    """The bytes of the file or object; raises `NotFoundError` if there is none."""
    if source.startswith("s3://"):
        if storage is None:
            raise ModelError(f"{source} needs an S3 client")
        return storage.get(*parse_s3_uri(source))
    path = Path(source)
    if not path.is_file():
        raise NotFoundError(
            f"no weights at {source!r}: "
            "set initial weights to coco, imagenet, none, a file or an S3 URI"
        )
    return path.read_bytes()


def load_detector(
    model: FasterRCNN, config: DetectorConfig, state: dict[str, Tensor], name: str
) -> None:
    """Load a whole detector's state dict in place; raises `ModelError` when anything is missing.

    Statistics that only training needs may be missing or left over.
    """
    own = set(model.state_dict())
    counters = {key for key in own | set(state) if key.endswith("num_batches_tracked")}
    missing, unknown = own - set(state) - counters, set(state) - own - counters
    if missing or unknown:
        example = min(missing or unknown)
        raise ModelError(
            f"{name} does not hold a {config.architecture}: {len(missing)} tensors are missing and "
            f"{len(unknown)} are unknown, for example {example}; name the right architecture"
        )
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{name} does not fit {config.architecture}: {_first_line(error)}"
        ) from error


def _download(config: DetectorConfig, source: str) -> dict[str, Tensor]:
    entry = getattr(ARCHITECTURES[config.architecture], source)
    if entry is None:
        raise ModelError(
            f"there are no {source} weights for {config.architecture}: "
            "set GUN_DETECTION_INITIAL_WEIGHTS to none, a file or an S3 URI"
        )
    try:
        state: dict[str, Tensor] = entry.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ModelError(
            f"the {source} weights of {config.architecture} cannot be downloaded "
            f"({_first_line(error)}): fetch {entry.url.rsplit('/', 1)[-1]} elsewhere and set "
            "GUN_DETECTION_INITIAL_WEIGHTS to its path or S3 URI, or to none",
            reason="WEIGHTS_UNAVAILABLE",
        ) from error
    return state


def _load_matching(
    model: FasterRCNN, config: DetectorConfig, state: dict[str, Tensor], source: str
) -> int:
    """Load a detector's or a classifier's state dict into the parts of `model` that it fits."""
    if not any(name.startswith("backbone.") for name in state):
        state = _as_backbone(config, state)
    own = model.state_dict()
    # Other classes than ours (COCO has 91) end in another predictor, which is learned anew.
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if name in own and (tensor.shape == own[name].shape or not name.startswith(_PREDICTOR))
    }
    body = [name for name in own if name.startswith("backbone.body.")]
    missing = [n for n in body if n not in fitting and not n.endswith("num_batches_tracked")]
    if missing:
        raise ModelError(
            f"the weights in {source} are not for {config.architecture}: {len(missing)} of its "
            f"backbone's {len(body)} tensors are missing, for example {missing[0]}"
        )
    try:
        model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"the weights in {source} do not fit {config.architecture}: {_first_line(error)}"
        ) from error
    return len(fitting)


def _as_backbone(config: DetectorConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = ARCHITECTURES[config.architecture].classifier_prefix
    return {
        "backbone.body." + name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        (lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0])[:200]
        if lines
        else "empty"
    )
