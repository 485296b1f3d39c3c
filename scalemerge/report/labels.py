"""Labels beside the data instead of a legend, moved apart where they would cover each other.

A reader should not have to match colours with a box in the corner; merges, moreover, cost nearly the same and score
nearly the same, so their labels collide unless somebody makes room.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalemerge.report.drawing import INK, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_SIZE = 8.5
_RINGS = 14
Box = tuple[float, float, float, float]
"""left, bottom, right, top, in display units (points: figures are laid out at 72 dots an inch)."""


@dataclass(frozen=True)
class LabelledPoint:
    """A point in data coordinates and what to write beside it; `radius` (points) is the size of its marker."""

    x: float
    y: float
    label: str
    radius: float = 5.0
    bold: bool = False


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions near `wanted`, in the same order, at least `gap` apart."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    for _ in range(200):
        moved = False
        for low, high in itertools.pairwise(order):
            lack = gap - (placed[high] - placed[low])
            if lack > 1e-9 * max(gap, 1.0):
                placed[low] -= lack / 2
                placed[high] += lack / 2
                moved = True
        if not moved:
            break
    return placed


def label_line_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, label, colour) to the right of the axes, each tied to the end of its line."""
    low, high = axes.get_ylim()
    inches = axes.get_position().height * figure.get_figheight()
    gap = (high - low) * _SIZE * 1.35 / 72 / max(inches, 0.1)
    beside = axes.get_yaxis_transform()
    for y, (at, label, shade) in zip(spread([end[0] for end in ends], gap), ends, strict=True):
        axes.annotate(
            shortened(label),
            xy=(1, at),
            xytext=(1.045, y),
            xycoords=beside,
            textcoords=beside,
            va="center",
            fontsize=_SIZE,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 0},
        )


def label_points(figure: Figure, axes: Axes, points: Sequence[LabelledPoint], obstacles: Sequence[Text] = ()) -> None:
    """Label points so that labels cover neither each other, nor a marker, nor an obstacle.

    Greedy: a label takes the nearest free place on rings of candidates around its point, and gets a leader line where
    it had to move away. The most crowded points choose first. Call it last: it freezes the layout it measured.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    transformed = [axes.transData.transform((point.x, point.y)) for point in points]
    spots = [(float(x), float(y)) for x, y in transformed]
    taken: list[Box] = []
    for (x, y), point in zip(spots, points, strict=True):
        taken.append((x - point.radius, y - point.radius, x + point.radius, y + point.radius))
    for obstacle in obstacles:
        extent = obstacle.get_window_extent()
        taken.append((extent.x0, extent.y0, extent.x1, extent.y1))

    def crowding(index: int) -> tuple[int, float]:
        x, y = spots[index]
        near = sum(abs(x - other[0]) < 90 and abs(y - other[1]) < 22 for other in spots)
        return -near, -y

    for index in sorted(range(len(points)), key=crowding):
        point, (x, y) = points[index], spots[index]
        weight = "bold" if point.bold else "normal"
        probe = axes.text(0, 0, shortened(point.label), fontsize=_SIZE, weight=weight)
        extent = probe.get_window_extent()
        probe.remove()
        # Other markers count as wider than they are: a label that touches one seems to belong to it.
        foreign = [_wider(one) if place < len(points) else one for place, one in enumerate(taken) if place != index]
        box, far = _free_box((x, y), point.radius, extent.width, extent.height, foreign, inside)
        taken.append(box)
        axes.annotate(
            shortened(point.label),
            xy=(point.x, point.y),
            xytext=(box[0] - x, (box[1] + box[3]) / 2 - y),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=_SIZE,
            weight=weight,
            arrowprops=_leader(point.radius, box, x) if far else None,
        )


def _free_box(
    spot: tuple[float, float], radius: float, width: float, height: float, taken: Sequence[Box], inside: Box
) -> tuple[Box, bool]:
    """The nearest box that covers nothing (else the one that covers least), and whether it needs a leader line."""
    x, y = spot
    tried: list[tuple[float, int, Box]] = []
    for ring in range(_RINGS):
        away = radius + 2 + 7.0 * ring
        corners = (
            (x + away, y - height / 2),
            (x - away - width, y - height / 2),
            (x + radius, y + away - 3),
            (x + radius, y - away - height + 3),
            (x - radius - width, y + away - 3),
            (x - radius - width, y - away - height + 3),
        )
        for left, bottom in corners:
            box = (left, bottom, left + width, bottom + height)
            outside = width * height - _overlap(box, inside)
            covered = sum(_overlap(box, other) for other in taken) + outside
            if ring > 1:
                covered += sum(_crosses(spot, box, other) for other in taken) * height
            if covered < 1e-6:
                return box, ring > 1
            tried.append((covered, ring, box))
    _, ring, box = min(tried)
    return box, ring > 1


def _wider(marker: Box) -> Box:
    left, bottom, right, top = marker
    return left - 8, bottom, right + 8, top


def _leader(radius: float, box: Box, x: float) -> dict[str, Any]:
    """A thin line from the marker to the near end of the label."""
    near_end = (0.0, 0.5) if box[0] >= x else (1.0, 0.5) if box[2] <= x else (0.5, 0.5)
    style = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 1, "shrinkB": radius}
    return {**style, "relpos": near_end}


def _crosses(spot: tuple[float, float], box: Box, other: Box) -> bool:
    """Whether the leader line from `spot` to `box` would run through `other` (sampled: boxes are larger than steps)."""
    x, y = spot
    end_x, end_y = min(max(x, box[0]), box[2]), (box[1] + box[3]) / 2
    steps = [index / 24 for index in range(25)]
    line = [(x + (end_x - x) * part, y + (end_y - y) * part) for part in steps]
    # Markers that lie on one another cannot be told apart by a line; only what does not cover the spot counts.
    if other[0] <= x <= other[2] and other[1] <= y <= other[3]:
        return False
    return any(other[0] <= at_x <= other[2] and other[1] <= at_y <= other[3] for at_x, at_y in line)


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, across) * max(0.0, up)
