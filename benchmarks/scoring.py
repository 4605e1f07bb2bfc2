"""The usual loop over a bucket against ours: the same pictures and weights, from objects to rows.

    python benchmarks/scoring.py --data DIR [--weights FILE] [--large-weights FILE] [--pictures N]
        [--repeat N] [--jobs N] [--sizes N ...] [--engines NAME ...] [--night N] [--out DIR]

DIR holds `pistols/` and `negatives/` (Images/N.jpeg, Labels/N.txt), FILE is what
`benchmarks/accuracy.py` trained on three quarters of them; the other quarter is scored here. The
usual loop is the one of tutorials: boto3, PIL, ToTensor, torchvision's detector on one picture at
a time, one INSERT for each box. Ours is `gun-detection score`. Each is a process of its own with
an empty database. A ResNet-50 without `--large-weights` has random ones, which show its cost alone;
it is measured on N pictures. Without `--weights` it is all that is measured.

Prints, of each side, pictures/s and CPU seconds of a picture after the first, and those of a run
over one picture apart; the largest memory of all its processes; AP50 of the rows. In the end the
chosen network scores the pictures of a whole night, its start included. Leaves in `--out`
`scoring.json`, which grows with every row, and a plot of AP50 against cost.

Where there is a GPU, both sides use it, of several the first, and the share of the time in which it
computes is printed, as its driver counts: from when every shard has a tenth of its outcomes until
the first shard ends, and, as `whole`, from its first operation to its last. Ours is so fast there
that it needs `--repeat` to have enough to do: every picture so many times, each with bytes of its
own, and a 25th of that for the usual loop.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
from PIL import Image
from sqlalchemy import NullPool, create_engine, text
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import to_tensor
from usage import Span, Used, check, measure, use_one_gpu

from embedded.servers import Servers, make_bucket, temporary_servers
from gun_detection import stages
from gun_detection.database import open_session, upgrade
from gun_detection.database.models import EnginePackage
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.torch_dataset import DetectionDataset
from gun_detection.detector.architectures import (
    ARCHITECTURES,
    DetectorConfig,
    build_detector,
    select_device,
)
from gun_detection.detector.detections import Detections
from gun_detection.detector.engines import CPU_ENGINES, GPU_ENGINES, REFERENCE
from gun_detection.detector.running import runnable
from gun_detection.detector.weights import config_of, deserialize
from gun_detection.evaluation.matching import Boxes, match_all
from gun_detection.evaluation.metrics import average_precision
from gun_detection.release.champion import promote
from gun_detection.release.packages import detector_file, package_key
from gun_detection.release.packaging import FEW_PROPOSALS, MARGIN, toolchain
from gun_detection.release.registry import NewModel, publish
from gun_detection.settings import Settings, load_settings
from gun_detection.storage import Storage

USUAL = "usual loop"
# Of AP50, below the best: what the plot leaves out.
FAR_LESS = 0.12
SMALL, LARGE = "mobilenet_v2_fpn", "resnet50_fpn"
# What users of torchvision's large detector resize to.
LARGE_SIZE = 800
CALIBRATION = 100
_OWN = ARCHITECTURES[SMALL].min_size


@dataclass(frozen=True)
class Picture:
    key: str
    data: bytes
    truth: Boxes


@dataclass(frozen=True)
class Measured:
    """A side's figures; `start` is a run over one picture."""

    architecture: str
    size: int
    mirrored: bool
    engine: str
    pictures: int
    start: Used
    whole: Used
    ap50: float | None

    @property
    def cpu(self) -> float:
        """CPU seconds of a picture after the first."""
        return (self.whole.cpu - self.start.cpu) / (self.pictures - 1)

    @property
    def seconds(self) -> float:
        """Seconds by the clock of a picture after the first."""
        return (self.whole.seconds - self.start.seconds) / (self.pictures - 1)


