"""Metrics of detections against labels, as data.

Average precision comes from a maintained COCO evaluator; counts at the operating threshold use
the COCO rule too: by falling score, each detection takes the unmatched box it overlaps most, from
IoU 0.5 on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gun_detection.detector.inference import Detections

# Part of the identity of a cached evaluation: raise it when a number would come out differently.
EVALUATOR_VERSION = "1"
_IOU = 0.5


class Metrics(BaseModel):
    """Quality on one split. `None` where there is nothing to measure (no such boxes or images).

    ap: COCO AP, mean over IoU 0.50 to 0.95; ap50, ap75: at one IoU; by box size as COCO's
    (areas below 32², up to 96², above). precision, recall and the false positives are counted at
    `threshold`: per gun-free picture (`false_positives_per_negative`), and as the share of
    gun-free pictures with any (`false_alarm_rate`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    boxes: int
    negatives: int
    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    threshold: float
    precision: float | None
    recall: float | None
    false_positives_per_negative: float | None
    false_alarm_rate: float | None


def compute_metrics(
    truths: Sequence[NDArray[np.floating[Any]]],
    detections: Sequence[Detections],
    threshold: float,
) -> Metrics:
    """Metrics over pictures; `truths` holds each picture's boxes, (N, 4) xyxy pixels."""
    if len(truths) != len(detections):
        raise ValueError(f"{len(truths)} pictures have labels and {len(detections)} detections")
    scores = _coco(truths, detections)
    counts = [
        _count(truth, found.above(threshold))
        for truth, found in zip(truths, detections, strict=True)
    ]
    true_positives = sum(true for true, _ in counts)
    false_positives = sum(false for _, false in counts)
    boxes = sum(len(truth) for truth in truths)
    alarms = [false for truth, (_, false) in zip(truths, counts, strict=True) if len(truth) == 0]
    return Metrics(
        images=len(truths),
        boxes=boxes,
        negatives=len(alarms),
        **scores,
        threshold=threshold,
        precision=_ratio(true_positives, true_positives + false_positives),
        recall=_ratio(true_positives, boxes),
        false_positives_per_negative=_ratio(sum(alarms), len(alarms)),
        false_alarm_rate=_ratio(sum(count > 0 for count in alarms), len(alarms)),
    )


def choose_threshold(
    truths: Sequence[NDArray[np.floating[Any]]], detections: Sequence[Detections]
) -> float:
    """The score with the best F1 over these pictures (use validation, never the holdout).

    0.5 where nothing was detected or nothing could be.
    """
    scores: list[float] = []
    correct: list[bool] = []
    for truth, found in zip(truths, detections, strict=True):
        scores += found.scores.tolist()
        correct += match(truth, found)
    total = sum(len(truth) for truth in truths)
    if not any(correct) or not total:
        return 0.5
    order = np.argsort(-np.asarray(scores), kind="stable")
    hits = np.cumsum(np.asarray(correct)[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + total)
    # Only where the score falls can a threshold cut: tied scores stay or go together.
    ordered = np.asarray(scores)[order]
    cuts = np.append(ordered[:-1] > ordered[1:], True)
    best = int(np.argmax(np.where(cuts, f1, -1.0)))
    following = ordered[best + 1] if best + 1 < len(ordered) else 0.0
    return round(float(ordered[best] + following) / 2, 4)


def _coco(
    truths: Sequence[NDArray[np.floating[Any]]], detections: Sequence[Detections]
) -> dict[str, float | None]:
    names = {
        "ap": "AP_all",
        "ap50": "AP_50",
        "ap75": "AP_75",
        "ap_small": "AP_small",
        "ap_medium": "AP_medium",
        "ap_large": "AP_large",
    }
    if not any(len(truth) for truth in truths):
        return dict.fromkeys(names)
    truth_set = COCO(
        {
            "images": [{"id": index} for index in range(len(truths))],
            "categories": [{"id": 1, "name": "gun"}],
            "annotations": _annotations(truths),
        }
    )
    rows = [
        {"image_id": index, "category_id": 1, "bbox": box, "score": float(score)}
        for index, found in enumerate(detections)
        for box, score in zip(_xywh(found.boxes), found.scores, strict=True)
    ]
    evaluator = COCOeval_faster(
        truth_set, truth_set.loadRes(rows), "bbox", print_function=lambda *_: None
    )
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    found = evaluator.stats_as_dict
    # The evaluator answers -1 where there are no boxes of a size.
    return {
        name: (float(found[theirs]) if found[theirs] >= 0 else None)
        for name, theirs in names.items()
    }


def _annotations(truths: Sequence[NDArray[np.floating[Any]]]) -> list[dict[str, Any]]:
    boxes = [(index, box) for index, truth in enumerate(truths) for box in _xywh(truth)]
    return [
        {
            "id": number,
            "image_id": index,
            "category_id": 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, (index, box) in enumerate(boxes, start=1)
    ]


def _xywh(boxes: NDArray[np.floating[Any]]) -> list[list[float]]:
    return [[float(x1), float(y1), float(x2 - x1), float(y2 - y1)] for x1, y1, x2, y2 in boxes]


def _count(truth: NDArray[np.floating[Any]], found: Detections) -> tuple[int, int]:
    """(true positives, false positives)"""
    matched = match(truth, found)
    return sum(matched), len(matched) - sum(matched)


def match(truth: NDArray[np.floating[Any]], found: Detections) -> list[bool]:
    """Whether each detection, best first, takes a box."""
    free = np.ones(len(truth), dtype=bool)
    result = []
    for box in found.boxes:
        overlap = np.where(free, _iou(box, truth), 0.0)
        hit = len(overlap) > 0 and bool(overlap.max() >= _IOU)
        if hit:
            free[overlap.argmax()] = False
        result.append(hit)
    return result


def _iou(
    box: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    if len(others) == 0:
        return np.zeros(0)
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    inter = np.clip(high - low, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    union = (box[2] - box[0]) * (box[3] - box[1]) + areas - inter
    result: NDArray[np.floating[Any]] = inter / union
    return result


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
