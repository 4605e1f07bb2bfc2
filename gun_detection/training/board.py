"""What TensorBoard shows of a training: curves, pictures over the epochs, recipe and result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from gun_detection.datasets.torch_dataset import ImageDataset
from gun_detection.detector.detections import Detections
from gun_detection.evaluation.matching import Boxes, match_all
from gun_detection.images import draw_boxes
from gun_detection.training import distributed
from gun_detection.training.config import TrainingConfig

_PICTURES = 4
_SHOWN_FROM = 0.3
_CURVE_POINTS = 101


class Board:
    """Writes the events of one training; only the first process does, the others write nothing."""

    def __init__(self, folder: Path, step: int) -> None:
        # Events after the checkpoint that is gone on from would stand there twice.
        self._writer = (
            SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
            if distributed.rank() == 0
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def recipe(self, config: TrainingConfig) -> None:
        if self._writer is not None:
            self._writer.add_text("recipe", f"```json\n{config.model_dump_json(indent=2)}\n```")

    def step(self, step: int, losses: dict[str, float], speed: dict[str, float]) -> None:
        if self._writer is None:
            return
        for name, value in losses.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        for name, value in speed.items():
            self._writer.add_scalar(f"progress/{name}", value, step)

    def validation(
        self,
        step: int,
        row: dict[str, float],
        pictures: ImageDataset,
        truths: Sequence[Boxes],
        found: Sequence[Detections],
    ) -> None:
        """The numbers of a validation, its precision-recall curve and what some pictures gave."""
        if self._writer is None:
            return
        for name, value in row.items():
            if name.startswith("validation_"):
                self._writer.add_scalar(
                    f"validation/{name.removeprefix('validation_')}", value, step
                )
        self._precision_recall(step, truths, found)
        for index in range(min(_PICTURES, len(pictures))):
            image, _ = pictures[index]
            shown = found[index].above(_SHOWN_FROM)
            drawn = draw_boxes(
                image.permute(1, 2, 0).numpy(), shown.boxes, shown.scores, _SHOWN_FROM
            )
            self._writer.add_image(f"validation/{index}", drawn, step, dataformats="HWC")
        self._writer.flush()

    def _precision_recall(
        self, step: int, truths: Sequence[Boxes], found: Sequence[Detections]
    ) -> None:
        assert self._writer is not None
        matched = match_all(truths, found)
        total = sum(len(truth) for truth in truths)
        if not total:
            return
        scores = np.concatenate([picture.found.scores for picture in matched])
        correct = np.concatenate([picture.correct for picture in matched])
        cuts = np.linspace(0, 1, _CURVE_POINTS)
        true = np.array([(correct & (scores >= cut)).sum() for cut in cuts])
        false = np.array([(~correct & (scores >= cut)).sum() for cut in cuts])
        marked = np.maximum(true + false, 1)
        zeros = np.zeros_like(true)
        self._writer.add_pr_curve_raw(
            "validation/precision_recall",
            true,
            false,
            zeros,
            total - true,
            true / marked,
            true / total,
            step,
            num_thresholds=_CURVE_POINTS,
        )

    def result(
        self, config: TrainingConfig, history: Sequence[dict[str, float]], best_epoch: int
    ) -> None:
        """The recipe beside what it reached, for the comparison of trainings."""
        if self._writer is None or not history:
            return
        best = next(row for row in history if row["epoch"] == best_epoch)
        flat = {
            name: value if isinstance(value, str | int | float) else str(value)
            for name, value in config.model_dump(mode="json").items()
        }
        reached = {
            "result/validation_ap50": best["validation_ap50"],
            "result/validation_loss": best["validation_loss"],
        }
        self._writer.add_hparams(flat, reached, run_name=".")
