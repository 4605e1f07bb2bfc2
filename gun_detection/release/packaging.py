"""Make a model version ready for an engine, and check it against the reference.

A package is accepted when its AP50 on the holdout and its recall at the threshold are at most so
much below those of the reference, and its false marks at most so much above (`MARGIN` and the
following). One that looks at few regions of a picture is tried first, then one that looks at as
many as the reference. Its files are stored before its row, and with them what the engine finds in a
few pictures, for other machines.
"""

import hashlib
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.database import open_session
from gun_detection.database.models import EnginePackage, ModelVersion
from gun_detection.datasets.cache import write_whole
from gun_detection.datasets.groups import Split
from gun_detection.datasets.manifest import Manifest, load_manifest
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.detector.architectures import ARCHITECTURES, select_device
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import REFERENCE, shape_class
from gun_detection.detector.inference import EVALUATION_FLOOR
from gun_detection.detector.running import DetectorEngine, runnable
from gun_detection.errors import ModelError
from gun_detection.evaluation.evaluate import evaluate_version, load_labelled, load_samples
from gun_detection.evaluation.matching import IOU, Matched, pairwise_iou
from gun_detection.evaluation.metrics import average_precision
from gun_detection.evaluation.samples import Samples, measure
from gun_detection.release.answers import ANSWERS, PICTURES, record
from gun_detection.release.champion import require_weights
from gun_detection.release.packages import (
    cached_file,
    detector_file,
    device_of,
    load_engine,
    package_key,
    require_runnable,
)
from gun_detection.release.registry import load_model
from gun_detection.settings import Settings
from gun_detection.storage import Storage

if TYPE_CHECKING:
    from gun_detection.detector.openvino import Networks

logger = logging.getLogger(__name__)

# How much lower the AP50 of an accepted package may be.
MARGIN = 0.005
# How much lower its recall at the threshold may be, and how many more false marks a picture may
# have; on few pictures, as much as so many of them.
RECALL_MARGIN, MARKS_MARGIN = 0.02, 0.05
_FEW = 2
# Regions of a picture that the box head looks at, where that finds as much.
FEW_PROPOSALS = 100
_CALIBRATION_PICTURES = 100
_TIMED_PICTURES = 8
_TIMED_ROUNDS = 3
# Weaker detections come and go with the last digit.
_WEAK = 0.1

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Result:
    """The columns of a package's row that the check gives."""

    accepted: bool
    reason: str
    reference_ap50: float | None = None
    ap50: float | None = None
    pictures: int = 0
    milliseconds: float | None = None
    reference_milliseconds: float | None = None
    files: dict[str, str] = field(default_factory=dict)


def package(
    version: ModelVersion,
    engine: str,
    settings: Settings,
    storage: Storage,
    progress: Progress = lambda done, total: None,
) -> EnginePackage:
    """Make the package of an engine and check it; its row replaces that of an earlier one.

    A refused package is a row with the reason, and no files. `progress` hears how many pictures of
    the holdout are done. Raises `SettingsError` for an engine that this machine cannot run.
    """
    return _Packaging(version, settings, storage, progress).make(engine)


def package_all(
    version: ModelVersion,
    settings: Settings,
    storage: Storage,
    progress: Progress = lambda done, total: None,
) -> list[EnginePackage]:
    """The packages of every engine that this machine can run, made anew."""
    packaging = _Packaging(version, settings, storage, progress)
    return [packaging.make(engine) for engine in runnable(select_device(settings.device))]


def at_threshold(pictures: Sequence[Matched], threshold: float) -> tuple[float, float]:
    """(recall, false marks a picture) of detections at or above the threshold."""
    counts = [picture.counts(threshold) for picture in pictures]
    guns = sum(len(picture.truth) for picture in pictures)
    hits, marks = (sum(column) for column in zip(*counts, strict=True))
    return hits / max(1, guns), marks / max(1, len(pictures))


