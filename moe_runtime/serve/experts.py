"""Routes about experts: their load, as data and as pictures, where they are, and moving them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from moe_runtime.serve.errors import ApiError, error_responses, json_response, shown
from moe_runtime.serve.requests import engine_of

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
HEATMAPS: dict[int | str, dict[str, Any]] = {
    200: {"content": {media_type.partition(";")[0]: {} for media_type in MEDIA_TYPES.values()}}
}


class RebalanceOptions(BaseModel):
    """The body of `POST /experts/rebalance`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool = False


router = APIRouter(prefix="/experts")


@router.get("/load")
async def load(request: Request) -> Response:
    """Tokens per phase, layer and expert since the start."""
    load: ExpertLoad = await engine_of(request).query("expert_load")
    return json_response(load.to_dict())


@router.get("/heatmap.{suffix}", response_class=Response, responses=HEATMAPS | error_responses(404))
async def heatmap(suffix: str, request: Request) -> Response:
    """The load as a picture, page or table."""
    if suffix not in MEDIA_TYPES:
        allowed = ", ".join(MEDIA_TYPES)
        raise ApiError(404, f"suffix: {shown(suffix)} is not allowed; it must be one of {allowed}", "suffix")
    load: ExpertLoad = await engine_of(request).query("expert_load")
    async with request.app.state.drawing:
        content = await asyncio.to_thread(load.render, suffix)
    return Response(content, media_type=MEDIA_TYPES[suffix])


@router.get("/placement")
async def placement(request: Request) -> Response:
    """Which expert is in which slot of which rank."""
    placement: Placement = await engine_of(request).query("placement")
    return json_response(placement.to_dict())


@router.get("/decisions")
async def decisions(request: Request) -> Response:
    """The balancer's recent decisions with their figures, newest last."""
    return json_response({"decisions": await engine_of(request).query("decisions")})


@router.post("/rebalance", responses=error_responses(409))
async def rebalance(request: Request, options: RebalanceOptions | None = None) -> Response:
    """Move experts to a better placement for the recent load. Replies once they have moved."""
    try:
        return json_response(await engine_of(request).rebalance(options.dry_run if options else False))
    except ValueError as error:
        raise ApiError(409, str(error)) from None
