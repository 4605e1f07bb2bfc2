import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from embedded import seaweedfs
from embedded.config import PlatformError
from tests.conftest import Servers


def test_a_stopped_server_does_not_answer(servers: Servers) -> None:
    assert seaweedfs.answers(servers.seaweedfs)
    stopped = replace(servers.seaweedfs, ports=replace(servers.seaweedfs.ports, s3=1))
    assert not seaweedfs.answers(stopped)


def test_the_identities_are_private(servers: Servers) -> None:
    mode = (servers.seaweedfs.folder / "identities.json").stat().st_mode
    assert mode & 0o077 == 0


def test_a_socket_that_another_user_left_is_named(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seaweedfs, "_SOCKETS", tmp_path)
    seaweedfs.check_sockets(servers.seaweedfs)
    path = f"seaweedfs-s3-grpc-{servers.seaweedfs.ports.s3_grpc}.sock"
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    monkeypatch.setattr(os, "geteuid", lambda: Path(path).stat().st_uid)
    seaweedfs.check_sockets(servers.seaweedfs)
    monkeypatch.setattr(os, "geteuid", lambda: Path(path).stat().st_uid + 1)
    with pytest.raises(PlatformError, match=r"belongs to another user: .*PLATFORM_S3_GRPC_PORT"):
        seaweedfs.check_sockets(servers.seaweedfs)
