"""HEAD wherever GET is, OPTIONS on every route, and CORS for the origins that the server's options name."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_runtime.serve.errors import error_response

ALLOWED = ("GET", "HEAD", "POST", "OPTIONS")
EXPOSED_HEADERS = ("X-Request-Id", "Retry-After")


class Methods:
    """Answers HEAD as GET without a body, and OPTIONS with a route's methods."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        drops_body = method == "HEAD"

        async def send_as_asked(message: Message) -> None:
            nonlocal drops_body
            if message["type"] == "http.response.start" and message["status"] == 405:
                headers = MutableHeaders(raw=list(message["headers"]))
                headers["Allow"] = _with_own_methods(headers.get("Allow", ""))
                message = {**message, "headers": headers.raw}
                if method == "OPTIONS":
                    del headers["Content-Length"], headers["Content-Type"]
                    message["status"], drops_body = 204, True
            elif drops_body and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # The application answers 405 to OPTIONS, and names the route's methods.
        await self._app({**scope, "method": "GET"} if method == "HEAD" else scope, receive, send_as_asked)


def _with_own_methods(allow: str) -> str:
    methods = {method.strip() for method in allow.split(",")} | {"OPTIONS"}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(method for method in ALLOWED if method in methods)


class Cors(CORSMiddleware):
    """Starlette's CORS, with refusals that have the body of all errors."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app, allow_origins=origins, allow_methods=ALLOWED, allow_headers=("*",), expose_headers=EXPOSED_HEADERS
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return error_response(response.status_code, bytes(response.body).decode(), headers={"Vary": "Origin"})
