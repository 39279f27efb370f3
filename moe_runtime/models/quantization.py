"""Finds what a checkpoint says of its quantisation, wherever it says it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_runtime.models.hf_config import HFConfig, read_json_object, shown
from moe_runtime.models.quantization_methods import METHODS
from moe_runtime.weights.scheme import Scheme

KEYS = ("quantization_config", "compression_config")  # of config.json
METHOD_OF_FILE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_scheme(path: Path, config: dict[str, Any]) -> Scheme | None:
    """How the checkpoint in the directory `path` is quantised; None: it is not.

    Args:
        config: its `config.json`.

    Raises:
        ValueError: a method or a setting is not supported; the message names it, its value and the file.
    """
    told = {f"{key} of config.json": config.get(key) for key in KEYS}
    told |= {file: read_json_object(path / file) for file in METHOD_OF_FILE}
    for where, settings in told.items():
        found = _without_wrapping(settings)
        if not found:
            continue
        method = found.get("quant_method", METHOD_OF_FILE.get(where)) if isinstance(found, dict) else None
        if not isinstance(method, str) or method not in METHODS:
            what, known = shown(found) if method is None else method, ", ".join(METHODS)
            raise ValueError(f"quantization: {what} ({where}) is not supported; supported: {known}")
        dtype = HFConfig(config, "").dtype
        return METHODS[method](HFConfig(found, method, where), dtype)
    return None


def _without_wrapping(settings: Any) -> Any:
    """Settings of any method. ModelOpt's lie in an object `quantization`, whose `quant_algo` may be null for none."""
    inner = settings.get("quantization") if isinstance(settings, dict) else None
    if not isinstance(inner, dict):
        return settings
    return None if inner.get("quant_algo") is None else {"quant_method": "modelopt", **inner}
