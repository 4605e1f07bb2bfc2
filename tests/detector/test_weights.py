import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torchvision.ops import FrozenBatchNorm2d

from gun_detection.detector.architectures import ARCHITECTURES, DetectorConfig, build_detector
from gun_detection.detector.detections import Detections
from gun_detection.detector.inference import Predictor
from gun_detection.detector.weights import (
    config_of,
    deserialize,
    initialize,
    load_detector,
    read_state_dict,
    serialize,
)
from gun_detection.errors import ModelError, NotFoundError

SMALL = DetectorConfig(architecture="resnet18_fpn")
PIXELS = np.full((60, 80, 3), 127, dtype=np.uint8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_goes_out_and_comes_back(name: str) -> None:
    config = DetectorConfig(architecture=name, min_size=96, max_size=128)
    torch.manual_seed(0)
    model = build_detector(config)
    data, sha256 = serialize(model, config)
    assert config_of(data) == config
    again = deserialize(data, config, sha256=sha256)
    assert serialize(again, config) == (data, sha256)
    before, after = (Predictor(m, torch.device("cpu"), 0.0)([PIXELS])[0] for m in (model, again))
    np.testing.assert_array_equal(before.boxes, after.boxes)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="resnet18_fpn"):
        DetectorConfig(architecture="yolo")


def test_frozen_statistics_do_not_move() -> None:
    frozen, trainable = (
        build_detector(DetectorConfig(architecture="resnet18_fpn", norm=norm))
        for norm in ("frozen", "trainable")
    )
    assert any(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in trainable.modules())


def test_changed_bytes_are_not_loaded() -> None:
    data, sha256 = serialize(build_detector(SMALL), SMALL)
    with pytest.raises(ModelError) as caught:
        deserialize(data[:-1] + b"x", SMALL, sha256=sha256)
    assert caught.value.reason == "SHA256_MISMATCH"


@pytest.mark.parametrize("data", [b"", b"junk", b"\xff" * 100, save({"a": torch.zeros(1)})])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        deserialize(data, SMALL)


class _Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("this code ran",))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_is_never_run(wrapped: bool, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = io.BytesIO()
    if wrapped:
        torch.save({"weight": _Hostile()}, buffer)
    else:
        pickle.dump(_Hostile(), buffer)
    with pytest.raises(ModelError, match="not a plain weights file"):
        read_state_dict(buffer.getvalue(), "model.pth")
    assert capsys.readouterr().out == ""


def test_a_plain_pth_is_imported_whole_or_not_at_all() -> None:
    source, target = build_detector(SMALL), build_detector(SMALL)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    state = read_state_dict(buffer.getvalue(), "model.pth")
    load_detector(target, SMALL, state, "model.pth")
    assert serialize(source, SMALL) == serialize(target, SMALL)
    state.popitem()
    with pytest.raises(ModelError, match="1 tensors are missing"):
        load_detector(target, SMALL, state, "model.pth")


def test_a_classifier_gives_the_backbone(shared_data: Path) -> None:
    path = shared_data.parent / "weights" / "mobilenet_v2_imagenet.pth"
    if not path.exists():
        pytest.skip(f"no pretrained backbone at {path}")
    config = DetectorConfig(architecture="mobilenet_v2_fpn")
    model = build_detector(config)
    assert initialize(model, config, str(path), None) == 260
    with pytest.raises(ModelError, match="not for resnet18_fpn"):
        initialize(build_detector(SMALL), SMALL, str(path), None)


def test_a_detector_of_other_classes_keeps_our_predictor(tmp_path: Path) -> None:
    model = build_detector(SMALL)
    state = {k: v.clone() for k, v in build_detector(SMALL).state_dict().items()}
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(91, 256)
    state["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(91)
    own = model.roi_heads.box_predictor.cls_score.weight.clone()
    path = tmp_path / "coco.pth"
    torch.save(state, path)
    assert initialize(model, SMALL, str(path), None) == len(state) - 2
    torch.testing.assert_close(model.roi_heads.box_predictor.cls_score.weight, own)


def test_initial_weights_that_are_not_there_say_what_to_set() -> None:
    with pytest.raises(NotFoundError, match="coco, imagenet, none"):
        initialize(build_detector(SMALL), SMALL, "/nowhere.pth", None)
    with pytest.raises(ModelError, match="GUN_DETECTION_INITIAL_WEIGHTS"):
        initialize(build_detector(SMALL), SMALL, "coco", None)


def test_other_initial_weights_than_those_meant_are_refused(tmp_path: Path) -> None:
    data, sha256 = serialize(build_detector(SMALL), SMALL)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    assert initialize(build_detector(SMALL), SMALL, str(path), None, sha256=sha256)
    with pytest.raises(ModelError, match="other weights") as caught:
        initialize(build_detector(SMALL), SMALL, str(path), None, sha256="0" * 64)
    assert caught.value.reason == "SHA256_MISMATCH"


def test_detections_are_inside_ordered_and_solid() -> None:
    torch.manual_seed(1)
    [found] = Predictor(build_detector(SMALL), torch.device("cpu"), 0.0)([PIXELS])
    assert len(found.scores) > 0
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes[:, :2] >= 0).all()
    assert (found.boxes[:, 2:] <= [80, 60]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert len(found.above(2.0).scores) == 0
    with pytest.raises(ValueError, match="do not match"):
        Detections(np.zeros((2, 4), np.float32), np.zeros(1, np.float32))
