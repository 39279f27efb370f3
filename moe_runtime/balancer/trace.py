"""Which experts each token used, step by step; the planner replays it.

Shape suffixes: T tokens of all steps, L sparse layers, K experts per token, E logical experts.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.placement import check_layer_ids
from moe_runtime.system.files import field, require_format
from moe_runtime.system.npz import read_npz

FORMAT = "moe_runtime.routing_trace"
FORMAT_VERSION = 1
UNUSED = 0xFFFF  # an unused entry: the token used fewer than K experts
MAX_EXPERTS = UNUSED
ARRAYS = ("experts", "step", "rank", "is_decode")


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts of every token that went through the model, in order of steps.

    A row is a computed token. Tokens that a preempted sequence computes again appear again. The arrays are read-only.

    Attributes:
        experts: uint16 [T, L, K], logical experts, best first; `UNUSED` where a token used fewer than K.
        step: int32 [T], number of the step, never falling.
        rank: uint16 [T], rank on which the token's sequence lives.
        is_decode: bool [T]; False: a token of a prompt.
        num_experts: logical experts of a layer, E.
        layer_ids: the sparse layers' indices in the model, ascending.
        model: name shown in pictures and files.
        top_k: experts per token of the model, K.

    Raises:
        ValueError: shapes that do not fit each other, or values out of range.
    """

    experts: npt.NDArray[np.uint16]
    step: npt.NDArray[np.int32]
    rank: npt.NDArray[np.uint16]
    is_decode: npt.NDArray[np.bool_]
    num_experts: int
    layer_ids: tuple[int, ...]
    model: str
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ValueError(f"num_experts: {self.num_experts} is not allowed; it must be from 1 to {MAX_EXPERTS}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: {self.top_k} is not allowed; it must be from 1 to {self.num_experts}")
        experts = _array("experts", self.experts, np.uint16, 3)
        object.__setattr__(self, "layer_ids", check_layer_ids(self.layer_ids, experts.shape[1]))
        if experts.shape[2] != self.top_k:
            raise ValueError(f"experts: shape {experts.shape} is not allowed; the last must be top_k, {self.top_k}")
        if ((experts >= self.num_experts) & (experts != UNUSED)).any():
            raise ValueError(f"experts: a value is not allowed; all must be below {self.num_experts}, or {UNUSED}")
        object.__setattr__(self, "experts", experts)
        for name, dtype in (("step", np.int32), ("rank", np.uint16), ("is_decode", np.bool_)):
            array = _array(name, getattr(self, name), dtype, 1)
            if len(array) != len(experts):
                raise ValueError(f"{name}: {len(array)} entries are not allowed; they must be {len(experts)}")
            object.__setattr__(self, name, array)
        if (self.step < 0).any() or (self.step[1:] < self.step[:-1]).any():
            raise ValueError("step: the numbers are not allowed; they must be at least 0 and must not fall")

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.experts)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.experts.shape[1])

    @property
    def num_ranks(self) -> int:
        """Ranks up to the last one that had a token; the trace does not know of ranks after it."""
        return int(self.rank.max()) + 1 if len(self.rank) else 0

    @property
    def num_steps(self) -> int:
        """Steps that had tokens."""
        return len(np.unique(self.step))

    def counts(self) -> npt.NDArray[np.int64]:
        """int64 [2, L, E]: token rows of each expert, prefill then decode."""
        counts_2LE = np.zeros((2, self.num_layers, self.num_experts), np.int64)
        for phase in (0, 1):
            for layer in range(self.num_layers):
                chosen = self.experts[self.is_decode == bool(phase), layer].ravel()
                chosen = chosen[chosen != UNUSED]
                counts_2LE[phase, layer] = np.bincount(chosen, minlength=self.num_experts)
        return counts_2LE

    def save(self, path: str | Path) -> None:
        """Write a compressed NPZ archive: the arrays, `layer_ids`, and `metadata` (JSON text)."""
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
        }
        arrays: dict[str, Any] = {name: getattr(self, name) for name in ARRAYS}
        arrays["layer_ids"] = np.asarray(self.layer_ids, np.int64)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays, metadata=np.array(json.dumps(metadata)))
        Path(path).write_bytes(file.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """The trace that `save` wrote.

        Raises:
            ValueError: the file does not exist, is not a trace, is damaged, or has a version that cannot be read.
        """
        try:
            arrays, metadata = read_npz(Path(path), (*ARRAYS, "layer_ids"))
            metadata = require_format(metadata, FORMAT, FORMAT_VERSION)
            return cls(
                **{name: arrays[name] for name in ARRAYS},
                num_experts=field(metadata, "num_experts", int),
                layer_ids=tuple(arrays["layer_ids"].ravel().tolist()),
                model=field(metadata, "model", str),
                top_k=field(metadata, "top_k", int),
            )
        except OSError as error:
            raise ValueError(f"trace: {str(path)!r} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"trace: {str(path)!r} is not allowed: {error}") from error


def _array(name: str, value: object, dtype: type[np.generic], ndim: int) -> npt.NDArray[Any]:
    """A read-only array; a value that the type cannot hold is an error, and never wraps around."""
    array = np.asarray(value)
    if array.ndim != ndim:
        raise ValueError(f"{name}: shape {array.shape} is not allowed; it must have {ndim} dimensions")
    if array.dtype != dtype:
        integers = np.issubdtype(array.dtype, np.integer) and np.issubdtype(dtype, np.integer)
        if not integers or (array.astype(dtype) != array).any():
            raise ValueError(f"{name}: {array.dtype} is not allowed; it must be {np.dtype(dtype)}")
    array = array.astype(dtype)
    array.flags.writeable = False
    return array