def main() -> None:
    if sys.argv[1:2] == ["--usual-loop"]:
        usual_loop(Path(sys.argv[2]))
        return
    check()
    use_one_gpu()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help=f"of a {SMALL}")
    parser.add_argument("--large-weights", type=Path, help=f"of a {LARGE}")
    parser.add_argument("--pictures", type=int, default=60, help="for the ResNet-50")
    parser.add_argument("--repeat", type=int, default=1, help="how often we score each picture")
    parser.add_argument("--jobs", type=int, default=1, help="shards that we score at the same time")
    parser.add_argument("--limit", type=int, help="of the pictures that were held back")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 320, 512, LARGE_SIZE])
    parser.add_argument("--engines", nargs="+", default=list(runnable(select_device("auto"))))
    parser.add_argument("--night", type=int, default=2000, help="pictures of the last run")
    parser.add_argument("--out", type=Path, default=Path("build/scoring"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with temporary_servers() as servers, tempfile.TemporaryDirectory() as name:
        comparison = Comparison(servers, Path(name), arguments)
        rows = comparison.rows()
        chosen = choose(rows) if arguments.weights else None
        night = comparison.night(chosen, arguments.night) if chosen else None
    summarize(rows)
    if chosen and night:
        compare_with_large(rows, chosen, night, arguments.night)
        plot(rows, arguments.out / "scoring.png")


class Comparison:
    """Both sides' servers, pictures and detectors."""

    def __init__(self, servers: Servers, folder: Path, arguments: argparse.Namespace) -> None:
        self._servers, self._folder, self._arguments = servers, folder, arguments
        self._number = 0
        self._measured: list[Measured] = []
        os.environ["GUN_DETECTION_SCORING_TASKS"] = str(arguments.jobs)
        os.environ["GUN_DETECTION_HOME"] = str(folder / "home")
        # The same split as where the weights were trained.
        os.environ["GUN_DETECTION_VALIDATION_SHARE"] = "0.1"
        os.environ["GUN_DETECTION_HOLDOUT_SHARE"] = "0.25"
        settings = self._settings()
        source = folder / "source"
        for part in ("pistols", "negatives"):
            shutil.copytree(arguments.data / part, source / part)
        dataset = stages.ingest(str(source), settings)["dataset_id"]
        storage = Storage(settings)
        manifest = load_manifest(storage, settings.data_bucket, dataset)
        held = DetectionDataset(manifest, "holdout", settings, storage)
        self._pictures = [
            Picture(f"{index:05d}{Path(entry.name).suffix}", held.read(index), entry.box_array())
            for index, entry in enumerate(held.entries)
        ][: arguments.limit]
        self._training = DetectionDataset(manifest, "train", settings, storage)

    def rows(self) -> list[Measured]:
        few = max(1, len(self._pictures) // self._arguments.pictures)
        large, weights = DetectorConfig(architecture=LARGE), self._arguments.large_weights
        torch.manual_seed(0)
        if weights:
            large = config_of(weights.read_bytes()) or large
        model = deserialize(weights.read_bytes(), large) if weights else build_detector(large)
        rows = self._sides(
            model.eval(),
            large,
            [USUAL, *self._arguments.engines],
            self._pictures[::few][: self._arguments.pictures],
            trained=weights is not None,
        )
        if not self._arguments.weights:
            return rows
        for size in (None, *self._arguments.sizes):
            engines = list(self._arguments.engines)
            if size is None:
                engines = [USUAL, REFERENCE, *engines]
            elif size == LARGE_SIZE:
                engines = [USUAL, *engines]
            config, model = self._small(size, mirrored=False)
            rows += self._sides(model, config, engines, self._pictures, trained=True)
        config, model = self._small(None, mirrored=True)
        engines = [REFERENCE, *self._arguments.engines]
        return rows + self._sides(model, config, engines, self._pictures, trained=True)

    def _sides(
        self,
        model: FasterRCNN,
        config: DetectorConfig,
        engines: Sequence[str],
        pictures: Sequence[Picture],
        *,
        trained: bool,
    ) -> list[Measured]:
        files = self._packages(model, config, engines, trained=trained)
        truths = [picture.truth for picture in pictures]
        rows = []
        for engine in engines:
            run = partial(self._run, model, config, engine, files.get(engine))
            many = list(self._copies(pictures, engine))
            start, _ = run(pictures[:1])
            whole, found = run(many)
            detections = [found.get(picture.key, _NOTHING) for picture in pictures]
            ap50 = average_precision(match_all(truths, detections))["ap50"] if trained else None
            row = Measured(
                architecture=config.architecture,
                size=config.min_size or ARCHITECTURES[config.architecture].min_size,
                mirrored=config.mirrored,
                engine=engine,
                pictures=len(many),
                start=start,
                whole=whole,
                ap50=ap50,
            )
            self._note(row)
            rows.append(row)
        return rows

    def _note(self, row: Measured) -> None:
        """Show and store it at once: the next ones take long, and may fail."""
        show(row)
        self._measured.append(row)
        document = json.dumps([asdict(one) for one in self._measured], indent=2)
        (self._arguments.out / "scoring.json").write_text(document)

    def night(self, chosen: Measured, count: int) -> Used:
        """What a run of the chosen network over so many pictures takes, all told."""
        config, model = self._small(None if chosen.size == _OWN else chosen.size, chosen.mirrored)
        files = self._packages(model, config, [chosen.engine], trained=True)
        pictures = list(islice(_distinct(cycle(self._pictures)), count))
        used, _ = self._run(model, config, chosen.engine, files.get(chosen.engine), pictures)
        return used

    def _copies(self, pictures: Sequence[Picture], engine: str) -> Iterator[Picture]:
        times = self._arguments.repeat
        times = max(1, times // 25) if engine == USUAL else times
        yield from pictures
        yield from _distinct(islice(cycle(pictures), (times - 1) * len(pictures)))

    def _small(self, size: int | None, mirrored: bool) -> tuple[DetectorConfig, FasterRCNN]:
        config = DetectorConfig(
            architecture=SMALL, norm="folded", mirrored=mirrored, **_input_sides(size)
        )
        return config, deserialize(self._arguments.weights.read_bytes(), config).eval()

    def _packages(
        self, model: FasterRCNN, config: DetectorConfig, engines: Sequence[str], *, trained: bool
    ) -> dict[str, dict[str, bytes]]:
        """The files of each engine's package; the reference has none."""
        # Whether few proposals find as much, random weights do not tell.
        most = model.rpn.post_nms_top_n()
        own = detector_file(min(most, FEW_PROPOSALS) if trained else most)
        files = {name: own for name in engines if name in GPU_ENGINES}
        if not set(engines) & set(CPU_ENGINES):
            return files
        from gun_detection.detector.conversion import convert, quantize, to_files

        precise = ARCHITECTURES[config.architecture].precise
        networks = convert(deepcopy(model))
        for engine in engines:
            if engine == "openvino-int8":
                # What is fitted to random weights does not matter.
                count = CALIBRATION if trained else 4
                chosen = np.random.default_rng(0).permutation(len(self._training))[:count]
                eight = quantize(
                    deepcopy(model),
                    networks,
                    chosen.tolist(),
                    lambda index: self._training[index][0] / 255,
                    precise,
                )
                files[engine] = to_files(eight, precise) | own
            elif engine in CPU_ENGINES:
                files[engine] = to_files(networks, precise) | own
        return files

    def _settings(self) -> Settings:
        """Those of a database and an uploads bucket that nobody has used."""
        self._number += 1
        name = f"side{self._number}"
        server = create_engine(self._servers.postgres.url("postgres"), poolclass=NullPool)
        with server.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        os.environ |= self._servers.variables(name, "data", f"uploads-{name}")
        settings = load_settings()
        for bucket in (settings.data_bucket, settings.uploads_bucket):
            make_bucket(Storage(settings), bucket)
        upgrade(settings)
        return settings

    def _run(
        self,
        model: FasterRCNN,
        config: DetectorConfig,
        engine: str,
        files: dict[str, bytes] | None,
        pictures: Sequence[Picture],
    ) -> tuple[Used, dict[str, Detections]]:
        """What a side used for these pictures, and the rows that it left, by key."""
        if torch.cuda.is_available():
            # As many shards as are scored at the same time: processes that start once.
            os.environ["GUN_DETECTION_SHARD_IMAGES"] = str(len(pictures))
            os.environ["GUN_DETECTION_SHARD_MB"] = "1000000"
        settings = self._settings()
        storage = Storage(settings)
        with ThreadPoolExecutor(16) as pool:
            put = partial(storage.put, settings.uploads_bucket)
            list(pool.map(lambda picture: put(picture.key, picture.data), pictures))
        if engine == USUAL:
            return self._usual(model, settings)
        used, found = self._ours(model, config, engine, files, settings)
        with open_session(settings) as session:
            statement = "SELECT COUNT(*) FROM ledger WHERE outcome = 'scored' AND engine = :engine"
            scored = session.scalar(text(statement), {"engine": engine})
        assert scored == len(pictures), f"{scored} of {len(pictures)} were scored"
        return used, found

    def _usual(self, model: FasterRCNN, settings: Settings) -> tuple[Used, dict[str, Detections]]:
        theirs = deepcopy(model)
        pool = theirs.roi_heads.box_roi_pool
        theirs.roi_heads.box_roi_pool = MultiScaleRoIAlign(
            pool.featmap_names, pool.output_size, pool.sampling_ratio
        )
        theirs.roi_heads.score_thresh = settings.score_floor
        file = self._folder / "usual.pt"
        torch.save(theirs, file)
        with open_session(settings) as session:
            session.execute(text(_TABLE))
        command = [sys.executable, __file__, "--usual-loop", str(file)]
        used = measure(command, partial(_spans, settings, _OF_LOOP))
        with open_session(settings) as session:
            statement = "SELECT key, x1, y1, x2, y2, score FROM found ORDER BY score DESC"
            return used, _by_key(session.execute(text(statement)).all())

    def _ours(
        self,
        model: FasterRCNN,
        config: DetectorConfig,
        engine: str,
        files: dict[str, bytes] | None,
        settings: Settings,
    ) -> tuple[Used, dict[str, Detections]]:
        name = _publish(model, config, engine, files, settings)
        os.environ["GUN_DETECTION_ENGINE"] = engine
        program = "from gun_detection.cli import main; main()"
        options = ["--model", name, "--jobs", str(self._arguments.jobs), "--yes", "--json"]
        command = [sys.executable, "-c", program, "score", *options]
        used = measure(command, partial(_spans, settings, _OF_SHARDS))
        statement = """
            SELECT u.key, d.x1, d.y1, d.x2, d.y2, d.score
            FROM upload u JOIN ledger l ON l.upload_id = u.id JOIN detection d ON d.ledger_id = l.id
            ORDER BY d.score DESC
        """
        with open_session(settings) as session:
            return used, _by_key(session.execute(text(statement)).all())


# Of the moments that rows were written at.
_SPAN = """
    extract(epoch FROM percentile_disc(0.1) WITHIN GROUP (ORDER BY w.created_at))::float8,
    extract(epoch FROM max(w.created_at))::float8
"""
_OF_SHARDS = f"""
    SELECT {_SPAN} FROM shard s CROSS JOIN unnest(s.upload_ids) u (id)
    JOIN ledger w ON w.upload_id = u.id GROUP BY s.id
"""
_OF_LOOP = f"SELECT {_SPAN} FROM found w HAVING count(*) > 0"


def _spans(settings: Settings, statement: str) -> list[Span]:
    with open_session(settings) as session:
        return [(tenth, end) for tenth, end in session.execute(text(statement))]


_NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
_TABLE = """
    CREATE TABLE found (
        key text, x1 float4, y1 float4, x2 float4, y2 float4, score float4,
        created_at timestamptz DEFAULT now()
    )
"""


def _distinct(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """The same pictures with keys and bytes of their own."""
    for number, one in enumerate(pictures):
        # What follows the end of a picture changes its bytes and nothing else.
        yield Picture(f"copy/{number:06d}", one.data + number.to_bytes(4), one.truth)


def _input_sides(size: int | None) -> dict[str, int]:
    """Both sides that the small detector resizes to; the longer one as the architecture's own."""
    if size is None:
        return {}
    longest = 1333 if size == LARGE_SIZE else size * 4 // 3
    return {"min_size": size, "max_size": longest}


def _by_key(rows: Sequence[Any]) -> dict[str, Detections]:
    tables: dict[str, list[tuple[float, ...]]] = {}
    for key, *values in rows:
        tables.setdefault(key, []).append(tuple(values))
    arrays = {key: np.array(table, np.float32) for key, table in tables.items()}
    return {key: Detections(table[:, :4], table[:, 4]) for key, table in arrays.items()}


def _publish(
    model: FasterRCNN,
    config: DetectorConfig,
    engine: str,
    files: dict[str, bytes] | None,
    settings: Settings,
) -> str:
    """A model version with a package that nobody checked: AP50 of what it scores is shown."""
    storage = Storage(settings)
    new = NewModel(
        model=deepcopy(model),
        detector=config,
        config={"detector": config.model_dump(mode="json")},
        config_hash=config.model_dump_json(),
        dataset_id=None,
        parent_id=None,
        threshold=0.5,
        training={},
    )
    with open_session(settings) as session:
        version = publish(new, settings, storage, session)
        name = version.id
        if files is not None:
            sums = {}
            for role, data in files.items():
                sha256 = hashlib.sha256(data).hexdigest()
                file = f"{Path(role).stem}-{sha256}{Path(role).suffix}"
                storage.put(settings.data_bucket, package_key(name, engine, file), data)
                sums[file] = sha256
            session.add(
                EnginePackage(
                    model_id=name,
                    engine=engine,
                    accepted=True,
                    reason="for a benchmark",
                    pictures=0,
                    files=sums,
                    toolchain=toolchain(),
                )
            )
        promote(session, name, actor="benchmark", reason="only a champion scores uploads")
    return name


def usual_loop(file: Path) -> None:
    """What most would write: list, then one picture at a time from its bytes to its rows."""
    settings = load_settings()
    device = select_device("auto")
    model = torch.load(file, weights_only=False).eval().to(device)
    assert settings.s3_secret_access_key is not None
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=settings.s3_secret_access_key.get_secret_value(),
    )
    assert settings.database_url is not None
    # A plain connection of psycopg2.
    connection = create_engine(settings.database_url.get_secret_value()).raw_connection()
    bucket = settings.uploads_bucket
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for listed in page["Contents"]:
            data = client.get_object(Bucket=bucket, Key=listed["Key"])["Body"].read()
            image = to_tensor(Image.open(io.BytesIO(data)).convert("RGB")).to(device)
            with torch.no_grad():
                [found] = model([image])
            cursor = connection.cursor()
            for box, score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True):
                cursor.execute(
                    "INSERT INTO found (key, x1, y1, x2, y2, score) "
                    "VALUES (%s, %s, %s, %s, %s, %s)",
                    (listed["Key"], *box, score),
                )
            connection.commit()


def show(row: Measured) -> None:
    ap50 = "  random weights" if row.ap50 is None else f"  AP50 {row.ap50:.4f}"
    gpu = ""
    if row.whole.gpu is not None:
        steady = row.whole.gpu_steady
        share = "" if steady is None else f" {steady:.0%} of the time,"
        gpu = f", GPU at work{share} whole {row.whole.gpu:.0%}"
    print(
        f"{_name(row)} {row.pictures:4d} pictures {1 / row.seconds:6.2f}/s {row.cpu:7.3f} CPU s "
        f"each, start {row.start.cpu:5.1f} CPU s {row.start.seconds:5.1f} s, "
        f"{row.whole.peak / 2**20:5.0f} MiB{gpu}{ap50}",
        flush=True,
    )


def _name(row: Measured) -> str:
    network = f"{row.architecture} {row.size} px" + (" mirrored" if row.mirrored else "")
    return f"{network:32s} {row.engine:14s}"


def choose(rows: Sequence[Measured]) -> Measured:
    """The cheapest of ours that finds what the same weights find in the usual loop."""
    [base] = [row for row in rows if (row.engine, row.size) == (USUAL, _OWN)]
    assert base.ap50 is not None
    good = [
        row
        for row in rows
        if row.engine != USUAL
        and row.ap50 is not None
        and row.ap50 >= base.ap50 - MARGIN
        and row.architecture == SMALL
    ]
    return min(good, key=lambda row: row.cpu)


def summarize(rows: Sequence[Measured]) -> None:
    """Ours against the usual loop with the same network and size."""
    print(
        "\nagainst the usual loop, same weights and size: ratio of CPU, of pictures/s, AP50 points"
    )
    usual = {(row.architecture, row.size): row for row in rows if row.engine == USUAL}
    for row in rows:
        base = usual.get((row.architecture, row.size))
        if base is not None and row is not base and not row.mirrored:
            points = ""
            if row.ap50 is not None and base.ap50 is not None:
                points = f" {100 * (row.ap50 - base.ap50):+.2f}"
            print(
                f"{_name(row)} {base.cpu / row.cpu:6.2f} {base.seconds / row.seconds:6.2f}{points}"
            )


def compare_with_large(rows: Sequence[Measured], chosen: Measured, night: Used, count: int) -> None:
    """Ours against the usual loop with the large network."""
    [base] = [row for row in rows if (row.engine, row.architecture) == (USUAL, LARGE)]
    print(f"\nagainst the usual loop with {LARGE} at {LARGE_SIZE} px: ratio of CPU, of pictures/s")
    for row in rows:
        if row.ap50 is not None and row is not base:
            ratios = f"{base.cpu / row.cpu:6.2f} {base.seconds / row.seconds:6.2f}"
            print(f"{_name(row)} {ratios}  AP50 {row.ap50:.4f}")
    print(
        f"\nchosen: {_name(chosen)}\n{count:,} pictures, start and all: {night.cpu / count:.3f} "
        f"CPU s each, {count / night.seconds:.2f}/s, {night.peak / 2**20:.0f} MiB: "
        f"{base.cpu * count / night.cpu:.1f} times less CPU than the usual loop with {LARGE} at "
        f"{LARGE_SIZE} px, {base.seconds * count / night.seconds:.1f} times its pictures/s"
    )


def plot(rows: Sequence[Measured], file: Path) -> None:
    """AP50 against CPU seconds of a picture: engines by colour, input sizes by shape."""
    from matplotlib.figure import Figure

    known = [(row, row.ap50) for row in rows if row.ap50 is not None]
    best = max(ap50 for _, ap50 in known)
    # What finds far less would press the rest into a line.
    shown = [(row, ap50) for row, ap50 in known if ap50 > best - FAR_LESS]
    engines = list(dict.fromkeys(row.engine for row, _ in known))
    shapes = dict(zip(sorted({row.size for row, _ in shown}), "^soDvP", strict=False))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for row, ap50 in shown:
        color = f"C{engines.index(row.engine)}"
        face = "white" if row.mirrored else color
        axes.plot(row.cpu, ap50, shapes[row.size], color=color, markerfacecolor=face, ls="none")
    for number, name in enumerate(engines):
        axes.plot([], [], "o", color=f"C{number}", label=name)
    for size, shape in shapes.items():
        axes.plot([], [], shape, color="gray", label=f"{size} px")
    if any(row.mirrored for row, _ in shown):
        axes.plot([], [], "o", color="gray", markerfacecolor="white", label="mirrored too")
    cost = next(row.cpu for row in rows if (row.engine, row.architecture) == (USUAL, LARGE))
    axes.axvline(cost, ls=":", color="gray", label=f"{USUAL}, {LARGE} at {LARGE_SIZE} px")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    left_out = len(known) - len(shown)
    far = f" ({left_out} below {best - FAR_LESS:.2f} not shown)" if left_out else ""
    axes.set_xlabel("CPU seconds of a picture, from bucket to rows")
    axes.set_ylabel("AP50 on the pictures held back" + far)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