class _Packaging:
    """Makes the packages of a version; what they share is made when it is first needed."""

    def __init__(
        self,
        version: ModelVersion,
        settings: Settings,
        storage: Storage,
        progress: Progress,
    ) -> None:
        require_weights(version)
        self._version, self._settings, self._storage = version, settings, storage
        self._progress = progress

    def make(self, engine: str) -> EnginePackage:
        require_runnable(engine)
        if self._version.dataset_id is None:
            reason = "it was imported without a data set: there is no holdout to check it on"
            return self._record(engine, _Result(accepted=False, reason=reason))
        networks = self._build(engine)
        own = self._model.eval().rpn.post_nms_top_n()
        # Few regions of a picture hold a gun, and the box head costs the same for each.
        for most in sorted({own, min(own, FEW_PROPOSALS)}):
            built = networks | detector_file(most)
            files = {_file_name(role, data): data for role, data in built.items()}
            for file, data in files.items():
                write_whole(cached_file(file, self._settings), data)
            paths = dict(zip(built, (cached_file(f, self._settings) for f in files), strict=True))
            loaded = self._load(engine, paths)
            result = self._check(loaded)
            if result.accepted:
                break
        if result.accepted:
            answers = self._answers(loaded)
            files[_file_name(ANSWERS, answers)] = answers
            bucket, sums = self._settings.data_bucket, {}
            for file, data in files.items():
                # Other bytes under this name are damaged ones.
                self._storage.put(bucket, package_key(self._version.id, engine, file), data)
                sums[file] = hashlib.sha256(data).hexdigest()
            result = replace(result, files=sums)
        return self._record(engine, result)

    def _build(self, engine: str) -> dict[str, bytes]:
        if device_of(engine).type == "cuda":
            return {}
        from gun_detection.detector.conversion import quantize, to_files

        precise = ARCHITECTURES[self._version.architecture].precise
        if engine != "openvino-int8":
            return to_files(self._networks, precise)
        pictures = self._pictures("train")
        chosen = np.random.default_rng(0).permutation(len(pictures))[:_CALIBRATION_PICTURES]
        networks = quantize(
            self._model,
            self._networks,
            chosen.tolist(),
            lambda index: pictures[index][0] / 255,
            precise,
        )
        return to_files(networks, precise)

    @cached_property
    def _model(self) -> FasterRCNN:
        return load_model(self._version, self._settings, self._storage)

    @cached_property
    def _networks(self) -> "Networks":
        from gun_detection.detector.conversion import convert

        return convert(self._model)

    def _pictures(self, split: Split, fit: tuple[int, int] | None = None) -> DetectionDataset:
        return DetectionDataset(self._manifest, split, self._settings, self._storage, fit=fit)

    @cached_property
    def _manifest(self) -> Manifest:
        assert self._version.dataset_id is not None
        return load_manifest(self._storage, self._settings.data_bucket, self._version.dataset_id)

    @cached_property
    def _recorded(self) -> Samples:
        """What the reference finds in the holdout, measured now where it never was."""
        assert self._version.dataset_id is not None
        evaluation = evaluate_version(
            self._version,
            self._version.dataset_id,
            self._settings,
            self._storage,
            progress=self._progress,
        )
        return load_samples(evaluation, self._settings, self._storage)

    def _load(self, engine: str, files: Mapping[str, Path]) -> DetectorEngine:
        return load_engine(
            self._version, engine, files, self._settings, self._storage, EVALUATION_FLOOR
        )

    @cached_property
    def _reference(self) -> DetectorEngine:
        return self._load(REFERENCE, {})

    def _check(self, engine: DetectorEngine) -> _Result:
        """Whether the engine finds what the reference does, and at what cost."""
        pictures = self._pictures("holdout", fit=engine.input_size)
        entries = pictures.entries
        # In batches such as scoring makes: what a picture is padded with is seen as well.
        order = sorted(
            range(len(entries)),
            key=lambda index: shape_class((entries[index].height, entries[index].width)),
        )
        try:
            samples = measure(
                engine.predictor,
                (load_labelled(pictures, index) for index in order),
                lambda done: self._progress(done, len(pictures)),
                batch=engine.batch,
            )
        except ModelError as error:
            return _Result(accepted=False, reason=error.message, pictures=len(pictures))
        recorded = [self._recorded.matched[index] for index in order]
        before = average_precision(recorded)["ap50"]
        after = average_precision(samples.matched)["ap50"]
        costs = self._costs(engine, pictures)
        if before is None or after is None:
            return _Result(
                accepted=False,
                reason="no picture of the holdout has a gun to find",
                pictures=len(pictures),
            )
        median, most = drift(
            [matched.found for matched in recorded], [matched.found for matched in samples.matched]
        )
        threshold = self._version.threshold
        recall, marks = at_threshold(recorded, threshold)
        its_recall, its_marks = at_threshold(samples.matched, threshold)
        guns = sum(len(matched.truth) for matched in recorded)
        # Average precision does not see that all scores moved together.
        same = its_recall >= recall - max(RECALL_MARGIN, _FEW / guns) and its_marks <= marks + max(
            MARKS_MARGIN, _FEW / len(pictures)
        )
        return _Result(
            accepted=after >= before - MARGIN and same,
            reason=f"AP50 is {after:.4f}, that of the reference {before:.4f}, on {len(pictures)} "
            f"pictures; at the threshold recall {its_recall:.3f} against {recall:.3f}, false marks "
            f"a picture {its_marks:.3f} against {marks:.3f}; boxes differ by {median:.2f} px, by "
            f"{most:.1f} px in one of 100",
            reference_ap50=before,
            ap50=after,
            pictures=len(pictures),
            milliseconds=costs[0],
            reference_milliseconds=costs[1],
        )

    def _answers(self, engine: DetectorEngine) -> bytes:
        """What the engine finds in the pictures of the holdout with the surest detections."""
        pictures = self._pictures("holdout", fit=engine.input_size)
        surest = sorted(
            range(len(pictures)),
            key=lambda index: -self._recorded.matched[index].found.scores.max(initial=0.0),
        )
        return record(engine, [_pixels(pictures, index) for index in surest[:PICTURES]])

    def _costs(self, engine: DetectorEngine, pictures: DetectionDataset) -> tuple[float, float]:
        """Milliseconds of a picture, by the engine and by the reference, in turns.

        Processor time on a CPU, where neighbours change how long things take.
        """
        clock = time.process_time if device_of(engine.name).type == "cpu" else time.perf_counter
        times: tuple[list[float], list[float]] = ([], [])
        some = [_pixels(pictures, index) for index in range(min(_TIMED_PICTURES, len(pictures)))]
        parts = [some[at : at + engine.batch] for at in range(0, len(some), engine.batch)]
        # The first batch pays for what the others use again.
        for part in parts * (1 if engine.batch == 1 else _TIMED_ROUNDS):
            for one, taken in zip((engine, self._reference), times, strict=True):
                start = clock()
                one(part)
                taken.append(1000 * (clock() - start) / len(part))
        return statistics.median(times[0]), statistics.median(times[1])

    def _record(self, engine: str, result: _Result) -> EnginePackage:
        values = {
            "model_id": self._version.id,
            "engine": engine,
            "toolchain": toolchain(),
            **asdict(result),
        }
        statement = insert(EnginePackage).values(**values)
        statement = statement.on_conflict_do_update(
            index_elements=["model_id", "engine"], set_=values | {"created_at": func.now()}
        )
        # In a transaction of its own: what comes of another engine takes nothing back.
        with open_session(self._settings) as session:
            row = session.scalars(statement.returning(EnginePackage)).one()
        verdict = "accepted" if result.accepted else "refused"
        logger.info("%s for %s: %s, %s", engine, self._version.id, verdict, result.reason)
        return row


