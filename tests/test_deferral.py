"""Processes start without PyTorch's compiler, and have it when they need it."""

import subprocess
import sys

import pytest

_DETECTOR = """
import sys
import {first}
from gun_detection.release.packages import open_engine
from gun_detection.detector.architectures import DetectorConfig, build_detector
import torch
with torch.inference_mode():
    build_detector(DetectorConfig(architecture="resnet18_fpn")).eval()([torch.rand(3, 64, 64)])
print("torch._dynamo" in sys.modules)
print(sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu"))
from torch._dynamo.utils import is_compile_supported
print(is_compile_supported("cpu"), sys.modules["torch._dynamo.utils"] is torch._dynamo.utils)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


@pytest.mark.parametrize(("first", "loaded"), [("gun_detection", False), ("torch._dynamo", True)])
def test_the_compiler_is_loaded_when_it_is_called(first: str, loaded: bool) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _DETECTOR.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == [str(loaded), "True", "True True", "2.0"]


def test_another_version_of_torchvision_gets_what_it_asks_for() -> None:
    code = (
        "import sys, gun_detection\n"
        "from gun_detection.deferral import _MODULE, _StandIn\n"
        "sys.modules[_MODULE] = _StandIn(_MODULE)\n"
        "from torch._dynamo.utils import counters\n"
        "print(type(sys.modules[_MODULE]).__name__, len(counters))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["module", "0"]
