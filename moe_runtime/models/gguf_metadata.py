"""The metadata of a GGUF file: every key is read, known to have no effect here, or refused by name. No torch."""

from __future__ import annotations

from typing import Any

from moe_runtime.models.hf_config import shown
from moe_runtime.models.inert_keys import is_empty
from moe_runtime.weights.gguf_file import Gguf

# They say nothing that changes a forward pass, or what other keys and the tensors say too.
INERT = {
    "vocab_size",
    "feed_forward_length",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}


class Metadata:
    """The metadata of an architecture, read key by key, so that unread keys can be refused.

    Args:
        gguf: the files; `general.architecture` is a text.
    """

    def __init__(self, gguf: Gguf) -> None:
        self.gguf, self.arch = gguf, gguf.metadata["general.architecture"]
        self._seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`. A list with a value for each layer counts as one if they are equal."""
        self._seen.add(key)
        value = self.gguf.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and value and value == value[:1] * len(value):
            return value[0]
        return value

    def need(self, key: str) -> Any:
        """As `get`. Raises ValueError if there is none."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.arch}.{key}: missing in {self.gguf.path}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer that is not negative; without a default, there must be one. Raises ValueError."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or value < 0:
            raise self._refusal(key, value, "it must be an integer >= 0")
        return value

    def number(self, key: str, default: float) -> float:
        """A number. Raises ValueError if it is something else."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)):
            raise self._refusal(key, value, "it must be a number")
        return value

    def always(self, key: str, *allowed: Any) -> None:
        """Raise ValueError if there is a value, and it is none of those that the runtime computes."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise self._refusal(key, value, f"it must be {' or '.join(map(repr, allowed))}")

    def has(self, tensor: str) -> bool:
        """Whether the first layer has a tensor."""
        return f"blk.0.{tensor}" in self.gguf.tensors

    @property
    def vocab_size(self) -> int:
        return self.gguf.shape("token_embd.weight")[0]

    def finish(self) -> None:
        """Raise ValueError for a key that was not read and may change a forward pass."""
        for name, value in self.gguf.metadata.items():
            key = name.removeprefix(f"{self.arch}.")
            if key != name and key not in self._seen | INERT and not (is_empty(value) or value == 0):
                raise self._refusal(key, value, "the runtime does not know it")

    def _refusal(self, key: str, value: object, why: str) -> ValueError:
        return ValueError(f"{self.arch}.{key}: {shown(value)} in {self.gguf.path} is not supported; {why}")
