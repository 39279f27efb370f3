"""Recognises quantised checkpoints, wherever they say that they are, and names what they are. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_runtime.models.hf_config import read_json_object, shown

MODELOPT_FILE = "hf_quant_config.json"
FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
KEYS = ("quantization_config", "compression_config")  # of config.json


def refuse_quantization(path: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if the checkpoint in the directory `path` is quantised.

    Args:
        config: its `config.json`.
    """
    told = {name: config.get(name) for name in KEYS} | {name: read_json_object(path / name) for name in FILES}
    for name, settings in told.items():
        if settings and (kind := _kind(name, settings)):
            where = f"{name} in config.json" if name in KEYS else str(path / name)
            raise ValueError(f"quantization: {kind} ({where}) is not supported; the weights must be float32 or 16-bit")


def _kind(name: str, settings: Any) -> str:
    """What the settings describe, in a few words; empty if they say that nothing is quantised."""
    if not isinstance(settings, dict):
        return shown(settings)
    if name == MODELOPT_FILE:
        inner = settings.get("quantization")
        algorithm = inner.get("quant_algo") if isinstance(inner, dict) else inner
        return f"{algorithm} of ModelOpt" if algorithm else ""
    method = settings.get("quant_method")
    if method is None and name == "quantize_config.json":
        method = "GPTQ"
    if method is None and name == "quant_config.json":
        method = "AWQ"
    if method == "modelopt":
        return f"{settings.get('quant_algo')} of ModelOpt"
    bits = next((settings[key] for key in ("bits", "w_bit") if key in settings), None)
    return f"{shown(settings) if method is None else method}{f' with {bits} bits' if bits else ''}"
