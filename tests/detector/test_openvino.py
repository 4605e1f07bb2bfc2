import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from gun_detection.detector import openvino
from gun_detection.detector.architectures import limit_proposals
from gun_detection.detector.conversion import to_files
from gun_detection.detector.inference import Predictor
from gun_detection.detector.openvino import Networks, ResizeFirst
from gun_detection.detector.running import runnable
from tests.detector.conftest import CPU, picture, predictor

# Made larger, made smaller, upright, square.
SIZES = [(60, 90), (240, 400), (300, 200), (192, 192)]


@pytest.mark.parametrize("mirrored", [False, True], ids=["plain", "mirrored"])
def test_in_float32_it_finds_what_the_reference_finds(
    model: FasterRCNN, networks: Networks, mirrored: bool
) -> None:
    reference = Predictor(deepcopy(model), CPU, 0.0, mirrored=mirrored)
    converted = predictor(model, networks, mirrored=mirrored)
    for size in SIZES:
        [expected], [found] = reference([picture(*size)]), converted([picture(*size)])
        assert len(expected.scores) > 20
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)


def test_pictures_of_several_sizes_in_one_call(model: FasterRCNN, networks: Networks) -> None:
    pictures = [picture(*size) for size in SIZES]
    expected = Predictor(deepcopy(model), CPU, 0.0)(pictures)
    found = predictor(model, networks)(pictures)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


@pytest.mark.parametrize("most", [1, 7, 60, 1000])
def test_the_best_regions_are_those_of_torchvision(
    most: int, model: FasterRCNN, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At first too few to end with as many as are wanted.
    monkeypatch.setattr(openvino, "_AT_HAND", 1)
    limited = deepcopy(model)
    limit_proposals(limited, most)
    for size in SIZES:
        [expected] = Predictor(deepcopy(limited), CPU, 0.0)([picture(*size)])
        [found] = predictor(limited, networks)([picture(*size)])
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        # Further down scores differ by less than they are computed to.
        np.testing.assert_allclose(found.boxes[:10], expected.boxes[:10], atol=1e-2)


def test_threads_do_not_disturb_each_other(model: FasterRCNN, networks: Networks) -> None:
    shared = predictor(model, networks)
    pictures = [picture(*size) for size in SIZES] * 3
    alone = [shared([pixels])[0] for pixels in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = [found for [found] in pool.map(lambda pixels: shared([pixels]), pictures)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)


# In a process of its own, as only the first inference of a process can go wrong.
STARTED = """
import sys
import threading
from contextlib import suppress
from pathlib import Path
import torch
from gun_detection.detector.openvino import OpenVinoDetector, from_files
from tests.detector.conftest import detector

files = {path.name: path for path in Path(sys.argv[1]).iterdir()}
trunk = OpenVinoDetector(detector("resnet18_fpn"), from_files(files), "f32", streams=8)._trunk
compiled, together = trunk._compiled, threading.Barrier(8)


# Threads that may have their request at the same time go on at the same time.
class Together:
    def create_infer_request(self):
        request = compiled.create_infer_request()
        with suppress(threading.BrokenBarrierError):
            together.wait(2)
        return request


trunk._compiled = Together()
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=trunk, args=[torch.zeros(1, 3, 64, 64)]) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_may_begin_at_the_same_time(networks: Networks, tmp_path: Path) -> None:
    for name, data in to_files(networks).items():
        (tmp_path / name).write_bytes(data)
    subprocess.run([sys.executable, "-c", STARTED, str(tmp_path)], check=True, timeout=120)


@pytest.mark.skipif("openvino-bf16" not in runnable(CPU), reason="the processor has no bfloat16")
def test_half_precision_is_near_but_not_the_same(model: FasterRCNN, networks: Networks) -> None:
    [full], [half] = (
        predictor(model, networks, precision)([picture(240, 400)]) for precision in ("f32", "bf16")
    )
    assert not np.array_equal(half.scores[:10], full.scores[:10])
    np.testing.assert_allclose(half.scores[:10], full.scores[:10], atol=0.02)
    # Rounded to 8 bits of mantissa, many scores would be the same.
    assert len(np.unique(half.scores)) == len(half.scores)


# In half precision they may be rounded to it, as the RPN reads them.
@pytest.mark.parametrize(("precision", "rounding"), [("f32", 0.0), ("bf16", 2**-8)])
def test_feature_maps_are_turned_round(precision: str, rounding: float, networks: Networks) -> None:
    if precision == "bf16" and "openvino-bf16" not in runnable(CPU):
        pytest.skip("the processor has no bfloat16")
    pixels = torch.rand(2, 3, 128, 96)
    plain, turned = (
        openvino._Network(trunk, precision, 1)(pixels)
        for trunk in (networks.trunk, openvino._channels_last(networks.trunk))
    )
    assert turned.keys() == plain.keys()
    for name, values in turned.items():
        found = values.permute(0, 3, 1, 2) if name.startswith("feature ") else values
        torch.testing.assert_close(found, plain[name], atol=0, rtol=rounding)


@pytest.mark.parametrize("size", [(60, 90), (500, 333), (1200, 700)])
def test_pictures_are_prepared_as_by_torchvision(size: tuple[int, int]) -> None:
    theirs = GeneralizedRCNNTransform(192, 320, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    pixels = torch.from_numpy(picture(*size)).permute(2, 0, 1) / 255
    (expected, _), (found, _) = theirs([pixels]), ResizeFirst.of(theirs).eval()([pixels])
    assert found.image_sizes == expected.image_sizes
    torch.testing.assert_close(found.tensors, expected.tensors, atol=1e-5, rtol=0)
