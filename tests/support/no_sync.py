"""Proof that nothing waits for the device: a mode in which every op that gives a tensor's contents to Python fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Ops that read a number, or whose result has a size that depends on the data.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}
READING = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy}


class _NoReading(TorchFunctionMode):
    """Fails at functions that read a CPU tensor without an op."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func not in READING, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


class NoSync(TorchDispatchMode):
    """Fails at the first op that would wait on a GPU; `seen` holds the names of all ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> NoSync:
        self._stack.enter_context(_NoReading())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.seen.add(name)
        assert name not in WAITING, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, f"{name} by a mask waits for the device"
        return func(*args, **(kwargs or {}))
