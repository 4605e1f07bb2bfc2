"""What Prometheus reads; in several processes through files of PROMETHEUS_MULTIPROC_DIR."""

import os
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

REQUESTS = Counter(
    "gun_detection_requests_total", "Requests by route and status.", ["route", "status"]
)
REQUEST_SECONDS = Histogram(
    "gun_detection_request_seconds", "From the request to its answer.", ["route"], buckets=_SECONDS
)
PICTURES = Counter("gun_detection_pictures_total", "Pictures by outcome.", ["outcome"])
DETECTIONS = Counter("gun_detection_detections_total", "Boxes at or above the threshold.")
STAGE_SECONDS = Histogram(
    "gun_detection_stage_seconds", "Time of a picture by stage.", ["stage"], buckets=_SECONDS
)
BATCH = Histogram(
    "gun_detection_batch_pictures", "Pictures in one call.", buckets=(1, 2, 4, 8, 16, 32)
)
UNDER_WAY = Gauge(
    "gun_detection_pictures_under_way", "Admitted, not yet answered.", multiprocess_mode="livesum"
)
MODEL = Gauge(
    "gun_detection_model", "1 for what answers now.", ["model"], multiprocess_mode="livemax"
)
STALE = Gauge(
    "gun_detection_model_stale",
    "1 while a newer champion cannot be loaded or looked for.",
    multiprocess_mode="livemax",
)


def forget_dead_processes() -> None:
    """What processes that are gone said of their present is not true any more."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    for file in Path(folder).glob("gauge_live*_*.db") if folder else ():
        pid = int(file.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            mark_process_dead(pid)  # type: ignore[no-untyped-call]


def exposition() -> tuple[bytes, str]:
    """(document, content type)."""
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
