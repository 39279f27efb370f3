"""Builds an engine with running ranks from the user's configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.expert_policy import CALIBRATION_NAME, policies_of
from moe_runtime.config.model import ModelConfig
from moe_runtime.config.quantization import check_activations
from moe_runtime.demo.files import EXPERT_CALIBRATION
from moe_runtime.engine.engine import Engine
from moe_runtime.engine.overload import overload_routing
from moe_runtime.memory.budget import check_budget, pages_text
from moe_runtime.wire.executor import Executor

logger = logging.getLogger(__name__)

MakeExecutor = Callable[[EngineConfig, ModelConfig, Path], Executor]


def build_engine(
    config: EngineConfig, make_executor: MakeExecutor | None = None, local_ranks: int | None = None
) -> Engine:
    """Find the model, log the memory that the ranks will take, load the tokenizer, and start the ranks.

    Args:
        config: the user's options.
        make_executor: starts the ranks. None runs a single rank in this process, and several in a process each.
        local_ranks: how many of the ranks share this host; None means all.

    Raises:
        ValueError: no such model, options that do not fit it, or less free memory here than CPU ranks need.
        RankError: a rank failed to start. All started ranks have been ended.
    """
    from moe_runtime.memory.initial_placement import initial_placement
    from moe_runtime.models.registry import read_default_sampling, read_model_config, read_stored_config
    from moe_runtime.weights.checkpoint import resolve_model

    path = resolve_model(config.model)
    model_config = (read_model_config if config.load_format == "dummy" else read_stored_config)(path)
    model_config = config.quantized(model_config)
    check_activations(model_config, config.activation_quantization)
    if config.generation_config == "auto":
        model_config = replace(model_config, default_sampling=read_default_sampling(path))
    config = fit_to_model(find_calibration(config, path), model_config)
    initial_placement(config, model_config, config.ep_size)  # refuses a file that does not fit, before ranks start
    overload_routing(config, policies_of(config, model_config))  # both refuse what the model cannot do
    logger.info("memory: %s", check_budget(config, model_config, local_ranks or config.ep_size))
    tokenizer = None
    if not config.skip_tokenizer_init:
        from moe_runtime.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_path(config.tokenizer or path)
        model_config = with_tokenizer_eos(model_config, tokenizer.eos_token_id)
    executor = (make_executor or _executor_class(config))(config, model_config, path)
    try:
        engine = Engine(config, model_config, executor, tokenizer)
    except BaseException:
        executor.close()
        raise
    logger.info("%s", _choices(engine))
    return engine


def _choices(engine: Engine) -> str:
    """One line with the engine's choices and their memory; `/health` reports the same."""
    ranks = engine.executor.ranks
    kernels = ", ".join(sorted(set(ranks[0].kernels.values())))
    weights, cache = (
        sum(sizes) / 1e9 for sizes in zip(*((r.weight_bytes, r.kv_cache_bytes) for r in ranks), strict=True)
    )
    num_pages = [sum(counts) for counts in zip(*(r.num_pages for r in ranks), strict=True)]
    return (
        f"{engine.model_name}: {len(ranks)} x {ranks[0].device} with {ranks[0].num_threads} threads, {ranks[0].dtype}, "
        f"kernels {kernels}, dispatcher {engine.config.dispatcher}, weights {weights:.2f} GB, "
        f"KV cache {cache:.2f} GB ({pages_text(num_pages)} of {engine.config.block_size} tokens in "
        f"{ranks[0].kv_cache_dtype}), "
        f"loaded in {max(r.load_seconds for r in ranks):.1f} s"
    )


def find_calibration(config: EngineConfig, path: Path) -> EngineConfig:
    """The configuration; if it names no routing calibration, with the one in the model's folder, if any."""
    found = EXPERT_CALIBRATION if config.model == "demo" else path / CALIBRATION_NAME
    if config.routing_calibration is not None or not found.exists():
        return config
    return replace(config, routing_calibration=str(found))


def with_tokenizer_eos(model: ModelConfig, eos_token_id: int | None) -> ModelConfig:
    """The configuration; outputs also end at the tokenizer's own end-of-sequence token, if it has one."""
    if eos_token_id is None or eos_token_id in model.eos_token_ids:
        return model
    logger.info("outputs also end at the tokenizer's end-of-sequence token %d", eos_token_id)
    return replace(model, eos_token_ids=(*model.eos_token_ids, eos_token_id))


def fit_to_model(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """The configuration with `max_model_len` set. Raises ValueError if an option does not fit the model."""
    if config.ep_size > model.moe.num_experts:
        raise ValueError(
            f"ep_size: {config.ep_size} is not allowed; it must be at most {model.moe.num_experts}, the model's experts"
        )
    if config.ep_size == 1 and config.dispatcher not in ("auto", "local"):
        raise ValueError(
            f'dispatcher: {config.dispatcher!r} is not allowed with one rank; it must be "auto" or "local"'
        )
    max_model_len = config.max_model_len or model.max_model_len
    if max_model_len > model.max_model_len:
        raise ValueError(
            f"max_model_len: {max_model_len} is not allowed; "
            f"it must be at most {model.max_model_len}, the model's context"
        )
    return replace(config, max_model_len=max_model_len)


def _executor_class(config: EngineConfig) -> MakeExecutor:
    if config.ep_size == 1:
        from moe_runtime.cluster.in_process import InProcessExecutor

        return InProcessExecutor
    from moe_runtime.cluster.process_executor import ProcessExecutor

    return ProcessExecutor
