"""`moe-runtime plan` predicts the speed and memory of choices. `moe-runtime profile` measures a machine for that."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.config.checks import check_integer, check_output
from moe_runtime.config.engine import KV_CACHE_DTYPES, EngineConfig
from moe_runtime.config.options import given_values, only_fields, options_of, user_mistakes
from moe_runtime.config.quantization import METHODS
from moe_runtime.memory.model_size import weights_dtype

if TYPE_CHECKING:
    from moe_runtime.balancer.trace import RoutingTrace
    from moe_runtime.planner.routing import Routing
    from moe_runtime.planner.shape import ModelShape


@dataclass(frozen=True)
class PlanOptions:
    """Options of the `plan` command.

    Attributes:
        trace: a recorded routing trace; if no model is named, the trace's model is used.
        assume: loads of experts if there is no trace: "uniform" or "zipf:X".
        ranks: numbers of ranks.
        redundant: slots per rank and layer beyond those for one copy of every expert.
        hardware: h200, h800, cpu, or a file that `profile` wrote.
        batch: sequences per rank.
        phase: decode or prefill.
        context_len: keys of each sequence; with phase prefill, tokens of each prompt.
        dtype: data type of weights: auto, float32 or bfloat16; a JSON shape has its own.
        quantization: of all matrices but gates: none, int8, int4, fp8 or mxfp4; may be repeated, to compare. Products
            are predicted as those in the dtype.
        kv_cache_dtype: data type of the KV cache: auto, fp8 or int8; a JSON shape has its own.
        max_step_ms: do not recommend a choice with a longer step.
        seed: seeds assumed loads and the draws from them.
        json: print JSON.
        output: also write a file, .png or .json; may be repeated.

    Raises:
        ValueError: a value is not allowed.
    """

    trace: str | None = None
    assume: str | None = None
    ranks: Sequence[int] = (1, 2, 4, 8)
    redundant: Sequence[int] = (0,)
    hardware: str = "cpu"
    batch: Sequence[int] = (1, 8, 32, 128)
    phase: str = "decode"
    context_len: int = 1024
    dtype: str = "auto"
    quantization: Sequence[str] = ("none",)
    kv_cache_dtype: str = "auto"
    max_step_ms: float | None = None
    seed: int = 0
    json: bool = False
    output: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, least in (("ranks", 1), ("redundant", 0), ("batch", 1)):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)):
                values = (values,)
            for value in values:
                check_integer(name, value, least)
            if not values:
                raise ValueError(f"{name}: [] is not allowed; it must be one or more integers")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        if isinstance(self.quantization, str):
            object.__setattr__(self, "quantization", (self.quantization,))
        known = ["none", *METHODS]
        for method in self.quantization:
            if method not in known:
                raise ValueError(f"quantization: {method!r} is not allowed; it must be one of {known}")
        if isinstance(self.output, str):
            object.__setattr__(self, "output", (self.output,))
        check_integer("context_len", self.context_len, 1)
        check_integer("seed", self.seed, 0)
        if self.phase not in ("decode", "prefill"):
            raise ValueError(f"phase: {self.phase!r} is not allowed; it must be decode or prefill")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype: {self.dtype!r} is not allowed; it must be auto, float32 or bfloat16")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(
                f"kv_cache_dtype: {self.kv_cache_dtype!r} is not allowed; it must be one of {list(KV_CACHE_DTYPES)}"
            )
        limit = self.max_step_ms
        if limit is not None and (isinstance(limit, (bool, str)) or not limit > 0):
            raise ValueError(f"max_step_ms: {limit!r} is not allowed; it must be a number above 0")
        if (self.trace is None) == (self.assume is None):
            raise ValueError("trace, assume: exactly one of them must be given")
        for path in self.output or ():
            check_output("output", path, (".json", ".png"))


@dataclass(frozen=True)
class ProfileOptions:
    """Options of the `profile` command.

    Attributes:
        output: a .yaml, .yml or .json file.
        name: name shown in reports; the default is the processor's.

    Raises:
        ValueError: a value is not allowed.
    """

    output: str
    name: str | None = None

    def __post_init__(self) -> None:
        check_output("output", self.output, (".yaml", ".yml", ".json"))
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise ValueError(f"name: {self.name!r} is not allowed; it must be a string")


def plan(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserMistake: an option, the trace, the model or the hardware profile cannot be used.
    """
    with user_mistakes():
        values = given_values(namespace, [*options_of(EngineConfig)[:1], *options_of(PlanOptions)])
        options = PlanOptions(**only_fields(PlanOptions, values))
        found = _predict_all(values.get("model"), options)
        from moe_runtime.planner.report import to_text

        for name in options.output or ():
            path = Path(name)
            if path.suffix == ".json":
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            else:
                from moe_runtime.planner.plot import draw

                path.write_bytes(draw(found))
    print(json.dumps(found, indent=1) if options.json else to_text(found))
    return 0


