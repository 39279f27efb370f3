"""Marks for tests that need what not every machine has."""

from __future__ import annotations

import pytest

from moe_runtime.kernels.cpu.library import can_have_kernels

needs_native_kernels = pytest.mark.skipif(not can_have_kernels(), reason="no native kernels here")