def drift(before: Sequence[Detections], after: Sequence[Detections]) -> tuple[float, float]:
    """How far the sides of the same boxes lie apart, pixels: (median, 99th percentile).

    Of detections with a score of at least 0.1 in `before`, each with the one that it overlaps most.
    """
    distances = []
    for one, other in zip(before, after, strict=True):
        strong = one.above(_WEAK).boxes
        for box, overlap in zip(strong, pairwise_iou(strong, other.boxes), strict=True):
            if overlap.max(initial=0.0) >= IOU:
                distances.append(float(np.abs(box - other.boxes[overlap.argmax()]).max()))
    median, most = np.quantile(distances or [0.0], [0.5, 0.99])
    return float(median), float(most)


def _pixels(pictures: DetectionDataset, index: int) -> NDArray[np.uint8]:
    """A picture as engines are given it, uint8 (H, W, 3) RGB."""
    pixels: NDArray[np.uint8] = pictures[index][0].permute(1, 2, 0).numpy()
    return pixels


def toolchain() -> str:
    """What a package was made with and on."""
    parts = [f"{name} {version_of(name)}" for name in ("torch", "openvino", "nncf")]
    parts.append(torch.backends.cpu.get_cpu_capability())
    if torch.cuda.is_available():
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        parts += [torch.cuda.get_device_name(), f"cuDNN {cudnn}"]
    return ", ".join(parts)


def _file_name(role: str, data: bytes) -> str:
    """`trunk-<sha256>.bin` for the role `trunk.bin`."""
    path = Path(role)
    return f"{path.stem}-{hashlib.sha256(data).hexdigest()}{path.suffix}"
