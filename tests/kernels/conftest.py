"""The native CPU kernels on every instruction set that this machine has, with one thread and with two."""

from __future__ import annotations

import pytest

from moe_runtime.kernels.cpu import library, loader

ALL_SETS = library.supported_instruction_sets() or ["none"]


def _load(name):
    if name == "none":
        pytest.skip("no instruction set for the native kernels")
    try:
        return loader.load(name)
    except library.NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=[name for name in ALL_SETS if name != "avx_vnni"])
def kernels(request):
    return _load(request.param)


@pytest.fixture(scope="module", params=ALL_SETS)
def byte_kernels(request):
    """Also those that differ from others only in products of bytes."""
    return _load(request.param)


@pytest.fixture(params=[1, 2])
def threads(request, kernels):
    kernels.set_threads(request.param)
