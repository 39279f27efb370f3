"""An expert load as a CSV table, which spreadsheets can open and which reads back exactly.

Rows of metadata, whose first cell starts with `#`, stand above one row per phase, layer and expert.
Shape suffixes: L MoE layers, E logical experts, W ranks, S slots per rank.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.balancer.expert_counts import FORMAT, FORMAT_VERSION, PHASES, ExpertCounts
from moe_runtime.balancer.placement import EMPTY, Placement
from moe_runtime.system.files import read_text, require_format

COLUMNS = ["phase", "layer", "expert", "tokens", "ranks", "slots"]
PLACEMENT_FIELDS = ("num_ranks", "max_slots", "placement_version")

# (phase, layer, expert) -> its tokens and its (rank, slot within the rank)
Cells = dict[tuple[str, int, int], tuple[int, tuple[tuple[int, int], ...]]]


def to_csv(load: ExpertCounts) -> bytes:
    """The table. Columns `ranks` and `slots` list an expert's ranks and its slot on each, separated by blanks."""
    placement = load.placement
    metadata: dict[str, object] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": load.model,
        "top_k": load.top_k,
        "num_ranks": placement and placement.num_ranks,
        "max_slots": placement and placement.max_slots,
        "placement_version": placement and placement.version,
    }
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([f"# {key}", value] for key, value in metadata.items())  # csv writes None as an empty cell
    writer.writerow(COLUMNS)
    places = {} if placement is None else _places(placement)
    for phase in PHASES:
        for row, (layer, counts_E) in enumerate(zip(load.layer_ids, load.tokens[phase].tolist(), strict=True)):
            for expert, tokens in enumerate(counts_E):
                ranks, slots = zip(*places.get((row, expert), [("", "")]), strict=True)
                writer.writerow([phase, layer, expert, tokens, " ".join(ranks), " ".join(slots)])
    return file.getvalue().encode()


def _places(placement: Placement) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """(layer row, expert) -> its (rank, slot within the rank), by rank."""
    places: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for layer, rank, slot in np.argwhere(placement.slots != EMPTY).tolist():
        places.setdefault((layer, int(placement.slots[layer, rank, slot])), []).append((str(rank), str(slot)))
    return places


def from_csv(path: Path) -> dict[str, Any]:
    """The arguments of the `ExpertLoad` in the file; ValueError if the file is no expert load or is damaged."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path), newline="")) if row]
    except csv.Error as error:
        raise ValueError(f"not a readable CSV table ({error})") from error
    metadata = {row[0][2:]: row[1] for row in rows if row[0].startswith("# ") and len(row) > 1}
    table = [row for row in rows if not row[0].startswith("#")]
    require_format({**metadata, "format_version": _integer(metadata, "format_version")}, FORMAT, FORMAT_VERSION)
    if not table or table[0][: len(COLUMNS)] != COLUMNS:
        raise ValueError(f"the table's header must be {','.join(COLUMNS)}")
    cells = _cells(table[1:])
    layer_ids = tuple(sorted({layer for _, layer, _ in cells}))
    experts = range(max((expert for _, _, expert in cells), default=-1) + 1)
    # keys are distinct and within these bounds, so their number shows whether all are present
    if not cells or len(cells) != len(PHASES) * len(layer_ids) * len(experts):
        raise ValueError("the table must have one row for each phase, layer and expert")
    return {
        "tokens": {
            phase: np.array([[cells[phase, layer, expert][0] for expert in experts] for layer in layer_ids])
            for phase in PHASES
        },
        "layer_ids": layer_ids,
        "placement": _placement(cells, metadata, layer_ids, len(experts)),
        "model": metadata.get("model", ""),
        "top_k": _integer(metadata, "top_k"),
    }


def _cells(table: Sequence[Sequence[str]]) -> Cells:
    cells: Cells = {}
    for number, row in enumerate(table, start=1):
        where = f"row {number} of the table"
        if len(row) < len(COLUMNS) or row[0] not in PHASES:
            raise ValueError(f"{where}: must be {','.join(COLUMNS)} with phase {' or '.join(PHASES)}")
        ranks, slots = _integers(row[4], where), _integers(row[5], where)
        numbers = _integers(" ".join(row[1:4]), where)
        if len(numbers) != 3 or len(ranks) != len(slots) or min(*numbers, *ranks, *slots) < 0:
            raise ValueError(f"{where}: layer, expert and tokens must be integers of at least 0, with a slot per rank")
        key = (row[0], numbers[0], numbers[1])
        if key in cells:
            raise ValueError(f"{where}: {row[0]}, layer {key[1]}, expert {key[2]} appears twice")
        cells[key] = (numbers[2], tuple(zip(ranks, slots, strict=True)))
    return cells


def _placement(
    cells: Cells, metadata: Mapping[str, str], layer_ids: tuple[int, ...], num_experts: int
) -> Placement | None:
    num_ranks, max_slots, version = (_integer(metadata, name) for name in PLACEMENT_FIELDS)
    if num_ranks is None or max_slots is None or version is None:
        if (num_ranks, max_slots, version) != (None, None, None):
            raise ValueError(f"{', '.join(PLACEMENT_FIELDS)}: must be given together or not at all")
        return None
    slots_LWS = np.full((len(layer_ids), num_ranks, max_slots), EMPTY, np.int32)
    for row, layer in enumerate(layer_ids):
        for expert in range(num_experts):
            places = cells[PHASES[0], layer, expert][1]
            if any(cells[phase, layer, expert][1] != places for phase in PHASES):
                raise ValueError(f"layer {layer}, expert {expert}: has other ranks or slots in prefill than in decode")
            for rank, slot in places:
                if rank >= num_ranks or slot >= max_slots or slots_LWS[row, rank, slot] != EMPTY:
                    raise ValueError(f"layer {layer}, expert {expert}: slot {slot} of rank {rank} is taken or missing")
                slots_LWS[row, rank, slot] = expert
    return Placement(slots_LWS, num_experts, layer_ids, version)


def _integer(metadata: Mapping[str, str], name: str) -> int | None:
    numbers = _integers(metadata.get(name, ""), name)
    if len(numbers) > 1 or (numbers and numbers[0] < 0):
        raise ValueError(f"{name}: {metadata[name]!r} is not allowed; it must be one integer of at least 0")
    return numbers[0] if numbers else None


def _integers(text: str, where: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise ValueError(f"{where}: {text!r} is not allowed; it must be integers") from error
