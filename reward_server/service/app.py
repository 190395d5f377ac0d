"""The HTTP face: routes over a RewardService.

Every error is JSON `{"detail": "..."}` with a 4xx or 503 status.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from reward_server.client.failover import FINGERPRINT_HEADER, PROTOCOL_HEADER
from reward_server.scorers.base import Scorer
from reward_server.service.admission import OverloadedError
from reward_server.service.forms import FormError, parts_of
from reward_server.service.guard import OPEN_PATHS, Guard
from reward_server.service.intake import Ask, Buffer, ItemError, ask_of, read_item, told
from reward_server.service.schema import (
    Alive,
    BatchRequest,
    BatchResponse,
    Health,
    Info,
    ItemResult,
    Letters,
    Problem,
    ScoreRequest,
    ScoreResponse,
)
from reward_server.service.service import NotReadyError, RewardService, TooManyPixelsError
from reward_server.settings import Settings

log = logging.getLogger(__name__)

_RETRY_LATER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
_PROBLEMS: dict[int | str, dict] = {
    400: {"model": Problem, "description": "the body is not JSON"},
    401: {"model": Problem, "description": "the bearer token is missing or wrong"},
    408: {"model": Problem, "description": "the body did not come in time"},
    413: {"model": Problem, "description": "the body is too large"},
    415: {"model": Problem, "description": "the body is of another type, or compressed"},
    422: {"model": Problem, "description": "the request cannot be scored as it was sent"},
    429: {"model": Problem, "description": "the queue is full", "headers": _RETRY_LATER},
    503: {
        "model": Problem,
        "description": "not ready yet, or too many requests",
        "headers": _RETRY_LATER,
    },
}
_SETUP = {
    FINGERPRINT_HEADER: {
        "description": "`fingerprint` of `/info`: other servers that score alike have the same",
        "schema": {"type": "string"},
    }
}
_BATCH: dict[int | str, dict] = {
    **_PROBLEMS,
    200: {"headers": _SETUP},
    207: {
        "model": BatchResponse,
        "description": "scored, but some items have an `error`",
        "headers": _SETUP,
    },
}
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"items": {"type": "string", "contentMediaType": "application/json"}},
                "required": ["items"],
                "additionalProperties": {"type": "string", "format": "binary"},
            }
        }
    },
}
_NOT_READY: dict[int | str, dict] = {
    503: {"model": Health, "description": "not ready", "headers": _RETRY_LATER}
}
_BUSY: dict[int | str, dict] = {status: _PROBLEMS[status] for status in (401, 503)}


def create_app(
    settings: Settings,
    load: Callable[[], list[Scorer]],
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The application.

    Scorers are loaded by `load` in a thread once it starts; `on_failure` is called if that fails,
    and when a scorer breaks later.
    """
    service = RewardService(settings, load, on_failure)

    def start() -> None:
        try:
            service.start()
        except Exception:
            log.exception("the scorers could not be loaded")
            on_failure()

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        threading.Thread(target=start, name="loader", daemon=True).start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Calligrapher reward server",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(RequestValidationError, _unprocessable)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(OverloadedError, _overloaded)
    app.add_exception_handler(NotReadyError, _not_ready)
    app.add_exception_handler(TooManyPixelsError, _too_many_pixels)
    app.add_exception_handler(Exception, _our_mistake)

    @app.post("/score", responses={**_PROBLEMS, 200: {"headers": _SETUP}})
    async def score(request: ScoreRequest, response: Response) -> ScoreResponse:
        """Score one picture."""
        try:
            (result,) = await service.score([ask_of(request, names=service.names)])
        except ItemError as error:
            service.metrics.rejected.labels("item").inc()
            raise HTTPException(422, str(error)) from None
        _name_setup(response)
        if isinstance(result, ItemError):
            raise HTTPException(422, str(result))
        return result

    @app.post("/score_batch", responses=_BATCH)
    async def score_batch(batch: BatchRequest, response: Response) -> BatchResponse:
        """Score several pictures; results in the order of the items."""
        return await _score_all(batch, None, response)

    @app.post("/score_files", responses=_BATCH, openapi_extra={"requestBody": _FORM})
    async def score_files(request: Request, response: Response) -> BatchResponse:
        """`/score_batch` for pictures as they are: a third fewer bytes, and BMP needs no inflating.

        `multipart/form-data`: the part `items` is the JSON of a `/score_batch`, in which a picture
        is the name of another part, a PNG or BMP file. Several items may name the same part.
        """
        try:
            parts = parts_of(request.headers["content-type"], await request.body())
            batch = BatchRequest.model_validate_json(bytes(parts.pop("items", b"")))
        except (FormError, ValidationError) as error:
            detail = str(error) if isinstance(error, FormError) else told(error.errors())
            raise HTTPException(422, f"items: {detail}"[:500]) from None
        return await _score_all(batch, parts, response)

    async def _score_all(
        batch: BatchRequest, files: Mapping[str, Buffer] | None, response: Response
    ) -> BatchResponse:
        if len(batch.items) > settings.max_items:
            raise HTTPException(
                422, f"items must be at most {settings.max_items}. Got {len(batch.items)}."
            )
        asked = [_read(item, files, service.names) for item in batch.items]
        results = await service.score(asked)
        _name_setup(response)
        if any(isinstance(result, ItemError) for result in results):
            response.status_code = 207
        return BatchResponse(
            results=[
                ItemResult(score=None, error=str(result))
                if isinstance(result, ItemError)
                else ItemResult(score=result, error=None)
                for result in results
            ]
        )

    def _name_setup(response: Response) -> None:
        response.headers[FINGERPRINT_HEADER] = service.fingerprint
        response.headers[PROTOCOL_HEADER] = str(service.protocol)

    @app.get("/livez")
    async def livez() -> Alive:
        """200 while the process answers at all, loading and stopping included."""
        return Alive(status="alive", pid=os.getpid())

    @app.get("/readyz", responses=_NOT_READY)
    @app.get("/health", responses=_NOT_READY)
    async def health() -> Health:
        """200 once every scorer has scored a probe picture, 503 before; `/readyz` is the same."""
        state = service.health()
        if state.status == "ok":
            return state
        return JSONResponse(state.model_dump(), 503, headers={"Retry-After": "1"})  # type: ignore[return-value]

    @app.get("/info", responses={**_BUSY, 200: {"headers": _SETUP}})
    async def info(response: Response) -> Info:
        """What decides the scores, and the limits."""
        answer = service.info()
        _name_setup(response)
        return answer

    @app.get("/alphabet", responses={**_BUSY, 200: {"headers": _SETUP}})
    async def alphabet(response: Response) -> Letters:
        """The letters that the OCR can read: a text with another one has no OCR score."""
        answer = Letters(characters=service.letters())
        _name_setup(response)
        return answer

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **_BUSY},
    )
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(
            service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        """`/openapi.json` to be read and tried out; the page's script comes from the network."""
        return get_swagger_ui_html(openapi_url="/openapi.json", title=app.title)

    token = settings.token()
    if token is not None:
        _declare_bearer(app)
    app.add_middleware(
        Guard,
        token=token,
        max_body_bytes=settings.max_body_bytes,
        max_requests=settings.queue_size,
        body_timeout=settings.body_timeout,
        metrics=service.metrics,
    )
    return app


def _read(item: Any, files: Mapping[str, Buffer] | None, names: Sequence[str]) -> Ask | ItemError:
    try:
        return read_item(item, files, names=names)
    except ItemError as error:
        return error


def _declare_bearer(app: FastAPI) -> None:
    """Let the OpenAPI document tell what the guard asks for."""
    document = app.openapi()  # FastAPI keeps this object and serves it
    document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"bearer": []}]
    for path in OPEN_PATHS:
        document["paths"][path]["get"]["security"] = []


async def _http_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": str(error.detail)}, error.status_code, headers=error.headers)


async def _overloaded(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OverloadedError)
    return JSONResponse(
        {"detail": str(error)}, 429, headers={"Retry-After": str(error.retry_after)}
    )


async def _not_ready(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "1"})


async def _too_many_pixels(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 413)


async def _our_mistake(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(
        {"detail": f"the server failed on this request: {type(error).__name__}"}, 500
    )


async def _unprocessable(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": told(error.errors())}, 422)
