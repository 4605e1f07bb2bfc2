import re
from dataclasses import replace

import numpy as np

from gun_detection.detector.detections import Detections
from gun_detection.evaluation.matching import Matched
from gun_detection.evaluation.metrics import compute_metrics
from gun_detection.evaluation.report import render_report
from gun_detection.evaluation.samples import Labelled, Samples, measure
from gun_detection.evaluation.slices import compute_slices
from tests.evaluation.conftest import GUN, NONE, OTHER, picture, random_pictures, sample


def render(pictures: list[Matched], **names: str) -> str:
    samples = [sample(p, f"<i{i}>.jpg") for i, p in enumerate(pictures)]
    metrics = compute_metrics(pictures, 0.5)
    return render_report(
        "a <b> report",
        metrics,
        compute_slices(samples, 0.5),
        samples,
        lambda _: np.zeros((150, 200, 3), np.uint8),
        ["chosen <so>"],
    )


def test_the_report_shows_the_worst_and_escapes_names() -> None:
    page = render([picture([], (GUN, 0.95)), picture([GUN]), picture([GUN], (OTHER, 0.9))])
    assert "a &lt;b&gt; report" in page
    assert "chosen &lt;so&gt;" in page
    assert "&lt;i0&gt;.jpg" in page
    assert "<i0>" not in page
    assert "gun-free pictures (1 pictures have one)" in page
    assert "pictures with guns (1 pictures have one)" in page
    assert "Most missed guns (2 pictures have one)" in page
    assert page.count("data:image/jpeg;base64,") == 4
    assert page.count("<svg") == 4


def test_the_report_asks_nothing_from_elsewhere() -> None:
    page = render(random_pictures(30))
    assert "<script" not in page
    # The plots name their vocabulary by address, which is not fetched.
    links = set(re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]+)", page))
    assert links == set()


def test_a_report_of_gun_free_pictures_and_of_none() -> None:
    assert "not measured" in render([picture([])])
    assert "not measured" in render([])


def test_slices_count_every_picture_once_and_guns_by_size() -> None:
    samples = [
        sample(picture([GUN], (GUN, 0.9)), brightness=30.0, source="a"),
        sample(picture([[0, 0, 190, 140]]), brightness=200.0, source="b"),
        sample(picture([], (OTHER, 0.8)), source="b"),
    ]
    slices = {(item.property, item.value): item for item in compute_slices(samples, 0.5)}
    by_property: dict[str, int] = {}
    for (name, _), item in slices.items():
        by_property[name] = by_property.get(name, 0) + item.images
    assert by_property == {
        "size of the gun": 2,
        "source": 3,
        "number of guns": 3,
        "brightness": 3,
        "sharpness": 3,
        "aspect": 3,
    }
    assert slices["size of the gun", "0.2 to 0.5 of the short side"].recall == 1
    assert slices["size of the gun", "above 0.5 of the short side"].recall == 0
    assert slices["source", "a"].ap50 == 1
    assert slices["source", "b"].ap50 == 0
    assert slices["number of guns", "0"].false_positives_per_image == 1
    assert slices["number of guns", "0"].ap50 is None
    assert slices["brightness", "dark (below 80)"].images == 1


def test_slices_of_two_scenes_have_no_intervals() -> None:
    seen, missed, free = picture([GUN], (GUN, 0.9)), picture([GUN]), picture([], (OTHER, 0.8))
    for scenes, known in ((1, False), (2, False), (3, True)):
        rows = [sample(seen if i % 2 else missed, str(i)) for i in range(9)]
        rows = [replace(row, group=str(i % scenes)) for i, row in enumerate(rows)]
        slices = compute_slices([*rows, *(sample(free, f"free-{i}") for i in range(9))], 0.5)
        found = {item.property: item for item in slices if item.boxes}
        assert (found["size of the gun"].recall_interval is not None) is known
        assert (found["source"].recall_interval is not None) is known
        assert (found["source"].ap50_interval is not None) is known


def test_measured_samples_survive_being_stored() -> None:
    class Predictor:
        device = "cpu"

        def __call__(self, images: list[np.ndarray]) -> list[Detections]:
            assert images[0].shape == (20, 30, 3)
            box = np.array([[1.0, 2.0, 9.0, 8.0]], np.float32)
            return [Detections(box, np.array([0.5], np.float32))]

    pixels = np.full((20, 30, 3), 50, np.uint8)
    pictures = [
        Labelled("a", "g", "s", pixels, np.array([GUN]), (60, 40)),
        Labelled("b", "g", "s", pixels, NONE, (30, 20)),
    ]
    samples = measure(Predictor(), pictures)  # type: ignore[arg-type]
    again = Samples.from_json(samples.to_json())
    assert again.to_json() == samples.to_json()
    assert [s.properties for s in again.items] == [s.properties for s in samples.items]
    # In pixels of the whole picture, of which one half as large was looked at.
    assert [s.matched.found.boxes.tolist() for s in samples.items] == [
        [[2, 4, 18, 16]],
        [[1, 2, 9, 8]],
    ]
    assert samples.items[0].properties.width == 60
    assert samples.items[0].properties.brightness == 50
    assert samples.items[0].properties.sharpness == 0
