import json

import numpy as np
import pytest

from gun_detection.datasets.labels import (
    NamedBoxes,
    gun_categories,
    load_json,
    parse_coco,
    parse_counted_text,
    parse_name_lines,
    parse_voc,
    parse_yolo,
    parse_yolo_names,
)
from gun_detection.errors import DatasetError, LabelError


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("1\n76 45 146 87\n", [[76, 45, 146, 87]]),
        ("2\r\n1 2 3 4\r\n5.5 6 7 8\r\n\r\n", [[1, 2, 3, 4], [5.5, 6, 7, 8]]),
        ("﻿1\n1 2 3 4", [[1, 2, 3, 4]]),
        ("0", []),
    ],
)
def test_counted_text(text: str, boxes: list[list[float]]) -> None:
    label = parse_counted_text(text.encode())
    assert label.boxes.shape == (len(boxes), 4)
    assert label.boxes.tolist() == boxes
    assert label.pixels(10, 10).tolist() == boxes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"2\n1 2 3 4\n", "COUNT_MISMATCH"),
        (b"0\n1 2 3 4\n", "COUNT_MISMATCH"),
        (b"1\n", "COUNT_MISMATCH"),
        (b"", "BAD_LABEL"),
        (b"1 2 3 4\n", "BAD_LABEL"),
        (b"-1\n", "BAD_LABEL"),
        (b"1" * 5000, "BAD_LABEL"),
        (b"1\n1 2 3\n", "BAD_LABEL"),
        (b"1\n1 2 3 x\n", "BAD_LABEL"),
        (b"\xff\xfe1\n", "BAD_LABEL"),
    ],
)
def test_counted_text_faults(data: bytes, reason: str) -> None:
    with pytest.raises(LabelError) as caught:
        parse_counted_text(data)
    assert caught.value.reason == reason


def test_yolo_boxes_are_shares_of_the_size() -> None:
    label = parse_yolo(b"0 0.5 0.5 0.2 0.4\n\n3 0.1 0.1 0.2 0.2\n").label(None)
    assert label.classes == (("0", True), ("3", True))
    assert label.pixels(100, 50).round(6).tolist() == [[40, 15, 60, 35], [0, 0, 20, 10]]


def test_yolo_without_lines_has_no_gun() -> None:
    assert parse_yolo(b"").label(None).pixels(9, 9).shape == (0, 4)


def test_yolo_names_narrow_the_classes_to_guns() -> None:
    names = parse_yolo_names(b"names: [knife, Handgun]\n")
    label = parse_yolo(b"0 0.5 0.5 1 1\n1 0.5 0.5 0.5 0.5\n", names).label(frozenset({"Handgun"}))
    assert label.classes == (("knife", False), ("Handgun", True))
    assert label.pixels(4, 4).tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"names: {0: gun, 1: phone}", {0: "gun", 1: "phone"}),
        (b"names: [a]\nnc: 1", {0: "a"}),
        (b"names: [no, 9, yes]", {0: "no", 1: "9", 2: "yes"}),
        (b"names: !!int ''", {}),
        (b"when: !!timestamp soon\nnames: !whatever {'0': gun}", {0: "gun"}),
        (b"nc: 1", {}),
        (b"names:", {}),
        (b"names", {}),
        (b"", {}),
    ],
)
def test_yolo_names(text: bytes, names: dict[int, str]) -> None:
    assert parse_yolo_names(text) == names


def test_a_class_on_each_line() -> None:
    assert parse_name_lines("\ufeffknife\r\n\r\n Handgun \n\n".encode()) == {
        0: "knife",
        2: "Handgun",
    }
    assert parse_name_lines(b"\n") == {}
    with pytest.raises(LabelError, match="UTF-8"):
        parse_name_lines(b"\xff\xfe")


# Written out, its last line would have ten to the power of forty items.
BOMB = "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 10}]" for n in range(1, 41))])


@pytest.mark.parametrize(
    "data",
    [
        b"names: [",
        b"[" * 5000,
        b"names: " + b"1" * 5000,
        b"names: {" + b"1" * 5000 + b": gun}",
        b"names: {gun: 0}",
        b"names: [[gun]]",
        b"names: &a [*a]",
        f"{BOMB}\nnames: *a40".encode(),
    ],
)
def test_yolo_names_that_are_not_yaml(data: bytes) -> None:
    with pytest.raises(LabelError, match=r"data\.yaml"):
        parse_yolo_names(data)


