import errno
import pickle

import pytest

from gun_detection.errors import (
    GunDetectionError,
    ImageError,
    TerminalError,
    TransientError,
    explain_os_error,
)


def _leaves(kind: type[GunDetectionError]) -> list[type[GunDetectionError]]:
    below = [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]
    return below or [kind]


@pytest.mark.parametrize("kind", _leaves(GunDetectionError))
def test_every_leaf_is_terminal_or_transient_and_has_a_reason(
    kind: type[GunDetectionError],
) -> None:
    assert issubclass(kind, TerminalError) != issubclass(kind, TransientError)
    assert kind("why").reason == kind("why").reason.upper()


def test_the_reason_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(ImageError("cut off", reason="TRUNCATED")))
    assert (type(error), error.reason, str(error)) == (ImageError, "TRUNCATED", "cut off")


def test_a_full_disk_is_said_with_what_to_do() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/file")
    assert "the disk is full at /data/file: free some space" in explain_os_error(full)
    assert explain_os_error(PermissionError(13, "Permission denied", "/x")).endswith("'/x'")
