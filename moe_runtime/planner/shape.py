"""The sizes of a model that determine its speed; also for models that the runtime cannot serve.

Formulas use D hidden, V vocabulary, F intermediate, H query heads, G key/value heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_runtime.config.model import ModelConfig
from moe_runtime.memory.model_size import cache_dtype
from moe_runtime.system.files import parse_json, read_text
from moe_runtime.types.weight_format import DENSE, BlockFormats, WeightFormat

DTYPES = ("float32", "bfloat16", "float8")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float8": 1}
INTEGERS = {  # fields of a file, with the least allowed value
    "vocab_size": 2,
    "hidden_size": 1,
    "num_layers": 1,
    "num_sparse_layers": 1,
    "num_experts": 1,
    "top_k": 1,
    "expert_intermediate_size": 1,
    "shared_intermediate_size": 0,
    "dense_intermediate_size": 0,
    "kv_bytes": 1,
    "decode_flops_per_key": 1,
    "prefill_flops_per_key": 1,
    "bytes_out": 1,
    "bytes_back": 1,
}
OTHERS = ("name", "source", "dtype", "head_dtype", "attention", "tied_embedding")


@dataclass(frozen=True)
class Matrix:
    """A weight `[outputs, inputs]`, multiplied in `dtype`; `format` is how it is held if it is quantised."""

    outputs: int
    inputs: int
    dtype: str
    format: WeightFormat | None = None

    @property
    def parameters(self) -> int:
        return self.outputs * self.inputs


Matrices = tuple[Matrix, ...]


def _held(matrices: Matrices, format: WeightFormat | None) -> Matrices:
    return tuple(replace(matrix, format=format) for matrix in matrices)


@dataclass(frozen=True)
class ModelShape:
    """What a step of a model reads, computes and sends, without norms and biases.

    Attributes:
        name: shown in reports.
        num_layers, num_sparse_layers: all layers, and layers with experts; the others have `dense_mlp`.
        num_experts, top_k: experts per sparse layer, and experts per token in it.
        attention: projections of a layer.
        dense_mlp: matrices of a layer without experts.
        shared: experts of a sparse layer that every token uses.
        gate: the gate of a sparse layer.
        expert: one routed expert.
        head: maps rows to logits.
        embedding_bytes: bytes of the embedding table; 0 if it is tied to the head.
        kv_bytes: bytes of the keys and values of one token in one layer.
        windows: each layer's sliding window, the largest number of keys that a token sees there, or None.
        decode_flops_per_key, prefill_flops_per_key: operations of one query token with one key and value, in one layer,
            in decode and in prompts.
        bytes_out, bytes_back: bytes of a token's row to an expert's rank, and of an expert's row on the return path.
    """

    name: str
    num_layers: int
    num_sparse_layers: int
    num_experts: int
    top_k: int
    attention: Matrices
    dense_mlp: Matrices
    shared: Matrices
    gate: Matrix
    expert: Matrices
    head: Matrix
    embedding_bytes: int
    kv_bytes: int
    windows: tuple[int | None, ...]
    decode_flops_per_key: int
    prefill_flops_per_key: int
    bytes_out: int
    bytes_back: int

    @property
    def dense(self) -> Matrices:
        """Matrices that every rank holds: all except the routed experts and the embedding table."""
        sparse, without = self.num_sparse_layers, self.num_layers - self.num_sparse_layers
        return (
            *(self.num_layers * self.attention),
            *(sparse * (*self.shared, self.gate)),
            *(without * self.dense_mlp),
            self.head,
        )

    @property
    def weights(self) -> str:
        """How the routed experts are held, in a word."""
        matrix = self.expert[0]
        return matrix.dtype if matrix.format is None else matrix.format.name

    def quantized(self, format: WeightFormat) -> ModelShape:
        """The shape with all matrices but the gate in a quantised format."""
        return replace(
            self,
            attention=_held(self.attention, format),
            dense_mlp=_held(self.dense_mlp, format),
            shared=_held(self.shared, format),
            expert=_held(self.expert, format),
            head=replace(self.head, format=format),
        )

    def keys_seen(self, length: int) -> int:
        """Keys that the token after `length` sees, summed over the layers."""
        return sum(min(length, window or length) for window in self.windows)

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, name: str, kv_cache_dtype: str = "auto") -> ModelShape:
        """The shape of a checkpoint that the runtime serves, with weights in `dtype` and this option for the cache."""
        hidden, moe = config.hidden_size, config.moe
        attention = config.layers[0].attention  # layers differ only in their windows
        formats = config.layers[config.moe_layers[0]].formats  # those of the first sparse layer stand for all
        *inputs, output = attention.matrices(hidden)
        # One product with the key, one with the value.
        flops = 2 * attention.num_heads * (attention.key_size + attention.value_size)
        item = ITEMSIZE[dtype]
        kept = config.kv_specs(cache_dtype(kv_cache_dtype, dtype))
        return cls(
            name=name,
            num_layers=config.num_layers,
            num_sparse_layers=len(config.moe_layers),
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            attention=(
                *(Matrix(*size, dtype, formats.attention.input) for size in inputs),
                Matrix(*output, dtype, formats.attention.output),
                *(Matrix(*size, dtype) for size in attention.head_matrices),
            ),
            dense_mlp=_mlp(
                hidden, max(layer.dense_intermediate_size or 0 for layer in config.layers), dtype, formats.mlp
            ),
            shared=_mlp(hidden, moe.shared_intermediate_size, dtype, formats.mlp),
            gate=Matrix(moe.num_experts, hidden, "float32" if moe.gate_float32 else dtype),
            expert=_mlp(hidden, moe.intermediate_size, dtype, formats.experts),
            head=Matrix(config.vocab_size, hidden, dtype, config.head_format),
            embedding_bytes=0 if config.shares_embedding else config.vocab_size * hidden * item,
            kv_bytes=kept[0].bytes_per_token,
            windows=tuple(spec.window for spec in kept),
            decode_flops_per_key=flops,
            prefill_flops_per_key=flops,
            bytes_out=hidden * item,
            bytes_back=hidden * item,
        )

    @classmethod
    def load(cls, path: Path) -> ModelShape:
        """The shape that a JSON file of sizes describes; docs/planner.md lists its fields.

        Raises:
            ValueError: no such file, or a missing, unknown or wrong field.
        """
        try:
            return cls.parse(parse_json(read_text(path)))
        except OSError as error:
            raise ValueError(f"model: {str(path)!r} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"model: {str(path)!r}: {error}") from None

    @classmethod
    def parse(cls, content: object) -> ModelShape:
        """As `load`, from the file's parsed content."""
        if not isinstance(content, Mapping):
            raise ValueError(f"a {type(content).__name__} is not allowed; it must be an object of sizes")
        unknown = sorted(set(content) - {*INTEGERS, *OTHERS, "sliding_window"})
        if unknown:
            raise ValueError(
                f"{unknown[0]}: no such field; the fields are {sorted({*INTEGERS, *OTHERS, 'sliding_window'})}"
            )
        size = {name: _integer(content, name, least) for name, least in INTEGERS.items()}
        window = _integer(content, "sliding_window", 1) if content.get("sliding_window") is not None else None
        name, tied = content.get("name"), content.get("tied_embedding", False)
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: {name!r} is not allowed; it must be a string")
        if not isinstance(tied, bool):
            raise ValueError(f"tied_embedding: {tied!r} is not allowed; it must be true or false")
        if size["num_sparse_layers"] > size["num_layers"]:
            raise ValueError(
                f"num_sparse_layers: {size['num_sparse_layers']} is not allowed; it must be at most num_layers, "
                f"{size['num_layers']}"
            )
        if size["top_k"] > size["num_experts"]:
            raise ValueError(
                f"top_k: {size['top_k']} is not allowed; it must be at most num_experts, {size['num_experts']}"
            )
        dtype = _dtype(content, "dtype")
        head = Matrix(size["vocab_size"], size["hidden_size"], _dtype(content, "head_dtype"))
        hidden = size["hidden_size"]
        return cls(
            name=name,
            attention=_matrices(content.get("attention"), dtype),
            dense_mlp=_mlp(hidden, size["dense_intermediate_size"], dtype),
            shared=_mlp(hidden, size["shared_intermediate_size"], dtype),
            gate=Matrix(size["num_experts"], hidden, head.dtype),
            expert=_mlp(hidden, size["expert_intermediate_size"], dtype),
            head=head,
            embedding_bytes=0 if tied else head.parameters * ITEMSIZE[head.dtype],
            windows=(window,) * size["num_layers"],
            **{key: size[key] for key in ("num_layers", "num_sparse_layers", "num_experts", "top_k", "kv_bytes")},
            **{key: size[key] for key in ("decode_flops_per_key", "prefill_flops_per_key", "bytes_out", "bytes_back")},
        )


def _mlp(hidden: int, inner: int, dtype: str, formats: BlockFormats = DENSE) -> Matrices:
    """SwiGLU: gate, up, down."""
    if not inner:
        return ()
    up = Matrix(inner, hidden, dtype, formats.input)
    return (up, up, Matrix(hidden, inner, dtype, formats.output))


def _integer(content: Mapping[str, Any], name: str, least: int) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be an integer of at least {least}")
    return value


def _dtype(content: Mapping[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be one of {list(DTYPES)}")
    return value


def _matrices(value: object, dtype: str) -> Matrices:
    def good(pair: object) -> bool:
        sizes = pair if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 else (0, 0)
        return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)

    if not isinstance(value, list) or not value or not all(map(good, value)):
        raise ValueError(f"attention: {value!r} is not allowed; it must be a list of [outputs, inputs]")
    return tuple(Matrix(outputs, inputs, dtype) for outputs, inputs in value)
