"""One panel of the heatmap: the cells of a phase, the ranks' loads above them, the layers' balancedness beside them.

All sizes are fixed here in inches from the top left corner, so the picture does not depend on automatic layout.
Shape suffixes: L MoE layers, E logical experts, W ranks, C columns of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Rectangle

from moe_runtime.balancer.expert_counts import ExpertCounts
from moe_runtime.balancer.heatmap_page import (
    BAR,
    BAR_WORST,
    DIGIT,
    FAINT,
    INK,
    MUTED,
    NO_CELL,
    SMALL,
    TEXT,
    Box,
    Page,
    free_box,
    ticks,
)

TITLE = 0.24
RANK_BARS, RANK_NAMES = 0.24, 0.18
LEFT = 0.42  # layer numbers and their name
BALANCE_GAP, BALANCE = 0.12, 0.56
BELOW = 0.42  # expert numbers and their name
NUM_NAMED = 5
MAX_VECTOR_CELLS = 2000  # with more cells, an SVG holds them as a bitmap

LAYER_STEPS = (1, 2, 5, 10, 20, 50, 100)
EXPERT_STEPS = tuple(2**power for power in range(12))
IN_CELL: dict[str, Any] = {"size": SMALL - 0.6, "ha": "center", "va": "center_baseline"}


@dataclass(frozen=True)
class Colours:
    """Maps a ratio to a colour; `top` is the ratio at which the colour scale ends."""

    norm: Normalize
    map: Colormap
    top: float

    def dark(self, ratio: float) -> bool:
        return float(self.norm(ratio)) > 0.45


@dataclass(frozen=True)
class Columns:
    """What each column shows, and where it starts, in columns from the left."""

    rank_C: npt.NDArray[np.int64]
    slot_C: npt.NDArray[np.int64]
    left_C: npt.NDArray[np.float64]
    expert_LC: npt.NDArray[np.int32]  # -1: an empty slot
    replicas_LE: npt.NDArray[np.int64]

    @classmethod
    def of(cls, load: ExpertCounts) -> Columns:
        if load.placement is None:
            experts = np.arange(load.num_experts, dtype=np.int32)
            slots_LWS = np.broadcast_to(experts, (load.num_layers, 1, load.num_experts))
            replicas_LE = np.ones((load.num_layers, load.num_experts), np.int64)
        else:
            slots_LWS = load.placement.slots
            replicas_LE = load.placement.hosts.sum(axis=1)
        rank_C, slot_C = np.nonzero((slots_LWS >= 0).any(axis=0))
        gap = max(0.3, len(rank_C) / 250)
        left_C = np.arange(len(rank_C)) + gap * np.unique(rank_C, return_inverse=True)[1]
        return cls(rank_C, slot_C, left_C, slots_LWS[:, rank_C, slot_C], replicas_LE)

    @property
    def width(self) -> float:
        return float(self.left_C[-1]) + 1

    @property
    def is_same_in_all_layers(self) -> npt.NDArray[np.bool_]:
        """bool [C]: whether a column holds the same expert in all layers, so that the axis can show its number."""
        same_C: npt.NDArray[np.bool_] = (self.expert_LC == self.expert_LC[0]).all(axis=0)
        return same_C

    @property
    def is_replica(self) -> npt.NDArray[np.bool_]:
        """bool [L, C]: whether a cell is one of several slots of its expert."""
        several_LC = np.take_along_axis(self.replicas_LE, np.maximum(self.expert_LC, 0), axis=1) > 1
        return several_LC & (self.expert_LC >= 0)

    def ratios(self, load: ExpertCounts, phase: str) -> npt.NDArray[np.float64]:
        """float64 [L, C]: token rows of a slot / mean of the layer's experts; NaN without an expert or tokens."""
        counts_LE = load.counts(phase)
        mean_L1 = counts_LE.mean(axis=1, keepdims=True)
        unknown_LE = np.full(counts_LE.shape, np.nan)
        ratio_LE = np.divide(counts_LE / self.replicas_LE, mean_L1, out=unknown_LE, where=mean_L1 > 0)
        ratio_LC = np.take_along_axis(ratio_LE, np.maximum(self.expert_LC, 0), axis=1)
        return np.where(self.expert_LC >= 0, ratio_LC, np.nan)


