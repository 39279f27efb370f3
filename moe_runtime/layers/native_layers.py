"""The parts of a decoder on the native CPU kernels; `moe_runtime.layers.torch_kit` has the same in torch.

`moe_runtime.layers.native_kit` makes them. Blocks add to the residual rows in place.

Shape suffixes: T tokens, D hidden, E logical experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moe_runtime.all2all.dispatch import Dispatcher
from moe_runtime.all2all.symmetric import SymmetricDispatcher
from moe_runtime.experts.parts import ExpertPart
from moe_runtime.kernels.cpu.blocks import (
    AttentionCall,
    DenseCall,
    GateCall,
    LayerPolicies,
    NextNorm,
    SparseCall,
)
from moe_runtime.kernels.cpu.layers import Layers
from moe_runtime.kernels.cpu.native import Kernels, Step
from moe_runtime.kernels.cpu.packed import PackedExperts, PackedLinear
from moe_runtime.layers.batch import Batch, StepPolicies
from moe_runtime.layers.decoder import LayerLoop, Rows
from moe_runtime.layers.kv_cache import LayerCache
from moe_runtime.layers.moe import MoELayer, part_size


@dataclass(frozen=True)
class NativeNorm:
    """See `ops.rms_norm`."""

    kernels: Kernels
    weight_D: Tensor
    eps: float

    @property
    def behind(self) -> NextNorm:
        """As the blocks take it."""
        return NextNorm(self.weight_D, self.eps)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.kernels.rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + x`, and that sum, in the places of `x` and `residual`."""
        return self.kernels.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps, in_place=True)


class NativeAttention:
    """See `torch_kit.Attention`."""

    def __init__(self, block: AttentionCall) -> None:
        self.block = block

    @property
    def nbytes(self) -> int:
        return self.block.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, step: Step, cache: LayerCache) -> tuple[Tensor, Tensor]:
        return self.block(x_TD, step, cache.k_NBGd, cache.v_NBGd, residual_TD, in_place=True), residual_TD


class NativeMLP:
    """SwiGLU; loaded as an expert in slot 0."""

    def __init__(self, experts: PackedExperts) -> None:
        self.experts = experts
        self._block = DenseCall(experts)

    @property
    def nbytes(self) -> int:
        return self.experts.nbytes

    def load(self, slot: int, part: ExpertPart, first_row: int, rows: Tensor) -> None:
        """Pack rows of a weight."""
        self.experts.load(slot, part, first_row, rows)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._block(x_TD)


class NativeDenseBlock:
    """An MLP and the norm behind it, in one call."""

    def __init__(self, mlp: NativeMLP, next_norm: NativeNorm) -> None:
        self.mlp = mlp
        self.block = DenseCall(mlp.experts, next_norm.behind)

    @property
    def nbytes(self) -> int:
        return self.mlp.nbytes

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.block(x_TD, residual_TD), residual_TD


class NativeGate:
    """See `gate.Gate`."""

    def __init__(self, call: GateCall, layer: int) -> None:
        self.call = call
        self.layer = layer

    @property
    def nbytes(self) -> int:
        return self.call.nbytes

    def logits(self, x_TD: Tensor) -> Tensor:
        return self.call.logits(x_TD)

    def __call__(self, x_TD: Tensor, num_decode: int, policies: StepPolicies | None = None) -> tuple[Tensor, Tensor]:
        return self.call(x_TD, num_decode, _of_layer(policies, self.layer))


def _of_layer(policies: StepPolicies | None, layer: int) -> LayerPolicies:
    if policies is None:
        return LayerPolicies()
    policies_LP4, chosen_LTK = policies.policies_LP4, policies.chosen_LTK
    return LayerPolicies(
        policies.policy_T,
        None if policies_LP4 is None else policies_LP4[layer],
        None if chosen_LTK is None else chosen_LTK[layer],
    )


class NativeSparseBlock:
    """The sparse block of a rank that holds all experts, and the norm behind it, in one call."""

    def __init__(self, block: SparseCall, gate: NativeGate) -> None:
        self.block = block
        self.gate = gate
        self.experts = block.experts

    @property
    def nbytes(self) -> int:
        parts = (self.block.gate, self.block.experts, self.block.shared)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.dispatcher == "local"
        policies = _of_layer(batch.policies, self.gate.layer)
        return self.block(x_TD, batch.num_decode, residual_TD, policies), residual_TD


class NativeMoELayer(MoELayer):
    """A sparse block whose rows go through shared memory, and the norm behind it; `block` does the same in one call."""

    def __init__(
        self,
        gate: NativeGate,
        slot_E: Tensor,
        experts: PackedExperts,
        shared: NativeMLP | None,
        next_norm: NativeNorm,
        dispatchers: Mapping[str, Dispatcher],
    ) -> None:
        super().__init__(gate, slot_E, experts, shared, next_norm, dispatchers)
        way = dispatchers["symmetric"]
        assert isinstance(way, SymmetricDispatcher)
        shared_experts = None if shared is None else shared.experts
        slot_EP = self.slot_EP[:-1]  # which `use_replicas` changes
        self.block = SparseCall(gate.call, slot_EP, experts, shared_experts, next_norm.behind, way.exchange)
        self.way = way


class FusedLayers:
    """All layers in one call, where the experts are here or rows go through shared memory; see
    `models.decoder.LayerRunner`.

    Args:
        way: the exchange of the layers, or None.
        loop: runs what the call can't: steps that are measured or that take another way.
    """

    def __init__(self, layers: Layers, way: SymmetricDispatcher | None, loop: LayerLoop) -> None:
        self._layers = layers
        self._way = way
        self._loop = loop

    def begin(self, x_TD: Tensor, residual_TD: Tensor, step: Step, batch: Batch) -> Rows:
        spread = None
        if self._way is not None:
            if batch.dispatcher != "symmetric" or batch.expert_work is not None:
                return self._loop.begin(x_TD, residual_TD, step, batch)
            tokens_per_rank = batch.tokens_per_rank
            size = part_size(tokens_per_rank, self._layers.num_experts, self._way.top_k)
            spread = self._way.step(tokens_per_rank, size)
        policies = batch.policies and [_of_layer(batch.policies, layer) for layer in range(self._layers.num_sparse)]
        running = self._layers.begin(x_TD, residual_TD, step, batch.num_decode, policies or (), spread)

        def rows() -> Tensor:
            running.wait()
            return x_TD

        return rows


class NativeHead:
    """Logits in float32, never rounded to the model's dtype."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def tied_embedding(self) -> NativeEmbedding:
        """The embedding that shares this head's weight."""
        return NativeEmbedding(self.linear)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self.linear(x_TD, float32=True)


class NativeEmbedding:
    """Rows of a packed weight `[V, D]` by token id."""

    def __init__(self, linear: PackedLinear) -> None:
        self.linear = linear

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, token_T: Tensor) -> Tensor:
        return self.linear.take_rows(token_T)
