"""Checks slots, loads and speeds from callers; loads and speeds become float64 arrays of a known scale.

Shape suffixes: L MoE layers, E logical experts, W ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.flow import Floats

NEGLIGIBLE = 1e-30


def check_integers(name: str, values: npt.ArrayLike, dimensions: tuple[str, ...]) -> npt.NDArray[np.integer[Any]]:
    """`values` as an array of their own integer type.

    Raises:
        ValueError: another shape, no values, or values that are not integers.
    """
    array = np.asarray(values)
    if array.ndim != len(dimensions) or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: an array of {array.dtype} and shape {array.shape} is not allowed; "
            f"it must be of integers [{', '.join(dimensions)}] and must not be empty"
        )
    return array


def check_load(name: str, load: npt.ArrayLike, dimensions: tuple[str, ...]) -> Floats:
    """`load` as float64.

    Raises:
        ValueError: another shape, or numbers that are negative or not finite.
    """
    array = np.asarray(load)
    allowed = f"it must be an array of numbers [{', '.join(dimensions)}] that is not empty"
    if array.dtype.kind not in "iuf":
        what = type(load).__name__ if array.ndim == 0 else f"an array of {array.dtype}"
        raise ValueError(f"{name}: {what} is not allowed; {allowed}")
    if array.ndim != len(dimensions) or array.size == 0:
        raise ValueError(f"{name}: an array of shape {array.shape} is not allowed; {allowed}")
    array = array.astype(np.float64)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high < np.inf):
        raise ValueError(f"{name}: values from {low} to {high} are not allowed; they must be finite and at least 0")
    return array


def check_speed(rank_speed: npt.ArrayLike | None, num_ranks: int) -> Floats:
    """[W], relative speeds with a mean of 1.

    Raises:
        ValueError: not one number per rank, or a number that is not finite and above 0.
    """
    if rank_speed is None:
        return np.ones(num_ranks)
    speed_W = np.asarray(rank_speed, np.float64)
    if speed_W.shape != (num_ranks,) or not np.isfinite(speed_W).all() or not (speed_W > 0).all():
        raise ValueError(
            f"rank_speed: {np.asarray(rank_speed).tolist()} is not allowed; "
            f"it must be {num_ranks} finite numbers above 0, one per rank"
        )
    relative_W: Floats = speed_W / speed_W.mean()
    return relative_W


def relative(load: Floats) -> Floats:
    """Loads divided by the largest, so that sums neither overflow nor underflow; negligible loads become 0."""
    relative_load = load / (load.max() or 1.0)
    relative_load[relative_load < NEGLIGIBLE] = 0
    return relative_load


def in_mean_ranks(load_LE: Floats, num_ranks: int) -> Floats:
    """[L, E]: loads in units of a layer's mean load per rank; a layer without load counts as even."""
    relative_LE = np.stack([relative(load_E) if load_E.any() else np.ones_like(load_E) for load_E in load_LE])
    mean_ranks_LE: Floats = relative_LE * (num_ranks / relative_LE.sum(axis=1, keepdims=True))
    return mean_ranks_LE
