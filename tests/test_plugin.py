"""The pages inside the Airflow UI, where the library cannot be used."""

import os
import subprocess
import sys

from embedded.config import REPOSITORY

# In a process of its own: Airflow is much to import, and warns.
_ASK = """
import sys
sys.path.insert(0, "plugins")
from fastapi import HTTPException
import gun_detection_plugin as plugin
for page in (lambda: plugin._page(str), lambda: plugin._stored("datasets/x", "report")):
    try:
        page()
    except HTTPException as error:
        print(error.status_code, error.detail)
"""


_MATCH = """
import sys
sys.path.insert(0, "plugins")
from gun_detection_plugin import _REPORT
print([bool(_REPORT.fullmatch(key)) for key in sys.argv[1:]])
"""


def test_which_objects_are_reports() -> None:
    sha256 = "0a" * 32
    reports = [
        f"datasets/{sha256}/report.html",
        f"datasets/{sha256}/report-{sha256}.html",
        "evaluations/model-1/holdout-2.html",
    ]
    others = [
        f"datasets/{sha256}/manifest.jsonl",
        f"datasets/{sha256}/report-x.html",
        "images/00/report.html",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", _MATCH, *reports, *others],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines()[-1] == str([True] * 3 + [False] * 3)


def test_what_is_wrong_with_the_settings_is_shown() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _ASK],
        env=os.environ | {"GUN_DETECTION_NONSENSE": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    shown = [line for line in ran.stdout.splitlines() if line.startswith("500 ")]
    assert len(shown) == 2
    assert all("unknown setting GUN_DETECTION_NONSENSE" in line for line in shown)
