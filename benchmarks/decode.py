"""What decoding costs: in a child process against in this one, whole against at reduced scale.

    python benchmarks/decode.py [--fit SHORTER LONGEST]

Prints CPU milliseconds a picture, those of the child process included, and their ratios. `--fit` is
the size that the network resizes pictures to.
"""

import argparse
import resource
import time

import numpy as np
from PIL import Image

from gun_detection.images import DecodeLimits, SandboxedDecoder, decode, encode_jpeg
from gun_detection.settings import Settings, load_settings

SIZES = ((284, 177), (640, 480), (1280, 720), (1920, 1080), (4032, 3024))
# So many pixels are decoded for a number: enough to tell a tenth of it apart.
PIXELS = 150_000_000
MOST = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=int, nargs=2, default=(384, 512))
    shorter, longest = parser.parse_args().fit
    settings = load_settings()
    print(f"CPU ms a picture (JPEG, quality 90), reduced for {shorter}/{longest} pixels")
    print("                 kB   here   child  child/here  reduced  whole/reduced")
    for width, height in SIZES:
        data = picture(width, height)
        count = min(MOST, PIXELS // (width * height))
        here = cost_here(data, settings, count)
        child = cost_of_child(data, settings, count, None)
        reduced = cost_of_child(data, settings, count, (shorter, longest))
        print(
            f"{width:5d}x{height:<5d} {len(data) // 1000:7d} {here:6.2f} {child:7.2f} "
            f"{child / here:11.2f} {reduced:8.2f} {child / reduced:14.2f}",
            flush=True,
        )


def picture(width: int, height: int) -> bytes:
    """As fine as a photograph: broad shapes under the noise of a camera."""
    random = np.random.default_rng(0)
    shapes = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC))
    noise = random.normal(0, 5, smooth.shape)
    return encode_jpeg((smooth + noise).clip(0, 255).astype(np.uint8), 90)


def cost_here(data: bytes, settings: Settings, count: int) -> float:
    limits = DecodeLimits.from_settings(settings)
    decode(data, limits)
    start = time.process_time()
    for _ in range(count):
        decode(data, limits)
    return (time.process_time() - start) * 1000 / count


def cost_of_child(
    data: bytes, settings: Settings, count: int, fit: tuple[int, int] | None
) -> float:
    """Without what the start of the child costs, which one picture shows."""
    return (_run(data, settings, 1 + count, fit) - _run(data, settings, 1, fit)) * 1000 / count


def _run(data: bytes, settings: Settings, count: int, fit: tuple[int, int] | None) -> float:
    before = _cpu_seconds()
    with SandboxedDecoder(settings) as decoder:
        for _ in range(count):
            decoder.decode(data, fit)
    return _cpu_seconds() - before


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
