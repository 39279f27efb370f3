"""The tokens of a model as bytes: all that a grammar must know of a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        tokens: the bytes that each token adds to a text; of a special token the bytes of its name.
        special_ids: tokens that are no text.
        eos_ids: tokens that end an output.
    """

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]
