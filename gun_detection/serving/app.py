"""The routes of the predict service."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from gun_detection import __version__
from gun_detection.serving.answers import (
    DISCLAIMER,
    BatchPrediction,
    ErrorAnswer,
    Failure,
    Health,
    ModelCard,
    Prediction,
    Readiness,
    Welcome,
)
from gun_detection.serving.bodies import announced_pictures, read_pictures
from gun_detection.serving.frame import Frame
from gun_detection.serving.limits import client_name
from gun_detection.serving.metrics import exposition
from gun_detection.serving.negotiation import preferred
from gun_detection.serving.refusals import Refusal
from gun_detection.serving.service import Service, gather
from gun_detection.settings import Settings

_T = TypeVar("_T")

_PAGE = resources.files("gun_detection.serving") / "page"
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_MEANINGS = {
    400: "The form is broken.",
    401: "No valid API key.",
    403: "The API key may not do this, or nobody may.",
    408: "The request took too long to arrive.",
    413: "Too many bytes, files or fields.",
    415: "No form, or no JPEG, PNG, WebP or BMP in it.",
    422: "No such field, a parameter out of its range, or a picture that cannot be used.",
    429: "Too many pictures: Retry-After says when there is room.",
    503: "No model yet, too much to do, or a server away: Retry-After says when to come again, "
    "and where there is none, that does not help.",
}

bearer = HTTPBearer(auto_error=False, description="An API key as `gun-detection keys` makes them.")
header = APIKeyHeader(name="X-API-Key", auto_error=False)
# Handlers are coroutines, also where nothing is waited for: others would each take a thread.
router = APIRouter()


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {s: {"model": ErrorAnswer, "description": _MEANINGS[s]} for s in statuses}


def allowed(scope: str) -> Callable[..., Awaitable[str]]:
    """A dependency that gives the client's name, if it has this scope."""

    async def client(
        request: Request,
        token: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
        key: Annotated[str | None, Depends(header)],
    ) -> str:
        given = request.state.key = token.credentials if token else key
        found = service_of(request).admit(given, scope)
        request.state.log = {"key": found.name} if found else {}
        if found is not None:
            return f"key {found.name}"
        return client_name(request.client.host if request.client else None)

    return client


Client = Annotated[str, Depends(allowed("predict"))]
AtThreshold = Annotated[
    float | None,
    Query(ge=0, le=1, description="Instead of the model's own; below `score_floor` it is that."),
]
Format = Annotated[
    Literal["png", "json"] | None, Query(description="Instead of what `Accept` says.")
]
Store = Annotated[
    bool, Query(description="Store the picture where it is scored; needs the scope `store`.")
]


def _form(field: str, many: bool) -> dict[str, Any]:
    """The body, as OpenAPI says it; it is read by hand, with limits."""
    file = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP or BMP."}
    schema = {
        "type": "object",
        "required": [field],
        "properties": {field: {"type": "array", "items": file, "minItems": 1} if many else file},
    }
    kinds = "image/jpeg, image/png, image/webp, image/bmp"
    content = {
        "multipart/form-data": {"schema": schema, "encoding": {field: {"contentType": kinds}}}
    }
    return {"requestBody": {"required": True, "content": content}}


@router.get(
    "/",
    response_model=Welcome,
    responses={200: {"content": {"text/html": {}}}},
    summary="A greeting, or the web page for browsers",
)
async def root(request: Request) -> Response:
    kind = preferred(request.headers.get("accept", ""), ("application/json", "text/html"))
    if kind == "text/html":
        return _file("index.html")
    return JSONResponse(Welcome().model_dump())


@router.get("/page.css", include_in_schema=False)
@router.get("/page.js", include_in_schema=False)
async def page(request: Request) -> Response:
    return _file(request.url.path.removeprefix("/"))


def _file(name: str) -> Response:
    kind = _TYPES[name.rpartition(".")[2]]
    # One address gives two kinds of answers.
    return Response((_PAGE / name).read_bytes(), media_type=kind, headers={"Vary": "Accept"})


@router.post("/predict", include_in_schema=False)
@router.post(
    "/predict/",
    response_model=Prediction,
    responses={
        200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
        **failures(400, 401, 403, 408, 413, 415, 422, 429, 503),
    },
    openapi_extra=_form("file", many=False),
    summary="The guns in a picture, as PNG with boxes or as JSON",
)
async def predict(
    request: Request,
    client: Client,
    threshold: AtThreshold = None,
    format: Format = None,  # noqa: A002
    store: Store = False,
) -> Response:
    service = service_of(request)
    store = _storing(request, store)
    headers = await service.limit.spend(client)
    accept = request.headers.get("accept", "")
    kind = f"image/{format}" if format == "png" else f"application/{format}"
    if format is None:
        kind = preferred(accept, ("image/png", "application/json"))
    with service.models.serving.in_use() as served, service.slots.hold(1):
        at = service.threshold(served, threshold)
        [(_, data)] = await _read(request, "file", 1)
        work = service.answer(served, data, at, store=store, draw=kind == "image/png")
        answer, drawn = await _while_connected(request, work)
        request.state.log |= {"model": answer.model, "detections": len(answer.detections)}
        headers |= _described(answer)
        content = answer.model_dump_json() if drawn is None else drawn
        return Response(content, media_type=kind, headers=headers)