@pytest.mark.parametrize(
    "data", [b"0 0.5 0.5 0.2\n", b"0.5 0.5 0.5 0.2 0.2\n", b"-1 0 0 1 1\n", b"7 0.5 0.5 0.2 0.2\n"]
)
def test_yolo_faults(data: bytes) -> None:
    with pytest.raises(LabelError) as caught:
        parse_yolo(data, {0: "gun"})
    assert caught.value.reason == "BAD_LABEL"


def voc(*objects: tuple[str, str], size: str = "") -> bytes:
    items = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(
            f"<{side}>{value}</{side}>"
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True)
        )
        + "</bndbox></object>"
        for name, box in objects
    )
    return f"<annotation>{size}{items}</annotation>".encode()


def test_voc() -> None:
    named = parse_voc(voc(("pistol", "1 2 3 4"), ("person", "0 0 9 9.5")))
    assert named.names == ["pistol", "person"]
    assert named.label(frozenset({"pistol"})).boxes.tolist() == [[1, 2, 3, 4]]
    assert parse_voc(voc()).label(frozenset()).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        ("640", "480", (640, 480)),
        ("640.0", " 480 ", (640, 480)),
        ("0", "0", None),
        ("640", "0", None),
        ("-1", "5", None),
        ("", "", None),
        ("wide", "high", None),
        ("nan", "480", None),
        ("640", "inf", None),
    ],
)
def test_sizes_that_labels_state(width: str, height: str, size: tuple[float, float] | None) -> None:
    stated = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    assert parse_voc(voc(size=stated)).label(frozenset()).size == size
    image = {"id": 1, "file_name": "a.jpg", "width": width, "height": height}
    _, labels = parse_coco({"images": [image], "annotations": []})
    label = labels["a.jpg"]
    assert isinstance(label, NamedBoxes)
    assert label.size == size
    assert parse_voc(voc()).size is None


@pytest.mark.parametrize(
    "data",
    [
        b"not xml",
        b"<html></html>",
        b"<annotation><object><name>gun</name></object></annotation>",
        b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
        b'<!DOCTYPE a [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>',
        b"\xff\xfe\x00",
    ],
)
def test_voc_faults(data: bytes) -> None:
    with pytest.raises(LabelError) as caught:
        parse_voc(data)
    assert caught.value.reason == "BAD_LABEL"


COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 2, "file_name": "b.jpg"},
        {"id": 3, "file_name": "c.jpg"},
    ],
    "categories": [{"id": 1, "name": "pistol"}, {"id": 2, "name": "person"}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40]},
        {"image_id": 1, "category_id": 2, "bbox": [0, 0, 99, 99]},
        {"image_id": 1, "category_id": 2, "bbox": [1, 1, 5, 5], "iscrowd": 1},
        {"image_id": 3, "category_id": 1, "bbox": [1, 1, None, 5]},
    ],
}


def test_coco() -> None:
    names, labels = parse_coco(COCO)
    assert names == {"pistol", "person"}
    first, second, third = (labels[name] for name in ("a.jpg", "b.jpg", "c.jpg"))
    assert isinstance(first, NamedBoxes)
    assert first.names == ["pistol", "person"]
    assert first.label(frozenset({"pistol"})).boxes.tolist() == [[10, 20, 40, 60]]
    assert isinstance(second, NamedBoxes)
    assert second.label(names).boxes.shape == (0, 4)
    assert isinstance(third, LabelError)


@pytest.mark.parametrize("beside", [[], COCO["annotations"][:2]], ids=["alone", "beside-boxes"])
def test_coco_crowd_of_guns(beside: list[dict[str, object]]) -> None:
    crowd = {"image_id": 1, "category_id": 1, "segmentation": {}, "iscrowd": 1}
    _, labels = parse_coco(COCO | {"annotations": [*beside, crowd]})
    label = labels["a.jpg"]
    assert isinstance(label, NamedBoxes)
    with pytest.raises(LabelError, match="mark each gun") as caught:
        label.label(frozenset({"pistol"}))
    assert caught.value.reason == "CROWD"
    with pytest.raises(LabelError):
        label.label(None)
    assert len(label.label(frozenset({"person"})).boxes) == len(beside) // 2


