"""The tutorials' prediction service against ours: the same weights, pictures and clients.

    python benchmarks/serving.py --data DIR --weights FILE [--clients N ...] [--seconds S]

DIR holds `pistols/` and `negatives/`, FILE is what `benchmarks/accuracy.py` trained on them. The
tutorials' service is a FastAPI handler that opens the picture with PIL, runs torchvision's detector
on it in the event loop, draws, and answers with PNG. Ours is `gun-detection serve` with the weights
as champion, packaged as `retrain` does. Both are asked for PNG by N clients at once, each of which
sends its next picture when it has the answer to the last, for S seconds, after a round to warm up.

Prints, for each number of clients, requests/s and the median and 99th percentile of the latency of
both, and the ratios. The clients share the machine with the service.
"""

import argparse
import asyncio
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import httpx
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Response, UploadFile
from PIL import Image, ImageDraw
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import to_tensor

from embedded.servers import make_bucket, temporary_servers
from gun_detection import stages
from gun_detection.database import open_session, upgrade
from gun_detection.release.champion import promote
from gun_detection.release.packages import engine_for
from gun_detection.release.registry import NewModel, open_file, publish
from gun_detection.settings import load_settings
from gun_detection.storage import Storage

THRESHOLD = 0.5
PICTURES = 60
USUAL, OURS = "tutorials' service", "ours"


@dataclass(frozen=True)
class Load:
    """What clients saw: seconds of each answer, and of all of them together."""

    latencies: list[float]
    seconds: float

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.latencies, percent))


def main() -> None:
    if sys.argv[1:2] == ["--usual-service"]:
        uvicorn.run(usual_service(Path(sys.argv[2])), port=int(sys.argv[3]), log_level="warning")
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=30)
    arguments = parser.parse_args()
    files = sorted((arguments.data / "pistols" / "Images").iterdir())
    pictures = [path.read_bytes() for path in files[:: len(files) // PICTURES]]
    with temporary_servers() as servers, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= servers.variables("postgres", "data", "uploads")
        os.environ["GUN_DETECTION_HOME"] = str(folder / "home")
        engine = make_champion(arguments, folder)
        print(f"ours answers with {engine}; {len(pictures)} pictures")
        port = free_port()
        ours = [str(Path(sys.executable).with_name("gun-detection")), "serve", "--port", str(port)]
        os.environ["GUN_DETECTION_SERVE_ANONYMOUS"] = "true"
        os.environ["GUN_DETECTION_SERVE_RATE_LIMIT"] = "off"
        other = free_port()
        usual = [sys.executable, __file__, "--usual-service", str(arguments.weights), str(other)]
        for clients in arguments.clients:
            # One after the other, so that neither takes the other's cores.
            with service(usual, other, "/docs"):
                before = measure(other, pictures, clients, arguments.seconds)
            show(USUAL, clients, before)
            with service(ours, port, "/ready"):
                after = measure(port, pictures, clients, arguments.seconds)
            show(OURS, clients, after)
            print(
                f"  {clients:2} clients: {after.rate / before.rate:.1f} times the requests, median "
                f"{after.percentile(50) / before.percentile(50):.2f} and p99 "
                f"{after.percentile(99) / before.percentile(99):.2f} of the latency"
            )


def make_champion(arguments: argparse.Namespace, folder: Path) -> str:
    """Ingest, import, package and promote, as users do; the engine that is chosen."""
    # The same split as where the weights were trained.
    os.environ["GUN_DETECTION_VALIDATION_SHARE"] = "0.1"
    os.environ["GUN_DETECTION_HOLDOUT_SHARE"] = "0.25"
    settings = load_settings()
    storage = Storage(settings)
    for bucket in (settings.data_bucket, settings.uploads_bucket):
        make_bucket(storage, bucket)
    upgrade(settings)
    source = folder / "source"
    for part in ("pistols", "negatives"):
        shutil.copytree(arguments.data / part, source / part)
    dataset = stages.ingest(str(source), settings)["dataset_id"]
    model, detector, _ = open_file(arguments.weights)
    # The tutorials' service looks at each picture once; a mirrored detector does so twice.
    detector = detector.model_copy(update={"mirrored": False})
    new = NewModel(
        model=model,
        detector=detector,
        config={"detector": detector.model_dump(mode="json")},
        config_hash="",
        # Packages are checked on its holdout.
        dataset_id=dataset,
        parent_id=None,
        threshold=THRESHOLD,
        training={},
    )
    with open_session(settings) as session:
        version = publish(new, settings, storage, session)
        promote(session, version.id, actor="benchmark", reason="to be measured")
    for made in stages.package(settings, version.id)["packages"]:
        print(f"{made['engine']}: {made['reason']}")
    return engine_for(version, settings)


def usual_service(weights: Path) -> FastAPI:
    """As tutorials have it."""
    model, _, _ = open_file(weights)
    pool = model.roi_heads.box_roi_pool
    model.roi_heads.box_roi_pool = MultiScaleRoIAlign(
        pool.featmap_names, pool.output_size, pool.sampling_ratio
    )
    model.eval()
    app = FastAPI()

    @app.post("/predict/")
    async def predict(file: UploadFile) -> Response:
        image = Image.open(io.BytesIO(await file.read())).convert("RGB")
        with torch.no_grad():
            [found] = model([to_tensor(image)])
        draw = ImageDraw.Draw(image)
        for box, score in zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True):
            if score >= THRESHOLD:
                draw.rectangle(box, outline="red", width=3)
                draw.text((box[0], box[1]), f"{score:.2f}", fill="red")
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    return app


@contextmanager
def service(command: Sequence[str], port: int, ready: str) -> Iterator[None]:
    # Lines of a log for each request belong to its work, and to nobody's screen.
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}{ready}").is_success:
                    break
            except httpx.TransportError:
                assert process.poll() is None, "the service did not start"
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def measure(port: int, pictures: Sequence[bytes], clients: int, seconds: float) -> Load:
    asyncio.run(_load(port, pictures[:8], clients, None))
    return asyncio.run(_load(port, pictures, clients, seconds))


async def _load(port: int, pictures: Sequence[bytes], clients: int, seconds: float | None) -> Load:
    """So many clients for `seconds`, or until each has sent every picture once."""
    latencies: list[float] = []
    began = time.perf_counter()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        own = [*pictures[number % len(pictures) :], *pictures[: number % len(pictures)]]
        for picture in own if seconds is None else cycle(own):
            start = time.perf_counter()
            if seconds is not None and start - began > seconds:
                return
            answer = await http.post("/predict/", files={"file": ("x.jpg", picture)})
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "image/png"
            latencies.append(time.perf_counter() - start)

    limits = httpx.Limits(max_connections=clients)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return Load(latencies, time.perf_counter() - began)


def show(name: str, clients: int, load: Load) -> None:
    print(
        f"{name:>18}, {clients:2} clients: {load.rate:6.2f} requests/s, latency "
        f"{load.percentile(50):6.3f} s median, {load.percentile(99):6.3f} s p99, "
        f"{len(load.latencies)} answers",
        flush=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
