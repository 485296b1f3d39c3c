"""The figures that compare models and task vectors: scores by type, cost against quality, the Gram matrix as cosines.

Each function returns an SVG string, or None where the run has nothing to draw. Curves over steps are in `curves`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from scalemerge.report import quantities
from scalemerge.report.drawing import (
    GRID,
    KIND_COLORS,
    KIND_MARKERS,
    LEARNED_COLOR,
    LEARNED_MARKER,
    WIDTH,
    canvas,
    shortened,
    to_svg,
)
from scalemerge.report.labels import LabelledPoint, label_points
from scalemerge.report.reading import Position
from scalemerge.report.results import ModelResult, Results, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS_A_ROW = 4


def model_color(model: ModelResult) -> str:
    """One colour a group; the learned merge has its own."""
    return LEARNED_COLOR if model.learned else KIND_COLORS[model.kind]


def model_marker(model: ModelResult) -> str:
    """One marker a group, so that colour is never the only difference."""
    return LEARNED_MARKER if model.learned else KIND_MARKERS[model.kind]


def scores_by_type(results: Results) -> str | None:
    """A dot plot, one panel per task type and one for the mean, one row per model.

    With ten models and five types, fifty bars are unreadable; aligned dots show at a glance who gains where, and an
    axis that starts near the lowest score (fair for dots, not for bars) shows differences of half a point.
    """
    models = [model for model in results.models if model.by_type or model.mean is not None]
    if not models:
        return None
    panels: list[tuple[str, list[float | None]]] = [("Mean", [results.mean(model) for model in models])]
    for name in results.types:
        panels.append((readable(name), [results.type_mean(model, name) for model in models]))
    rows = -(-len(panels) // _PANELS_A_ROW)
    columns = -(-len(panels) // rows)
    base_row = next((row for row, model in enumerate(models) if model.kind == "base"), None)
    with canvas(rows * (0.62 + 0.205 * len(models))) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_visible(False)
                continue
            title, values = panels[index]
            reference = None if base_row is None else values[base_row]
            _score_panel(axes, models, values, reference)
            axes.set_title(shortened(title, 24))
            if index + columns >= len(panels):
                axes.set_xlabel("points")
        for axes in grid[:, 0]:
            axes.set_yticks(range(len(models)), [shortened(model.full_label, 26) for model in models])
            for label, model in zip(axes.get_yticklabels(), models, strict=True):
                label.set_fontweight("bold" if model.learned else "normal")
        grid[0][0].set_ylim(len(models) - 0.4, -0.6)
        return to_svg(figure, "scores")


def _score_panel(axes: Axes, models: list[ModelResult], values: list[float | None], reference: float | None) -> None:
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if reference is not None:
        axes.axvline(reference, color=KIND_COLORS["base"], linewidth=0.9, linestyle=":")
    for row, (model, value) in enumerate(zip(models, values, strict=True)):
        if value is None:
            continue
        shade, marker = model_color(model), model_marker(model)
        if reference is not None:
            axes.plot([reference, value], [row, row], color=shade, linewidth=1.2, alpha=0.55)
        axes.plot(value, row, marker, color=shade, markersize=10 if model.learned else 5.5, markeredgewidth=0)
    axes.margins(x=0.1)


def cost_against_quality(results: Results, measure: Literal["seconds", "flops"] = "seconds") -> str | None:
    """Total cost (experts included where a model needs them) against the mean score; the base model is a line.

    Returns None where fewer than two models have both a cost and a complete score.
    """
    shown: list[tuple[float, float, ModelResult]] = []
    for model in results.models:
        cost: float | None = getattr(model.cost, measure)
        mean = results.mean(model)
        if model.kind != "base" and cost is not None and cost > 0 and mean is not None:
            shown.append((cost, mean, model))
    if len(shown) < 2:
        return None
    low, high = min(cost for cost, _, _ in shown), max(cost for cost, _, _ in shown)
    logarithmic = high / low > 8
    with canvas(4.3) as figure:
        axes = figure.subplots()
        points = []
        for cost, mean, model in shown:
            area = 210 if model.learned else 46
            marker, shade = model_marker(model), model_color(model)
            axes.scatter(cost, mean, s=area, marker=marker, color=shade, linewidths=0, zorder=3)
            points.append(LabelledPoint(cost, mean, model.full_label, math.sqrt(area) / 2 + 1, model.learned))
        axes.margins(y=0.14)
        base = results.base
        reference = results.mean(base) if base else None
        notes = []
        if reference is not None:
            axes.axhline(reference, color=KIND_COLORS["base"], linestyle=":", linewidth=1.2)
            note = f"base model, {quantities.points(reference)}"
            beside = axes.get_yaxis_transform()
            notes = [axes.text(0.995, reference, note, transform=beside, ha="right", va="bottom", fontsize=8.5)]
        _cost_axis(axes, low, high, logarithmic)
        unit = "total seconds" if measure == "seconds" else "total FLOPs"
        axes.set_xlabel(f"{unit}, with every model it needed{' (log scale)' if logarithmic else ''}")
        axes.set_ylabel("mean score, points")
        label_points(figure, axes, points, notes)
        return to_svg(figure, f"cost-{measure}")


def _cost_axis(axes: Axes, low: float, high: float, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.6, high * 1.9)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, high * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if 1 <= x < 1e5 else quantities.count(x)))


def whole_gram(position: Position) -> list[list[float]] | None:
    """The Gram matrix of the whole task vectors: the groups partition the weights, so theirs add up."""
    if not position.gram:
        return None
    size = range(len(position.experts))
    return [[sum(gram[i][j] for gram in position.gram.values()) for j in size] for i in size]


def cosines(gram: list[list[float]]) -> list[list[float | None]]:
    """cos = G_ij / sqrt(G_ii G_jj); None where a task vector is zero or not finite."""

    def cosine(i: int, j: int) -> float | None:
        scale = gram[i][i] * gram[j][j]
        if not (scale > 0 and math.isfinite(scale) and math.isfinite(gram[i][j])):
            return None
        return max(-1.0, min(1.0, gram[i][j] / math.sqrt(scale)))

    return [[cosine(i, j) for j in range(len(gram))] for i in range(len(gram))]


def gram_cosines(position: Position) -> str | None:
    """Cosines between task vectors as a heat map with numbers; the diagonal gives the norm of each."""
    gram = whole_gram(position)
    if gram is None:
        return None
    from matplotlib.patches import Rectangle

    names = [shortened(readable(name), 20) for name in position.experts]
    size = len(names)
    table = cosines(gram)
    between = [abs(value) for i, row in enumerate(table) for j, value in enumerate(row) if i != j and value is not None]
    top = max(0.2, *between) if between else 1.0
    side = min(WIDTH, 2.3 + 0.8 * size)
    with canvas(0.9 + 0.52 * size, side) as figure:
        axes = figure.subplots()
        axes.grid(visible=False)
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                if row == column:
                    norm = math.sqrt(gram[row][row]) if gram[row][row] >= 0 else None
                    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="none", edgecolor=GRID))
                    axes.text(column, row, f"‖T‖ {quantities.coefficient(norm)}", ha="center", va="center", fontsize=8)
                    continue
                strength = 0.0 if value is None else min(1.0, abs(value) / top)
                shade = "#0072b2" if value is None or value >= 0 else "#d55e00"
                corner, alpha = (column - 0.5, row - 0.5), 0.06 + 0.54 * strength
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=shade, alpha=alpha, linewidth=0))
                shown = quantities.ABSENT if value is None else f"{value:.2f}".replace("-", quantities.MINUS)
                axes.text(column, row, shown, ha="center", va="center", fontsize=9.5)
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_xticks(range(size), names, rotation=0 if size <= 6 else 40, ha="center" if size <= 6 else "right")
        axes.set_yticks(range(size), names)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return to_svg(figure, "gram")
