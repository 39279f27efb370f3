"""Routes for those who watch the server: its page, health, readiness, metrics, version, and the list of routes."""

from __future__ import annotations

import contextlib
import os
import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from moe_runtime.serve.async_engine import RETRY_SECONDS, State
from moe_runtime.serve.errors import json_response, retry_header
from moe_runtime.serve.page import docs_page, index_page
from moe_runtime.serve.request_stream import UnavailableError
from moe_runtime.serve.requests import engine_of
from moe_runtime.types.version import __version__

SCRAPE_SECONDS = 1.0  # how long a scrape waits for the engine's load; a long step takes longer

router = APIRouter()


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """A page with links and the current heatmap."""
    return HTMLResponse(index_page(engine_of(request)))


@router.get("/docs", include_in_schema=False)
@router.get("/redoc", include_in_schema=False)
async def docs() -> Response:
    """A page that shows `/openapi.json`."""
    return HTMLResponse(docs_page())


@router.get("/version")
async def version() -> Response:
    """The version of the server."""
    return json_response({"version": __version__})


@router.get("/health")
async def health(request: Request) -> Response:
    """503 once the engine is dead, otherwise 200: also while it loads or shuts down."""
    engine = engine_of(request)
    body: dict[str, object] = {
        "status": str(engine.state),
        "pid": os.getpid(),
        "uptime_seconds": round(time.time() - request.app.state.started, 3),
    }
    if engine.reason:
        body["reason"] = engine.reason
    if engine.info is not None:
        body |= engine.info.health
    if engine.metrics.stats is not None:
        body |= engine.metrics.stats.health_counts()
    return json_response(body, 503 if engine.state is State.DEAD else 200)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests are accepted, otherwise 503 with the reason."""
    engine = engine_of(request)
    if engine.state is State.READY:
        return json_response({"status": "ready"})
    response = json_response({"status": str(engine.state), "reason": engine.reason}, 503)
    response.headers.update(retry_header(RETRY_SECONDS))
    return response


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """The metrics in Prometheus' text format. If the engine is in a long step, the gauges of load are older."""
    engine = engine_of(request)
    if engine.state in (State.READY, State.DRAINING):
        with contextlib.suppress(UnavailableError):
            engine.metrics.set_expert_load(await engine.query("expert_load", SCRAPE_SECONDS))
    return Response(engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)
