"""Take the README's pictures from the running platform (after `make demo`).

    python docs/screenshots.py [FOLDER]

With a `retrain` that waits for approval, its question is among them.

Needs a Chromium at /usr/bin/chromium, or at CHROMIUM.
"""

import os
import sys
from pathlib import Path

from playwright.sync_api import FilePayload, Page, ViewportSize, sync_playwright
from sqlalchemy import text

from embedded.config import load_platform
from embedded.stack import Stack
from gun_detection.database import open_session
from gun_detection.settings import Settings
from gun_detection.stages.links import run_url
from gun_detection.storage import Storage

SIZE: ViewportSize = {"width": 1440, "height": 810}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    stack = Stack(load_platform())
    with stack.airflow() as airflow, sync_playwright() as playwright:
        runs = [
            run["dag_run_id"]
            for run in airflow.dag_runs("retrain")
            if any(
                task["task_id"] == "promote" and task["state"] == "success"
                for task in airflow.task_instances("retrain", run["dag_run_id"])
            )
        ]
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport=SIZE)
        page.goto(f"{airflow.url}/auth/login")
        page.get_by_label("Username").fill("admin")
        page.locator("input[type=password]").fill(stack.platform.credentials.passwords["admin"])
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/")
        shoot(page, f"{airflow.url}/dags", folder / "dags.png")
        waiting = [
            run["dag_run_id"]
            for run in airflow.dag_runs("retrain")
            if any(
                task["state"] == "awaiting_input"
                for task in airflow.task_instances("retrain", run["dag_run_id"])
            )
        ]
        for run in waiting or runs[-1:]:
            place = f"{airflow.url}/dags/retrain/runs/{run}"
            shoot(page, f"{place}/plugin/verdict", folder / "verdict.png")
            # The question with its buttons.
            page.set_viewport_size({"width": SIZE["width"], "height": 1060})
            shoot(page, f"{place}/tasks/approve/required_actions", folder / "approve.png")
            page.set_viewport_size(SIZE)
            page.goto(place)
            page.get_by_role("button", name="Graph").click()
            page.wait_for_timeout(2000)
            page.screenshot(path=folder / "retrain.png")
        shoot(page, f"{airflow.url}/plugin/gun-detection-models", folder / "models.png")
        page.set_viewport_size({"width": SIZE["width"], "height": 1410})
        shoot(page, run_url(stack.settings, _largest_run(stack.settings)), folder / "scoring.png")
        page.set_viewport_size(SIZE)
        page.goto(f"{airflow.url}/dags/score_uploads")
        page.get_by_role("button", name="Trigger").click()
        page.wait_for_timeout(2000)
        page.screenshot(path=folder / "trigger.png")
        page.set_viewport_size({"width": 1200, "height": 900})
        _predict(page, stack, folder / "predict.png")
        browser.close()


def _predict(page: Page, stack: Stack, path: Path) -> None:
    """The predict service's page with a few of the demo's uploads."""
    settings, storage = stack.settings, Storage(stack.settings)
    listed = storage.list_objects(settings.uploads_bucket, "demo/")
    keys = [item.key for item in listed if "upload" in item.key][:3]
    page.goto(stack.platform.predict_url)
    page.get_by_label("API key").fill(stack.platform.credentials.predict_key)
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector("#key-form", state="hidden")
    files = [
        FilePayload(
            name=Path(key).name,
            mimeType="image/jpeg",
            buffer=storage.get(settings.uploads_bucket, key),
        )
        for key in keys
    ]
    page.set_input_files("#files", files)
    page.locator("details:visible").nth(len(keys) - 1).wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=path)


def _largest_run(settings: Settings) -> str:
    statement = "SELECT id FROM scoring_run ORDER BY planned DESC, created_at DESC LIMIT 1"
    with open_session(settings) as session:
        return str(session.execute(text(statement)).scalar_one())


def shoot(page: Page, url: str, path: Path) -> None:
    page.goto(url)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1500)
    page.screenshot(path=path)


if __name__ == "__main__":
    main()
