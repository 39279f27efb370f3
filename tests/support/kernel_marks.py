"""Marks for tests whose requirements not every machine meets."""

from __future__ import annotations

import pytest

from moe_runtime.kernels.cpu.library import can_have_kernels

needs_native_kernels = pytest.mark.skipif(not can_have_kernels(), reason="no native kernels here")
