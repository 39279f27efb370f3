"""Sends the application a request for each route of a client, before there is an engine.

The first request to an application costs some 10 ms more than later ones: pydantic, FastAPI and the modules that they
load on first use. These requests are answered 503, because the model is not loaded, or 401.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

MESSAGES = [{"role": "user", "content": "a"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/generate": {"messages": MESSAGES, "max_tokens": 1, "stream": True},
    "/v1/completions": {"prompt": "a", "max_tokens": 1, "stream": True},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1, "stream": True},
}


async def warm_up(app: FastAPI) -> None:
    """Call it before the engine is started, so that no request runs."""
    for path, body in REQUESTS.items():
        await _post(app, path, json.dumps(body).encode())


async def _post(app: FastAPI, path: str, body: bytes) -> None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
        "state": {},
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)
