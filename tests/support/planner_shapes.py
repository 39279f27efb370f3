"""A small model, ideal hardware and simple routing, for predictions that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe_runtime.balancer.placement import Placement
from moe_runtime.planner.hardware import Hardware, Link, Overheads
from moe_runtime.planner.routing import LoadRouting
from moe_runtime.planner.shape import Matrix, ModelShape

FREE = Overheads(
    step=0,
    step_ranks=0,
    step_row=0,
    layer=0,
    layer_row=0,
    layer_byte=0,
    slot=0,
    expert_byte=0,
    wait=0,
)
IDEAL = Hardware(
    name="ideal",
    cores=None,
    ranks_per_node=4,
    memory_bytes=1e12,
    reserved_bytes=0,
    weight_bytes={},
    memory_bandwidth=((1, 1e9),),
    expert_bandwidth=1,
    matrix_rate={"bfloat16": ((1, 1e12),)},
    efficiency={"bfloat16": ((1, 1.0),)},
    attention_bandwidth=1,
    attention_rate=1,
    attention_dtype="bfloat16",
    output_multiple=1,
    intra_node=Link(1e9, 0),
    inter_node=Link(1e9, 0),
    rows_out="expert",
    rows_back="expert",
    overlap=1,
    cold_factor=((0, 1.0),),
    overheads=FREE,
)


def tiny(num_experts: int = 4, top_k: int = 1, **changes: object) -> ModelShape:
    """Every matrix of a layer has a round number of bytes."""
    shape = ModelShape(
        name="tiny",
        num_layers=2,
        num_sparse_layers=1,
        num_experts=num_experts,
        top_k=top_k,
        attention=(Matrix(100, 50, "bfloat16"),),
        dense_mlp=(Matrix(1000, 10, "bfloat16"),),
        shared=(),
        gate=Matrix(num_experts, 50, "bfloat16"),
        expert=(Matrix(500, 100, "bfloat16"),),
        head=Matrix(1000, 50, "bfloat16"),
        embedding_bytes=0,
        kv_bytes=200,
        windows=(None, None),
        decode_flops_per_key=1,
        prefill_flops_per_key=1,
        bytes_out=1000,
        bytes_back=3000,
    )
    return replace(shape, **changes)


def even(shape: ModelShape, ranks: int, layers: int = 1) -> Placement:
    return Placement.even(layers, shape.num_experts, ranks)


def certain(shape: ModelShape) -> LoadRouting:
    """Every token uses all experts."""
    return LoadRouting(np.ones((1, shape.num_experts)), shape.num_experts)
