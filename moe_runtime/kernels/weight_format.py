"""How a weight matrix is stored. Slots, native packing, Triton, migrations and budgets share this type. No torch."""

from __future__ import annotations

from enum import Enum


class WeightFormat(Enum):
    """A format of matrices.

    Attributes:
        dtype: of the values.
        bits: of one weight.
        native: its number in the native kernels; None if they do not support it.
    """

    FLOAT32 = ("float32", 32, 0)
    BFLOAT16 = ("bfloat16", 16, None)
    CODED_BFLOAT16 = ("bfloat16", 12, 1)  # high bytes coded, without loss; see kernels/cpu/coded.h

    def __init__(self, dtype: str, bits: int, native: int | None) -> None:
        self.dtype, self.bits, self.native = dtype, bits, native

    @classmethod
    def of(cls, dtype: str, coded: bool = False) -> WeightFormat:
        """The format of matrices of a dtype; `coded` if native kernels store them.

        Raises:
            ValueError: matrices of this dtype are not supported.
        """
        match dtype, coded:
            case "float32", _:
                return cls.FLOAT32
            case "bfloat16", True:
                return cls.CODED_BFLOAT16
            case "bfloat16", False:
                return cls.BFLOAT16
        raise ValueError(f"dtype: {dtype} is not allowed; it must be float32 or bfloat16")

    def nbytes(self, num_weights: int) -> float:
        """Bytes of `num_weights` weights, without the padding of a matrix to whole panels."""
        return num_weights * self.bits / 8
