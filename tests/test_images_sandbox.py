"""The decoding child: dies, hangs and runs out of memory without harm to the next picture."""

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gun_detection.errors import ImageError, ServiceUnavailableError
from gun_detection.images import DecodeLimits, Reason, SandboxedDecoder, decode, encode_png
from gun_detection.settings import Settings
from tests.bad_picture_files import CORRUPT, TRUNCATED
from tests.picture_files import saved, scene


def png(width: int = 64, height: int = 48) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return encode_png(pixels)


GOOD = png()


@pytest.fixture
def decoder() -> Iterator[SandboxedDecoder]:
    with SandboxedDecoder(Settings(decode_timeout=60)) as decoder:
        yield decoder


def child_of(decoder: SandboxedDecoder) -> subprocess.Popen[bytes]:
    """Its child, started by a first picture."""
    decoder.decode(GOOD)
    assert decoder._child is not None
    return decoder._child


def refused(decoder: SandboxedDecoder, data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decoder.decode(data)
    return caught.value.reason


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def kill_at_work(child: subprocess.Popen[bytes]) -> None:
    """Kill a stopped child once a picture was sent to it."""
    assert child.stdin is not None
    pipe, waiting = child.stdin.fileno(), bytearray(4)

    def sent() -> bool:
        fcntl.ioctl(pipe, termios.FIONREAD, waiting)
        return int.from_bytes(waiting, sys.byteorder) > 0

    wait_for(sent)
    child.kill()


def state(pid: int) -> str:
    """The kernel's letter for it: R, S, D, T, Z, or X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP"])
def test_pixels_are_those_of_the_decoder_in_this_process(
    decoder: SandboxedDecoder, name: str
) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(1280, 720))).save(buffer, name)
    direct = decode(buffer.getvalue(), DecodeLimits.from_settings(Settings()))
    sandboxed = decoder.decode(buffer.getvalue())
    assert np.array_equal(sandboxed.pixels, direct.pixels)
    assert sandboxed.pixels.flags.writeable
    for field in ("width", "height", "format", "frames"):
        assert getattr(sandboxed, field) == getattr(direct, field)


def test_pixels_at_reduced_scale_are_those_of_the_decoder_in_this_process(
    decoder: SandboxedDecoder,
) -> None:
    data, fit = saved(scene(1280, 721), "JPEG"), (160, 300)
    direct = decode(data, DecodeLimits.from_settings(Settings()), fit)
    sandboxed = decoder.decode(data, fit)
    assert np.array_equal(sandboxed.pixels, direct.pixels)
    assert sandboxed.pixels.shape == (181, 320, 3)
    assert (sandboxed.width, sandboxed.height) == (1280, 721)
    assert decoder.decode(data).pixels.shape == (721, 1280, 3)


def test_one_child_serves_all_pictures_good_and_bad(decoder: SandboxedDecoder) -> None:
    child = child_of(decoder)
    for reason, data in (
        (Reason.EMPTY, b""),
        (Reason.CORRUPT, CORRUPT["PNG with a wrong checksum"]),
        (Reason.TRUNCATED, TRUNCATED["PNG that lacks a row"]),
        # Its header is in order, so that only the child sees that it has no tables.
        (Reason.CORRUPT, CORRUPT["JPEG without tables"]),
    ):
        assert refused(decoder, data) == reason
    assert child_of(decoder) is child


def test_child_killed_between_pictures_is_replaced(decoder: SandboxedDecoder) -> None:
    child = child_of(decoder)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert decoder.decode(GOOD).pixels.shape == (48, 64, 3)


def test_child_killed_at_work_is_reported_and_replaced(decoder: SandboxedDecoder) -> None:
    child = child_of(decoder)
    os.kill(child.pid, signal.SIGSTOP)
    killer = threading.Thread(target=kill_at_work, args=[child])
    killer.start()
    assert refused(decoder, GOOD) == Reason.DECODER_CRASHED
    killer.join()
    assert decoder.decode(GOOD).pixels.shape == (48, 64, 3)


def test_pipes_may_be_as_small_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses larger ones to a user who has many."""

    def refuse(pipe: int, command: int, argument: int) -> int:
        assert command == fcntl.F_SETPIPE_SZ
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    large = saved(scene(700, 500), "PNG")
    with SandboxedDecoder(Settings(decode_timeout=60)) as decoder:
        assert decoder.decode(large).pixels.shape == (500, 700, 3)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without other pipes")
def test_pipes_of_all_decoders_of_a_machine_leave_none_small() -> None:
    """Three shards of sixteen decoders, of a user whom the kernel gives 64 MiB of pipes."""
    script = """
import fcntl, os
from gun_detection.images.sandbox import _descriptors, _start
os.setgid(54321)
os.setuid(54321)
children = [_start(["/bin/cat"]) for _ in range(48)]
pipes = [pipe for child in children for pipe in _descriptors(child)]
print(*(fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) for pipe in pipes))
for child in children:
    child.kill()
    child.wait()
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    sizes = [int(size) for size in output.split()]
    assert len(sizes) == 96
    assert min(sizes) >= 2**16
    assert max(sizes) > 2**16, "pixels pass in large pieces"


@pytest.mark.parametrize("side", [48, 1500], ids=["fits the pipe", "blocks the pipe"])
def test_hanging_child_is_killed_and_replaced(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with SandboxedDecoder(Settings(decode_timeout=60)) as decoder:
        child = child_of(decoder)
        os.kill(child.pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_timeout", 2.0)
            assert refused(decoder, png(side, side)) == Reason.DECODE_TIMEOUT
        assert child.returncode == -signal.SIGKILL
        assert decoder.decode(GOOD).pixels.shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"method": 0})],
    ids=["png", "jpeg", "progressive", "webp"],
)
def test_lack_of_memory_is_reported_and_the_next_picture_decodes(
    name: str, options: dict[str, object]
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8000, 6000), "navy").save(buffer, name, **options)
    with SandboxedDecoder(Settings(decode_memory_mb=300)) as decoder:
        assert refused(decoder, buffer.getvalue()) == Reason.DECODE_MEMORY
        assert decoder.decode(GOOD).pixels.shape == (48, 64, 3)


def test_largest_allowed_picture_fits_the_default_memory(decoder: SandboxedDecoder) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (8000, 6250), "navy").save(buffer, "WEBP", method=0, lossless=True)
    assert decoder.decode(buffer.getvalue()).pixels.shape == (6250, 8000, 3)


def test_child_sees_nothing_of_the_environment(
    decoder: SandboxedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUN_DETECTION_S3_SECRET_ACCESS_KEY", "sesame")
    monkeypatch.setenv("SOME_TOKEN", "sesame")
    environment = Path(f"/proc/{child_of(decoder).pid}/environ").read_bytes()
    assert b"PYTHONPATH=" in environment
    assert b"sesame" not in environment


def test_interrupted_decode_does_not_leave_its_answer_to_the_next(
    decoder: SandboxedDecoder,
) -> None:
    class InterruptionError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise InterruptionError

    child = child_of(decoder)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        os.kill(child.pid, signal.SIGSTOP)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(InterruptionError):
            decoder.decode(png(100, 100))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert decoder.decode(GOOD).pixels.shape == (48, 64, 3)


def test_leaving_the_context_ends_the_child() -> None:
    with SandboxedDecoder(Settings()) as decoder:
        child = child_of(decoder)
    assert child.returncode == -signal.SIGKILL


def test_child_ends_with_its_killed_parent() -> None:
    script = f"""
import time
from gun_detection.images import SandboxedDecoder
from gun_detection.settings import Settings
decoder = SandboxedDecoder(Settings())
decoder.decode({GOOD!r})
print(decoder._child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert state(child) in "RSD"
        parent.kill()
    wait_for(lambda: state(child) in "XZ")


def test_child_that_does_not_start_is_not_the_fault_of_the_picture(
    decoder: SandboxedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ServiceUnavailableError) as caught:
        decoder.decode(GOOD)
    assert caught.value.reason == "DECODER_UNAVAILABLE"


def test_importing_the_decoder_does_not_import_the_detector() -> None:
    script = "import sys, gun_detection.images; print(sorted({'torch', 'cv2'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert output.stdout == b"[]\n"
