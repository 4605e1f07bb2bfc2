import json
from pathlib import Path

import pytest

from gun_detection.datasets.labels import Label
from gun_detection.datasets.layouts import Sample, find_samples
from gun_detection.datasets.trees import FolderTree, open_folder
from gun_detection.errors import DatasetError, ImageError, LabelError, NotFoundError

MAX = 10**6

COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}],
    }
)
VOC = (
    "<annotation><object><name>gun</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax>"
    "<ymax>6</ymax></bndbox></object></annotation>"
)
EMPTY_VOC = "<annotation></annotation>"
BOX, NONE = "1\n1 2 4 6\n", "0\n"
YOLO = "0 0.25 0.4 0.3 0.4\n"


def write(root: Path, files: dict[str, str]) -> FolderTree:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return open_folder(root)


def outcomes(samples: list[Sample]) -> dict[str, str | list[list[float]]]:
    """By name, the boxes in a 10×10 picture or the reason of the fault."""
    found: dict[str, str | list[list[float]]] = {}
    for sample in samples:
        label = sample.label()
        found[sample.name] = (
            label.pixels(10, 10).round(6).tolist() if isinstance(label, Label) else label.reason
        )
    return found


@pytest.mark.parametrize(
    "files",
    [
        {"Images/a.jpg": "", "Images/b.jpg": "", "Labels/a.txt": BOX, "Labels/b.txt": NONE},
        {"Images/a.jpg": "", "Images/b.jpg": "", "annotations/x.json": COCO},
        {"Images/a.jpg": "", "Images/b.jpg": "", "x.json": COCO, "notes.json": "[1]"},
        {
            "Images/a.jpg": "",
            "Images/b.jpg": "",
            "Annotations/a.xml": VOC,
            "Annotations/b.xml": EMPTY_VOC,
        },
        {"Images/a.jpg": "", "Images/b.jpg": "", "Images/a.xml": VOC, "Images/b.xml": EMPTY_VOC},
        {"Images/a.jpg": "", "Images/b.jpg": "", "labels/a.txt": YOLO, "labels/b.txt": ""},
        {
            "Images/a.jpg": "",
            "Images/b.jpg": "",
            "labels/a.txt": YOLO,
            "labels/b.txt": "",
            "data.yaml": "names: [gun]",
            "labels/classes.txt": "gun",
            "train.txt": "x",
        },
    ],
    ids=["counted", "coco", "coco-root", "voc", "voc-beside", "yolo", "yolo-names"],
)
def test_layouts(tmp_path: Path, files: dict[str, str]) -> None:
    samples = find_samples(write(tmp_path, files), MAX)
    assert outcomes(samples) == {"Images/a.jpg": [[1, 2, 4, 6]], "Images/b.jpg": []}


def test_wrapping_folder_changes_nothing(tmp_path: Path) -> None:
    files = {"Images/a.jpg": "pixels", "Labels/a.txt": BOX}
    plain = find_samples(write(tmp_path / "plain", files), MAX)
    wrapped = find_samples(
        write(tmp_path / "wrapped", {f"guns-main/{name}": text for name, text in files.items()}),
        MAX,
    )
    assert outcomes(wrapped) == outcomes(plain)
    assert wrapped[0].read() == b"pixels"


def test_splits_in_subfolders(tmp_path: Path) -> None:
    files = {
        "train/images/1.jpg": "",
        "train/labels/1.txt": BOX,
        "val/images/1.jpg": "",
        "val/labels/1.txt": NONE,
    }
    samples = find_samples(write(tmp_path, files), MAX)
    assert outcomes(samples) == {"train/images/1.jpg": [[1, 2, 4, 6]], "val/images/1.jpg": []}


