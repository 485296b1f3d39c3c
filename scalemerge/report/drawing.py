"""How every figure of the report looks, and how it becomes an SVG string.

* Deterministic: matplotlib's own defaults under a fixed style (no matplotlibrc of the machine), a fixed hash salt, no
  metadata. The same run gives the same bytes.
* Text stays text (`svg.fonttype: none`): crisp, searchable, small, and read aloud by a screen reader. It is laid out in
  DejaVu Sans, wider than what a browser is likely to use: labels that do not collide here do not collide there.
* Colour-blind safe: Okabe-Ito, and line styles and markers that differ too.
* Figures have no background and draw their text in INK and grid in GRID, two colours used for nothing else: the page
  replaces them by CSS variables, so a figure is readable in light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from scalemerge.report.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = "#24303b", "#d5dbe1"
OKABE_ITO = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c")
LINE_STYLES = ("-", "--", "-.", ":")
KIND_COLORS = {"base": "#8c8c8c", "expert": "#e69f00", "joint": "#0072b2", "merge": "#009e73", "other": "#cc79a7"}
KIND_MARKERS = {"base": "s", "expert": "^", "joint": "o", "merge": "D", "other": "v"}
LEARNED_COLOR, LEARNED_MARKER = "#d55e00", "*"
WIDTH = 9.6
"""Inches at 72 units an inch: about the width of the page's text column, so font sizes come out as written."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scalemerge",
    "text.parse_math": False,  # a task name may hold a dollar sign
    "font.family": ["DejaVu Sans"],
    "figure.dpi": 72,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "figure.constrained_layout.h_pad": 0.09,
}


@contextmanager
def canvas(height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A figure in the report's style. Everything, `to_svg` included, must happen inside the block."""
    style = require("matplotlib.style")
    figures = require("matplotlib.figure")
    with style.context(["default", _STYLE]):
        figure: Figure = figures.Figure(figsize=(width, height), layout="constrained")
        require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        yield figure


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element without prolog or metadata. Ids start with `name`, unique within a page."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", dpi=72, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # inline, it would style the whole page
    return svg.strip()


def color(index: int) -> str:
    """The colour of series `index`."""
    return OKABE_ITO[index % len(OKABE_ITO)]


def line_style(index: int) -> str:
    """The line style of series `index`: changes with every series, so that colour is never the only difference."""
    return LINE_STYLES[index % len(LINE_STYLES)]


def shortened(label: str, limit: int = 34) -> str:
    """A label that cannot push a plot aside."""
    return label if len(label) <= limit else label[: limit - 1] + "…"


def binned(
    steps: Sequence[float], values: Sequence[float], bins: int = 160
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Step, mean, minimum and maximum of up to `bins` runs of neighbouring points.

    Ten thousand noisy steps become a readable line with its spread, and the SVG stays small.
    """
    size = max(1, -(-len(steps) // bins))
    chunks = [(steps[start : start + size], values[start : start + size]) for start in range(0, len(steps), size)]
    return (
        [sum(at) / len(at) for at, _ in chunks],
        [sum(part) / len(part) for _, part in chunks],
        [min(part) for _, part in chunks],
        [max(part) for _, part in chunks],
    )
