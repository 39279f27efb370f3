"""The family, the configuration and the weights of a checkpoint. No torch at import.

A family's file has `parse(config.json) -> ModelConfig`, which describes every layer, and `NAMES`, the tensor names in
the family's checkpoints. All families share the decoder of `layers.decoder`.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.config.default_sampling import default_sampling
from moe_runtime.config.model import ModelConfig
from moe_runtime.models.gguf_config import read_config, read_generation_config
from moe_runtime.models.gguf_names import GgufNames, check_tensors
from moe_runtime.models.hf_config import read_json_object, token_ids
from moe_runtime.models.quantization import KEYS, read_scheme
from moe_runtime.models.stored_formats import with_stored_formats
from moe_runtime.weights.deepspeed_files import DeepSpeedFiles, with_deepspeed_gate
from moe_runtime.weights.gguf_file import GGUF_SUFFIX, Gguf
from moe_runtime.weights.safetensors_file import stored_dtype

if TYPE_CHECKING:
    from types import ModuleType

    from moe_runtime.models.names import TensorNames
    from moe_runtime.weights.checkpoint import WeightSource
    from moe_runtime.weights.deepspeed import DeepSpeedCheckpoint
    from moe_runtime.weights.scheme import Scheme

logger = logging.getLogger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
FAMILIES = {
    name: f"moe_runtime.models.families.{name}"
    for name in (
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "glm4_moe",
        "glm4_moe_lite",
        "gpt_oss",
        "granitemoe",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "minimax_m2",
        "mistral4",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "solar_open",
    )
} | {
    "hunyuan": "moe_runtime.models.families.hunyuan_v1_moe",  # its name before transformers had it
    "kimi_k2": "moe_runtime.models.families.deepseek_v3",
}


def family_module(family: str) -> ModuleType:
    """The module of a family named in `ModelConfig.family`."""
    return importlib.import_module(FAMILIES[family])


def names_of(family: str) -> TensorNames:
    """The tensor names in the checkpoints of a family."""
    names: TensorNames = family_module(family).NAMES
    return names


def read_model_config(path: Path) -> ModelConfig:
    """Read the configuration of the checkpoint in the directory `path`, or of the GGUF file `path`.

    Of a checkpoint, only its files in JSON are read.

    Raises:
        ValueError: no such directory, missing or broken `config.json`, unknown architecture, unsupported setting or
            quantisation; a GGUF file that is damaged or has tensors that cannot be read.
    """
    if path.suffix == GGUF_SUFFIX:
        return _read_gguf_config(Gguf(path))
    model, scheme = _read_checkpoint_config(path)
    return model if scheme is None else with_stored_formats(model, names_of(model.family), scheme.format_of)


def read_stored_config(path: Path) -> ModelConfig:
    """As `read_model_config`, with what only the files of the weights tell.

    That are the types of scales, which matrices a quantised checkpoint has left as they were, and whether a head that
    is tied to the embedding is the same. If it is not, both are used, as transformers does.

    Raises:
        ValueError: as `read_model_config` and `open_weights`.
    """
    if path.suffix == GGUF_SUFFIX:
        return _read_gguf_config(Gguf(path))
    model, scheme = _read_checkpoint_config(path)
    if scheme is None and not model.tie_word_embeddings:
        return model
    source, names = _open_checkpoint(path, model, scheme), names_of(model.family)
    if model.tie_word_embeddings and _has_own_head(source, names, model):
        model = dataclasses.replace(model, tie_word_embeddings=False)
    return model if scheme is None else with_stored_formats(model, names, source.format_of)


def _read_checkpoint_config(path: Path) -> tuple[ModelConfig, Scheme | None]:
    """The configuration of a directory, without the formats of its matrices, and what it says of them.

    End-of-sequence ids come from `generation_config.json` if it names some, else from `config.json`.
    """
    if not path.is_dir():
        raise ValueError(f"model: {str(path)!r} is no directory")
    config = read_json_object(path / CONFIG)
    if config is None:
        raise ValueError(f"model: {str(path)!r} is no checkpoint; it has no config.json")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type: {family!r} in {path / CONFIG} is not known; known: {sorted(FAMILIES)}")
    scheme = read_scheme(path, config)
    model: ModelConfig = family_module(family).parse({key: config[key] for key in config if key not in KEYS})
    _check(model)
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        model = dataclasses.replace(model, dtype=stored_dtype(path) or model.dtype)
    if DeepSpeedFiles.find(path) is not None:
        model = with_deepspeed_gate(model)
    file = path / GENERATION_CONFIG
    eos_token_ids = token_ids("eos_token_id", (read_json_object(file) or {}).get("eos_token_id"), str(file))
    return dataclasses.replace(model, eos_token_ids=eos_token_ids) if eos_token_ids else model, scheme


def _read_gguf_config(gguf: Gguf) -> ModelConfig:
    """The configuration of a GGUF file, by the reader of its family."""
    config, has_pairs = read_config(gguf)
    try:
        model: ModelConfig = family_module(config["model_type"]).parse(config)
        _check(model)
    except ValueError as error:
        raise ValueError(f"{error} (config.json: what {gguf.path} means)") from None
    names = names_of(model.family)
    check_tensors(gguf, names, model.num_layers)
    if has_pairs:
        model = dataclasses.replace(model, rope=dataclasses.replace(model.rope, interleaved=True))
    located = GgufNames(names, gguf.tensors)
    return with_stored_formats(model, names, lambda name: gguf.format_of(located.locate(name)))


def read_default_sampling(path: Path) -> dict[str, float | int]:
    """The sampling parameters that `generation_config.json` in the directory `path`, or the GGUF file `path`,
    recommends; perhaps none.

    Raises:
        ValueError: the file is broken, or a value is not allowed; the message names the field and the file.
    """
    is_gguf = path.suffix == GGUF_SUFFIX
    file = path if is_gguf else path / GENERATION_CONFIG
    try:
        return default_sampling(read_generation_config(Gguf(path)) if is_gguf else read_json_object(file) or {})
    except ValueError as error:
        raise ValueError(f"{error} ({file}; generation_config=none ignores its sampling parameters)") from None


def _has_own_head(source: WeightSource, names: TensorNames, config: ModelConfig) -> bool:
    """Whether a checkpoint has a head that differs from its embedding; a log line says so."""
    import torch

    if not source.has(names.head) or not source.has(names.embedding):
        return False
    shape = (config.vocab_size, config.hidden_size)
    if torch.equal(source.read(names.head, shape), source.read(names.embedding, shape)):
        return False
    logger.warning(
        "tie_word_embeddings: config.json says true, but %s and %s differ in the checkpoint; both are used",
        names.head,
        names.embedding,
    )
    return True


def open_weights(path: Path, config: ModelConfig) -> WeightSource:
    """The weights in a model's directory, safetensors files or else a DeepSpeed checkpoint, or in a GGUF file.

    Raises:
        ValueError: there are none, or a file is missing, foreign or damaged.
    """
    if path.suffix == GGUF_SUFFIX:
        from moe_runtime.weights.gguf import GgufWeights

        gguf, names = Gguf(path), names_of(config.family)
        check_tensors(gguf, names, config.num_layers)
        return GgufWeights(gguf, GgufNames(names, gguf.tensors).locate)
    return _open_checkpoint(path, config, read_scheme(path, read_json_object(path / CONFIG) or {}))


def _open_checkpoint(path: Path, config: ModelConfig, scheme: Scheme | None) -> WeightSource:
    """The weights in a directory, stored as the scheme says."""
    files = DeepSpeedFiles.find(path)
    if files is not None:
        return open_deepspeed(files, config)
    from moe_runtime.weights.checkpoint import Checkpoint
    from moe_runtime.weights.quantized import QuantizedCheckpoint

    return Checkpoint(path) if scheme is None else QuantizedCheckpoint(Checkpoint(path), scheme)


def open_deepspeed(files: DeepSpeedFiles, config: ModelConfig) -> DeepSpeedCheckpoint:
    """A DeepSpeed checkpoint, read by its family's tensor names. Raises ValueError as `open_weights` does."""
    from moe_runtime.weights.deepspeed import DeepSpeedCheckpoint

    names = names_of(config.family)
    parts = names.expert_parts
    return DeepSpeedCheckpoint(files, config, names.sparse, (parts.gate, parts.up, parts.down))


