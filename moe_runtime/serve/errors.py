"""Errors as clients receive them: always `{"error": {"message", "type", "param", "code"}}`, with a one-line message.

`error_responses` describes them in `/openapi.json`.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moe_runtime.serve.admission import QueueFullError
from moe_runtime.serve.async_engine import RETRY_SECONDS
from moe_runtime.serve.request_stream import UnavailableError

MAX_SHOWN_INPUT = 80  # characters of a value, in an error about it
MAX_PARAM = 64
FASTAPI_UNREADABLE = "There was an error parsing the body"
UNREADABLE = "body: cannot be read; it must be JSON in UTF-8, neither compressed nor nested too deeply"
UNSUPPORTED = "unsupported"  # type of a validation error whose context has the field and its value
# Of a client's error that is longer than this, only the beginning and the end are sent: it quotes what the client sent.
MAX_MESSAGE, MESSAGE_HEAD, MESSAGE_TAIL = 240, 110, 85
DESCRIPTIONS = {
    400: "The body is not JSON, or a field is unknown, missing, of another type or out of range.",
    401: "The key is missing or unknown.",
    403: "The client may not use this route.",
    404: "There is nothing of this name here.",
    408: "The body did not arrive in time.",
    409: "The server's state does not allow it now.",
    413: "The body is too large.",
    429: "Too many requests wait, or this one has waited too long.",
    500: "The server has a fault.",
    503: "The server cannot take or finish the request now.",
    504: "The request took longer than it or the server allows.",
}


class ErrorDetail(BaseModel):
    """What is wrong: one line, the field if it is about one, and the status."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The argument `responses` of a route that may answer with these errors."""
    return {status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses}


class ApiError(Exception):
    """The reply to a request is this error.

    Attributes:
        status: the HTTP status.
        param: the wrong field, if the error is about one.
        retry_after: seconds after which the client may try again, if it may.
    """

    def __init__(self, status: int, message: str, param: str | None = None, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_after = retry_after


def user_error(error: ValueError, renamed: Mapping[str, str]) -> ApiError:
    """The ApiError for a wrong value, from a message of the form `field: what is wrong`.

    `renamed` maps fields to the names under which the client sent them, if they differ.
    """
    named = re.fullmatch(r"(\w+)(.*?: .*)", str(error), re.DOTALL)
    if named is None:
        return ApiError(400, str(error))
    field = renamed.get(named[1], named[1])
    return ApiError(400, field + named[2], field)


def json_response(body: object, status: int = 200) -> Response:
    """JSON in ASCII. So it can quote any text that a client sent (UTF-8 cannot encode a lone surrogate)."""
    return Response(json.dumps(body, allow_nan=False), status, media_type="application/json")


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error, in OpenAI's format. At most 200 characters of it are the client's."""
    line = " ".join(message.split())
    if status < 500 and len(line) > MAX_MESSAGE:
        line = f"{line[:MESSAGE_HEAD]} ... {line[-MESSAGE_TAIL:]}"
    if param is not None and len(param) > MAX_PARAM:
        param = None
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": line, "type": kind, "param": param, "code": status}}


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    response = json_response(error_body(status, message, param), status)
    response.headers.update(headers or {})
    return response


def retry_header(seconds: int | None) -> dict[str, str]:
    """The header that says when to try again; none without `seconds`."""
    return {} if seconds is None else {"Retry-After": str(seconds)}


def event(data: str) -> bytes:
    """A server-sent event."""
    return f"data: {data}\n\n".encode()


def error_event(status: int, message: str) -> bytes:
    """An error as the last event of a stream."""
    return event(json.dumps(error_body(status, message)))


def shown(value: object) -> str:
    """A client's value for an error about it, shortened. The value's size and depth do not matter."""
    short = reprlib.Repr()  # goes into no more than a few levels and items
    short.maxstring = MAX_SHOWN_INPUT
    text = short.repr(value)
    return text if len(text) <= MAX_SHOWN_INPUT else text[:MAX_SHOWN_INPUT] + "..."


def add_error_handlers(app: FastAPI) -> None:
    """Send every error of the application in this format."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> Response:
        return error_response(error.status, str(error), error.param, retry_header(error.retry_after))

    @app.exception_handler(UnavailableError)
    async def _unavailable(request: Request, error: UnavailableError) -> Response:
        return error_response(503, str(error), headers=retry_header(RETRY_SECONDS))

    @app.exception_handler(QueueFullError)
    async def _full(request: Request, error: QueueFullError) -> Response:
        return error_response(429, str(error), headers=retry_header(error.retry_after))

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        return _describe_validation(error.errors())

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        message = UNREADABLE if error.detail == FASTAPI_UNREADABLE else str(error.detail)
        return error_response(error.status_code, message, headers=error.headers)

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # the client has disconnected and does not read it


def _describe_validation(errors: Any) -> Response:
    """One line about the first wrong field. Alternatives of a union are joined."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return error_response(400, f"body: not valid JSON ({first['ctx']['error']} at character {first['loc'][-1]})")
    if first["type"] == UNSUPPORTED:
        field, message = first["ctx"]["field"], first["msg"]
        return error_response(400, f"{field}: {shown(first['ctx']['value'])} is not supported; {message}", field)
    path = first["loc"][1:]
    if first["type"] == "string_unicode" and not path:
        return error_response(400, "body: has a field whose name is not valid Unicode")
    if not path:
        return error_response(400, "body: must be a JSON object, sent with Content-Type: application/json")
    field, where = str(path[0]), ".".join(str(part) for part in path)
    if first["type"] == "extra_forbidden":
        return error_response(400, f"{where}: no such field", field)
    if first["type"] == "missing":
        return error_response(400, f"{where}: missing; it must be given", field)
    wanted = dict.fromkeys(error["msg"] for error in errors if error["loc"][:2] == first["loc"][:2])
    where = where if len(errors) == 1 else field  # a union's branches are no part of a path
    return error_response(400, f"{where}: {shown(first['input'])} is not allowed; {'; '.join(wanted)}", field)
