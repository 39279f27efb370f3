"""`X-Request-Id`: every reply names its request, also errors and streams."""

from __future__ import annotations

import asyncio
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_runtime.serve.errors import error_response

HEADER = b"x-request-id"
ALLOWED = re.compile(rb"[\w.:=+/-]{1,128}")


class RequestIds:
    """Takes the client's id if it is sane, otherwise makes one. Also answers when the application fails.

    The id is in `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id)]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends
            if not started:
                await error_response(503, "the server is shutting down")(scope, receive, send_with_id)
            raise
        except Exception as error:  # the web server logs it
            if not started:
                await error_response(500, f"internal error: {type(error).__name__}")(scope, receive, send_with_id)
            raise


def _request_id(scope: Scope) -> bytes:
    given = dict(scope["headers"]).get(HEADER, b"")
    return given if ALLOWED.fullmatch(given) else uuid.uuid4().hex.encode()
