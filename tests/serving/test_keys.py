"""API keys: who may do what, until when."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from gun_detection.errors import NotFoundError, SettingsError
from gun_detection.serving import keys as serving_keys
from gun_detection.serving.keys import (
    Key,
    KeyRing,
    add_key,
    key_of,
    new_key,
    read_keys,
    revoke_key,
    rotate_key,
    today,
)
from gun_detection.settings import Settings
from tests.picture_files import saved, scene
from tests.serving.conftest import PROGRAM, Running

PICTURE = saved(scene(64, 64), "JPEG")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "api-keys"


def ring(path: Path, **settings: Any) -> KeyRing:
    return KeyRing(Settings(serve_keys_file=path, **settings))


def test_only_a_hash_is_kept(path: Path) -> None:
    secret, key = new_key("camera-1", ["predict"], None)
    add_key(path, key)
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert ring(path).find(secret) == key
    assert ring(path).find(secret + "x") is None
    assert ring(path).find("") is None
    assert new_key("camera-1", ["predict"], None)[0] != secret


def test_key_ends_with_its_last_day() -> None:
    day = date(2026, 2, 28)
    key = Key("x", frozenset({"predict"}), day, "0" * 64)
    assert key.valid(day)
    assert not key.valid(day + timedelta(days=1))
    assert Key.parse(str(key)) == key
    assert str(Key.parse(f"{key}:2026-01-01")) == f"{key}:2026-01-01"


def test_ended_key_opens_nothing(path: Path) -> None:
    secret, key = new_key("x", ["predict"], -1)
    add_key(path, key)
    assert ring(path).find(secret) is None
    assert len(ring(path)) == 0
    # Its name is free again.
    add_key(path, new_key("x", ["predict"], None)[1])


def test_rotation_lets_both_keys_in_for_a_while(path: Path) -> None:
    before, key = new_key("x", ["predict", "store"], None)
    add_key(path, key)
    after, _ = rotate_key(path, "x", overlap_days=7, days=90)
    keys = ring(path)
    old, new = keys.find(before), keys.find(after)
    assert old is not None
    assert new is not None
    assert (old.end, new.end) == (today() + timedelta(days=7), today() + timedelta(days=90))
    assert new.scopes == key.scopes
    # A key that ends sooner is not made to last longer.
    rotate_key(path, "x", overlap_days=100, days=None)
    found = ring(path).find(before)
    assert found is not None
    assert found.end == old.end


def test_rotated_key_lasts_as_long_as_the_one_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_key(path, new_key("camera", ["predict"], 90)[1])
    add_key(path, new_key("other", ["predict"], None)[1])
    # It is rotated shortly before its end, and again before the old one has ended.
    later = today() + timedelta(days=85)
    monkeypatch.setattr(serving_keys, "today", lambda: later)
    for _ in range(2):
        secret, key = rotate_key(path, "camera", overlap_days=7, days=None)
        assert key.end == later + timedelta(days=90)
        assert ring(path).find(secret) == key
    assert rotate_key(path, "other", overlap_days=7, days=None)[1].end is None


def test_rotation_asks_how_long_where_the_entry_does_not_say(path: Path) -> None:
    path.parent.mkdir()
    entry = f"camera:predict:{today()}:{'0' * 64}\n"
    path.write_text(entry)
    with pytest.raises(SettingsError, match=r"camera .* --days"):
        rotate_key(path, "camera", overlap_days=7, days=None)
    assert path.read_text() == entry
    assert rotate_key(path, "camera", overlap_days=7, days=3)[1].days == 3


def test_names_are_taken_once_and_found_again(path: Path) -> None:
    add_key(path, new_key("x", ["predict"], None)[1])
    with pytest.raises(SettingsError, match="rotate it"):
        add_key(path, new_key("x", ["predict"], None)[1])
    for change in (revoke_key, lambda path, name: rotate_key(path, name, 1, None)):
        with pytest.raises(NotFoundError, match="nobody"):
            change(path, "nobody")
    assert revoke_key(path, "x") == 1
    assert read_keys(path) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("x", "not name:scopes:end:sha256"),
        (f"x:predict:never:{'g' * 64}", "no sha256"),
        (f"x:everything:never:{'0' * 64}", "choose from predict, store, metrics"),
        (f"x::never:{'0' * 64}", "choose from"),
        (f"x:predict:tomorrow:{'0' * 64}", "YYYY-MM-DD"),
        (f"x:predict:never:{'0' * 64}:yesterday", "was made on 'yesterday': write YYYY-MM-DD"),
        (f"x:predict:never:{'0' * 64}:2026-01-01:", "not name:scopes:end:sha256"),
        (f"../x:predict:never:{'0' * 64}", "no name"),
    ],
)
def test_damaged_entries_are_refused_by_name(path: Path, entry: str, message: str) -> None:
    path.parent.mkdir()
    path.write_text(entry + "\n")
    with pytest.raises(SettingsError, match=message):
        ring(path)
    with pytest.raises(SettingsError, match=message):
        ring(path.with_name("none"), serve_keys=entry)


def test_a_key_that_was_taken_out_opens_nothing_while_the_file_is_damaged(path: Path) -> None:
    secret, key = new_key("gone", ["predict"], None)
    add_key(path, key)
    keys = ring(path)
    assert keys.find(secret) == key
    path.write_text("a slip of the pen\n")
    keys._looked = 0.0
    for _ in range(3):
        with pytest.raises(SettingsError):
            keys.find(secret)
    path.write_text("")
    assert keys.find(secret) is None


def test_settings_and_file_both_count(path: Path) -> None:
    one, key = new_key("one", ["predict"], None)
    two, other = new_key("two", ["metrics"], None)
    add_key(path, key)
    keys = ring(path, serve_keys=f" {other}\n")
    assert keys.find(one) == key
    assert keys.find(two) == other


def test_a_revoked_name_that_the_environment_has_too_is_told(path: Path) -> None:
    key = new_key("two-places", ["predict"], None)[1]
    add_key(path, key)
    places = {"GUN_DETECTION_SERVE_KEYS_FILE": str(path), "GUN_DETECTION_SERVE_KEYS": str(key)}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [PROGRAM, "keys", *arguments]
        return subprocess.run(
            command, env=os.environ | places, capture_output=True, text=True, check=False
        )

    def listed() -> list[str]:
        return [row["where"] for row in json.loads(run("list", "--json").stdout)]

    assert listed() == [str(path), "GUN_DETECTION_SERVE_KEYS"]
    revoked = run("revoke", "two-places")
    assert (revoked.returncode, "GUN_DETECTION_SERVE_KEYS goes on" in revoked.stderr) == (0, True)
    assert read_keys(path) == []
    assert listed() == ["GUN_DETECTION_SERVE_KEYS"]
    again = run("revoke", "two-places")
    assert (again.returncode, "GUN_DETECTION_SERVE_KEYS goes on" in again.stderr) == (1, True)


def test_a_damaged_variable_keeps_no_key_in_the_file(path: Path) -> None:
    for name in ("stolen", "other"):
        add_key(path, new_key(name, ["predict"], None)[1])
    places = {"GUN_DETECTION_SERVE_KEYS_FILE": str(path), "GUN_DETECTION_SERVE_KEYS": "slip"}

    def run(*arguments: str) -> "tuple[int, str, Any]":
        command = [PROGRAM, "keys", *arguments, "--json"]
        done = subprocess.run(
            command, env=os.environ | places, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr, json.loads(done.stdout)

    damaged = "GUN_DETECTION_SERVE_KEYS is damaged: an API key's entry is not"
    code, said, answer = run("revoke", "stolen")
    assert (code, answer["error"]["reason"]) == (2, "SETTINGS")
    assert f"all keys stolen in {path} are revoked, but {damaged}" in said
    assert [key.name for key in read_keys(path)] == ["other"]
    code, said, _ = run("revoke", "stolen")
    assert (code, f"no API key stolen in {path}, but {damaged}" in said) == (2, True)
    code, said, rows = run("list")
    assert (code, damaged in said) == (2, True)
    assert [row["name"] for row in rows] == ["other"]


def test_keys_and_entries_are_whole_in_narrow_windows() -> None:
    run = subprocess.run(
        [PROGRAM, "keys", "new", "camera-1", "--print"],
        env=os.environ | {"COLUMNS": "40"},
        capture_output=True,
        text=True,
        check=True,
    )
    shown = dict(line.split(maxsplit=1) for line in run.stdout.splitlines()[1:])
    entry = Key.parse(shown["entry"])
    assert key_of(shown["key"], entry.name, entry.scopes) == entry


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away: that is not checked")
def test_what_root_writes_belongs_to_who_has_to_read_it(path: Path) -> None:
    def owners() -> set[tuple[int, int]]:
        return {(one.stat().st_uid, one.stat().st_gid) for one in path.parent.iterdir()}

    path.parent.mkdir()
    os.chown(path.parent, 1234, 5678)
    add_key(path, new_key("x", ["predict"], None)[1])
    assert owners() == {(1234, 5678)}
    os.chown(path, 2345, 6789)
    rotate_key(path, "x", overlap_days=1, days=None)
    assert owners() == {(2345, 6789)}


@pytest.mark.parametrize("suffix", [".new", ".lock"])
def test_no_link_leads_to_another_file(path: Path, suffix: str) -> None:
    other = path.parent.with_name("other")
    other.write_text("kept")
    path.parent.mkdir()
    path.with_name(path.name + suffix).symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        add_key(path, new_key("x", ["predict"], None)[1])
    assert other.read_text() == "kept"


@pytest.fixture
def guarded(
    start: Callable[..., Running], weights: Path, path: Path
) -> "tuple[Running, Callable[..., Any]]":
    """A service that asks for keys, and the command line for them."""
    environment = {"GUN_DETECTION_SERVE_KEYS_FILE": str(path)}

    def keys(*arguments: object) -> Any:
        run = subprocess.run(
            [PROGRAM, "keys", *map(str, arguments), "--json"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(run.stdout)

    service = start("--model", weights, GUN_DETECTION_SERVE_RATE_LIMIT="off", **environment)
    return service, keys


def test_who_may_do_what(guarded: "tuple[Running, Callable[..., Any]]") -> None:
    service, keys = guarded
    assert "nobody will be answered" in service.log

    def status(path: str, key: str | None = None, header: str = "Authorization") -> int:
        value = f"Bearer {key}" if header == "Authorization" else key
        headers = {} if key is None else {header: value}
        if path.startswith("/predict"):
            field = "files" if "batch" in path else "file"
            return httpx.post(
                service.url + path, files={field: PICTURE}, headers=headers
            ).status_code
        return httpx.get(service.url + path, headers=headers).status_code

    predicting = keys("new", "camera")["key"]
    watching = keys("new", "prometheus", "--scope", "metrics")["key"]
    time.sleep(1.1)
    for path in ("/", "/page.js", "/health", "/ready", "/openapi.json"):
        assert status(path) == 200
    for path in ("/predict/", "/predict/batch", "/model"):
        assert [status(path), status(path, "gd_wrong"), status(path, watching)] == [401, 401, 403]
        assert status(path, predicting) == status(path, predicting, "X-API-Key") == 200
    assert [status("/metrics", key) for key in (None, predicting, watching)] == [401, 403, 200]
    assert status("/predict/?store=true", predicting) == 403
    answer = httpx.post(f"{service.url}/predict/", files={"file": PICTURE})
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "key=camera" in service.log
    assert predicting not in service.log

    rotation = keys("rotate", "camera", "--overlap-days", 1)
    assert rotation["last_day"] == "never ends"
    rotated = rotation["key"]
    time.sleep(1.1)
    assert status("/model", predicting) == status("/model", rotated) == 200
    assert keys("revoke", "camera") == {"revoked": 2}
    time.sleep(1.1)
    assert status("/model", predicting) == status("/model", rotated) == 401
    assert [row["name"] for row in keys("list")] == ["prometheus"]


def test_damaged_file_of_keys_lets_nobody_in_and_is_told(
    guarded: "tuple[Running, Callable[..., Any]]", path: Path
) -> None:
    service, keys = guarded
    key = {"Authorization": f"Bearer {keys('new', 'camera')['key']}"}
    good = path.read_text()
    time.sleep(1.1)
    assert httpx.get(f"{service.url}/model", headers=key).is_success
    path.write_text("nonsense")
    time.sleep(1.1)
    answer = httpx.get(f"{service.url}/model", headers=key)
    assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "SETTINGS")
    assert "not name:scopes:end:sha256" in service.log
    path.write_text(good)
    time.sleep(1.1)
    assert httpx.get(f"{service.url}/model", headers=key).is_success
