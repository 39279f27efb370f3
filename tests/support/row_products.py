"""Matrix products for Triton's interpreter in which each row is computed independently.

On a GPU the rows of a tile are independent. The interpreter multiplies with numpy, and numpy with a BLAS that does not
guarantee bits: those of a row may depend on the other rows, and on some processors they do.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """As `numpy.matmul`, summed in one order for every element."""
    kind = np.result_type(a, b) if dtype is None else dtype
    a, b = a.astype(kind), b.astype(kind)
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), kind)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., k, None, :]
    return total


def use_in_this_process() -> None:
    """Make the interpreter use `matmul` from now on."""
    np.matmul = matmul