def profile(namespace: argparse.Namespace) -> int:
    """Measure this machine; returns the exit code.

    Raises:
        UserMistake: an option cannot be used, or there is nothing to measure.
        RankError: a rank failed.
    """
    with user_mistakes():
        options = ProfileOptions(**given_values(namespace, options_of(ProfileOptions)))
        from moe_runtime.planner.hardware_file import save_hardware
        from moe_runtime.planner.measure import measure

        name = options.name or platform.processor() or platform.machine()
        found = measure(name, say=lambda text: print(text, file=sys.stderr))
        save_hardware(found, Path(options.output))
    return 0


def _predict_all(model: str | None, options: PlanOptions) -> dict[str, Any]:
    """The result of `report.to_dict`.

    Raises:
        ValueError: as `plan`.
    """
    from moe_runtime.balancer.trace import RoutingTrace
    from moe_runtime.planner.choices import evaluate, recommend
    from moe_runtime.planner.hardware_file import load_hardware
    from moe_runtime.planner.report import to_dict

    hardware = load_hardware(options.hardware)
    trace = None if options.trace is None else RoutingTrace.load(options.trace)
    named = model if model is not None or trace is None else trace.model
    if named is None:
        raise ValueError("model: missing; without a trace that names it, it must be given")
    shape = load_shape(named, options.dtype, options.kv_cache_dtype)
    routing, words = _routing(shape, trace, options)
    choices = [
        choice
        for method in dict.fromkeys(options.quantization)
        for choice in evaluate(
            shape if method == "none" else shape.quantized(METHODS[method]),
            hardware,
            routing,
            ranks=options.ranks,
            redundant=options.redundant,
            batches=options.batch,
            phase="decode" if options.phase == "decode" else "prefill",
            length=options.context_len,
        )
    ]
    best = recommend(choices, None if options.max_step_ms is None else options.max_step_ms / 1e3)
    return to_dict(shape, hardware, words, options.phase, options.context_len, choices, best)


def load_shape(model: str, dtype: str, kv_cache_dtype: str = "auto") -> ModelShape:
    """The shape of a model, from a JSON file of sizes or from a checkpoint's configuration.

    Raises:
        ValueError: neither can be read.
    """
    from moe_runtime.planner.shape import ModelShape

    if model.endswith(".json"):
        return ModelShape.load(Path(model))
    from moe_runtime.models.registry import read_model_config
    from moe_runtime.weights.checkpoint import resolve_model

    config = read_model_config(resolve_model(model, weights=False))
    return ModelShape.of(config, weights_dtype(dtype, config.dtype), model, kv_cache_dtype)


def _routing(shape: ModelShape, trace: RoutingTrace | None, options: PlanOptions) -> tuple[Routing, str]:
    """The tokens' expert choices, and a description of them.

    Raises:
        ValueError: the trace is from a different model than the shape.
    """
    from moe_runtime.planner.routing import LoadRouting, TraceRouting

    if trace is None:
        assert options.assume is not None
        return LoadRouting.assume(options.assume, shape.num_experts, shape.top_k, options.seed), options.assume
    for what, found, wanted in (
        ("experts", trace.num_experts, shape.num_experts),
        ("experts per token", trace.top_k, shape.top_k),
        ("sparse layers", trace.num_layers, shape.num_sparse_layers),
    ):
        if found != wanted:
            raise ValueError(f"trace: {options.trace!r} has {found} {what}, but {shape.name!r} has {wanted}")
    recorded = TraceRouting(trace, options.phase)
    return recorded, f"{recorded.num_tokens} recorded {options.phase} tokens"
