"""Pages inside the Airflow UI; every route asks who is there."""

import re
from collections.abc import Callable
from typing import Any

from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_dag
from airflow.plugins_manager import AirflowPlugin
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse

# Reports only: nothing else of the data bucket is reached by this route.
_REPORT = re.compile(
    r"(datasets/[0-9a-f]{64}/report(-[0-9a-f]{64})?|evaluations/[\w.-]+/[\w.-]+)\.html"
)
_MODEL = re.compile(r"[a-z0-9-]{1,80}")
_RUN = re.compile(r"[\w.~:+@-]{1,500}")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}
_MAY_LOOK = [Depends(requires_access_dag("GET"))]

app = FastAPI(title="Gun detection", docs_url=None, redoc_url=None, openapi_url=None)


@app.get("/reports/{key:path}", dependencies=_MAY_LOOK)
def report(key: str, user: GetUserDep) -> HTMLResponse:
    """A stored report, for anyone who may look at DAGs."""
    if not _REPORT.fullmatch(key):
        raise HTTPException(404, "There is no such report.")
    return _stored(key, "report")


@app.get("/cards/{model_id}", dependencies=_MAY_LOOK)
def card(model_id: str, user: GetUserDep) -> HTMLResponse:
    """The model card of a version."""
    if not _MODEL.fullmatch(model_id):
        raise HTTPException(404, "There is no such model.")
    return _stored(f"models/{model_id}/card.html", "card; it is written when the model is judged")


@app.get("/models", dependencies=_MAY_LOOK)
def models(user: GetUserDep) -> HTMLResponse:
    """Every version with its state, and who was champion when."""
    from gun_detection.release.pages import models_page

    return _page(models_page)


@app.get("/decisions/{decision_id}", dependencies=_MAY_LOOK)
def decision(decision_id: int, user: GetUserDep) -> HTMLResponse:
    """What the gate said of a candidate, rule by rule."""
    from gun_detection.release.pages import decision_page

    return _page(lambda session: decision_page(session, decision_id))


@app.get("/verdict", dependencies=_MAY_LOOK)
def verdict(dag_id: str, run_id: str, user: GetUserDep) -> HTMLResponse:
    """The decision of a DAG run; the tab of a run that decided nothing says so."""
    from gun_detection.release.pages import verdict_page

    origin = _origin(dag_id, run_id)
    return _page(lambda session: verdict_page(session, origin))


@app.get("/scoring", dependencies=_MAY_LOOK)
def scoring(user: GetUserDep) -> HTMLResponse:
    """How fresh scoring is, its last runs, and what could not be scored."""
    from gun_detection.scoring.pages import scoring_page

    return _page(scoring_page)


@app.get("/runs/{run_id}", dependencies=_MAY_LOOK)
def run(run_id: str, user: GetUserDep) -> HTMLResponse:
    """What a scoring run found, did and could not do; one that is open, as far as it is."""
    from gun_detection.scoring.pages import run_page

    if not _RUN.fullmatch(run_id):
        raise HTTPException(404, "There is no such run.")
    return _page(lambda session: run_page(session, run_id))


@app.get("/scored", dependencies=_MAY_LOOK)
def scored(dag_id: str, run_id: str, user: GetUserDep) -> HTMLResponse:
    """What a DAG run has scored; the tab of a run that scored nothing says so."""
    from gun_detection.scoring.pages import scored_page

    origin = _origin(dag_id, run_id)
    return _page(lambda session: scored_page(session, origin))


def _origin(dag_id: str, run_id: str) -> str:
    """What a DAG run is called in the database."""
    # A plus in a query that the UI did not encode arrives as a space; no run id has one.
    origin = f"airflow:{dag_id}:{run_id.replace(' ', '+')}"
    if not _RUN.fullmatch(origin):
        raise HTTPException(404, "There is no such run.")
    return origin


def _page(make: Callable[[Any], str]) -> HTMLResponse:
    from gun_detection.database import open_session
    from gun_detection.errors import GunDetectionError, NotFoundError, TransientError
    from gun_detection.settings import load_settings

    try:
        with open_session(load_settings()) as session:
            return HTMLResponse(make(session), headers=_HEADERS)
    except NotFoundError as error:
        raise HTTPException(404, error.message) from None
    except TransientError as error:
        raise HTTPException(503, error.message, {"Retry-After": "10"}) from None
    except GunDetectionError as error:
        raise HTTPException(500, error.message) from None


def _stored(key: str, what: str) -> HTMLResponse:
    from gun_detection.errors import GunDetectionError, NotFoundError, TransientError
    from gun_detection.settings import load_settings
    from gun_detection.storage import Storage

    try:
        settings = load_settings()
        page = Storage(settings).get(settings.data_bucket, key)
    except NotFoundError:
        raise HTTPException(404, f"There is no such {what}.") from None
    except TransientError as error:
        raise HTTPException(503, error.message, {"Retry-After": "10"}) from None
    except GunDetectionError as error:
        raise HTTPException(500, error.message) from None
    return HTMLResponse(page, headers=_HEADERS)


class GunDetectionPlugin(AirflowPlugin):
    name = "gun_detection"
    fastapi_apps = [{"app": app, "url_prefix": "/gun-detection", "name": "Gun detection"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Models",
            "href": "gun-detection/models",
            "destination": "nav",
            "category": "browse",
            "url_route": "gun-detection-models",
        },
        {
            "name": "Scoring",
            "href": "gun-detection/scoring",
            "destination": "nav",
            "category": "browse",
            "url_route": "gun-detection-scoring",
        },
        {
            "name": "Verdict",
            "href": "gun-detection/verdict?dag_id={DAG_ID}&run_id={RUN_ID}",
            "destination": "dag_run",
            "url_route": "verdict",
        },
        {
            "name": "Scoring",
            "href": "gun-detection/scored?dag_id={DAG_ID}&run_id={RUN_ID}",
            "destination": "dag_run",
            "url_route": "scoring",
        },
    ]
