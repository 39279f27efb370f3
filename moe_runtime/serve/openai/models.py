"""OpenAI's list of models, which has the one that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from moe_runtime.serve.engine_messages import Loaded
from moe_runtime.serve.errors import ApiError, error_responses, json_response, shown
from moe_runtime.serve.openai.fields import OpenAIFields
from moe_runtime.serve.requests import Front, engine_of

router = APIRouter(prefix="/v1/models")


@router.get("")
async def models(request: Request) -> Response:
    """The one model that is served."""
    return json_response({"object": "list", "data": [_model(request)]})


@router.get("/{model_id:path}", responses=error_responses(404))
async def model(model_id: str, request: Request) -> Response:
    """The model of this name. Names may have slashes."""
    check_model(model_id, engine_of(request).require_ready())
    return json_response(_model(request))


def check_model(model: str | None, info: Loaded) -> None:
    """Raise ApiError if a request names another model than the one that is served."""
    if model not in (None, info.model_name):
        raise ApiError(404, f"model: {shown(model)} is not served here; it must be {info.model_name!r}", "model")


def front_of(request: Request, body: OpenAIFields) -> Front:
    """What a route needs, for a request to the model that is served. Fields without effect are noted.

    Raises:
        ApiError: another model is asked for.
        UnavailableError: the engine accepts no requests.
    """
    front = Front.of(request)
    check_model(body.model, front.info)
    request.app.state.unknown_fields.note(body)
    return front


def _model(request: Request) -> dict[str, Any]:
    info = engine_of(request).require_ready()
    return {
        "id": info.model_name,
        "object": "model",
        "created": int(request.app.state.started),
        "owned_by": "moe_runtime",
        "max_model_len": info.max_model_len,
    }
