"""The FastAPI application: its routes, and what applies to all of them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI

from moe_runtime.config.server import ServerConfig
from moe_runtime.serve import experts, generate, health, prefix_cache, tokenize
from moe_runtime.serve.access import Access
from moe_runtime.serve.async_engine import AsyncEngine
from moe_runtime.serve.errors import add_error_handlers, error_responses
from moe_runtime.serve.keys import KeyFile
from moe_runtime.serve.limits import Bodies, BodyLimit, RequestTimeout
from moe_runtime.serve.methods import Cors, Methods
from moe_runtime.serve.openai import chat, completions, models
from moe_runtime.serve.openai.fields import UnknownFields
from moe_runtime.serve.prompts import Tokenising
from moe_runtime.serve.request_ids import RequestIds
from moe_runtime.text.formats.registry import choose_format
from moe_runtime.types.version import __version__

ANY_REQUEST = error_responses(400, 401, 403, 408, 413, 429, 500, 503, 504)  # any route may answer with these


def create_app(engine: AsyncEngine, server_config: ServerConfig) -> FastAPI:
    """The application for an engine. The caller starts and closes the engine.

    Raises:
        ValueError: a file of keys cannot be read or has no keys, or a parser of tool calls or reasoning is unknown.
    """
    choose_format("", None, (), server_config.tool_call_parser, server_config.reasoning_parser)  # checks the names
    app = FastAPI(title="moe_runtime", version=__version__, docs_url=None, redoc_url=None, responses=ANY_REQUEST)
    app.state.engine = engine
    app.state.server_config = server_config
    app.state.bodies = Bodies(server_config)
    app.state.started = time.time()
    app.state.tokenising = Tokenising()
    app.state.unknown_fields = UnknownFields()
    app.state.drawing = asyncio.Lock()  # drawing competes with the ranks for cores: one picture at a time
    add_error_handlers(app)
    _add_layers(app, server_config)
    for module in (generate, completions, chat, models, tokenize, health, experts, prefix_cache):
        app.include_router(module.router)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _schema(app: FastAPI) -> dict[str, Any]:
    """`/openapi.json`. FastAPI adds a status 422 of its own to routes with parameters; here they answer 400."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
    assert app.openapi_schema is not None
    return app.openapi_schema


def _add_layers(app: FastAPI, config: ServerConfig) -> None:
    """The layers that a request passes before its route. The last one added is the first one passed."""
    app.add_middleware(BodyLimit, bodies=app.state.bodies)
    app.add_middleware(
        Access,
        api_keys=_keys("api_key_file", config.api_key_file),
        admin_keys=_keys("admin_key_file", config.admin_key_file),
    )
    app.add_middleware(Methods)
    if config.cors_origin:
        app.add_middleware(Cors, origins=tuple(config.cors_origin))
    if config.request_timeout is not None:
        app.add_middleware(RequestTimeout, seconds=config.request_timeout)
    app.add_middleware(RequestIds)


def _keys(option: str, path: str | None) -> KeyFile | None:
    return None if path is None else KeyFile(option, path)