@pytest.mark.parametrize(
    ("files", "name", "reason"),
    [
        ({"Images/b.jpg": ""}, "Images/b.jpg", "MISSING_LABEL"),
        ({"Labels/b.txt": BOX}, "b", []),
        (
            {"Images/b.jpg": "", "Images/b.png": "", "Labels/b.txt": BOX},
            "Images/b.png",
            "AMBIGUOUS_LABEL",
        ),
        (
            {"Images/b.jpg": "", "Labels/b.txt": BOX, "Images/b.txt": BOX},
            "Images/b.jpg",
            "AMBIGUOUS_LABEL",
        ),
        ({"Images/b.jpg": "", "Labels/b.txt": "2\n1 2 4 6\n"}, "Images/b.jpg", "COUNT_MISMATCH"),
        ({"Images/b.jpg": "", "Labels/b.txt": "1" * (2**20 + 1)}, "Images/b.jpg", "BAD_LABEL"),
    ],
)
def test_faults_of_single_samples(
    tmp_path: Path, files: dict[str, str], name: str, reason: str
) -> None:
    sound = {"Images/a.jpg": "", "Labels/a.txt": BOX}
    samples = {sample.name: sample for sample in find_samples(write(tmp_path, sound | files), MAX)}
    assert "Images/a.jpg" in samples
    label = samples[name].label()
    if reason:
        assert isinstance(label, LabelError)
        assert label.reason == reason
    else:
        with pytest.raises(ImageError) as caught:
            samples[name].read()
        assert caught.value.reason == "MISSING_IMAGE"


def test_voc_file_that_is_damaged_spoils_only_its_picture(tmp_path: Path) -> None:
    files = {"a.jpg": "", "a.xml": VOC, "b.jpg": "", "b.xml": "<"}
    assert outcomes(find_samples(write(tmp_path, files), MAX)) == {
        "a.jpg": [[1, 2, 4, 6]],
        "b.jpg": "BAD_LABEL",
    }


def test_each_yolo_label_goes_by_the_nearest_data_yaml(tmp_path: Path) -> None:
    """The same lines, and the classes the other way round."""
    files = {
        "data.yaml": "names: [pistol]",
        "c/images/1.jpg": "",
        "c/labels/1.txt": YOLO,
    }
    for part, names in (("a", "[gun, knife]"), ("b", "[knife, gun]")):
        files |= {
            f"{part}/data.yaml": f"names: {names}",
            f"{part}/train/images/1.jpg": "",
            f"{part}/train/labels/1.txt": YOLO,
            f"{part}/train/images/2.jpg": "",
            f"{part}/train/labels/2.txt": "1" + YOLO[1:],
        }
    assert outcomes(find_samples(write(tmp_path, files), MAX)) == {
        "a/train/images/1.jpg": [[1, 2, 4, 6]],
        "a/train/images/2.jpg": [],
        "b/train/images/1.jpg": [],
        "b/train/images/2.jpg": [[1, 2, 4, 6]],
        "c/images/1.jpg": [[1, 2, 4, 6]],
    }


def test_a_single_data_yaml_beside_all_labels_names_their_classes(tmp_path: Path) -> None:
    files = {
        "config/data.yaml": "names: [knife, gun]",
        "images/a.jpg": "",
        "labels/a.txt": YOLO + "1" + YOLO[1:],
    }
    (sample,) = find_samples(write(tmp_path, files), MAX)
    label = sample.label()
    assert isinstance(label, Label)
    assert label.classes == (("knife", False), ("gun", True))
    assert len(label.boxes) == 1


KNIFE_THEN_GUN = {
    "images/a.jpg": "",
    "labels/a.txt": YOLO + "1 0.5 0.5 0.2 0.2\n",
    "images/b.jpg": "",
    "labels/b.txt": "",
}


