"""Hardware as the planner sees it: a small YAML or JSON file of rates and overheads, each with its source.

A rank is one device (a GPU), or a share of the cores of its node (`cores`). For nodes with cores, rates are tables over
the number of working cores. For devices, the tables have the single entry 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from moe_runtime.planner.shape import ITEMSIZE, Matrix

Table = tuple[tuple[float, float], ...]
Floats = npt.NDArray[np.float64]

COPIES = ("expert", "rank", "node")


@dataclass(frozen=True)
class Link:
    """The link between two ranks.

    Attributes:
        bandwidth: bytes per second of one rank in one direction.
        latency: seconds that even the smallest exchange takes.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Overheads:
    """Seconds that a step takes in addition to its reading, computing and sending.

    The interpreter's work (`step`, `step_ranks`) is the time with warm caches. It takes `cold_factor` times as long
    after weights have passed through the caches.

    Attributes:
        step: per step with one rank.
        step_ranks: per step with several ranks.
        step_row: per sequence of the busiest rank in a step: sampling, bookkeeping.
        layer: per layer: norms, starting and joining threads.
        layer_row: per token of the busiest rank and layer, whatever its size: rotation, gate, grouping.
        layer_byte: on one core, per byte of rows that the norms and the weighted sum of a layer read or write.
        slot: per expert that has rows, in each layer.
        expert_byte: on one core, per byte of an expert's rows: gathering, activation and writing, beyond its products.
        wait: processor time per exchange of a rank without sequences, if ranks take turns on cores: it polls for the
            others.
    """

    step: float
    step_ranks: float
    step_row: float
    layer: float
    layer_row: float
    layer_byte: float
    slot: float
    expert_byte: float
    wait: float


@dataclass(frozen=True)
class Hardware:
    """Rates of the hardware of a rank.

    Attributes:
        name: shown in reports.
        cores: of a node, shared by its ranks; None if each rank has a device.
        ranks_per_node: devices of a node, or most ranks that share its cores; others are reached over `inter_node`.
        memory_bytes: of a device, or of a node with cores.
        reserved_bytes: of each rank, in addition to weights and pages.
        weight_bytes: per dtype, bytes per weight as kernels store it; for other dtypes, the dtype's size.
        memory_bandwidth: bytes of weights read per second by number of working cores, in products of one row.
        expert_bandwidth: share of `memory_bandwidth` at which experts' weights are read.
        matrix_rate: per dtype, operations per second of large products by number of working cores.
        efficiency: per dtype, share of `matrix_rate` by rows of a product.
        attention_bandwidth: share of `memory_bandwidth` at which attention reads keys and values.
        attention_rate: share of `matrix_rate` in `attention_dtype` at which attention computes.
        attention_dtype: dtype in which attention computes, whatever the weights' dtype.
        output_multiple: outputs of a matrix are rounded up to a multiple of it.
        intra_node, inter_node: links.
        rows_out, rows_back: a token's row travels once per "expert", "rank" or "node", in dispatch and on the return
            path.
        overlap: 1, or 2 if two halves of a batch take turns in computing and sending.
        cold_factor: slowdown factor of the interpreter's work, by bytes that the node's cores have read since it last
            did the same work.
        overheads: all other time of a step.
        sources: of each value, by its path in the file.
    """

    name: str
    cores: int | None
    ranks_per_node: int
    memory_bytes: float
    reserved_bytes: float
    weight_bytes: Mapping[str, float]
    memory_bandwidth: Table
    expert_bandwidth: float
    matrix_rate: Mapping[str, Table]
    efficiency: Mapping[str, Table]
    attention_bandwidth: float
    attention_rate: float
    attention_dtype: str
    output_multiple: int
    intra_node: Link
    inter_node: Link
    rows_out: str
    rows_back: str
    overlap: int
    cold_factor: Table
    overheads: Overheads
    sources: Mapping[str, str] = field(default_factory=dict)

    def cores_per_rank(self, num_ranks: int) -> float:
        """Cores of each rank if a node has `num_ranks`; below 1 if ranks take turns, and 1 for devices."""
        return 1.0 if self.cores is None else self.cores / min(num_ranks, self.ranks_per_node)

    def turns(self, active: int) -> float:
        """The slowdown factor of ranks that share fewer cores than there are ranks; at least 1."""
        return 1.0 if self.cores is None else max(1.0, active / self.cores)

    def stored_bytes(self, matrices: Sequence[Matrix]) -> float:
        """Bytes of weights as kernels store them."""
        sizes = ITEMSIZE | dict(self.weight_bytes)

        def stored(matrix: Matrix) -> float:
            if matrix.format is not None:
                return matrix.format.nbytes(matrix.outputs, matrix.inputs)
            return matrix.parameters * sizes[matrix.dtype]

        return sum(map(stored, matrices), 0.0)

    def cold(self, nbytes: float) -> float:
        """The slowdown factor of the interpreter if `nbytes` were read since it last did the same work."""
        return interpolate(self.cold_factor, nbytes)

    def bandwidth(self, num_ranks: int, active: int) -> float:
        """Bytes per second that each rank reads while `active` ranks of a node work; `num_ranks` is of all nodes."""
        return self._rate(self.memory_bandwidth, num_ranks, active)

    def rate(self, dtype: str, num_ranks: int, active: int) -> float:
        """Operations per second of each rank in large products while `active` ranks of a node work."""
        return self._rate(self.table_of(self.matrix_rate, dtype), num_ranks, active)

    def _rate(self, table: Table, num_ranks: int, active: int) -> float:
        if self.cores is None:
            return table[0][1]
        own = max(self.cores_per_rank(num_ranks), 1.0)
        working = min(active * own, self.cores)
        return min(interpolate(table, own), interpolate(table, working) / (working / own))

    def at_pace(self, read: float, rate: float) -> Hardware:
        """The profile with reading and copying scaled by `read`, and all other work by `rate`."""

        def scaled(table: Table, factor: float) -> Table:
            return tuple((cores, value * factor) for cores, value in table)

        over, link = self.overheads, self.intra_node
        return replace(
            self,
            overheads=Overheads(**{name: seconds / rate for name, seconds in vars(over).items()}),
            intra_node=Link(link.bandwidth * read, link.latency / rate),
            memory_bandwidth=scaled(self.memory_bandwidth, read),
            matrix_rate={name: scaled(table, rate) for name, table in self.matrix_rate.items()},
        )

    def table_of(self, tables: Mapping[str, Table], dtype: str) -> Table:
        """The table of a dtype.

        Raises:
            ValueError: the profile has none.
        """
        if dtype not in tables:
            raise ValueError(f"dtype: {dtype!r} is not in the hardware profile {self.name!r}; it has {sorted(tables)}")
        return tables[dtype]

    def efficiency_of(self, dtype: str, rows: Floats) -> Floats:
        """Share of the full rate that products with `rows` rows reach."""
        table = self.table_of(self.efficiency, dtype)
        known = np.log2([row for row, _ in table])
        found: Floats = np.exp2(np.interp(np.log2(np.maximum(rows, 1e-9)), known, np.log2([y for _, y in table])))
        return found


def interpolate(table: Table, x: float) -> float:
    """Linear between the entries, constant beyond them."""
    return float(np.interp(x, [entry[0] for entry in table], [entry[1] for entry in table]))
