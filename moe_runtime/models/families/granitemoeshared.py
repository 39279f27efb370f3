"""Granite MoE with shared experts (`GraniteMoeSharedForCausalLM`): as `granitemoe`, plus a shared expert."""

from __future__ import annotations

from typing import Any

from moe_runtime.config.model import ModelConfig
from moe_runtime.models.families import granitemoe
from moe_runtime.models.hf_config import HFConfig

NAMES = granitemoe.NAMES


def parse(config: dict[str, Any]) -> ModelConfig:
    """Normalise a `config.json`; defaults are those of transformers' `GraniteMoeSharedConfig`."""
    hf = HFConfig(config, "granitemoeshared")
    return granitemoe.parse_granite(hf, hf.integer("shared_intermediate_size", default=0, low=0))