@pytest.mark.parametrize(
    "files",
    [
        {"guns.yaml": "path: .\nnames: {0: knife, 1: gun}"},
        {"labels/guns.yml": "names: [knife, gun]", "hyp.yaml": "lr0: 0.1"},
        {"classes.txt": "knife\ngun\n"},
        {"labels/classes.txt": "knife\r\ngun\r\n", "guns.yaml": "names: ["},
        {"obj.names": "knife\ngun", "obj.data": "classes = 2", "train.txt": "images/a.jpg"},
        {"labels/_darknet.labels": "knife\ngun"},
        {"obj.names": "knife\ngun\n", "classes.txt": "knife\ngun", "a.yaml": "!x {names: !y 3}"},
        {"data.yaml": "names: [knife, gun]", "labels/classes.txt": "dog\nperson"},
        {"data.yaml": "nc: 2", "classes.txt": "knife\ngun"},
        {"classes.txt": "knife\ngun", "other/classes.txt": "gun\nknife"},
        {"guns.yaml": "names: [knife, gun]", "guns.yaml.bak": "", "big.yaml": "# " + "x" * 2**20},
    ],
)
def test_other_files_name_classes_where_no_data_yaml_does(
    tmp_path: Path, files: dict[str, str]
) -> None:
    samples = find_samples(write(tmp_path, KNIFE_THEN_GUN | files), MAX)
    assert outcomes(samples) == {"images/a.jpg": [[4, 4, 6, 6]], "images/b.jpg": []}
    label = samples[0].label()
    assert isinstance(label, Label)
    assert label.classes == (("knife", False), ("gun", True))


def test_a_single_class_without_a_name_is_a_gun(tmp_path: Path) -> None:
    other = {"labels/b.txt": "", "labels/c.txt": "3 0.5\n", "images/c.jpg": ""}
    files = {"images/a.jpg": "", "labels/a.txt": "7" + YOLO[1:], "images/b.jpg": ""} | other
    assert outcomes(find_samples(write(tmp_path, files), MAX)) == {
        "images/a.jpg": [[1, 2, 4, 6]],
        "images/b.jpg": [],
        "images/c.jpg": "BAD_LABEL",
    }


def test_a_picture_may_be_called_classes(tmp_path: Path) -> None:
    files = {"a.jpg": "", "a.txt": YOLO, "classes.jpg": "", "classes.txt": YOLO}
    boxes = [[1, 2, 4, 6]]
    samples = find_samples(write(tmp_path, files), MAX)
    assert outcomes(samples) == {"a.jpg": boxes, "classes.jpg": boxes}


