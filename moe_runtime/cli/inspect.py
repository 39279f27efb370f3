"""`moe-runtime inspect`: sizes and memory of a model, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from moe_runtime.config.checks import check_integer
from moe_runtime.config.engine import EngineConfig, parse_redundant
from moe_runtime.config.model import ModelConfig
from moe_runtime.config.options import Option, only_fields, option_values, options_of, user_mistakes
from moe_runtime.memory.budget import (
    Budget,
    available_host_memory,
    gigabytes,
    has_native_weights,
    may_use_cuda,
    plan_budget,
)
from moe_runtime.memory.model_size import (
    cache_dtype,
    count_parameters,
    decode_bytes,
    distinct_experts,
    expert_bytes,
    kv_bytes_per_token,
    page_bytes,
    weight_bytes,
    weights_dtype,
)

ENGINE = (
    "dtype",
    "device",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "kv_cache_dtype",
    "redundant_experts",
    "quantization",
    "quantization_parts",
    "quantization_group_size",
)
MOST_RANKS = 8  # by default


@dataclass(frozen=True)
class InspectOptions:
    """Options of the `inspect` command.

    Attributes:
        batch_size: sequences in a decode step.
        ep_size: numbers of ranks, all of them on this host. The default is 1, 2, 4 and 8; if `redundant_experts` lists
            a number per rank, it is the length of that list.
        json: print JSON, with sizes in bytes.

    Raises:
        ValueError: a value is not allowed.
    """

    batch_size: Sequence[int] = (1, 8, 32, 128)
    ep_size: Sequence[int] | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "ep_size"):
            values = getattr(self, name)
            if values is not None and not isinstance(values, (list, tuple)):
                values = (values,)
                object.__setattr__(self, name, values)
            for value in values or ():
                check_integer(name, value, 1)
        if not isinstance(self.json, bool):
            raise ValueError(f"json: {self.json!r} is not allowed; it must be true or false")


def inspect_engine_options() -> list[Option]:
    """The engine's options that affect its memory. `ep_size` is in `InspectOptions`."""
    return options_of(EngineConfig, exclude={field.name for field in fields(EngineConfig)} - set(ENGINE))


