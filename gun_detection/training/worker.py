"""The part of a training that may run in several processes.

`torchrun … -m gun_detection.training.worker FOLDER` reads `job.json` there, writes progress as JSON
lines to standard output, and leaves `best.safetensors` and `state.json`, or reports its error.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gun_detection.children import relay_logs, report_error, report_progress
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.detector.architectures import build_detector, input_size, select_device
from gun_detection.detector.weights import initialize
from gun_detection.errors import DatasetError, GunDetectionError
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage
from gun_detection.training import distributed
from gun_detection.training.checkpoints import Checkpoints
from gun_detection.training.config import TrainingConfig
from gun_detection.training.loop import Data, Progress, State, Training
from gun_detection.training.order import plan_order

logger = logging.getLogger(__name__)

# Crops enlarge: more pixels are kept than the network takes in.
_SPARE = 1.5
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Job:
    """What is trained on what; `name` is that of its checkpoints and of its TensorBoard run."""

    dataset_id: str
    config: TrainingConfig
    name: str


def run(
    job: Job,
    settings: Settings,
    storage: Storage,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[dict[str, Tensor], State]:
    """The best weights and the state at the end; goes on from a checkpoint where there is one.

    Raises `TrainingError`, `DatasetError`, `ModelError` or `NotFoundError`.
    """
    config = job.config
    data = open_data(job.dataset_id, config, settings, storage)
    device = select_device(settings.device)
    torch.manual_seed(config.seed)
    model = build_detector(config.detector)
    sha256 = config.initial_weights_sha256
    initialize(model, config.detector, config.initial_weights, storage, sha256=sha256)
    training = Training(
        model,
        config,
        data,
        device,
        settings.tensorboard_dir / job.name,
        Checkpoints(storage, settings.data_bucket, job.name),
        workers=_workers(settings, device),
        on_progress=on_progress,
    )
    logger.info(
        "training %s on %s in %d processes: %d pictures, %d steps",
        job.name,
        device,
        distributed.size(),
        len(data.train),
        training.steps,
    )
    return training.run(), training.state


def open_data(
    dataset_id: str, config: TrainingConfig, settings: Settings, storage: Storage
) -> Data:
    """The pictures of a data set version; raises `DatasetError` when a split has no gun."""
    manifest = load_manifest(storage, settings.data_bucket, dataset_id)
    fit = input_size(config.detector)
    train = DetectionDataset(
        manifest,
        "train",
        settings,
        storage,
        side=round(fit[1] * max(config.augmentation.scales) * _SPARE),
    )
    # As scoring will decode them.
    validation = DetectionDataset(manifest, "validation", settings, storage, fit=fit)
    for split in (train, validation):
        if not any(entry.boxes for entry in split.entries):
            raise DatasetError(
                f"data set {dataset_id[:12]} has {len(train)} pictures to train on and "
                f"{len(validation)} to validate with, and guns are not in both: ingest more",
                reason="EMPTY_SPLIT",
            )
    names = [entry.sha256 for entry in train.entries]
    return Data(train, validation, plan_order(train.entries, config), names)


def _workers(settings: Settings, device: torch.device) -> int:
    """Processes that read pictures; on a CPU the training itself wants every core."""
    if settings.training_workers is not None:
        return settings.training_workers
    if device.type == "cpu":
        return 0
    return min(_MOST_WORKERS, (os.cpu_count() or 1) // distributed.size())


def main(folder: Path) -> None:
    """One of the processes that `torchrun` started."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    settings = load_settings()
    content = json.loads((folder / "job.json").read_text())
    job = Job(
        content["dataset_id"], TrainingConfig.model_validate(content["config"]), content["name"]
    )
    try:
        distributed.start(select_device(settings.device).type)
        if distributed.rank() == 0:
            relay_logs()
        best, state = run(job, settings, Storage(settings), _print_progress)
        if distributed.rank() == 0:
            save_file(best, folder / "best.safetensors")
            (folder / "state.json").write_text(json.dumps(asdict(state)))
        distributed.stop()
    except GunDetectionError as error:
        report_error(error)
        raise


def _print_progress(progress: Progress) -> None:
    if distributed.rank() == 0:
        report_progress(**asdict(progress))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
