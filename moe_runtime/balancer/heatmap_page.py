"""Drawing tools of the heatmap: a page measured in inches, boxes on it, and free places for labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

INK, MUTED, FAINT, NO_CELL = "#1d2433", "#5b6474", "#d5d9e0", "#eceef2"
BAR, BAR_WORST = "#b3bccd", "#5d6b88"
LARGE, TEXT, SMALL = 12.0, 8.0, 6.8
DIGIT = 0.0602  # inches that a digit takes in SMALL


class Page:
    """A figure whose parts are placed in inches from its top left corner."""

    def __init__(self, width: float, height: float, dpi: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")

    def frame(self, left: float, top: float, width: float, height: float) -> Axes:
        rect = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(rect)

    def canvas(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without a frame whose data coordinates are inches from their own top left corner."""
        axes = self.frame(left, top, width, height)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        return axes

    def text(self, left: float, top: float, text: str, size: float = TEXT, color: str = INK, **style: Any) -> Text:
        # dollar signs in a model's name must not start a formula
        style = {"va": "top", "size": size, "color": color, "parse_math": False, **style}
        return self.figure.text(left / self.width, 1 - top / self.height, text, **style)


@dataclass(frozen=True)
class Box:
    """A rectangle in inches from the top left corner of its axes."""

    left: float
    top: float
    width: float
    height: float

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        return min(max(x, self.left), self.left + self.width), min(max(y, self.top), self.top + self.height)

    def rectangle(self, **style: Any) -> Rectangle:
        return Rectangle((self.left, self.top), self.width, self.height, **style)

    def within(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and other.top <= self.top
            and self.left + self.width <= other.left + other.width
            and self.top + self.height <= other.top + other.height
        )

    def overlaps(self, other: Box) -> bool:
        across, down = (abs(mine - its) for mine, its in zip(self.middle, other.middle, strict=True))
        return across < (self.width + other.width) / 2 and down < (self.height + other.height) / 2


def free_box(cell: Box, width: float, height: float, inside: Box, taken: Sequence[Box]) -> Box:
    """A place for a label near a cell: the nearest candidate that lies in `inside` and overlaps no box of `taken`."""
    x, y = cell.middle
    for distance in (0.12, 0.22, 0.34, 0.48, 0.64):
        for turn in (1, -1, 3, -3, 0, 4, 2, -2):
            angle = turn * np.pi / 4
            middle = (x + np.cos(angle) * (distance + width / 2), y - np.sin(angle) * (distance + height / 2))
            box = Box(middle[0] - width / 2, middle[1] - height / 2, width, height)
            if box.within(inside) and not any(box.overlaps(other) for other in taken):
                return box
    return Box(x - width / 2, y - height / 2, width, height)


def ticks(
    numbers: Iterable[int], places: npt.NDArray[Any], spacing: float, room: float, steps: Sequence[int]
) -> list[int]:
    """Indices to label: those of multiples of a round step, such that each label has enough room."""
    step = next((step for step in steps if step * spacing >= room), steps[-1])
    kept: list[int] = []
    for index, number in enumerate(numbers):
        if number % step == 0 and (not kept or places[index] - places[kept[-1]] >= room):
            kept.append(index)
    return kept
