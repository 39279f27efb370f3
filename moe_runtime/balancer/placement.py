"""Which logical expert is in which slot of which rank, and the placement file.

Shape suffixes: L MoE layers, W ranks, S slots per rank, E logical experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.balancer.checks import check_integers
from moe_runtime.system.files import field, parse_json, read_text, require_format

FORMAT = "moe_runtime.placement"
FORMAT_VERSION = 1
EMPTY = -1


@dataclass(frozen=True, eq=False)
class Placement:
    """The logical expert in every slot, per MoE layer.

    An expert may have slots on several ranks (replicas), never two on one rank. Ranks may have different numbers of
    slots; missing slots up to the largest number count as empty. The arrays are read-only.

    Attributes:
        slots: int32 [L, W, S], the logical expert in each slot, -1 where the slot is empty.
        num_experts: logical experts per layer, E.
        layer_ids: the layers' indices in the model, ascending (a model's dense layers have none here).
        version: increases with every change while serving.

    Raises:
        ValueError: an expert without a slot, twice on a rank or out of range; the message names layer, rank and expert.
    """

    slots: npt.NDArray[np.int32]
    num_experts: int
    layer_ids: tuple[int, ...]
    version: int = 0

    def __post_init__(self) -> None:
        slots = check_integers("slots", self.slots, ("layers", "ranks", "slots"))
        object.__setattr__(self, "layer_ids", check_layer_ids(self.layer_ids, len(slots)))
        self._check_experts(slots)
        slots = slots.astype(np.int32)
        slots.setflags(write=False)
        object.__setattr__(self, "slots", slots)
        if self.version < 0:
            raise ValueError(f"version: {self.version} is not allowed; it must be at least 0")

    def _check_experts(self, slots_LWS: npt.NDArray[Any]) -> None:
        num_slots = slots_LWS.shape[1] * slots_LWS.shape[2]
        if not 1 <= self.num_experts <= num_slots:
            raise ValueError(
                f"num_experts: {self.num_experts} is not allowed; it must be from 1 to a layer's slots, {num_slots}"
            )
        for layer, rank, slot in np.argwhere((slots_LWS < EMPTY) | (slots_LWS >= self.num_experts))[:1]:
            raise ValueError(
                f"layer {self.layer_ids[layer]}, rank {rank}: expert {slots_LWS[layer, rank, slot]} is not allowed; "
                f"it must be from 0 to {self.num_experts - 1}, or -1 for an empty slot"
            )
        ordered_LWS = np.sort(slots_LWS, axis=2)
        twice_LWS = (ordered_LWS[..., 1:] == ordered_LWS[..., :-1]) & (ordered_LWS[..., 1:] != EMPTY)
        for layer, rank, slot in np.argwhere(twice_LWS)[:1]:
            raise ValueError(
                f"layer {self.layer_ids[layer]}, rank {rank}: expert {ordered_LWS[layer, rank, slot]} has two slots; "
                "a rank must hold an expert at most once"
            )
        placed_LE = np.zeros((len(slots_LWS), self.num_experts), bool)
        layer, rank, slot = np.nonzero(slots_LWS != EMPTY)
        placed_LE[layer, slots_LWS[layer, rank, slot]] = True
        for layer, expert in np.argwhere(~placed_LE)[:1]:
            raise ValueError(
                f"layer {self.layer_ids[layer]}: expert {expert} has no slot on any rank; every expert must have one"
            )

    @classmethod
    def even(cls, layers: int | Sequence[int], num_experts: int, num_ranks: int) -> Placement:
        """Experts in order over the ranks, as evenly as possible; the first ranks get one more if there is a remainder.

        `layers` is the number of MoE layers, or their indices in the model.

        Raises:
            ValueError: no layers, no experts, or a rank without an expert.
        """
        if num_experts < 1:
            raise ValueError(f"num_experts: {num_experts} is not allowed; it must be at least 1")
        if not 1 <= num_ranks <= num_experts:
            raise ValueError(
                f"num_ranks: {num_ranks} is not allowed; it must be from 1 to the number of experts, {num_experts}"
            )
        layer_ids = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
        slots_WS = np.full((num_ranks, -(-num_experts // num_ranks)), EMPTY, np.int32)
        for rank, experts in enumerate(np.array_split(np.arange(num_experts), num_ranks)):
            slots_WS[rank, : len(experts)] = experts
        return cls(np.broadcast_to(slots_WS, (len(layer_ids), *slots_WS.shape)), num_experts, layer_ids)

    def in_slots(self, num_slots: int | Sequence[int]) -> Placement:
        """The same placement with `num_slots` slots on every rank (or one number per rank). Added slots are empty.

        If a removed slot holds an expert, the experts of that rank and layer move up, in order, without gaps.

        Raises:
            ValueError: a rank holds more experts.
        """
        num_slots_W1 = np.broadcast_to(num_slots, self.num_ranks)[:, None]
        most = int(num_slots_W1.max())
        more = np.full((*self.slots.shape[:2], max(0, most - self.max_slots)), EMPTY, np.int32)
        slots_LWS = np.concatenate((self.slots, more), axis=2)
        is_gone_WS = np.arange(slots_LWS.shape[2]) >= num_slots_W1
        order_LWS = np.argsort(slots_LWS == EMPTY, axis=2, kind="stable")
        closed_LWS = np.take_along_axis(slots_LWS, order_LWS, axis=2)
        is_lost_LW1 = ((slots_LWS != EMPTY) & is_gone_WS).any(axis=2, keepdims=True)
        slots_LWS = np.where(is_lost_LW1, closed_LWS, slots_LWS)
        for layer, rank, _ in np.argwhere((slots_LWS != EMPTY) & is_gone_WS)[:1]:
            held = int((slots_LWS[layer, rank] != EMPTY).sum())
            raise ValueError(
                f"num_slots: {num_slots_W1[rank, 0]} is not allowed; in layer {self.layer_ids[layer]} "
                f"rank {rank} holds {held} experts"
            )
        return replace(self, slots=slots_LWS[:, :, :most])

    @property
    def num_layers(self) -> int:
        return len(self.slots)

    @property
    def num_ranks(self) -> int:
        return int(self.slots.shape[1])

    @property
    def max_slots(self) -> int:
        return int(self.slots.shape[2])

    @property
    def hosts(self) -> npt.NDArray[np.bool_]:
        """bool [L, W, E]: whether a rank has a slot of an expert. Its sum over ranks is the number of replicas."""
        hosts_LWE = np.zeros((self.num_layers, self.num_ranks, self.num_experts), bool)
        layer, rank, slot = np.nonzero(self.slots != EMPTY)
        hosts_LWE[layer, rank, self.slots[layer, rank, slot]] = True
        return hosts_LWE

    @property
    def first_slot(self) -> npt.NDArray[np.int32]:
        """int32 [L, E]: the global slot, rank * max_slots + slot, that holds an expert on its lowest rank."""
        flat = self.slots.reshape(self.num_layers, -1)
        first_LE = np.full((self.num_layers, self.num_experts), flat.shape[1], np.int32)
        layer, slot = np.nonzero(flat != EMPTY)
        np.minimum.at(first_LE, (layer, flat[layer, slot]), slot.astype(np.int32))
        return first_LE

    def ranks_of(self, layer: int, expert: int) -> tuple[int, ...]:
        """The ranks that hold a logical expert, ascending; `layer` counts MoE layers from 0.

        Raises:
            ValueError: layer or expert out of range.
        """
        for name, value, count in (("layer", layer, self.num_layers), ("expert", expert, self.num_experts)):
            if not 0 <= value < count:
                raise ValueError(f"{name}: {value} is not allowed; it must be from 0 to {count - 1}")
        return tuple(int(rank) for rank in np.nonzero((self.slots[layer] == expert).any(axis=1))[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            (self.num_experts, self.layer_ids, self.version) == (other.num_experts, other.layer_ids, other.version)
            and self.slots.shape == other.slots.shape
            and bool((self.slots == other.slots).all())
        )

    def to_dict(self) -> dict[str, Any]:
        """The placement as plain lists and numbers: the contents of its file, and the answer of the HTTP endpoint."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "num_experts": self.num_experts,
            "num_ranks": self.num_ranks,
            "max_slots": self.max_slots,
            "layer_ids": list(self.layer_ids),
            "slots": [
                {"layer": layer, "rank": rank, "experts": experts}
                for layer, slots_WS in zip(self.layer_ids, self.slots.tolist(), strict=True)
                for rank, experts in enumerate(slots_WS)
            ],
        }

    @classmethod
    def from_dict(cls, data: object) -> Placement:
        """The placement that `to_dict` described; `slots` may come in any order.

        Raises:
            ValueError: another format, a missing or wrong field, or no valid placement.
        """
        data = require_format(data, FORMAT, FORMAT_VERSION)
        num_ranks, max_slots = field(data, "num_ranks", int), field(data, "max_slots", int)
        layer_ids = check_layer_ids(field(data, "layer_ids", list), None)
        rows: dict[tuple[int, int], list[int]] = {}
        for row in field(data, "slots", list):
            if not isinstance(row, Mapping):
                raise ValueError(f"slots: {row!r} is not allowed; it must be an object with layer, rank and experts")
            key = (field(row, "layer", int), field(row, "rank", int))
            experts = field(row, "experts", list)
            if key in rows or key[0] not in layer_ids or not 0 <= key[1] < num_ranks:
                raise ValueError(f"layer {key[0]}, rank {key[1]}: slots must name every layer and rank once, no other")
            if len(experts) != max_slots or not all(type(expert) is int for expert in experts):
                raise ValueError(f"layer {key[0]}, rank {key[1]}: experts must be {max_slots} integers (max_slots)")
            rows[key] = experts
        for layer, rank in ((layer, rank) for layer in layer_ids for rank in range(num_ranks)):
            if (layer, rank) not in rows:
                raise ValueError(f"layer {layer}, rank {rank}: is missing; slots must name every layer and rank once")
        slots_LWS = np.array([rows[key] for key in sorted(rows)]).reshape(len(layer_ids), num_ranks, max_slots)
        return cls(slots_LWS, field(data, "num_experts", int), layer_ids, field(data, "version", int))

    def save(self, path: str | Path) -> None:
        """Write a JSON file with one line per layer and rank, so that two placements can be compared with `diff`."""
        head = self.to_dict()
        rows = head.pop("slots")
        lines = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
        slots = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        Path(path).write_text("{\n" + "".join(lines) + f' "slots": [\n{slots}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is no placement or is damaged; the message names the file and the fault.
            OSError: it cannot be read.
        """
        try:
            return cls.from_dict(parse_json(read_text(Path(path))))
        except ValueError as error:
            raise ValueError(f"{path}: not a placement file: {error}") from error


def check_layer_ids(layer_ids: Sequence[int], num_layers: int | None) -> tuple[int, ...]:
    """`layer_ids` as a tuple of ints, if they are ascending and there are `num_layers` of them (None: any number).

    Raises:
        ValueError: they are not.
    """
    good = all(isinstance(layer, int | np.integer) and not isinstance(layer, bool) for layer in layer_ids)
    ids = tuple(int(layer) for layer in layer_ids) if good else ()
    ascending = all(low < high for low, high in zip((-1, *ids), ids, strict=False))
    if not ids or not ascending or num_layers not in (None, len(ids)):
        count = "at least one" if num_layers is None else str(num_layers)
        raise ValueError(
            f"layer_ids: {list(layer_ids)} is not allowed; they must be {count} ascending integers of at least 0"
        )
    return ids