@dataclass(frozen=True)
class Panel:
    """Where and what to draw; `left`, `top`, `width` are of the whole panel, `cells_height` is of the cells only."""

    page: Page
    load: ExpertCounts
    phase: str
    columns: Columns
    colours: Colours
    left: float
    top: float
    width: float
    cells_height: float

    @staticmethod
    def height(cells_height: float, placed: bool) -> float:
        return TITLE + (RANK_BARS + RANK_NAMES if placed else 0) + cells_height + BELOW

    @property
    def cells_left(self) -> float:
        return self.left + LEFT

    @property
    def cells_top(self) -> float:
        return self.top + self.height(0, self.load.placement is not None) - BELOW

    @property
    def cells_width(self) -> float:
        return self.width - LEFT - BALANCE_GAP - BALANCE

    @property
    def column(self) -> float:
        return self.cells_width / self.columns.width

    @property
    def row(self) -> float:
        return self.cells_height / self.load.num_layers

    def draw(self) -> None:
        tokens = self.load.num_tokens(self.phase)
        rows = int(self.load.counts(self.phase).sum())
        # without a known k, a token may have used any number of experts
        amount = f"{tokens:,} tokens" if tokens is not None else f"{rows:,} token-expert pairs"
        title = self.page.text(self.cells_left, self.top, self.phase.capitalize(), 9.5, weight="bold")
        axes = self.page.canvas(self.cells_left, self.cells_top, self.cells_width, self.cells_height)
        if not rows:
            axes.add_patch(Rectangle((0, 0), self.cells_width, self.cells_height, color=NO_CELL, linewidth=0))
            middle = (self.cells_width / 2, self.cells_height / 2)
            axes.text(*middle, "no tokens yet", size=TEXT + 2, color=MUTED, ha="center", va="center")
            return
        beside: dict[str, Any] = {"xycoords": title, "textcoords": "offset points", "va": "center"}
        axes.annotate(amount, (1, 0.5), (6, -0.3), size=TEXT, color=MUTED, **beside)
        ratio_LC = self.columns.ratios(self.load, self.phase)
        self._draw_cells(axes, ratio_LC)
        self._name_experts(axes, ratio_LC)
        self._draw_layer_numbers()
        self._draw_expert_numbers()
        self._draw_balancedness()
        if self.load.placement is not None:
            self._draw_ranks()

    def _draw_cells(self, axes: Axes, ratio_LC: npt.NDArray[np.float64]) -> None:
        num_layers = self.load.num_layers
        many = ratio_LC.size > MAX_VECTOR_CELLS
        # white lines between the cells if these are large enough
        joint = 0.5 if min(self.column, self.row) > 0.06 else 0
        edge_L = np.arange(num_layers + 1) * self.row
        for rank in np.unique(self.columns.rank_C):
            mine_C = self.columns.rank_C == rank
            left_C = self.columns.left_C[mine_C] * self.column
            axes.pcolormesh(
                [*left_C, left_C[-1] + self.column],
                edge_L,
                np.ma.masked_invalid(ratio_LC[:, mine_C]),
                norm=self.colours.norm,
                cmap=self.colours.map,
                edgecolors="white" if joint else "none",
                linewidth=joint,
                antialiased=bool(joint),
                rasterized=many,
            )
        row, column = np.nonzero(self.columns.is_replica)
        right, top = (self.columns.left_C[column] + 1) * self.column, row * self.row
        leg = min(0.07, 0.45 * min(self.column, self.row))
        corners = np.stack([right - leg, top, right, top, right, top + leg], axis=1).reshape(-1, 3, 2)
        axes.add_collection(PolyCollection(list(corners), fc="white", ec=INK, linewidth=4 * leg, rasterized=many))

    def _name_experts(self, axes: Axes, ratio_LC: npt.NDArray[np.float64]) -> None:
        """Outline the hottest experts and name them in their cells, or beside the first cell if a name does not fit.

        In a column whose expert differs between layers, each cell that is large enough shows its expert's number.
        """
        same_C = self.columns.is_same_in_all_layers
        hottest = {(hot.layer, hot.expert) for hot in self.load.hottest(NUM_NAMED, self.phase)}
        beside: dict[tuple[int, int], Box] = {}
        taken: list[Box] = []
        for row, layer in enumerate(self.load.layer_ids):
            for column, expert in enumerate(self.columns.expert_LC[row].tolist()):
                hot = (layer, expert) in hottest
                if expert < 0 or (same_C[column] and not hot):
                    continue
                cell = self._cell(row, column)
                name = f"e{expert}" if hot else str(expert)
                if cell.width > 0.9 * DIGIT * len(name) and cell.height > 0.12:
                    colour = "white" if self.colours.dark(ratio_LC[row, column]) else INK
                    axes.text(*cell.middle, name, color=colour, zorder=2, **IN_CELL)
                elif hot:
                    beside.setdefault((row, expert), cell)
                if hot:
                    taken.append(cell)
                    axes.add_patch(cell.rectangle(fc="none", ec=INK, lw=0.9))
        inside = Box(0, 0, self.cells_width, self.cells_height)
        for (_, expert), cell in beside.items():
            name = f"e{expert}"
            label = free_box(cell, DIGIT * len(name) + 0.05, 0.125, inside, taken)
            taken.append(label)
            axes.plot(*zip(cell.nearest(label.middle), label.middle, strict=True), color=INK, linewidth=0.6, zorder=3)
            axes.add_patch(label.rectangle(fc="white", ec=INK, lw=0.5, zorder=4))
            axes.text(*label.middle, name, color=INK, zorder=5, **IN_CELL)

    def _cell(self, layer: int, column: int) -> Box:
        return Box(float(self.columns.left_C[column]) * self.column, layer * self.row, self.column, self.row)

    def _draw_layer_numbers(self) -> None:
        place_L = (np.arange(self.load.num_layers) + 0.5) * self.row
        for row in ticks(self.load.layer_ids, place_L, self.row, 0.13, LAYER_STEPS):
            at = (self.cells_left - 0.05, self.cells_top + place_L[row])
            self.page.text(*at, str(self.load.layer_ids[row]), SMALL, MUTED, ha="right", va="center_baseline")
        middle = self.cells_top + self.cells_height / 2
        self.page.text(self.left + 0.05, middle, "layer", SMALL, MUTED, ha="center", va="center", rotation=90)

    def _draw_expert_numbers(self) -> None:
        same_C = self.columns.is_same_in_all_layers
        (columns,) = np.nonzero(same_C)
        place_C = (self.columns.left_C[columns] + 0.5) * self.column
        room = DIGIT * len(str(self.load.num_experts - 1)) + 0.04
        below = self.cells_top + self.cells_height
        for tick in ticks(self.columns.slot_C[columns].tolist(), place_C, self.column, room, EXPERT_STEPS):
            at = (self.cells_left + place_C[tick], below + 0.04)
            self.page.text(*at, str(self.columns.expert_LC[0, columns[tick]]), SMALL, MUTED, ha="center")
        differing = len(same_C) - len(columns)
        caption = f"expert ({differing} of {len(same_C)} slots differ between layers)" if differing else "expert"
        self.page.text(self.cells_left + self.cells_width / 2, below + 0.17, caption, SMALL, MUTED, ha="center")

    def _draw_ranks(self) -> None:
        """Each rank's share of the token rows of all layers, as a bar over its columns; dashed: an equal share."""
        load_W = self.load.rank_load(self.phase).sum(axis=0)
        share_W = load_W / load_W.sum()
        hottest = int(share_W.argmax())
        axes = self.page.canvas(self.cells_left, self.cells_top - RANK_NAMES - RANK_BARS, self.cells_width, RANK_BARS)
        equal = RANK_BARS / max(share_W.max() * len(share_W), 1.2)
        last = -1.0
        for rank in np.unique(self.columns.rank_C):
            left_C = self.columns.left_C[self.columns.rank_C == rank] * self.column
            left, width = left_C[0], left_C[-1] - left_C[0] + self.column
            tall = equal * share_W[rank] * len(share_W)
            colour = BAR_WORST if rank == hottest else BAR
            axes.add_patch(Rectangle((left, RANK_BARS - tall), width, tall, color=colour, linewidth=0))
            names = (f"{rank} · {share_W[rank]:.1%} of tokens", f"{rank} · {share_W[rank]:.0%}", str(rank))
            name = next((name for name in names if DIGIT * len(name) < width), names[-1])
            middle = left + width / 2
            if middle - last > DIGIT * len(name) + 0.04:
                at = (self.cells_left + middle, self.cells_top - RANK_NAMES + 0.03)
                self.page.text(*at, name, SMALL, INK if rank == hottest else MUTED, ha="center")
                last = middle
        axes.axhline(RANK_BARS - equal, color=INK, linewidth=0.6, linestyle=(0, (3, 2)))
        self.page.text(self.cells_left - 0.05, self.cells_top - RANK_NAMES + 0.03, "rank", SMALL, MUTED, ha="right")
        if self.cells_width > 5:  # wide enough for both ends of the title line
            busiest = f"busiest rank: {hottest}, {share_W[hottest] * len(share_W):.2f}× an equal share"
            self.page.text(self.cells_left + self.cells_width, self.top + 0.03, busiest, SMALL, MUTED, ha="right")

    def _draw_balancedness(self) -> None:
        balancedness_L = self.load.balancedness(self.phase)
        left = self.cells_left + self.cells_width + BALANCE_GAP
        axes = self.page.canvas(left, self.cells_top, BALANCE, self.cells_height)
        for row, value in enumerate(balancedness_L):
            bar = Rectangle((0, (row + 0.12) * self.row), value * BALANCE, 0.76 * self.row, linewidth=0)
            bar.set_color(BAR_WORST if row == int(balancedness_L.argmin()) else BAR)
            axes.add_patch(bar)
        axes.axvline(balancedness_L.mean() * BALANCE, color=INK, linewidth=0.6, linestyle=(0, (3, 2)))
        axes.axvline(BALANCE, color=FAINT, linewidth=0.6)
        middle = left + BALANCE / 2
        below = self.cells_top + self.cells_height
        for value in (0, 1):
            self.page.text(left + value * BALANCE, below + 0.04, str(value), SMALL, MUTED, ha="center")
        self.page.text(middle, below + 0.17, "balancedness", SMALL, MUTED, ha="center")
        self.page.text(middle, self.cells_top - 0.15, f"mean {balancedness_L.mean():.2f}", SMALL, INK, ha="center")
