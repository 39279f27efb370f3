"""Sampling parameters that a model's `generation_config.json` recommends. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_runtime.types.sampling_params import SamplingParams

# The keys that servers use, and their names in `SamplingParams`. `do_sample` is not among them: only the temperature
# says whether a request is greedy.
USED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling(generation_config: Mapping[str, Any]) -> dict[str, float | int]:
    """The fields of `SamplingParams` that a parsed `generation_config.json` sets; a null sets nothing.

    Raises:
        ValueError: a value is not allowed; the message names the field, the value and what is allowed.
    """
    found = {name: generation_config[key] for key, name in USED.items() if generation_config.get(key) is not None}
    SamplingParams(**found)  # checks them
    return found
