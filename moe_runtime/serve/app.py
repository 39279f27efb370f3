"""The FastAPI application: endpoints for health, metrics and experts, and settings common to all endpoints."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve import generate
from moe_runtime.serve.async_engine import AsyncEngine, State
from moe_runtime.serve.errors import ApiError, add_error_handlers, error_response, json_response
from moe_runtime.serve.openai import routes
from moe_runtime.serve.page import index_page
from moe_runtime.types.version import __version__

if TYPE_CHECKING:
    from moe_runtime.balancer.load import ExpertLoad
    from moe_runtime.balancer.placement import Placement

MEDIA_TYPES = {
    "png": "image/png",
    "svg": "image/svg+xml",
    "html": "text/html; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
    "npz": "application/octet-stream",
}


class RebalanceOptions(BaseModel):
    """The body of `POST /experts/rebalance`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool = False


def create_app(engine: AsyncEngine, server_config: ServerConfig) -> FastAPI:
    """The application for an engine. The caller starts and closes the engine."""
    app = FastAPI(title="moe_runtime", version=__version__)
    app.state.engine = engine
    app.state.server_config = server_config
    app.state.started = time.time()
    app.add_middleware(BodyLimit, max_bytes=server_config.max_body_bytes)
    add_error_handlers(app)
    app.include_router(generate.router)
    app.include_router(routes.router)
    _add_health_routes(app, engine)
    _add_expert_routes(app, engine)
    return app


def _add_health_routes(app: FastAPI, engine: AsyncEngine) -> None:
    started = time.monotonic()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        """A page with links and the current heatmap."""
        return HTMLResponse(index_page(engine))

    @app.get("/health")
    async def health() -> Response:
        """503 once the engine is dead, otherwise 200: also while it loads or shuts down."""
        body: dict[str, object] = {
            "status": str(engine.state),
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - started, 3),
        }
        if engine.reason:
            body["reason"] = engine.reason
        if engine.info is not None:
            body |= engine.info.health
        if engine.metrics.stats is not None:
            body |= engine.metrics.stats.health_counts()
        return json_response(body, 503 if engine.state is State.DEAD else 200)

    @app.get("/ready")
    async def ready() -> Response:
        """200 while requests are accepted, otherwise 503 with the reason."""
        if engine.state is State.READY:
            return json_response({"status": "ready"})
        return json_response({"status": str(engine.state), "reason": engine.reason}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """The metrics in Prometheus' text format."""
        if engine.state in (State.READY, State.DRAINING):
            engine.metrics.set_expert_load(await engine.query("expert_load"))
        return Response(engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_expert_routes(app: FastAPI, engine: AsyncEngine) -> None:
    rendering = asyncio.Lock()  # drawing competes with the ranks for cores: one picture at a time

    @app.get("/experts/load")
    async def load() -> Response:
        """Tokens per phase, layer and expert since the start."""
        load: ExpertLoad = await engine.query("expert_load")
        return json_response(load.to_dict())

    @app.get("/experts/heatmap.{suffix}")
    async def heatmap(suffix: str) -> Response:
        """The load as a picture, page or table."""
        if suffix not in MEDIA_TYPES:
            raise ApiError(
                404, f"suffix: {suffix!r} is not allowed; it must be one of {', '.join(MEDIA_TYPES)}", "suffix"
            )
        load: ExpertLoad = await engine.query("expert_load")
        async with rendering:
            content = await asyncio.to_thread(load.render, suffix)
        return Response(content, media_type=MEDIA_TYPES[suffix])

    @app.get("/experts/placement")
    async def placement() -> Response:
        """Which expert is in which slot of which rank."""
        placement: Placement = await engine.query("placement")
        return json_response(placement.to_dict())

    @app.get("/experts/decisions")
    async def decisions() -> Response:
        """The balancer's recent decisions with their figures, newest last."""
        return json_response({"decisions": await engine.query("decisions")})

    @app.post("/experts/rebalance")
    async def rebalance(options: RebalanceOptions | None = None) -> Response:
        """Move experts to a better placement for the recent load. Replies once they have moved."""
        try:
            return json_response(await engine.rebalance(options.dry_run if options else False))
        except ValueError as error:
            raise ApiError(409, str(error)) from None


class BodyLimit:
    """Refuses bodies of more than `max_bytes` before they fill memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = f"body: is too large; it must be at most {self._max_bytes} bytes"
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            await error_response(413, too_large)(scope, receive, send)
            return
        num_bytes = 0

        async def counting_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, counting_receive, send)
