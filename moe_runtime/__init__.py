"""Serve Mixture-of-Experts language models with expert parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_runtime.types.version import __version__

if TYPE_CHECKING:
    from moe_runtime.llm import LLM
    from moe_runtime.types.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Import a name only when it is used, so that `import moe_runtime` stays fast."""
    if name == "LLM":
        from moe_runtime.llm import LLM

        return LLM
    if name == "SamplingParams":
        from moe_runtime.types.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
