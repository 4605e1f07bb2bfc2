import torch

from gun_detection.detector.architectures import DetectorConfig, build_detector


def test_the_small_detector_proposes_from_stride_8_on_and_looks_at_stride_4() -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture="mobilenet_v2_fpn", norm="folded"))
    model.eval()
    images = torch.rand(1, 3, 384, 512)
    levels = model.backbone(images)
    assert [tuple(level.shape[2:]) for level in levels.values()] == [
        (96, 128),
        (48, 64),
        (24, 32),
        (12, 16),
        (6, 8),
    ]
    assert {level.shape[1] for level in levels.values()} == {128}
    read: list[int] = []
    model.rpn.head.conv.register_forward_hook(lambda _, x, __: read.append(x[0].shape[-1]))
    model(list(images))
    assert read == [64, 32, 16, 8]
    assert model.roi_heads.box_roi_pool.featmap_names == ["0", "1", "2", "3"]


def test_both_its_parts_learn() -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(architecture="mobilenet_v2_fpn", norm="folded"))
    # A gun that is small enough for the finest level.
    target = {"boxes": torch.tensor([[100.0, 100.0, 140.0, 130.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 384, 512)], [target])
    torch.stack(list(losses.values())).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == [], "a process group would wait for these for ever"


def test_fewer_proposals_are_a_matter_of_the_configuration() -> None:
    few = DetectorConfig(architecture="resnet18_fpn", max_proposals=7)
    model = build_detector(few).eval()
    seen = []
    model.roi_heads.box_head.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    model([torch.rand(3, 200, 300)])
    assert seen == [7]
    assert model.rpn._post_nms_top_n["training"] == 150