def inspect(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserMistake: an option or the model cannot be used.
    """
    with user_mistakes():
        model_option = options_of(EngineConfig)[:1]
        values = option_values(namespace, [*model_option, *options_of(InspectOptions), *inspect_engine_options()])
        options = InspectOptions(**only_fields(InspectOptions, values))
        chosen = {name: value for name, value in values.items() if name in ("model", *ENGINE)}
        redundant = parse_redundant(values.get("redundant_experts", 0))
        engine = EngineConfig(**chosen, ep_size=MOST_RANKS if isinstance(redundant, int) else len(redundant))
        from moe_runtime.models.registry import read_model_config
        from moe_runtime.weights.checkpoint import resolve_model

        model = engine.quantized(read_model_config(resolve_model(engine.model, weights=False)))
        found = describe(engine, model, options)
    print(json.dumps(found, indent=1) if options.json else to_text(found, model))
    return 0


def describe(engine: EngineConfig, model: ModelConfig, options: InspectOptions) -> dict[str, Any]:
    """All figures, as JSON values. Those whose names end in "bytes" are in bytes.

    `engine.ep_size` has no effect unless `redundant_experts` lists a number per rank.

    Raises:
        ValueError: an option does not fit the model.
    """
    from moe_runtime.build import fit_to_model

    dtype = weights_dtype(engine.dtype, model.dtype)
    kv_dtype = cache_dtype(engine.kv_cache_dtype, dtype)
    count, moe = count_parameters(model), model.moe
    usual = [n for n in (1, 2, 4, 8) if n <= min(MOST_RANKS, moe.num_experts)]
    sizes = options.ep_size or (usual if isinstance(engine.redundant_experts, int) else [engine.ep_size])
    available = None if may_use_cuda(engine.device) else available_host_memory()
    native = has_native_weights(engine.device)
    budgets = [plan_budget(fit_to_model(_with_ranks(engine, size), model), model, size, available) for size in sizes]
    return {
        "model": engine.model,
        "family": model.family,
        "dtype": dtype,
        "quantization": model.formats,
        "parameters": {"total": count.total, "active": count.active, "dense": count.dense, "expert": count.expert},
        "layers": {"total": model.num_layers, "sparse": len(model.moe_layers)},
        "experts": {
            "per_layer": moe.num_experts,
            "per_token": moe.top_k,
            "shared_intermediate_size": moe.shared_intermediate_size,
            "intermediate_size": moe.intermediate_size,
            "bytes": expert_bytes(model, dtype, native),
        },
        "weight_bytes": weight_bytes(model, dtype, moe.num_experts, native),
        "kv_cache_dtype": kv_dtype,
        "kv_bytes_per_token": kv_bytes_per_token(model, kv_dtype),
        "kv_cache": [
            {"window": window, "bytes_per_token": size}
            for window, size in zip(model.windows, page_bytes(model, 1, kv_dtype), strict=True)
        ],
        "max_model_len": engine.max_model_len or model.max_model_len,
        "decode": [_decode(model, dtype, batch_size, native) for batch_size in options.batch_size],
        "available_bytes": available,
        "ranks": [_memory(size, budget) for size, budget in zip(sizes, budgets, strict=True)],
    }


def _with_ranks(engine: EngineConfig, ep_size: int) -> EngineConfig:
    """The configuration for `ep_size` ranks. A single rank holds every expert and takes no redundant ones."""
    return replace(engine, ep_size=ep_size, redundant_experts=0 if ep_size == 1 else engine.redundant_experts)


def _decode(model: ModelConfig, dtype: str, batch_size: int, native: bool) -> dict[str, Any]:
    read = decode_bytes(model, dtype, batch_size, native=native)
    return {
        "batch_size": batch_size,
        "experts_per_layer": distinct_experts(model.moe.num_experts, model.moe.top_k, batch_size),
        "bytes_per_step": read,
        "bytes_per_token": read / batch_size,
    }


def _memory(ep_size: int, budget: Budget) -> dict[str, Any]:
    rank, num_slots = budget.largest, [rank.num_slots for rank in budget.ranks]
    return {
        "ep_size": ep_size,
        "slots_per_layer": num_slots if len(set(num_slots)) > 1 else rank.num_slots,
        "dense_bytes": rank.dense,
        "expert_bytes": rank.experts,
        "kv_cache_bytes": rank.kv_cache,
        "buffer_bytes": rank.buffers,
        "rank_bytes": rank.total,
        "all_ranks_bytes": budget.total,
        "fits": budget.fits,
    }


def to_text(found: dict[str, Any], model: ModelConfig) -> str:
    """The figures of `describe` as readable text."""
    parameters, experts, layers = found["parameters"], found["experts"], found["layers"]
    shared = f", {experts['shared_intermediate_size']} wide shared" if experts["shared_intermediate_size"] else ""
    facts = [
        ("model", f"{found['model']} ({found['family']}, {found['dtype']})"),
        ("parameters", f"{_count(parameters['total'])} in total, {_count(parameters['active'])} active per token"),
        ("layers", f"{layers['total']}, of which {layers['sparse']} have experts"),
        (
            "experts",
            f"{experts['per_layer']} per layer, {experts['per_token']} per token, "
            f"{experts['intermediate_size']} wide{shared}; {experts['bytes'] / 1e6:.2f} MB each",
        ),
        (
            "attention",
            f"{_attention(model)}; KV cache {_kept(found['kv_cache'])} in {found['kv_cache_dtype']}",
        ),
        ("context", f"{found['max_model_len']} tokens"),
        ("weights", gigabytes(found["weight_bytes"]) + _formats(found["quantization"])),
    ]
    decode = [["batch", "experts/layer", "per step", "per token"]] + [
        [
            str(row["batch_size"]),
            f"{row['experts_per_layer']:.1f}",
            gigabytes(row["bytes_per_step"]),
            f"{row['bytes_per_token'] / 1e6:.1f} MB",
        ]
        for row in found["decode"]
    ]
    memory = [["ep_size", "slots/layer", "dense", "experts", "KV cache", "buffers", "per rank", "all ranks", "fits"]]
    keys = ("dense_bytes", "expert_bytes", "kv_cache_bytes", "buffer_bytes", "rank_bytes", "all_ranks_bytes")
    for row in found["ranks"]:
        slots = row["slots_per_layer"]
        slots = ",".join(map(str, slots if isinstance(slots, list) else [slots]))
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        memory.append([str(row["ep_size"]), slots, *(gigabytes(row[key]) for key in keys), fits])
    free = "" if found["available_bytes"] is None else f"; {gigabytes(found['available_bytes'])} are free"
    unknown = "\nWhether ranks fit on GPUs is seen when they start." if found["available_bytes"] is None else ""
    return "\n".join(
        [
            *(f"{name:<11} {text}" for name, text in facts),
            "",
            "Weights that a decode step reads on one rank, with uniform routing:",
            *_aligned(decode),
            "",
            f"Memory with all ranks on this host{free}:{unknown}",
            *_aligned(memory),
        ]
    )


def _formats(parts: dict[str, str]) -> str:
    """The quantised parts, as text; empty if there are none."""
    named = [f"{part} {format}" for part, format in parts.items() if format != "none"]
    return f" ({', '.join(named)})" if named else ""


def _attention(model: ModelConfig) -> str:
    """The kinds of attention, and how many layers have each if there are several."""
    kinds = Counter(layer.attention for layer in model.layers)
    if len(kinds) == 1:
        return str(model.layers[0].attention)
    return "; ".join(f"{count} layers with {attention}" for attention, count in kinds.items())


def _kept(groups: Sequence[dict[str, Any]]) -> str:
    """What the KV cache keeps, as text: of each token, and of those within a window."""
    parts = []
    for group in groups:
        tokens = "per token" if group["window"] is None else f"for each of the last {group['window']} tokens"
        parts.append(f"{group['bytes_per_token'] / 1e3:.1f} kB {tokens}")
    return ", ".join(parts)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _count(number: int) -> str:
    """A count as text, such as 30.5 B or 134.5 M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)
