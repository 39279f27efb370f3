"""The picture of an expert load: PNG and SVG.

One panel per phase. A row is a layer. A column is a slot, grouped by rank (an expert if there is no placement). The
ranks' loads are above the cells, and the balancedness of each layer is beside them. The hottest experts are named in
the cells and listed below.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.image import imread, imsave

from moe_runtime.balancer.expert_counts import PHASES, ExpertCounts
from moe_runtime.balancer.heatmap_page import FAINT, LARGE, MUTED, NO_CELL, SMALL, TEXT, Page
from moe_runtime.balancer.heatmap_panel import NUM_NAMED, Colours, Columns, Panel

WIDTH, DPI = 9.0, 200
MARGIN = 0.22
HEADER = 0.66
BETWEEN = 0.3  # gap between tables, and between panels side by side
BENEATH = 0.12  # gap between panels one above the other
TABLE_ROW = 0.165
MAX_COLUMNS_BESIDE = 48  # with more, the panels stand one above the other
MAX_RATIO = 16.0  # the largest ratio at which the colours may end
BALANCED_AT = 0.2  # where ratio 1.0 lies on the colour scale


def draw(load: ExpertCounts, format: str) -> bytes:
    """The picture as a file's contents; `format` is "png" or "svg"."""
    columns = Columns.of(load)
    beside = len(columns.rank_C) <= MAX_COLUMNS_BESIDE
    cells_height = _cells_height(load.num_layers, beside)
    panel_height = Panel.height(cells_height, load.placement is not None)
    panels_height = panel_height if beside else 2 * panel_height + BENEATH
    page = Page(WIDTH, MARGIN + HEADER + panels_height + TABLE_ROW * (NUM_NAMED + 1) + MARGIN, DPI)
    colours = _colours([columns.ratios(load, phase) for phase in PHASES])
    _draw_header(page, load, colours, bool(columns.is_replica.any()))
    half = (WIDTH - 2 * MARGIN - BETWEEN) / 2
    for number, phase in enumerate(PHASES):
        beside_left = MARGIN + number * (half + BETWEEN)
        left, width = (beside_left, half) if beside else (MARGIN, WIDTH - 2 * MARGIN)
        top = MARGIN + HEADER + (0 if beside else number * (panel_height + BENEATH))
        Panel(page, load, phase, columns, colours, left, top, width, cells_height).draw()
        _draw_table(page, load, phase, beside_left, MARGIN + HEADER + panels_height, half)
    file = io.BytesIO()
    page.figure.savefig(file, format=format, metadata={"Date": None} if format == "svg" else None)
    return file.getvalue()


def draw_pair(before: ExpertCounts, after: ExpertCounts) -> bytes:
    """Two loads of one model in one PNG, the earlier above; `after` may include the counts of `before`.

    Raises:
        ValueError: they are of different models.
    """
    if (before.layer_ids, before.num_experts) != (after.layer_ids, after.num_experts):
        raise ValueError("before: is a load of another model; layers and experts must be the same")
    goes_on = all((after.tokens[phase] >= before.tokens[phase]).all() for phase in PHASES)
    since = after - before if goes_on else after
    named = (replace(before, model=f"{before.model}, before"), replace(since, model=f"{after.model}, after"))
    pictures = [imread(io.BytesIO(draw(load, "png"))) for load in named]
    file = io.BytesIO()
    imsave(file, np.concatenate(pictures), format="png", dpi=DPI)
    return file.getvalue()


def _cells_height(num_layers: int, beside: bool) -> float:
    row, most = (0.145, 4.5) if beside else (0.1, 3.1)
    return max(min(num_layers * row, most), num_layers * 0.03, 0.9)


def _colours(ratios: Sequence[npt.NDArray[np.float64]]) -> Colours:
    """The scale from 0 to a power of two, so that pictures share few scales; 1.0 has the same colour in all of them.

    Magma runs from light to dark, without its black end, on which outlines are invisible.
    """
    peak = max(float(ratio[np.isfinite(ratio)].max(initial=0.0)) for ratio in ratios)
    top = 4.0
    while top < min(peak, MAX_RATIO):
        top *= 2
    gamma = math.log(BALANCED_AT) / math.log(1 / top)
    magma = ListedColormap(matplotlib.colormaps["magma"](np.linspace(0.985, 0.12, 256)))
    return Colours(PowerNorm(gamma, vmin=0, vmax=top, clip=True), magma.with_extremes(bad=NO_CELL), top)


def _draw_header(page: Page, load: ExpertCounts, colours: Colours, replicated: bool) -> None:
    name = " ".join(load.model.split()) or "Expert load"
    page.text(MARGIN, MARGIN, name if len(name) <= 48 else f"…{name[-47:]}", LARGE, weight="bold")
    facts = [f"{load.num_layers} MoE layers × {load.num_experts} experts"]
    if load.top_k is not None:
        facts.append(f"top-{load.top_k}")
    if load.placement is not None:
        facts.append("1 rank" if load.placement.num_ranks == 1 else f"{load.placement.num_ranks} ranks")
    if replicated:
        facts.append("◥ one of several replicas")
    page.text(MARGIN, MARGIN + 0.26, " · ".join(facts), TEXT, MUTED)
    width = 3.2
    left = WIDTH - MARGIN - width
    subject = "a slot" if replicated else "an expert"
    page.text(left, MARGIN - 0.02, f"tokens of {subject} ÷ mean expert of its layer (1: balanced)", SMALL, MUTED)
    shades = ScalarMappable(colours.norm, colours.map)
    bar = page.figure.colorbar(shades, cax=page.frame(left, MARGIN + 0.15, width, 0.13), orientation="horizontal")
    ticks = [tick for tick in (0, 0.5, 1, 2, 4, 8, 16) if tick <= colours.top]
    bar.set_ticks(ticks, labels=[f"≥{tick:g}" if tick == MAX_RATIO else f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=SMALL, labelcolor=MUTED, color=FAINT, length=2, pad=1.5)
    bar.outline.set_linewidth(0)


def _draw_table(page: Page, load: ExpertCounts, phase: str, left: float, top: float, width: float) -> None:
    """The table of the hottest experts: layer, expert, ranks, tokens, share of the layer, multiple of its mean."""
    hottest = load.hottest(NUM_NAMED, phase)
    if not hottest:
        return
    ends = [left + width * end for end in (0.30, 0.43, 0.58, 0.74, 0.88, 1.0)]
    page.text(left, top, f"hottest, {phase}", SMALL, weight="bold")
    for end, title in zip(ends, ("layer", "expert", "rank", "tokens", "of layer", "× mean"), strict=True):
        page.text(end, top, title, SMALL, MUTED, ha="right")
    for number, hot in enumerate(hottest, start=1):
        ranks: tuple[int, ...] = ()
        if load.placement is not None:
            ranks = load.placement.ranks_of(load.layer_ids.index(hot.layer), hot.expert)
        rank = ", ".join(map(str, ranks[:3])) + (f" +{len(ranks) - 3}" if len(ranks) > 3 else "")
        row = top + number * TABLE_ROW
        multiple = f"{hot.share * load.num_experts:.1f}"
        tokens = f"{hot.tokens:,}" if hot.tokens < 10**8 else f"{hot.tokens:.2e}"
        cells = (str(hot.layer), f"e{hot.expert}", rank or "–", tokens, f"{hot.share:.1%}", multiple)
        for end, cell in zip(ends, cells, strict=True):
            page.text(end, row, cell, SMALL, ha="right")
