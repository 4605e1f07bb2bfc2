import json

import numpy as np
import pytest

from gun_detection.datasets.labels import (
    Label,
    gun_categories,
    load_json,
    parse_coco,
    parse_counted_text,
    parse_voc,
    parse_yolo,
    parse_yolo_names,
)
from gun_detection.errors import LabelError


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
    label = parse_yolo(b"0 0.5 0.5 0.2 0.4\n\n3 0.1 0.1 0.2 0.2\n")
    assert label.pixels(100, 50).round(6).tolist() == [[40, 15, 60, 35], [0, 0, 20, 10]]


def test_yolo_without_lines_has_no_gun() -> None:
    assert parse_yolo(b"").pixels(9, 9).shape == (0, 4)


def test_yolo_names_narrow_the_classes_to_guns() -> None:
    names = parse_yolo_names(b"names: [knife, Handgun]\n")
    label = parse_yolo(b"0 0.5 0.5 1 1\n1 0.5 0.5 0.5 0.5\n", names)
    assert label.pixels(4, 4).tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"names: {0: gun, 1: phone}", {0: "gun", 1: "phone"}),
        (b"names: [a]\nnc: 1", {0: "a"}),
        (b"nc: 1", {}),
        (b"", {}),
    ],
)
def test_yolo_names(text: bytes, names: dict[int, str]) -> None:
    assert parse_yolo_names(text) == names


@pytest.mark.parametrize("data", [b"names: [", b"[" * 5000])
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


def voc(*objects: tuple[str, str]) -> bytes:
    items = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(
            f"<{side}>{value}</{side}>"
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True)
        )
        + "</bndbox></object>"
        for name, box in objects
    )
    return f"<annotation>{items}</annotation>".encode()


def test_voc() -> None:
    named = parse_voc(voc(("pistol", "1 2 3 4"), ("person", "0 0 9 9.5")))
    assert named.names == ["pistol", "person"]
    assert named.label(frozenset({"pistol"})).boxes.tolist() == [[1, 2, 3, 4]]
    assert parse_voc(voc()).label(frozenset()).boxes.shape == (0, 4)


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
        {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "iscrowd": 1},
        {"image_id": 3, "category_id": 1, "bbox": [1, 1, None, 5]},
    ],
}


def test_coco() -> None:
    labels = parse_coco(COCO)
    first, second, third = (labels[name] for name in ("a.jpg", "b.jpg", "c.jpg"))
    assert isinstance(first, Label)
    assert first.boxes.tolist() == [[10, 20, 40, 60]]
    assert isinstance(second, Label)
    assert second.boxes.shape == (0, 4)
    assert isinstance(third, LabelError)


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
        {"annotations": [{"image_id": 1, "category_id": 1}]},
        {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "a.jpg"}]},
    ],
)
def test_coco_with_a_fault_in_one_image(change: dict[str, object]) -> None:
    assert isinstance(parse_coco(COCO | change)["a.jpg"], LabelError)


def test_coco_without_categories_has_only_guns() -> None:
    content = {key: value for key, value in COCO.items() if key != "categories"}
    label = parse_coco(content)["a.jpg"]
    assert isinstance(label, Label)
    assert len(label.boxes) == 2


def test_coco_numbers_that_json_does_not_know_are_left_to_the_checks() -> None:
    text = (
        '{"images": [{"id": 1, "file_name": "a"}],'
        ' "annotations": [{"image_id": 1, "bbox": [NaN, 1, 1, 1]}]}'
    )
    content = load_json(text.encode())
    assert isinstance(content, dict)
    label = parse_coco(content)["a"]
    assert isinstance(label, Label)
    assert np.isnan(label.boxes[0, 0])


@pytest.mark.parametrize("data", [b"{", b"\xff", b"[" * 200_000])
def test_json_that_is_none(data: bytes) -> None:
    with pytest.raises(LabelError, match="not JSON"):
        load_json(data)
    assert load_json(json.dumps(COCO).encode()) == COCO


@pytest.mark.parametrize(
    ("names", "guns"),
    [
        (["pistol", "person"], {"pistol"}),
        (["Handgun", "RIFLE", "knife", "AK-47"], {"Handgun", "RIFLE", "AK-47"}),
        (["object"], {"object"}),
        (["0", "1"], {"0", "1"}),
        ([], set()),
    ],
)
def test_gun_categories(names: list[str], guns: set[str]) -> None:
    assert gun_categories(names) == guns
