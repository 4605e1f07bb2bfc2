import json
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from embedded import config
from embedded.config import PlatformError, Ports, check_port, load_platform, remember_ports


def test_a_platform_keeps_its_credentials_and_nobody_else_reads_them(directory: Path) -> None:
    first, second = load_platform(), load_platform()
    assert first == second
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "credentials.json").stat().st_mode) == 0o600
    assert set(first.credentials.passwords) == {"admin", "operator", "reviewer", "viewer"}
    assert first.credentials.postgres_password not in repr(first)
    assert first.credentials.passwords["admin"] not in repr(first)


def test_two_platforms_share_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_LONGEST_SOCKET_PATH", 4096)
    secrets = []
    for name in ("one", "two"):
        monkeypatch.setenv("PLATFORM_DIR", str(tmp_path / name))
        content = json.loads((load_platform().directory / "credentials.json").read_text())
        del content["since"]
        secrets += [*content.pop("passwords").values(), *content.values()]
    assert len(set(secrets)) == len(secrets)


def test_a_damaged_file_is_named(directory: Path) -> None:
    load_platform()
    (directory / "credentials.json").write_text("{")
    with pytest.raises(PlatformError, match=r"credentials\.json is damaged"):
        load_platform()


def test_a_folder_with_other_things_in_it_is_left_alone(directory: Path) -> None:
    directory.mkdir(mode=0o755)
    (directory / "thesis.txt").touch()
    with pytest.raises(PlatformError, match="is not empty and holds no platform"):
        load_platform()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


def test_a_percent_sign_in_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_DIR", "/tmp/100%")
    with pytest.raises(PlatformError, match="percent sign"):
        load_platform()


def test_sockets_of_a_deep_folder_get_a_short_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLATFORM_DIR", str(tmp_path / "platform"))
    monkeypatch.setattr(config, "_LONGEST_SOCKET_PATH", 4096)
    assert load_platform().sockets == tmp_path / "platform" / "run"
    monkeypatch.setattr(config, "_LONGEST_SOCKET_PATH", 10)
    short = load_platform().sockets
    assert tmp_path not in short.parents
    # From every shell the same.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert load_platform().sockets == short
    assert stat.S_IMODE(short.stat().st_mode) == 0o700
    short.rmdir()


def test_ports_follow_the_environment_then_the_last_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_platform().ports == Ports()
    monkeypatch.setenv("PLATFORM_AIRFLOW_PORT", "9999")
    moved = load_platform()
    assert moved.ports == Ports(airflow=9999)
    remember_ports(moved)
    monkeypatch.delenv("PLATFORM_AIRFLOW_PORT")
    assert load_platform().ports == Ports(airflow=9999)
    monkeypatch.setenv("PLATFORM_AIRFLOW_PORT", "9998")
    assert load_platform().ports == Ports(airflow=9998)


@pytest.mark.parametrize("text", ["0", "65536", "-1", "http", "8080 "])
def test_a_port_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_S3_PORT", text)
    with pytest.raises(PlatformError, match=r"PLATFORM_S3_PORT is .*: set it to a port"):
        Ports.choose({})


def test_one_port_for_two_things_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_TENSORBOARD_PORT", "8080")
    with pytest.raises(PlatformError, match="port 8080 is set for two things"):
        Ports.choose({})


def test_a_port_that_is_no_longer_known_is_forgotten() -> None:
    assert Ports.choose({"airflow": 9000, "gopher": 70}) == Ports(airflow=9000)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_named_with_what_moves_it(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(PlatformError, match=f"port {port} is taken: .*PLATFORM_AIRFLOW_PORT"):
            check_port("airflow", port)
    check_port("airflow", port)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.check_disk(tmp_path)
    monkeypatch.setattr(config, "MINIMUM_FREE_BYTES", 2**62)
    with pytest.raises(PlatformError, match=f"MiB are free in {tmp_path}"):
        config.check_disk(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    config.write_private(path, "old")

    def fail(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        config.write_private(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_says_so_already_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    config.write_private(path, "same")
    before = path.stat().st_ino
    config.write_private(path, "same")
    assert path.stat().st_ino == before, "a platform can be looked at on a full disk"
    path.chmod(0o644)
    config.write_private(path, "same")
    assert path.stat().st_mode & 0o077 == 0
    config.write_private(path, "other")
    assert path.read_text() == "other"