@router.post(
    "/predict/batch",
    response_model=BatchPrediction,
    responses=failures(400, 401, 403, 408, 413, 415, 422, 429, 503),
    openapi_extra=_form("files", many=True),
    summary="The guns in several pictures, as JSON",
)
async def predict_batch(
    request: Request, client: Client, threshold: AtThreshold = None, store: Store = False
) -> Response:
    service = service_of(request)
    store = _storing(request, store)
    headers = await service.limit.spend(client)
    most = min(service.settings.serve_batch_images, service.settings.serve_queue)
    # Bytes take as many places as the largest pictures would.
    places = announced_pictures(request, most, service.settings.serve_max_bytes)
    with service.models.serving.in_use() as served, service.slots.hold(places):
        at = service.threshold(served, threshold)
        files = await _read(request, "files", most)
        headers |= await service.limit.spend(client, len(files) - 1, before=1)
        with service.slots.hold(max(0, len(files) - places)):
            items = [service.batch_item(served, name, data, at, store) for name, data in files]
            images = await _while_connected(request, gather(items))
        request.state.log |= {"model": served.card.model, "pictures": len(images)}
        answer = BatchPrediction(model=served.card.model, threshold=at, images=images)
        headers |= {"X-Model": answer.model}
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)


@router.get("/model", responses=failures(401, 403, 503), summary="The model that answers now")
async def model(request: Request, _: Client) -> ModelCard:
    return service_of(request).models.card


@router.get("/health", summary="Whether the process lives")
async def health() -> Health:
    return Health()


@router.get("/ready", responses=failures(503), summary="Whether there is a model to answer with")
async def ready(request: Request) -> Readiness:
    return Readiness(model=service_of(request).models.card.model)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **failures(401, 403)},
    summary="Figures for Prometheus",
    dependencies=[Depends(allowed("metrics"))],
)
async def metrics() -> Response:
    document, kind = exposition()
    return Response(document, media_type=kind)


def _storing(request: Request, asked: bool) -> bool:
    """Whether pictures of this request are stored; asking for it takes a key with that scope."""
    service = service_of(request)
    if asked:
        service.admit(request.state.key, "store")
    return service.wants_stored(asked)


async def _read(request: Request, field: str, most: int) -> list[tuple[str, bytes]]:
    settings = service_of(request).settings
    return await read_pictures(
        request, field, most, settings.serve_max_bytes, settings.serve_body_seconds
    )


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Nobody waits for what a client that went away has asked for."""
    task = asyncio.ensure_future(work)
    # The body was read: the next message can only be that the client is gone.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(400, "GONE", "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _described(answer: Prediction) -> dict[str, str]:
    """What a PNG cannot say."""
    return {
        "X-Model": answer.model,
        "X-Threshold": f"{answer.threshold:g}",
        "X-Detections": str(len(answer.detections)),
        "X-Review": answer.review,
        "Vary": "Accept",
    }


def _refuse(request: Request, refusal: Refusal) -> Response:
    request.state.log = getattr(request.state, "log", {}) | {"reason": refusal.reason}
    return _failure(refusal.status, refusal.reason, refusal.message, refusal.headers)


def _failure(status: int, reason: str, message: str, headers: dict[str, str]) -> Response:
    answer = ErrorAnswer(error=Failure(reason=reason, message=message))
    return JSONResponse(answer.model_dump(), status, headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refuse(request, error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _refuse(request, Refusal(422, "PARAMETER", f"{first['loc'][-1]}: {first['msg']}"))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = {404: "NOT_FOUND", 405: "METHOD"}.get(error.status_code, "HTTP")
    headers = dict(error.headers or {})
    return _refuse(request, Refusal(error.status_code, reason, str(error.detail), headers))


def create_app(settings: Settings, folder: Path | None = None) -> FastAPI:
    """The ASGI application; `folder` is shared by the processes of one service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(settings, folder)
        try:
            await service.start()
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="Gun detection",
        version=__version__,
        description=f"Finds guns in pictures. {DISCLAIMER}",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # A redirect would repeat the Host that the client claims.
        redirect_slashes=False,
        exception_handlers={
            Refusal: _on_refusal,
            RequestValidationError: _on_invalid,
            HTTPException: _on_http,
        },
    )
    app.include_router(router)
    origins = [origin.strip() for origin in settings.serve_cors_origins.split(",") if origin]
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key"],
            expose_headers=["Retry-After", "X-Request-ID", "X-Model", "X-Threshold"],
        )
    app.add_middleware(
        Frame, most_bytes=settings.serve_max_bytes, most_seconds=settings.serve_body_seconds
    )
    return app
