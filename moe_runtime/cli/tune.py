"""`moe-runtime tune`: measure tiles for a model's experts on this machine's GPU once, so that serving need not."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.model import ModelConfig
from moe_runtime.config.options import Option, option_values, options_of, user_mistakes

ENGINE = ("model", "ep_size", "dtype", "max_num_seqs", "max_num_batched_tokens", "redundant_experts")


def tune_options() -> list[Option]:
    """The engine's options that affect the shapes of a rank's matrix products."""
    return options_of(EngineConfig, exclude={field.name for field in fields(EngineConfig)} - set(ENGINE))


def tune(namespace: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        UserMistake: an option or the model cannot be used, or there is no GPU.
    """
    with user_mistakes():
        engine = EngineConfig(**option_values(namespace, tune_options()))
        from moe_runtime.build import fit_to_model
        from moe_runtime.models.registry import read_model_config
        from moe_runtime.weights.checkpoint import resolve_model

        model = read_model_config(resolve_model(engine.model, weights=False))
        file, lines = tune_model(fit_to_model(engine, model), model)
    print("\n".join(lines))
    print(f"written to {file}; ranks that start from now on use it", file=sys.stderr)
    return 0


def tune_model(engine: EngineConfig, model: ModelConfig) -> tuple[str, list[str]]:
    """Measure all tiles for each number of rows that a rank may get. Returns the file, and a line for each number.

    Raises:
        ValueError: there is no GPU, or Triton is not installed.
    """
    import torch

    from moe_runtime.kernels import ops
    from moe_runtime.memory.initial_placement import slots_per_rank
    from moe_runtime.memory.model_size import weights_dtype

    if not torch.cuda.is_available():
        raise ValueError("device: this machine has no CUDA device; tune measures the GPU that will serve")
    device = torch.device("cuda", torch.cuda.current_device())
    if not ops.uses_triton(device):
        raise ValueError("device: Triton is not installed; tune measures its kernels")
    from moe_runtime.kernels.triton.tune import tune as measure_tiles
    from moe_runtime.kernels.triton.tuned import cache_file

    moe = model.moe
    most = engine.max_num_batched_tokens * moe.top_k
    found: dict[str, object] = {}
    for num_slots in sorted(set(slots_per_rank(engine, model, engine.ep_size))):
        found |= measure_tiles(
            num_slots,
            model.hidden_size,
            moe.intermediate_size,
            getattr(torch, weights_dtype(engine.dtype, model.dtype)),
            [1 << power for power in range((most - 1).bit_length() + 1)],
            device=device,
        )
    file = cache_file(torch.cuda.get_device_name(device))
    return str(file), [f"{key}: {tile}" for key, tile in found.items()]
