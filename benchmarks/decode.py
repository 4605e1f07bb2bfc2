"""What the sandbox costs: decoding in a child process against decoding in this one.

    python benchmarks/decode.py

Prints milliseconds a picture of both, alternating, and their ratio.
"""

import statistics
import time

import numpy as np

from gun_detection.images import DecodeLimits, SandboxedDecoder, decode, encode_jpeg
from gun_detection.settings import load_settings


def main() -> None:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (90, 160, 3), dtype=np.uint8)
    data = encode_jpeg(coarse.repeat(8, axis=0).repeat(8, axis=1), 90)
    settings = load_settings()
    limits = DecodeLimits.from_settings(settings)
    here, child = [], []
    with SandboxedDecoder(settings) as decoder:
        decoder.decode(data)
        for _ in range(50):
            for times, function in (
                (here, lambda: decode(data, limits)),
                (child, lambda: decoder.decode(data)),
            ):
                start = time.perf_counter()
                function()
                times.append((time.perf_counter() - start) * 1000)
    first, second = statistics.median(here), statistics.median(child)
    print(f"1280x720 JPEG of {len(data) // 1000} kB, median of {len(here)}")
    print(f"in this process {first:6.1f} ms\nsandboxed       {second:6.1f} ms")
    print(f"ratio           {second / first:6.2f}")


if __name__ == "__main__":
    main()
