"""Every file of the table has the outcome that the table says: decoded, and ingested."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from embedded.config import REPOSITORY
from gun_detection.database import open_session
from gun_detection.datasets.ingest import IngestResult, ingest
from gun_detection.datasets.manifest import load_manifest
from gun_detection.datasets.synthetic import draw_pictures
from gun_detection.datasets.trees import open_folder
from gun_detection.errors import ImageError, TerminalError
from gun_detection.images import DecodedImage, Reason, SandboxedDecoder
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.bad_pictures import CASES, LIMITS, Case, document
from tests.picture_files import FILES

FIT = (8, 12)
# What takes much memory because the picture itself is large.
LARGE = {case.key for case in CASES if case.size and case.size[0] * case.size[1] > 10**7}


@pytest.fixture(scope="module")
def decoder() -> Iterator[SandboxedDecoder]:
    with SandboxedDecoder(Settings(**LIMITS)) as decoder:
        yield decoder


def result(decoder: SandboxedDecoder, case: Case, **options: object) -> DecodedImage | str:
    """The picture, or the reason why there is none."""
    try:
        return decoder.decode(case.make(), **options)  # type: ignore[arg-type]
    except ImageError as error:
        return error.reason


def by_name(case: Case) -> str:
    return case.name


def test_no_case_is_there_twice() -> None:
    assert len(CASES) >= 60
    for values in (
        {case.name for case in CASES},
        {case.key for case in CASES},
        {hashlib.sha256(case.make()).digest() for case in CASES},
    ):
        assert len(values) == len(CASES)


def test_document_is_up_to_date() -> None:
    path = REPOSITORY / "docs" / "bad-pictures.md"
    assert path.read_text() == document() + "\n", (
        "write it again: python -m tests.bad_pictures > docs/bad-pictures.md"
    )


@pytest.mark.parametrize("fit", [None, FIT], ids=["whole", "reduced"])
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_outcome_of_decoding(
    decoder: SandboxedDecoder, case: Case, fit: tuple[int, int] | None
) -> None:
    image = result(decoder, case, fit=fit)
    if isinstance(image, str):
        assert image == case.reason
        return
    assert (case.reason, case.size) == (None, (image.width, image.height))
    if case.corner is not None:
        np.testing.assert_allclose(image.pixels[0, 0], case.corner, atol=14)


def test_little_memory_is_the_only_other_reason() -> None:
    with SandboxedDecoder(Settings(**LIMITS, decode_memory_mb=300)) as decoder:
        others = {
            case.key: found
            for case in CASES
            if (found := result(decoder, case)) != case.reason and isinstance(found, str)
        }
    assert others == dict.fromkeys(LARGE, Reason.DECODE_MEMORY)


def test_bombs_leave_no_mark_on_memory(tmp_path: Path) -> None:
    for number, case in enumerate(case for case in CASES if case.key not in LARGE):
        (tmp_path / str(number)).write_bytes(case.make())
    script = f"""
import os, pathlib
from gun_detection.errors import ImageError
from gun_detection.images import SandboxedDecoder
from gun_detection.settings import Settings

def peak(pid):
    lines = pathlib.Path(f"/proc/{{pid}}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

with SandboxedDecoder(Settings(**{LIMITS})) as decoder:
    decoder.decode({FILES["png"]!r})
    child = decoder._child.pid
    before = peak(os.getpid()), peak(child)
    for path in pathlib.Path({str(tmp_path)!r}).iterdir():
        try:
            decoder.decode(path.read_bytes())
        except ImageError:
            pass
    print(peak(os.getpid()) - before[0], peak(child) - before[1])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    parent, child = (int(kilobytes) // 1024 for kilobytes in run.stdout.split())
    assert parent < 32
    assert child < 32


def write(root: Path, key: str, data: bytes) -> None:
    path = f"{root}/{key}"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def labelled(cases: list[Case]) -> Iterator[tuple[str, bytes]]:
    """The files of a data set: the cases, as pictures without a gun, and some good ones."""
    for case in cases:
        yield case.key, case.make()
        yield str(PurePosixPath(case.key).with_suffix(".txt")), b"0\n"
    for picture in draw_pictures(24, seed=5):
        rows = [" ".join(f"{value:g}" for value in box) for box in picture.boxes]
        yield f"good/{picture.name}", picture.data
        yield (
            f"good/{Path(picture.name).stem}.txt",
            "\n".join([str(len(rows)), *rows]).encode(),
        )


def outcomes(
    made: IngestResult, settings: Settings, storage: Storage
) -> dict[str, str | tuple[int, int]]:
    """By name of the picture; those that are good are left out."""
    manifest = load_manifest(storage, settings.data_bucket, made.dataset_id)
    kept = {entry.name: (entry.width, entry.height) for entry in manifest.entries}
    refused = {problem["name"]: problem["reason"] for problem in made.report["problems"]}
    assert not kept.keys() & refused.keys()
    return {name: got for name, got in (kept | refused).items() if not name.startswith("good/")}


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_outcome_of_ingest(
    settings: Settings, storage: Storage, tmp_path: Path, place: str
) -> None:
    lenient = settings.model_copy(update=LIMITS | {"dataset_reject_budget": 1.0})
    cases = [case for case in CASES if not getattr(case, f"not_in_{place}")]
    root = tmp_path / "pictures"
    for key, data in labelled(cases):
        if place == "folder":
            write(root, key, data)
        else:
            storage.put(settings.uploads_bucket, key, data)
    spec = str(root) if place == "folder" else f"s3://{settings.uploads_bucket}"
    with open_session(lenient) as session:
        made = ingest(spec, lenient, storage, session)
    assert outcomes(made, lenient, storage) == {
        case.key: case.reason or case.size for case in cases if not case.not_ingested
    }


@pytest.mark.parametrize("case", [case for case in CASES if case.not_in_folder], ids=by_name)
def test_keys_that_a_folder_cannot_hold(tmp_path: Path, case: Case) -> None:
    root = tmp_path / "outer" / "inner"
    root.mkdir(parents=True)
    try:
        write(root, case.key, case.make())
    except (OSError, ValueError):
        return
    assert case.key not in open_folder(root).paths


@pytest.mark.parametrize("case", [case for case in CASES if case.not_in_bucket], ids=by_name)
def test_keys_that_the_bucket_cannot_hold(settings: Settings, storage: Storage, case: Case) -> None:
    try:
        storage.put(settings.uploads_bucket, case.key, case.make())
    except TerminalError:
        return
    listed = [item.key for item in storage.list_objects(settings.uploads_bucket)]
    assert case.key not in listed
