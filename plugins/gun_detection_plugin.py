"""Pages inside the Airflow UI; every route asks who is there."""

import re

from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from airflow.plugins_manager import AirflowPlugin
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse

# Reports only: nothing else of the data bucket is reached by this route.
_REPORT = re.compile(r"(datasets/[0-9a-f]{64}/report|evaluations/[\w.-]+/[\w.-]+)\.html")

app = FastAPI(title="Gun detection", docs_url=None, redoc_url=None, openapi_url=None)


@app.get("/reports/{key:path}", dependencies=[Depends(requires_access_dag("GET"))])
def report(key: str, user: GetUserDep) -> HTMLResponse:
    """A stored report, for anyone who may look at DAGs."""
    from gun_detection.errors import NotFoundError
    from gun_detection.settings import load_settings
    from gun_detection.storage import Storage

    if not _REPORT.fullmatch(key):
        raise HTTPException(404, "There is no such report.")
    settings = load_settings()
    try:
        page = Storage(settings).get(settings.data_bucket, key)
    except NotFoundError:
        raise HTTPException(404, "There is no such report.") from None
    headers = {
        "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(page, headers=headers)


class GunDetectionPlugin(AirflowPlugin):
    name = "gun_detection"
    fastapi_apps = [{"app": app, "url_prefix": "/gun-detection", "name": "Gun detection"}]  # noqa: RUF012
