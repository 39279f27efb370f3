"""Reading `config.json`: every key is read, known to have no effect here, or refused by name. No torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from moe_runtime.models.inert_keys import is_empty, is_inert

logger = logging.getLogger(__name__)

Null = TypeVar("Null")  # what null means
LARGEST = (1 << 31) - 1  # integer of a configuration
SHOWN = 120  # characters of a value in a message


class HFConfig:
    """One `config.json`, read key by key, so that unread keys can be refused.

    Raises ValueError with one line that names the key, its value and what is allowed.

    Args:
        values: of the file, or of an object in it.
        family: for messages.
        where: name of the file or object, for messages.
    """

    def __init__(self, values: dict[str, Any], family: str, where: str = "config.json") -> None:
        self.values = values
        self.family = family
        self.where = where
        self.seen: set[str] = set()

    def get(self, *names: str, default: Any = None) -> Any:
        """Value of the first of several spellings that is present and not null."""
        self.seen.update(names)
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = LARGEST) -> int:
        """An integer from `low` to `high`; without a default the key is required. Null is not allowed."""
        value = self._given(names, default)
        if not _is_integer(value) or not low <= value <= high:
            allowed = f"an integer >= {low}" if high == LARGEST else f"an integer from {low} to {high}"
            raise self.refusal(self._spelling(names), value, allowed)
        return int(value)

    def integer_or_null(self, name: str, *, default: int | Null, null: Null) -> int | Null:
        """An integer of at least 1; null means `null`, and an absent key `default`."""
        self.seen.add(name)
        if name not in self.values:
            return default
        return null if self.values[name] is None else self.integer(name)

    def number(self, *names: str, default: float) -> float:
        """A finite number. Null is not allowed."""
        return self._number(names[0], self._given(names, default))

    def positive(self, name: str, default: float) -> float:
        """A finite number above 0. Null is not allowed."""
        value = self.number(name, default=default)
        if value <= 0:
            raise self.refusal(name, value, "a number above 0")
        return value

    def positive_or_none(self, name: str) -> float | None:
        """A finite number above 0; None if the key is absent or null."""
        value = self.number_or_none(name)
        if value is not None and value <= 0:
            raise self.refusal(name, value, "above 0")
        return value

    def number_or_none(self, name: str) -> float | None:
        """A finite number; None if the key is absent or null."""
        value = self.get(name)
        return None if value is None else self._number(name, value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false. Null is not allowed."""
        value = self._given((name,), default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true or false")
        return value

    def window(self, default: int | None = None, *, is_used: bool = True) -> int | None:
        """The sliding window in tokens; null means none, also where the family has a default for an absent key.

        If it is not used, its value has no effect.
        """
        self.seen.add("sliding_window")
        value = self.values.get("sliding_window", default) if is_used else None
        if value is not None and (not _is_integer(value) or value < 1):
            raise self.refusal("sliding_window", value, "null or an integer >= 1")
        return value

    def integer_of_layers(self, *names: str, num_layers: int, default: int) -> int:
        """An integer of at least 1, which may be written once for each layer."""
        value = self._given(names, default)
        if isinstance(value, list) and value and value == value[:1] * num_layers:
            value = value[0]
        if not _is_integer(value) or value < 1:
            raise self.refusal(
                self._spelling(names), value, f"an integer >= 1, or a list of {num_layers} times the same"
            )
        return int(value)

    def sparse_layers(self, num_layers: int) -> list[int]:
        """Layers with experts: every `decoder_sparse_step`-th one that `mlp_only_layers` does not name."""
        dense = self.get("mlp_only_layers", default=[])
        if not isinstance(dense, list) or not all(map(_is_integer, dense)):
            raise self.refusal("mlp_only_layers", dense, "a list of integers")
        stride = self.integer("decoder_sparse_step", default=1)
        return [index for index in range(num_layers) if index not in dense and (index + 1) % stride == 0]

    def sparse_of_types(self, name: str, num_layers: int) -> list[int] | None:
        """Layers that a list of "dense" and "sparse" names; None if it is absent."""
        value = self.get(name)
        if value is None:
            return None
        allowed = ("dense", "sparse")
        if not isinstance(value, list) or len(value) != num_layers or not all(kind in allowed for kind in value):
            raise self.refusal(name, value, f"a list that gives each of the {num_layers} layers one of {list(allowed)}")
        return [index for index, kind in enumerate(value) if kind == "sparse"]

    def require(self, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """A key of which only some values are supported."""
        value = self.get(name, default=default)
        if value not in allowed:
            raise ValueError(f"{name}: {shown(value)} in {self.where} is not supported; supported: {list(allowed)}")
        return value

    def always(self, **facts: Any) -> None:
        """What the family always does: a configuration may say it, and may not say anything else."""
        for name, value in facts.items():
            self.require(name, (value,), value)

    def layer_types(self, num_layers: int, window: int | None) -> None:
        """Check that `layer_types`, if there is one, says of every layer what `window` says of all."""
        kind = "full_attention" if window is None else "sliding_attention"
        value = self.get("layer_types")
        if value is not None and value != [kind] * num_layers:
            rule = f"each of the {num_layers} layers must be {kind!r}"
            raise ValueError(f"layer_types: {shown(value)} in {self.where} is not supported; {rule}")

    def layer_windows(self, with_window: Sequence[bool], window: int | None) -> list[int | None]:
        """Each layer's sliding window; `layer_types` says which layers have one, else `with_window` does."""
        kinds = ["sliding_attention" if has_window else "full_attention" for has_window in with_window]
        value = self.get("layer_types", default=kinds)
        allowed = ["full_attention"] if window is None else ["full_attention", "sliding_attention"]
        if not isinstance(value, list) or len(value) != len(kinds) or not all(kind in allowed for kind in value):
            raise self.refusal(
                "layer_types", value, f"a list that gives each of the {len(kinds)} layers one of {allowed}"
            )
        return [window if kind == "sliding_attention" else None for kind in value]

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        if self.get("head_dim") is not None:
            return self.integer("head_dim")
        if hidden_size % num_heads:
            raise ValueError(f"head_dim: missing in config.json, and {num_heads} heads do not divide {hidden_size}")
        return hidden_size // num_heads

    def finish(self) -> None:
        """Refuse keys that were not read and may have an effect; log the others in one line."""
        ignored = []
        for name, value in self.values.items():
            if name in self.seen or is_empty(value) or name == "model_type":
                continue
            if not is_inert(name):
                raise ValueError(f"{name}: {shown(value)} in {self.where} is not supported for {self.family}")
            ignored.append(name)
        if ignored:
            logger.info("%s: ignored, as they cannot change a forward pass: %s", self.where, ", ".join(sorted(ignored)))

    @property
    def dtype(self) -> str:
        """The checkpoint's dtype as the configuration states it."""
        return str(self.get("dtype", "torch_dtype", default="float32")).removeprefix("torch.")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return token_ids("eos_token_id", self.get("eos_token_id"), self.where)

    def _spelling(self, names: tuple[str, ...]) -> str:
        """The name that the file uses, else the first."""
        return next((name for name in names if self.values.get(name) is not None), names[0])

    def _given(self, names: tuple[str, ...], default: Any) -> Any:
        """As `get`, but the default is only for absent keys."""
        is_given = any(name in self.values for name in names)
        return self.get(*names, default=None if is_given else default)

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.refusal(name, value, "a finite number")
        return float(value)

    def refusal(self, name: str, value: object, allowed: str) -> ValueError:
        """The error for a value that is not allowed."""
        return ValueError(f"{name}: {shown(value)} in {self.where} is not allowed; it must be {allowed}")


def shown(value: object) -> str:
    """A value of a file as messages show it: on one line, cut to a bounded length."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def token_ids(name: str, value: object, where: str) -> tuple[int, ...]:
    """One token id or a list of them, as configurations have it; null is none."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_integer(token_id) and token_id >= 0 for token_id in found):
        raise ValueError(f"{name}: {shown(value)} in {where} is not allowed; it must be a token id or a list of them")
    return tuple(found)


def read_json_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file. Raises ValueError if the file holds something else."""
    if not file.exists():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model: {file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"model: {file} does not hold a JSON object")
    return value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
