import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from gun_detection.database import open_session
from gun_detection.database.models import DatasetVersion
from gun_detection.datasets import report
from gun_detection.datasets.ingest import ingest
from gun_detection.datasets.manifest import image_key
from gun_detection.datasets.synthetic import Picture, draw_pictures
from gun_detection.errors import DatasetError, ServiceUnavailableError
from gun_detection.settings import Settings
from gun_detection.storage import Storage
from tests.datasets.conftest import MakeFolder, manifest_of, run
from tests.release.conftest import watch_storage


def rows(settings: Settings) -> list[DatasetVersion]:
    with open_session(settings) as session:
        return list(session.scalars(select(DatasetVersion).order_by(DatasetVersion.created_at)))


def objects(settings: Settings, storage: Storage) -> dict[str, str]:
    listed = storage.list_objects(settings.data_bucket)
    return {item.key: f"{item.etag} {item.last_modified}" for item in listed}


def test_a_version_is_stored_whole(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    seen: list[tuple[int, int]] = []
    with open_session(settings) as session:
        result = ingest(
            str(make_folder()), settings, storage, session, lambda *step: seen.append(step)
        )
    assert seen == [(number, 24) for number in range(1, 25)]
    assert result.created
    manifest = manifest_of(result, settings, storage)
    assert len(manifest.entries) == result.counts["images"] == 24
    for entry in manifest.entries:
        data = storage.get(settings.data_bucket, image_key(entry.sha256))
        assert len(data) == entry.size
    (row,) = rows(settings)
    assert (row.id, row.source, row.holdout_id) == (
        result.dataset_id,
        "folder:guns",
        manifest.holdout_id,
    )
    assert row.images == row.train_images + row.validation_images + row.holdout_images == 24
    assert row.holdout_images == len(manifest.split("holdout"))
    assert row.boxes == sum(len(entry.boxes) for entry in manifest.entries)
    assert row.negatives == sum(not entry.boxes for entry in manifest.entries) == 4
    assert (row.rejected_images, row.rejected_boxes, row.duplicates) == (0, 0, 0)
    assert storage.get(settings.data_bucket, row.manifest_key) == manifest.to_bytes()
    assert json.loads(storage.get(settings.data_bucket, row.report_key)) == result.report
    assert len(objects(settings, storage)) == 24 + 3


def test_the_same_data_is_the_same_version(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    first = run(make_folder(), settings, storage)
    before = objects(settings, storage)
    again = run(make_folder("other-name"), settings, storage)
    assert not again.created
    assert again.dataset_id == first.dataset_id
    assert objects(settings, storage) == before
    assert len(rows(settings)) == 1


def test_what_a_further_ingest_rejects_is_reported(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    first = run(folder, settings, storage)
    for number, picture in enumerate(draw_pictures(2, seed=77), start=90):
        (folder / "Images" / f"{number}.jpeg").write_bytes(picture.data)
        (folder / "Labels" / f"{number}.txt").write_text("2\n1 1 5 5\n")
    second = run(folder, settings, storage)
    assert not second.created
    assert second.dataset_id == first.dataset_id
    assert second.page_key != first.page_key
    for result, rejected in ((first, []), (second, ["Images/90.jpeg", "Images/91.jpeg"])):
        page = storage.get(settings.data_bucket, result.page_key).decode()
        assert [name for name in ("Images/90.jpeg", "Images/91.jpeg") if name in page] == rejected
        json_key = result.page_key.removesuffix(".html") + ".json"
        assert json.loads(storage.get(settings.data_bucket, json_key)) == result.report
    before = objects(settings, storage)
    assert run(folder, settings, storage).page_key == second.page_key
    for number in (90, 91):
        (folder / "Images" / f"{number}.jpeg").unlink()
        (folder / "Labels" / f"{number}.txt").unlink()
    assert run(folder, settings, storage).page_key == first.page_key
    assert objects(settings, storage) == before


def test_no_transaction_waits_for_the_bucket(
    settings: Settings, storage: Storage, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread, as several would find each other's questions to the database.
    monkeypatch.setattr("gun_detection.datasets.ingest._UPLOADERS", 1)
    waiting = watch_storage(settings, monkeypatch)
    folder = make_folder()
    run(folder, settings, storage)
    assert set(waiting) == {0}
    waiting.clear()
    # It reads the manifest of the one before.
    run("synthetic:40:1", settings, storage)
    assert set(waiting) == {0}
    (folder / "Images" / "90.jpeg").write_bytes(b"<html></html>")
    waiting.clear()
    assert not run(folder, settings, storage).created, "but it stores a report of its own"
    assert set(waiting) == {0}


def test_a_damaged_manifest_stops_until_it_is_restored(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    result = run(make_folder(), settings, storage)
    (row,) = rows(settings)
    whole = storage.get(settings.data_bucket, row.manifest_key)
    storage.put(settings.data_bucket, row.manifest_key, whole[:-1])
    with pytest.raises(DatasetError) as caught:
        run("synthetic:40:1", settings, storage)
    assert caught.value.reason == "SHA256_MISMATCH"
    assert "from a backup" in caught.value.message
    assert "ingest the source again" not in caught.value.message
    storage.put(settings.data_bucket, row.manifest_key, whole)
    assert run("synthetic:40:1", settings, storage).dataset_id != result.dataset_id


def test_data_that_is_ingested_again_is_the_newest(settings: Settings, storage: Storage) -> None:
    first = run("synthetic:40:1", settings, storage).dataset_id
    second = run("synthetic:40:2", settings, storage).dataset_id
    assert [row.id for row in rows(settings)] == [first, second]
    assert not run("synthetic:40:1", settings, storage).created
    assert [row.id for row in rows(settings)] == [second, first]


def test_copies_count_once_and_conflicts_are_told(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    data = (folder / "Images" / "1.jpeg").read_bytes()
    label = (folder / "Labels" / "1.txt").read_text()
    for number, text in ((90, label), (91, "1\n1 1 9 9\n"), (92, "7\n")):
        (folder / "Images" / f"{number}.jpeg").write_bytes(data)
        (folder / "Labels" / f"{number}.txt").write_text(text)
    result = run(folder, settings, storage)
    assert result.counts["images"] == 24
    assert result.counts["duplicates"] == 3
    assert result.counts["label_conflicts"] == 1
    assert [
        (item["name"], item["reason"])
        for item in result.report["problems"]
        if item["kind"] == "duplicate"
    ] == [
        ("Images/90.jpeg", "DUPLICATE"),
        ("Images/91.jpeg", "LABEL_CONFLICT"),
        ("Images/92.jpeg", "DUPLICATE"),
    ]
    assert result.counts["rejected_images"] == 0


@pytest.mark.parametrize("first", ["1\n5 5 60 60\n", "0\n"], ids=["gun-first", "gun-last"])
def test_copies_with_a_gun_and_without_are_all_left_out(
    settings: Settings, storage: Storage, make_folder: MakeFolder, first: str
) -> None:
    folder = make_folder()
    data = (folder / "Images" / "1.jpeg").read_bytes()
    (folder / "Labels" / "1.txt").write_text(first)
    other = "0\n" if first != "0\n" else "1\n5 5 60 60\n"
    for number, text in ((90, other), (91, first), (92, other)):
        (folder / "Images" / f"{number}.jpeg").write_bytes(data)
        (folder / "Labels" / f"{number}.txt").write_text(text)
    result = run(folder, settings, storage)
    assert [(item["name"], item["kind"], item["reason"]) for item in result.report["problems"]] == [
        ("Images/1.jpeg", "image", "LABEL_CONFLICT"),
        ("Images/90.jpeg", "image", "LABEL_CONFLICT"),
        ("Images/91.jpeg", "duplicate", "DUPLICATE"),
        ("Images/92.jpeg", "duplicate", "DUPLICATE"),
    ]
    assert "Images/1.jpeg and Images/90.jpeg" in result.report["problems"][0]["message"]
    counts = result.counts
    assert (counts["images"], counts["rejected_images"], counts["duplicates"]) == (23, 2, 2)
    entries = manifest_of(result, settings, storage).entries
    assert hashlib.sha256(data).hexdigest() not in {entry.sha256 for entry in entries}


def test_classes_are_told(
    settings: Settings,
    storage: Storage,
    tmp_path: Path,
    pictures: list[Picture],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "data.yaml").write_text("names: [knife, Pistol]")
    lines = "1 0.5 0.5 0.4 0.4\n1 0.4 0.4 0.2 0.2\n0 0.2 0.2 0.1 0.1\n"
    for number, picture in enumerate(pictures):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture.data)
        (tmp_path / "labels" / f"{number}.txt").write_text(lines)
    caplog.set_level("INFO", "gun_detection")
    result = run(tmp_path, settings, storage)
    assert result.report["classes"] == {"guns": {"Pistol": 48}, "others": {"knife": 24}}
    assert (result.counts["boxes"], result.counts["other_boxes"]) == (48, 24)
    (record,) = [item for item in caplog.records if item.message == "data set ingested"]
    assert (vars(record)["guns"], vars(record)["others"]) == ({"Pistol": 48}, {"knife": 24})


def test_a_copy_replaces_one_whose_label_cannot_be_used(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    (folder / "Images" / "90.jpeg").write_bytes((folder / "Images" / "1.jpeg").read_bytes())
    (folder / "Labels" / "90.txt").write_text((folder / "Labels" / "1.txt").read_text())
    (folder / "Labels" / "1.txt").write_text("nonsense")
    result = run(folder, settings, storage)
    assert result.counts["images"] == 24
    assert result.counts["rejected_images"] == 1
    names = [entry.name for entry in manifest_of(result, settings, storage).entries]
    assert "Images/90.jpeg" in names
    assert "Images/1.jpeg" not in names


def test_rejects_within_the_budget_are_listed(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    (folder / "Images" / "3.jpeg").write_bytes(b"<html></html>")
    (folder / "Labels" / "4.txt").write_text("1\n-1 5.25 60.1234 90\n")
    (folder / "Labels" / "6.txt").write_text("2\n5 5 60 90\n20 20 20 40\n")
    result = run(folder, settings, storage)
    assert {(item["name"], item["kind"], item["reason"]) for item in result.report["problems"]} == {
        ("Images/3.jpeg", "image", "NOT_IMAGE"),
        ("Images/4.jpeg", "clipped", "OUT_OF_FRAME"),
        ("Images/6.jpeg", "box", "ZERO_AREA"),
        ("Images/6.jpeg", "image", "BAD_BOX"),
    }
    (row,) = rows(settings)
    assert (row.images, row.rejected_images, row.rejected_boxes) == (22, 2, 1)
    kept = {entry.name: entry for entry in manifest_of(result, settings, storage).entries}
    assert kept["Images/4.jpeg"].boxes == ((0.0, 5.25, 60.123, 90.0),)
    assert len(kept) == 22


def test_more_rejects_than_the_budget_are_refused(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    for number in (1, 2, 3):
        (folder / "Labels" / f"{number}.txt").write_text("5\n1 2 3 4\n")
    # Surplus copies must not water the rejects down.
    for number in range(100, 120):
        (folder / "Images" / f"{number}.jpeg").write_bytes(
            (folder / "Images" / "10.jpeg").read_bytes()
        )
        (folder / "Labels" / f"{number}.txt").write_text("0\n")
    with pytest.raises(DatasetError) as caught:
        run(folder, settings, storage)
    assert caught.value.reason == "REJECT_BUDGET"
    assert "3 of 24 images" in caught.value.message
    assert "COUNT_MISMATCH" in caught.value.message
    key = caught.value.message.split(f"s3://{settings.data_bucket}/")[1].split(".html")[0]
    assert key.startswith("datasets/rejected/")
    stored = json.loads(storage.get(settings.data_bucket, f"{key}.json"))
    assert stored["counts"]["rejected_images"] == 3
    assert b"Refused" in storage.get(settings.data_bucket, f"{key}.html")
    assert rows(settings) == []
    wider = settings.model_copy(update={"dataset_reject_budget": 0.125})
    assert run(folder, wider, storage).created


def test_boxes_have_a_budget_of_their_own(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    (folder / "Labels" / "1.txt").write_text("9\n" + "5 5 5 9\n" * 9)
    with pytest.raises(DatasetError, match="1 of 24 images and 9 of"):
        run(folder, settings, storage)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda folder: [path.write_bytes(b"") for path in folder.glob("Images/*")],
            "REJECT_BUDGET",
        ),
        (lambda folder: [path.unlink() for path in folder.glob("Images/*")], "EMPTY_SOURCE"),
        (lambda folder: [path.write_text("0") for path in folder.glob("Labels/*")], "EMPTY_SPLIT"),
    ],
    ids=["only-rejects", "no-pictures", "no-guns"],
)
def test_sets_that_nobody_can_learn_from(
    settings: Settings,
    storage: Storage,
    make_folder: MakeFolder,
    spoil: Callable[[Path], object],
    reason: str,
) -> None:
    folder = make_folder()
    spoil(folder)
    generous = settings.model_copy(update={"dataset_reject_budget": 1.0})
    with pytest.raises(DatasetError) as caught:
        run(folder, generous, storage)
    assert caught.value.reason == reason
    assert rows(settings) == []


@pytest.mark.parametrize(
    ("spec", "reason"), [("synthetic:0", "EMPTY_SOURCE"), ("synthetic:1", "EMPTY_SPLIT")]
)
def test_tiny_sets(settings: Settings, storage: Storage, spec: str, reason: str) -> None:
    with pytest.raises(DatasetError) as caught:
        run(spec, settings, storage)
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["_json", "render"])
def test_a_crash_leaves_no_version_and_the_next_attempt_finishes(
    settings: Settings,
    storage: Storage,
    make_folder: MakeFolder,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    folder = make_folder()

    def crash(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(report, name, crash)
        with pytest.raises(MemoryError):
            run(folder, settings, storage)
    assert rows(settings) == []
    result = run(folder, settings, storage)
    assert result.created
    (row,) = rows(settings)
    assert json.loads(storage.get(settings.data_bucket, row.report_key)) == result.report


@pytest.mark.parametrize("number", [1, 9], ids=["first", "last"])
def test_a_failed_upload_is_an_error(
    settings: Settings,
    storage: Storage,
    make_folder: MakeFolder,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    folder = make_folder()
    data = (folder / "Images" / f"{number}.jpeg").read_bytes()
    key = image_key(hashlib.sha256(data).hexdigest())
    put = storage.put_if_absent

    def fail(bucket: str, name: str, content: bytes, **options: str) -> bool:
        if name == key:
            raise ServiceUnavailableError("the server is down")
        return put(bucket, name, content, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_if_absent", fail)
        with pytest.raises(ServiceUnavailableError):
            run(folder, settings, storage)
    assert rows(settings) == []
    assert run(folder, settings, storage).created


def test_names_that_are_not_text_survive(
    settings: Settings, storage: Storage, make_folder: MakeFolder
) -> None:
    folder = make_folder()
    for picture in draw_pictures(1, seed=77):
        odd = b"<b>\xff\xfe\n"
        (folder / "Images" / (odd + b".jpg").decode("utf-8", "surrogateescape")).write_bytes(
            picture.data
        )
    result = run(folder, settings, storage)
    assert result.report["reasons"][0]["reason"] == "MISSING_LABEL"
    page = storage.get(settings.data_bucket, f"datasets/{result.dataset_id}/report.html")
    assert b"<b>" not in page


@pytest.mark.seed
def test_the_real_guns(settings: Settings, storage: Storage, shared_data: Path) -> None:
    result = run(shared_data / "guns-seed", settings, storage)
    assert result.counts == {
        "files": 333,
        "images": 302,
        "boxes": 387,
        "other_boxes": 0,
        "negatives": 0,
        "duplicates": 31,
        "label_conflicts": 2,
        "clipped_boxes": 1,
        "rejected_images": 0,
        "rejected_boxes": 0,
        "groups": 301,
        "largest_group": 2,
    }
    (clipped,) = [item for item in result.report["problems"] if item["kind"] == "clipped"]
    assert (clipped["name"], clipped["reason"]) == ("Images/70.jpeg", "OUT_OF_FRAME")
    groups = json.loads((shared_data / "guns-seed" / "DUPLICATE_GROUPS.json").read_text())
    entries = manifest_of(result, settings, storage).entries
    group_of = {entry.name: entry.group for entry in entries}
    for numbers in groups:
        kept = [
            f"Images/{number}.jpeg" for number in numbers if f"Images/{number}.jpeg" in group_of
        ]
        assert len({group_of[name] for name in kept}) == 1