def _check(model: ModelConfig) -> None:
    """Refuse values of a `config.json` that contradict each other."""
    moe = model.moe
    checks: list[tuple[str, object, bool, str]] = [
        ("num_experts_per_tok", moe.top_k, moe.top_k <= moe.num_experts, f"be at most {moe.num_experts} experts"),
        ("n_group", moe.num_groups, moe.num_experts % moe.num_groups == 0, f"divide {moe.num_experts} experts"),
        (
            "n_group",
            moe.num_groups,
            moe.num_groups == 1 or moe.groups_by_best or moe.num_experts // moe.num_groups >= 2,
            f"leave at least 2 of the {moe.num_experts} experts in a group",
        ),
        ("topk_group", moe.topk_groups, moe.topk_groups <= moe.num_groups, f"be at most {moe.num_groups} groups"),
        ("vocab_size", model.vocab_size, model.vocab_size > 1, "be at least 2"),
    ]
    for attention in dict.fromkeys(layer.attention for layer in model.layers):
        heads, kv_heads, window = attention.num_heads, attention.num_kv_heads, attention.sliding_window
        checks.append(("num_key_value_heads", kv_heads, heads % kv_heads == 0, "divide the heads"))
        checks.append(("sliding_window", window, (window or 1) >= 1, "be at least 1"))
    for name, value, good, rule in checks:
        if not good:
            raise ValueError(f"{name}: {value!r} in config.json is not allowed; it must {rule}")
    if not model.moe_layers:
        raise ValueError("model: config.json describes no sparse layer; this runtime serves Mixture-of-Experts models")