@pytest.mark.parametrize(
    "change",
    [
        {"images": [{"id": 1}]},
        {"images": [5]},
        {"images": [{"id": [], "file_name": "a.jpg"}]},
        {"annotations": ["x"]},
        {"annotations": [{"image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1]}]},
    ],
)
def test_coco_that_is_not_coco(change: dict[str, object]) -> None:
    with pytest.raises(LabelError, match="not COCO"):
        parse_coco(COCO | change)


@pytest.mark.parametrize(
    "change",
    [
        {"annotations": [{"image_id": 1, "category_id": 9, "bbox": [0, 0, 1, 1]}]},
        {"annotations": [{"image_id": 1, "category_id": [1], "bbox": [0, 0, 1, 1]}]},
        {"annotations": [{"image_id": 1, "category_id": 1}]},
        {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "a.jpg"}]},
    ],
)
def test_coco_with_a_fault_in_one_image(change: dict[str, object]) -> None:
    assert isinstance(parse_coco(COCO | change)[1]["a.jpg"], LabelError)


def test_coco_without_categories_has_numbers_for_names() -> None:
    content = {key: value for key, value in COCO.items() if key != "categories"}
    content["annotations"] = COCO["annotations"][:2]
    names, labels = parse_coco(content)
    label = labels["a.jpg"]
    assert isinstance(label, NamedBoxes)
    assert (names, label.names) == (frozenset(), ["1", "2"])
    assert len(label.label(None).boxes) == 2


def test_coco_numbers_that_json_does_not_know_are_left_to_the_checks() -> None:
    text = (
        '{"images": [{"id": 1, "file_name": "a"}],'
        ' "annotations": [{"image_id": 1, "bbox": [NaN, 1, 1, 1]}]}'
    )
    content = load_json(text.encode())
    assert isinstance(content, dict)
    label = parse_coco(content)[1]["a"]
    assert isinstance(label, NamedBoxes)
    assert np.isnan(label.boxes[0, 0])


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 200_000, b"1" * 5000])
def test_json_that_is_none(data: bytes) -> None:
    with pytest.raises(LabelError, match="not JSON"):
        load_json(data)
    assert load_json(json.dumps(COCO).encode()) == COCO


GUNS = """
    gun guns Gun gun1 handgun Handguns HandGun hand_gun shotgun SMG smg pistol PISTOLS pistola
    rifle AssaultRifle sniper_rifle revolver firearm Firearms weapon weapons short_weapons
    carbine M4-carbine musket glock Glock17 ak47 AK-47 ak_47 sniper Sniper Bazooka machine-gun
    machinegun submachineGuns GrenadeLauncher rocket_launcher person-with-gun
"""
NO_GUNS = """
    person knife no-gun No_Gun NoGun nogun non-weapon nonWeapon not_gun without-gun toygun
    toy_gun ToyGun water-gun watergun glue_gun nail-gun heatGun staple-gun spray_gun spraygun
    massage-gun gunman gunpowder begins object 1 soak47s
"""


def test_names_of_guns() -> None:
    guns = [*GUNS.split(), "Machine Gun", "AK 47"]
    others = [*NO_GUNS.split(), "toy gun", "Glue Gun", ""]
    assert gun_categories(guns + others) == set(guns)


@pytest.mark.parametrize(
    "names",
    [
        ["object"],
        ["Objects", "class_1", "class2", "item", "target-3"],
        ["0", "1"],
        ["revólver"],
        ["person"],
        [],
    ],
)
def test_names_that_tell_nothing_are_guns(names: list[str]) -> None:
    assert gun_categories(names) == set(names)


@pytest.mark.parametrize("names", [["person", "dog"], ["object", "knife"], ["toy gun"]])
def test_classes_without_a_gun_are_refused(names: list[str]) -> None:
    with pytest.raises(DatasetError, match="rename") as caught:
        gun_categories(names)
    assert caught.value.reason == "UNKNOWN_CLASSES"
    assert ", ".join(sorted(names)) in caught.value.message
