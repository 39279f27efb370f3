"""How long dispatch and combine of a layer take: the rows of the busiest rank / the bandwidth of its links.

On nodes with cores, the ranks copy rows themselves, one after the other. In dispatch, a rank writes the rows for other
ranks, and copies all rows that it computes, its own included. In combine, it writes all rows that it has computed.

Shape suffixes: E logical experts, W ranks, N nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_runtime.planner.hardware import Hardware
from moe_runtime.planner.routing import Routing
from moe_runtime.planner.shape import ModelShape

Floats = npt.NDArray[np.float64]


def exchange_seconds(
    shape: ModelShape,
    hardware: Hardware,
    routing: Routing,
    layer: int,
    share_EW: Floats,
    rows_W: Floats,
    tokens_W: Floats,
) -> float:
    """Seconds of one layer's dispatch and combine.

    Args:
        share_EW: share of each expert's tokens that each rank computes.
        rows_W: rows of each rank in the step.
        tokens_W: tokens of the sequences of each rank.
    """
    num_ranks = len(tokens_W)
    node_W = np.arange(num_ranks) // hardware.ranks_per_node
    node_NW = node_W == np.arange(node_W[-1] + 1)[:, None]
    pairs_W = rows_W / tokens_W.sum()
    once_W = np.minimum(routing.hits(layer, share_EW), pairs_W)  # an expected value may exceed the step's own rows
    per_token_W = {"expert": pairs_W, "rank": once_W, "node": once_W}  # "node" applies between nodes: see below
    node_hits_N = (
        routing.hits(layer, share_EW @ node_NW.T) if "node" in (hardware.rows_out, hardware.rows_back) else None
    )
    seconds = 0.0
    ways = ((hardware.rows_out, shape.bytes_out, True), (hardware.rows_back, shape.bytes_back, False))
    for rule, row_bytes, is_out in ways:
        hits_W = per_token_W[rule]
        inside_N, tokens_N = node_NW @ hits_W, node_NW @ tokens_W
        far_tokens_W = tokens_W.sum() - tokens_N[node_W]
        near_in_W = hits_W * (tokens_N[node_W] - tokens_W)
        near_out_W = tokens_W * (inside_N[node_W] - hits_W)
        if rule == "node":  # once to one rank of the node, which forwards it
            assert node_hits_N is not None
            size_N = node_NW.sum(axis=1)
            far_in_W = (node_hits_N / size_N)[node_W] * far_tokens_W
            far_out_W = tokens_W * (node_hits_N.sum() - node_hits_N[node_W])
            near_in_W = near_in_W + hits_W * far_tokens_W
        else:
            far_in_W = hits_W * far_tokens_W
            far_out_W = tokens_W * (hits_W.sum() - inside_N[node_W])
        near_W = np.maximum(near_in_W, near_out_W)
        if hardware.cores is not None:
            near_W = near_in_W + hits_W * tokens_W + (near_out_W if is_out else 0.0)
        near = float(near_W.max()) * row_bytes / hardware.intra_node.bandwidth
        far = float(np.maximum(far_in_W, far_out_W).max()) * row_bytes / hardware.inter_node.bandwidth
        latency = max(hardware.intra_node.latency, hardware.inter_node.latency if len(node_NW) > 1 else 0.0)
        seconds += max(near, far) + latency
    return seconds
