"""The native CPU kernels on every instruction set that this machine has, with one thread and with two."""

from __future__ import annotations

import pytest

from moe_runtime.kernels.cpu import library, loader


@pytest.fixture(scope="module", params=library.supported_instruction_sets() or ["none"])
def kernels(request):
    if request.param == "none":
        pytest.skip("no instruction set for the native kernels")
    try:
        return loader.load(request.param)
    except library.NativeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[1, 2])
def threads(request, kernels):
    kernels.set_threads(request.param)
