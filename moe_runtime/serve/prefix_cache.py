"""The route that empties the prefix cache."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from moe_runtime.serve.errors import json_response
from moe_runtime.serve.requests import engine_of

router = APIRouter()


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forget all cached prefixes. Requests that are sent after the reply find none of earlier ones."""
    await engine_of(request).reset_prefix_cache()
    return json_response({"reset": True})
