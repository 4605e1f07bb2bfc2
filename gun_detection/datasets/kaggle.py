"""Data sets of Kaggle, downloaded by the `kaggle` package in a process of its own.

Importing that package signs in, prints, makes folders and may end the process, so it never runs
inside this one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from gun_detection.errors import NotFoundError, ServiceUnavailableError, SettingsError

DEFAULT_DATASET = "issaisasank/guns-object-detection"
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
_HOURS = 6


def download(dataset: str, folder: Path) -> Path:
    """Download `owner/name` as one zip file into `folder` and return its path.

    Raises `SettingsError` without credentials or when Kaggle refuses them, `NotFoundError` when
    the data set is not there, and `ServiceUnavailableError` when Kaggle cannot be reached.
    """
    if not _SLUG.fullmatch(dataset):
        raise SettingsError(f"{dataset!r} is not a Kaggle data set: write kaggle:owner/name")
    if not _has_credentials():
        raise SettingsError(
            "no Kaggle credentials: set KAGGLE_USERNAME and KAGGLE_KEY, or KAGGLE_API_TOKEN, or "
            "save kaggle.json in ~/.kaggle (kaggle.com, Settings, API)",
            reason="KAGGLE_CREDENTIALS",
        )
    environment = dict(os.environ)
    if _config_folder() is None:
        # Without one the package would make a folder in the user's home.
        environment["KAGGLE_CONFIG_DIR"] = str(folder)
    command = [sys.executable, "-m", "kaggle", "datasets", "download", dataset]
    try:
        result = subprocess.run(
            [*command, "--path", str(folder), "--quiet"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_HOURS * 3600,
        )
    except subprocess.TimeoutExpired:
        raise ServiceUnavailableError(
            f"Kaggle did not deliver {dataset} within {_HOURS} hours"
        ) from None
    archive = folder / f"{dataset.split('/')[1]}.zip"
    if result.returncode != 0 or not archive.is_file():
        raise _explain(dataset, result.stdout, result.stderr)
    return archive


def _config_folder() -> Path | None:
    named = os.environ.get("KAGGLE_CONFIG_DIR")
    config_home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    candidates = [Path(named)] if named else [Path.home() / ".kaggle", Path(config_home) / "kaggle"]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _has_credentials() -> bool:
    if os.environ.get("KAGGLE_API_TOKEN"):
        return True
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        return True
    folder = _config_folder()
    files = [] if folder is None else [folder / "kaggle.json"]
    home = Path.home() / ".kaggle"
    files += [home / "access_token", home / "access_token.txt", home / "credentials.json"]
    return any(file.is_file() for file in files)


def _explain(
    dataset: str, output: str, errors: str
) -> SettingsError | NotFoundError | ServiceUnavailableError:
    """What the package's messages mean; it tells its failures apart in words only."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = lines[-1][:200] if lines else "no message"
    refused = re.search(r"40[13] Client Error|unauthori[sz]ed|forbidden|denied", errors, re.I)
    if refused or "Authentication required" in output:
        return SettingsError(
            f"Kaggle refuses the credentials or the access to {dataset}: check KAGGLE_USERNAME and "
            f"KAGGLE_KEY and the data set's terms ({said})",
            reason="KAGGLE_CREDENTIALS",
        )
    if re.search(r"404 Client Error|not found", errors, re.I):
        return NotFoundError(f"Kaggle has no data set {dataset}: check its name ({said})")
    return ServiceUnavailableError(f"Kaggle did not deliver {dataset}: {said}")
