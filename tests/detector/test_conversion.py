import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from torchvision.models.detection.faster_rcnn import FasterRCNN

from gun_detection.detector.conversion import convert, quantize, to_files
from gun_detection.detector.inference import Predictor
from gun_detection.detector.openvino import Networks, from_files
from gun_detection.detector.running import runnable
from tests.detector.conftest import CPU, detector, picture, predictor

SIZES = [(60, 90), (240, 400), (300, 200)]


def stored(networks: Networks, folder: Path, precise: int = 0) -> Networks:
    """The networks as they come back from files with other names."""
    paths = {}
    for role, data in to_files(networks, precise).items():
        paths[role] = folder / f"0-{role}"
        paths[role].write_bytes(data)
    return from_files(paths)


def test_the_files_hold_the_whole_networks(
    model: FasterRCNN, networks: Networks, tmp_path: Path
) -> None:
    [expected], [found] = (
        predictor(model, some)([picture(240, 400)])
        for some in (networks, stored(networks, tmp_path))
    )
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_a_head_that_leaves_out_the_finest_level() -> None:
    model = detector("mobilenet_v2_fpn")
    [expected] = Predictor(deepcopy(model), CPU, 0.0)([picture(240, 400)])
    [found] = predictor(model, convert(model))([picture(240, 400)])
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_eight_bits_are_near_and_quiet(
    model: FasterRCNN, networks: Networks, capsys: pytest.CaptureFixture[str]
) -> None:
    before = to_files(networks)

    def read(index: int) -> torch.Tensor:
        return torch.from_numpy(picture(*SIZES[index])).permute(2, 0, 1) / 255

    small = quantize(model, networks, list(range(len(SIZES))), read)
    assert to_files(networks) == before
    assert capsys.readouterr().out == ""
    for name in ("trunk.bin", "head.bin"):
        assert len(to_files(small)[name]) < 0.4 * len(before[name])
    [full], [found] = (predictor(model, some)([picture(240, 400)]) for some in (networks, small))
    np.testing.assert_allclose(found.scores[:10], full.scores[:10], atol=0.1)


@pytest.mark.skipif("openvino-bf16" not in runnable(CPU), reason="the processor has no bfloat16")
@pytest.mark.parametrize("bits", [16, 8])
def test_the_first_convolutions_stay_precise(
    bits: int, model: FasterRCNN, networks: Networks, tmp_path: Path
) -> None:
    if bits == 8:
        networks = quantize(model, networks, [0], lambda _: torch.rand(3, 192, 192), precise=2)
    trunk = stored(networks, tmp_path, precise=2).trunk
    compiled = openvino.Core().compile_model(trunk, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    compiled.create_infer_request().infer([np.zeros((1, 3, 192, 192), np.float32)])
    nodes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [n["runtimePrecision"].value for n in nodes if n["layerType"].value == "Convolution"]
    assert len(kinds) > 20
    assert kinds[:2] == ["f32", "f32"]
    # Whether 8 bits have a sign depends on the processor.
    assert set(kinds[2:]) <= ({"bf16"} if bits == 16 else {"i8", "u8"})


SIGNALLED = """
import signal
import torch
from gun_detection.detector.conversion import convert, quantize
from tests.detector.conftest import detector, predictor

signal.signal(signal.SIGTERM, lambda *_: print("handled"))
model = detector("resnet18_fpn")
networks = quantize(model, convert(model), [0], lambda _: torch.rand(3, 192, 192))
signal.raise_signal(signal.SIGTERM)
predictor(model, networks)
signal.raise_signal(signal.SIGTERM)
"""


def test_signals_are_handled_when_networks_are_gone() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert (ran.returncode, ran.stdout) == (0, "handled\n" * 2)


WATCHED = """
import sys

def watch(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "urllib", "os.fork")):
        print(event, arguments)

sys.addaudithook(watch)
from gun_detection.detector import openvino
import nncf
nncf.telemetry.telemetry.send_event("quantization", "target", "cpu")
"""


def test_nobody_is_told_of_its_use(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "CI": "false"}
    ran = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []
