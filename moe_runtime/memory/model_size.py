"""The size of a checkpoint, from its configuration alone: parameters, bytes, and bytes read by a decode step. No torch.

Formulas use D hidden, V vocabulary, L layers, E experts per sparse layer, K experts per token, F expert intermediate,
H query heads, G key/value heads, d head dim. `native` says whether native CPU kernels hold the weights. They hold
bfloat16 matrices in 12 bits a weight, and round the outputs of each matrix up to 64. The rounding adds nothing to most
models, a few percent to small ones, and more to models with narrow experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_runtime.config.attention import AnyAttention
from moe_runtime.config.model import ModelConfig
from moe_runtime.types.weight_format import PANEL, BlockFormats, WeightFormat

ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, summed over the layers. They include the gates' correction biases, but not extra layers
    for multi-token prediction, which are not loaded.

    Attributes:
        embedding: V * D.
        head: V * D, or 0 if it is tied to the embedding.
        attention: projections, their biases, and the norms of queries and keys.
        dense_mlp: layers without experts.
        shared_experts: experts that every token uses, and the gates on them.
        gate, gate_bias: gates of the sparse layers, and their correction biases.
        norms: before attention, before the MLP, and the last one.
        expert: one routed expert, 3 * D * F, and 2 * F + D if it has biases.
        num_experts, top_k: routed experts in all sparse layers, and how many of them a token uses.
    """

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    shared_experts: int
    gate: int
    gate_bias: int
    norms: int
    expert: int
    num_experts: int
    top_k: int

    @property
    def dense(self) -> int:
        """All except the routed experts."""
        layers = self.attention + self.dense_mlp + self.shared_experts + self.gate + self.gate_bias + self.norms
        return self.embedding + self.head + layers

    @property
    def total(self) -> int:
        return self.dense + self.num_experts * self.expert

    @property
    def active(self) -> int:
        """Parameters that a token uses: all except the experts it does not use, as model cards count them."""
        return self.dense + self.top_k * self.expert


def count_parameters(config: ModelConfig) -> Parameters:
    """Numbers of parameters of a checkpoint."""
    hidden, moe = config.hidden_size, config.moe
    num_sparse = len(config.moe_layers)
    dense_sizes = [layer.dense_intermediate_size or 0 for layer in config.layers]
    return Parameters(
        embedding=config.vocab_size * hidden,
        head=0 if config.tie_word_embeddings else config.vocab_size * hidden,
        attention=sum(_attention_parameters(layer.attention, hidden) for layer in config.layers),
        dense_mlp=3 * hidden * sum(dense_sizes),
        shared_experts=num_sparse * (3 * hidden * moe.shared_intermediate_size + _shared_gate(config)),
        gate=num_sparse * moe.num_experts * (hidden + moe.gate_bias),
        gate_bias=num_sparse * moe.num_experts if moe.correction_bias else 0,
        norms=(2 * config.num_layers + 1) * hidden,
        expert=3 * hidden * moe.intermediate_size + (2 * moe.intermediate_size + hidden) * moe.expert_bias,
        num_experts=num_sparse * moe.num_experts,
        top_k=num_sparse * moe.top_k,
    )


def _shared_gate(config: ModelConfig) -> int:
    """Parameters of a layer's gate on its shared experts."""
    return config.hidden_size if config.moe.shared_gate else 0


def _attention_parameters(attention: AnyAttention, hidden: int) -> int:
    sizes = [*attention.matrices(hidden), *attention.head_matrices]
    matrices = sum(outputs * inputs for outputs, inputs in sizes)
    return matrices + attention.num_vector_weights(hidden)


def weights_dtype(asked: str, stored: str) -> str:
    """The dtype of weights and activations, "float32" or "bfloat16". If `asked` is "auto", it is the checkpoint's.

    Raises:
        ValueError: `asked` is "auto", and the checkpoint's dtype is not supported.
    """
    name = stored if asked == "auto" else asked
    if name not in ITEMSIZE:
        raise ValueError(f'dtype: the checkpoint is {name}, which is not supported; choose "bfloat16" or "float32"')
    return name


def cache_dtype(asked: str, dtype: str) -> str:
    """The dtype of the KV cache; if `asked` is "auto", it is that of weights and activations."""
    return dtype if asked == "auto" else asked


def expert_bytes(config: ModelConfig, dtype: str, native: bool = False, layer: int | None = None) -> int:
    """Bytes of one routed expert of a sparse layer; without `layer`, of the layer whose experts are largest."""
    if layer is None:
        return max(expert_bytes(config, dtype, native, index) for index in config.moe_layers)
    hidden, moe = config.hidden_size, config.moe
    formats = config.layers[layer].formats.experts
    matrices = _mlp_bytes(formats, WeightFormat.of(dtype, native), hidden, moe.intermediate_size, native)
    if not moe.expert_bias:
        return matrices
    inner = -(-moe.intermediate_size // PANEL) * PANEL if native else moe.intermediate_size
    return matrices + (2 * inner + hidden) * ITEMSIZE[dtype]


def dense_bytes(config: ModelConfig, dtype: str, native: bool = False) -> int:
    """Bytes that every rank holds: all except the routed experts. Gates are float32 if the family stores them so. An
    embedding that shares nothing with the head is as in the checkpoint also with native kernels."""
    count, moe, hidden = count_parameters(config), config.moe, config.hidden_size
    dense = WeightFormat.of(dtype, native)
    gate = WeightFormat.of("float32" if moe.gate_float32 else dtype, native)
    embedding = 0 if config.shares_embedding else count.embedding
    vectors = count.norms + len(config.moe_layers) * _shared_gate(config)
    vectors += sum(layer.attention.num_vector_weights(hidden) for layer in config.layers)
    if moe.gate_bias:
        vectors += len(config.moe_layers) * moe.num_experts
    matrices = (config.head_format or dense).nbytes(config.vocab_size, hidden, native)
    for layer in config.layers:
        *inputs, output = layer.attention.matrices(hidden)
        formats = layer.formats.attention
        matrices += sum((formats.input or dense).nbytes(*size, native) for size in inputs)
        matrices += (formats.output or dense).nbytes(*output, native)
        matrices += sum(dense.nbytes(*size, native) for size in layer.attention.head_matrices)
        matrices += gate.nbytes(moe.num_experts, hidden, native) if layer.is_sparse else 0
        inner = moe.shared_intermediate_size if layer.is_sparse else layer.dense_intermediate_size
        matrices += _mlp_bytes(layer.formats.mlp, dense, hidden, inner or 0, native)
    return matrices + (embedding + vectors) * ITEMSIZE[dtype] + 4 * count.gate_bias


def _mlp_bytes(formats: BlockFormats, dense: WeightFormat, hidden: int, intermediate: int, native: bool) -> int:
    """Bytes of a SwiGLU's three matrices, `dense` where they are not quantised; 0 if it does not exist."""
    if not intermediate:
        return 0
    gate_up, down = formats.input or dense, formats.output or dense
    return 2 * gate_up.nbytes(intermediate, hidden, native) + down.nbytes(hidden, intermediate, native)


def weight_bytes(config: ModelConfig, dtype: str, num_slots: int, native: bool = False) -> int:
    """Bytes of weights on a rank with `num_slots` slots in each sparse layer. An empty slot takes memory too."""
    return dense_bytes(config, dtype, native) + num_slots * slot_bytes(config, dtype, native)


def slot_bytes(config: ModelConfig, dtype: str, native: bool = False) -> int:
    """Bytes of one slot in each sparse layer."""
    return sum(expert_bytes(config, dtype, native, layer) for layer in config.moe_layers)


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str) -> int:
    """Bytes that all layers keep of a new token; with grouped-query attention 2 * L * G * d numbers, and scales."""
    return sum(page_bytes(config, 1, kv_dtype))


def page_bytes(config: ModelConfig, block_size: int, kv_dtype: str) -> tuple[int, ...]:
    """Bytes of a page of each page group, over the group's layers; `kv_dtype` is the cache's, see `cache_dtype`."""
    sizes = [0] * len(config.windows)
    for group, spec in zip(config.page_groups, config.kv_specs(kv_dtype), strict=True):
        sizes[group] += block_size * spec.bytes_per_token
    return tuple(sizes)


def cache_bytes(num_pages: Sequence[int], sizes: Sequence[int]) -> int:
    """Bytes of a cache with `num_pages` pages of each group, given the bytes of a page of each group."""
    return sum(count * size for count, size in zip(num_pages, sizes, strict=True))


def distinct_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Expected number of distinct experts that B = `num_tokens` tokens use in a layer, if each chooses K at random.

    One token does not choose a given expert with probability 1 - K/E; B tokens do not with (1 - K/E)^B. So the expected
    number is E * (1 - (1 - K/E)^B).
    """
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def decode_bytes(config: ModelConfig, dtype: str, batch_size: int, context_len: int = 0, native: bool = False) -> float:
    """Expected bytes that one rank with all experts reads from memory in a decode step, if experts are used uniformly.

    It reads every dense weight once, the experts that the batch uses, and the keys and values of `context_len` tokens
    before each sequence's last. Of an embedding that is not tied to the head, it reads only the rows of the tokens.
    """
    moe = config.moe
    table = 0 if config.shares_embedding else count_parameters(config).embedding - batch_size * config.hidden_size
    experts = distinct_experts(moe.num_experts, moe.top_k, batch_size)
    kept = sum(spec.tokens_read(context_len) * spec.bytes_per_token for spec in config.kv_specs(dtype))
    return (
        dense_bytes(config, dtype, native)
        - table * ITEMSIZE[dtype]
        + experts * slot_bytes(config, dtype, native)
        + batch_size * kept
    )
