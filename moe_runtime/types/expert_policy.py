"""Expert policies: how many of its chosen experts a token uses, as a request may ask.

Shape suffixes: L sparse layers.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

FULL = "full"
CLASSES = (FULL, "balanced", "fast")
ALL_MASS = 2.0  # more than any sum of probabilities
ALLOWED = f'one of {list(CLASSES)}, "NAME=VALUE" or an object with top_k, top_p, threshold or temperature'


@dataclass(frozen=True)
class ExpertPolicy:
    """Fewer experts for the tokens of a request. A value applies to all sparse layers, or is a list with one per layer.

    The gate's chosen experts are taken best first. A token keeps at most `top_k` of them, and at most the fewest whose
    probabilities sum to `top_p`. It drops experts with less than `threshold` times the highest probability. It always
    keeps at least one. The kept experts are weighted as the model's gate does, normalised if the gate normalises.

    Probabilities are those of a softmax gate over all experts. For a sigmoid gate, they are the softmax of the gate's
    logits divided by `temperature`, which a calibration finds.

    Attributes:
        top_k: at most the model's own; None keeps the model's.
        top_p: in (0, 1]; None keeps all (arXiv 2403.07652).
        threshold: in [0, 1]; None or 0 keeps all (arXiv 2402.14800).
        temperature: above 0; None for softmax gates.

    Raises:
        ValueError: a value is out of range.
    """

    top_k: int | Sequence[int] | None = None
    top_p: float | Sequence[float] | None = None
    threshold: float | Sequence[float] | None = None
    temperature: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None:
            object.__setattr__(self, "top_k", _checked("top_k", self.top_k, int, 1, None, "an integer of at least 1"))
        for name, low, high, allowed in (
            ("top_p", 1e-9, 1.0, "a number above 0 and at most 1"),
            ("threshold", 0.0, 1.0, "a number from 0 to 1"),
            ("temperature", 1e-30, 1e30, "a number above 0"),
        ):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _checked(name, value, float, low, high, allowed))

    @property
    def drops(self) -> bool:
        """Whether the policy can drop experts."""
        return (self.top_k, self.top_p, self.threshold) != (None, None, None)

    def rows(self, num_layers: int, top_k: int) -> list[list[float]]:
        """`[L, 4]`, the gates' input: maximum experts, `top_p`, threshold and 1 / temperature of each layer."""
        columns = [
            _per_layer(value, neutral, num_layers)
            for value, neutral in (
                (self.top_k, top_k),
                (self.top_p, ALL_MASS),
                (self.threshold, 0.0),
                (self.temperature, 1.0),
            )
        ]
        return [[k, mass, threshold, 1 / temperature] for k, mass, threshold, temperature in zip(*columns, strict=True)]


PolicyRequest = str | ExpertPolicy | None
"""A class of `CLASSES`, a policy, or None for the server's default."""


def parse_expert_policy(value: object) -> PolicyRequest:
    """A policy or the name of a class, from a user's value: also `"top_p=0.8,top_k=6"`, JSON, or a mapping.

    Raises:
        ValueError: the value is none of these.
    """
    if value is None or isinstance(value, ExpertPolicy) or value in CLASSES:
        return value
    if isinstance(value, str):
        value = _from_text(value)
    known = [entry.name for entry in fields(ExpertPolicy)]
    if not isinstance(value, Mapping) or not value or not all(name in known for name in value):
        raise ValueError(f"routing: {reprlib.repr(value)} is not allowed; it must be {ALLOWED}")
    return ExpertPolicy(**value)


def _from_text(text: str) -> object:
    if text.startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # also of numbers with too many digits
            return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(sign and name.strip() for name, sign, _ in pairs):
        return text
    values: dict[str, object] = {}
    for name, _, number in pairs:
        try:
            values[name.strip()] = int(number) if number.strip().isdigit() else float(number)
        except ValueError:
            return text
    return values


def _checked(name: str, value: object, kind: type, low: float, high: float | None, allowed: str) -> Any:
    """A number, or a tuple with one number for each layer."""
    many = isinstance(value, (list, tuple))
    numbers: Any = value if many else [value]
    for number in numbers:
        is_number = isinstance(number, (int, kind)) and not isinstance(number, bool)
        if not is_number or not low <= number or (high is not None and number > high):
            raise ValueError(f"routing.{name}: {value!r} is not allowed; it must be {allowed}, or a list of them")
    if many and not numbers:
        raise ValueError(f"routing.{name}: [] is not allowed; it must be {allowed}, or one for each sparse layer")
    return tuple(map(kind, numbers)) if many else kind(value)


def _per_layer(value: float | Sequence[float] | None, neutral: float, num_layers: int) -> list[float]:
    if isinstance(value, Sequence):
        return list(value)
    return [neutral if value is None else value] * num_layers