def coco(name: str, category: str | None) -> str:
    named = {"categories": [{"id": 1, "name": category}]} if category else {}
    return json.dumps(
        {
            "images": [{"id": 1, "file_name": name}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        }
        | named
    )


@pytest.mark.parametrize(
    ("second", "boxes"), [("person", []), ("rifle", [[1, 2, 4, 6]]), (None, [[1, 2, 4, 6]])]
)
def test_classes_of_all_coco_files_tell_which_are_guns(
    tmp_path: Path, second: str | None, boxes: list[list[float]]
) -> None:
    files = {
        "a.jpg": "",
        "b.jpg": "",
        "a.json": coco("a.jpg", "gun"),
        "b.json": coco("b.jpg", second),
    }
    samples = find_samples(write(tmp_path, files), MAX)
    assert outcomes(samples) == {"a.jpg": [[1, 2, 4, 6]], "b.jpg": boxes}


def test_crowds_of_guns_leave_their_picture_out(tmp_path: Path) -> None:
    content = json.loads(coco("a.jpg", "gun"))
    content["annotations"][0]["iscrowd"] = 1
    files = {
        "a.jpg": "",
        "b.jpg": "",
        "a.json": json.dumps(content),
        "b.json": coco("b.jpg", "gun"),
    }
    samples = find_samples(write(tmp_path, files), MAX)
    assert outcomes(samples) == {"a.jpg": "CROWD", "b.jpg": [[1, 2, 4, 6]]}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"readme.txt": "nothing"}, "EMPTY_SOURCE"),
        ({}, "EMPTY_SOURCE"),
        ({"a.jpg": "", "b.jpg": ""}, "UNKNOWN_LAYOUT"),
        ({"a.jpg": "", "a.txt": BOX, "a.xml": VOC}, "AMBIGUOUS_LAYOUT"),
        ({"a.jpg": "", "a.txt": BOX, "b.jpg": "", "b.txt": YOLO}, "AMBIGUOUS_LAYOUT"),
        ({"a.jpg": "", "a.txt": "hello there"}, "AMBIGUOUS_LAYOUT"),
        ({"a.jpg": "", "x.json": "{"}, "BAD_LABEL"),
        ({"a.jpg": "", "a.txt": YOLO, "data.yaml": "names: ["}, "BAD_LABEL"),
        (
            {
                "a/1.jpg": "",
                "a/1.txt": YOLO,
                "b/data.yaml": "names: [gun]",
                "c/data.yaml": "names: [gun]",
            },
            "AMBIGUOUS_LAYOUT",
        ),
        (
            {
                "a/1.jpg": "",
                "a/1.txt": YOLO,
                "a/data.yaml": "names: [gun]",
                "b/1.jpg": "",
                "b/1.txt": YOLO,
            },
            "AMBIGUOUS_LAYOUT",
        ),
        ({"a.jpg": "", "a.txt": YOLO, "data.yaml": "names: [dog, cat]"}, "UNKNOWN_CLASSES"),
        ({"a.jpg": "", "a.txt": YOLO, "classes.txt": "dog\ncat"}, "UNKNOWN_CLASSES"),
        (KNIFE_THEN_GUN, "UNKNOWN_CLASSES"),
        (KNIFE_THEN_GUN | {"guns.yaml": "names: [knife"}, "UNKNOWN_CLASSES"),
        (KNIFE_THEN_GUN | {"elsewhere/guns.yaml": "names: [knife, gun]"}, "UNKNOWN_CLASSES"),
        (
            KNIFE_THEN_GUN | {f"{number}.yaml": "names: [knife, gun]" for number in range(99)},
            "UNKNOWN_CLASSES",
        ),
        (
            KNIFE_THEN_GUN | {"classes.txt": "knife\ngun", "guns.yaml": "names: [gun, knife]"},
            "AMBIGUOUS_LAYOUT",
        ),
        (KNIFE_THEN_GUN | {"classes.txt": "x" * (2**20 + 1)}, "BAD_LABEL"),
        (
            {
                "a/1.jpg": "",
                "a/1.txt": YOLO,
                "a/classes.txt": "gun",
                "b/1.jpg": "",
                "b/1.txt": YOLO,
            },
            "AMBIGUOUS_LAYOUT",
        ),
        (
            {
                "a.jpg": "",
                "b.jpg": "",
                "a.json": coco("a.jpg", "dog"),
                "b.json": coco("b.jpg", "cat"),
            },
            "UNKNOWN_CLASSES",
        ),
        (
            {"a.jpg": "", "b.jpg": "", "a.json": coco("a.jpg", None), "b.json": COCO},
            "UNKNOWN_CLASSES",
        ),
        ({"a.jpg": ""} | {f"{n}.json": "{}" for n in range(20)}, "UNKNOWN_LAYOUT"),
    ],
)
def test_unclear_sources(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    with pytest.raises(DatasetError) as caught:
        find_samples(write(tmp_path, files), MAX)
    assert caught.value.reason == reason


def test_reading_is_bounded_and_tells_what_is_gone(tmp_path: Path) -> None:
    tree = write(
        tmp_path, {"a.jpg": "12345", "a.txt": NONE, ".hidden/b.jpg": "", "__MACOSX/a.jpg": ""}
    )
    assert tree.paths == ["a.jpg", "a.txt"]
    (sample,) = find_samples(tree, 5)
    assert sample.read() == b"12345"
    with pytest.raises(ImageError) as caught:
        find_samples(tree, 4)[0].read()
    assert caught.value.reason == "TOO_LARGE"
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ImageError) as caught:
        sample.read()
    assert caught.value.reason == "MISSING_IMAGE"
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(ImageError) as caught:
        sample.read()
    assert caught.value.reason == "UNREADABLE"


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        open_folder(tmp_path / "none")
