"""The two sides of the comparison: an expert-parallel layer of DeepSpeed, and ours, with the same weights and inputs.

Shape suffixes: T tokens of a rank, D hidden, F intermediate, G = 2F, E experts, K experts per token, I inputs, W ranks,
S slots of a rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_runtime.all2all.dispatch import Dispatcher, RowOps, make_dispatchers
from moe_runtime.all2all.symmetric import SymmetricDispatcher
from moe_runtime.kernels.cpu import native
from moe_runtime.kernels.cpu.blocks import GateCall, SparseCall
from moe_runtime.kernels.cpu.packed import PackedExperts
from moe_runtime.layers.moe import part_size

HIDDEN, LAYERS, INPUTS = 1024, 2, 8
SHIFT = 8.0  # shift of all inputs along one direction, through which gate weights set the load
PEER_TIMEOUT = 600.0  # seconds
Call = Callable[[int], Tensor]


@dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    inner: int

    def __str__(self) -> str:
        return f"{self.experts} experts, top {self.top_k}, intermediate {self.inner}"


SHAPES = {"fine": Shape(64, 8, 512), "coarse": Shape(8, 2, 3584), "tiny": Shape(8, 2, 64)}


class SwiGLU(nn.Module):
    """An expert in DeepSpeed's form, with gate and up in one product."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.w13 = nn.Linear(HIDDEN, 2 * inner, bias=False)
        self.w2 = nn.Linear(inner, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expert_weights(shape: Shape, layer: int, expert: int) -> tuple[Tensor, Tensor]:
    """`(w13_GD, w2_DF)`, the same on every rank and side."""
    seed = 1000 * layer + expert
    w2_DF = normal(seed + 500, HIDDEN, shape.inner) / shape.inner**0.5
    return normal(seed, 2 * shape.inner, HIDDEN) / HIDDEN**0.5, w2_DF


def gate_weight(shape: Shape, layer: int, routing: str) -> Tensor:
    """`[E, D]`: normal scores; "skewed" adds the logarithm of Zipf's distribution, with the experts in random order."""
    weight_ED = normal(layer, shape.experts, HIDDEN) / HIDDEN**0.5
    weight_ED -= weight_ED.mean(1, keepdim=True)  # so that only the load sets the direction of the shift
    if routing == "skewed":
        order_E = normal(layer + 77, shape.experts).argsort()
        weight_ED -= torch.log(1.0 + order_E)[:, None] / SHIFT / HIDDEN**0.5
    return weight_ED


def draw_inputs(rank: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    x_ITD = normal(rank + 1, INPUTS, tokens, HIDDEN) + SHIFT / HIDDEN**0.5
    return list(x_ITD.to(dtype))


class DeepSpeedSide:
    """Layers of DeepSpeed with the experts of this rank."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        from deepspeed.moe.layer import MoE

        self.shape, (rank, ranks) = shape, (dist.get_rank(), dist.get_world_size())
        self.layers = []
        for index in range(LAYERS):
            layer = MoE(
                HIDDEN,
                SwiGLU(shape.inner).to(dtype),
                num_experts=shape.experts,
                ep_size=ranks,
                k=shape.top_k,
                drop_tokens=False,
                min_capacity=0,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
            layer.set_deepspeed_parallelism()
            for slot, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
                w13_GD, w2_DF = expert_weights(shape, index, rank * shape.experts // ranks + slot)
                expert.w13.weight.data.copy_(w13_GD)
                expert.w2.weight.data.copy_(w2_DF)
            self.layers.append(layer.to(dtype).eval())

    def route(self, routing: str) -> None:
        for index, layer in enumerate(self.layers):
            layer.deepspeed_moe.gate.wg.weight.data.copy_(gate_weight(self.shape, index, routing))

    def call(self, inputs: list[Tensor], index: int) -> Tensor:
        out_TD: Tensor = self.layers[index % LAYERS](inputs[index % INPUTS])[0]
        return out_TD


class OurSide:
    """Our layers with the experts of this rank, and every way to run them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, kernels: native.Kernels, max_tokens: int) -> None:
        self.shape, self.dtype, self.kernels = shape, dtype, kernels
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        slots = shape.experts // self.ranks
        self.experts = [PackedExperts(kernels, slots, HIDDEN, shape.inner, dtype) for _ in range(LAYERS)]
        for index, slot in itertools.product(range(LAYERS), range(slots)):
            w13_GD, w2_DF = expert_weights(shape, index, self.rank * slots + slot)
            gate_FD, up_FD = w13_GD.to(dtype).chunk(2)
            for part, rows in (("gate", gate_FD), ("up", up_FD), ("down", w2_DF.to(dtype))):
                self.experts[index].put(slot, part, 0, rows)
        self.ways: dict[str, Dispatcher] = {}
        if self.ranks > 1:
            group, row_ops = dist.group.WORLD, RowOps(kernels.group_by_slot, kernels.combine)
            assert group is not None
            sizes: dict[str, Any] = {"hidden_size": HIDDEN, "top_k": shape.top_k, "max_tokens": max_tokens}
            self.ways = make_dispatchers(group, slots, row_ops)
            self.ways["symmetric"] = SymmetricDispatcher(group, slots, dtype=dtype, timeout=PEER_TIMEOUT, **sizes)

    def route(self, routing: str) -> None:
        gate = native.gate_config(
            self.shape.experts, top_k=self.shape.top_k, scoring="softmax", normalize=self.shape.top_k > 1
        )
        # Rounded like DeepSpeed's gate, and multiplied in float32 as DeepSpeed does.
        weights = [gate_weight(self.shape, layer, routing).to(self.dtype).float() for layer in range(LAYERS)]
        self.gates = [GateCall(self.kernels, gate, weight_ED) for weight_ED in weights]

    def calls(self, inputs: list[Tensor]) -> dict[str, Call]:
        slot_EP, shared = torch.arange(self.shape.experts)[:, None], self.ways.get("symmetric")
        exchange, step = None, None
        if isinstance(shared, SymmetricDispatcher):
            tokens_per_rank = [len(inputs[0])] * self.ranks
            exchange = shared.exchange
            step = shared.step(tokens_per_rank, part_size(tokens_per_rank, self.shape.experts, self.shape.top_k))
        parts = zip(self.gates, self.experts, strict=True)
        blocks = [SparseCall(gate, slot_EP, experts, None, exchange=exchange) for gate, experts in parts]
        calls: dict[str, Call] = {name: partial(self._call, way, inputs) for name, way in self.ways.items()}
        calls["local" if step is None else "symmetric"] = lambda i: blocks[i % LAYERS](
            inputs[i % INPUTS], 0, spread=step
        )
        return calls

    def _call(self, way: Dispatcher, inputs: list[Tensor], index: int) -> Tensor:
        x_TD = inputs[index % INPUTS]
        weights_TK, slots_TK, _ = self.gates[index % LAYERS](x_TD, 0)
        sent = way.dispatch(x_TD, slots_TK, [len(x_TD)] * self.ranks)
        y_RD = self.experts[index % LAYERS](sent.x_ND, sent.row_R, sent.counts_S)
        return way.combine(y_RD, sent, weights_TK)

    def work(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Bytes that each rank must read and operations that it must do, `[W]` each, as means over the inputs."""
        counts = torch.zeros(INPUTS, self.shape.experts, dtype=torch.int64)
        for index, x_TD in enumerate(inputs):
            experts_TK = self.gates[index % LAYERS](x_TD, 0)[1]
            counts[index] = torch.bincount(experts_TK.flatten(), minlength=self.shape.experts)
        dist.all_reduce(counts)
        counts_IWS = counts.view(INPUTS, self.ranks, -1).double()
        matrix, gate = 3 * self.shape.inner * HIDDEN, self.shape.experts * HIDDEN
        expert_bytes = self.experts[0].nbytes / self.experts[0].num_slots
        nbytes = (counts_IWS > 0).sum(-1).double().mean(0) * expert_bytes + gate * 4
        return nbytes, 2 * (counts_IWS.sum(-1).mean(0) * matrix + len(inputs[0]) * gate)
