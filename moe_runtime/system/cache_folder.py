"""The folder of compiled kernels, tuned tiles and the demo model."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """The folder used when none is given. It may not exist yet."""
    if own := os.environ.get("MOE_RUNTIME_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moe-runtime"
