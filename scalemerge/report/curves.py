"""The figures that run over steps: coefficient paths, coefficients by group, probe losses, training losses.

Each function returns an SVG string, or None where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scalemerge.report import quantities
from scalemerge.report.drawing import (
    INK,
    KIND_COLORS,
    WIDTH,
    binned,
    canvas,
    color,
    line_style,
    shortened,
    to_svg,
)
from scalemerge.report.labels import label_line_ends
from scalemerge.report.reading import Position, SearchStep, TrainingStep
from scalemerge.report.results import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS_A_ROW = 4


def expert_names(position: Position | None, count: int) -> list[str]:
    """Names of the coefficients: known once the search has finished, numbered before."""
    if position is not None and len(position.experts) == count:
        return [readable(name) for name in position.experts]
    return [f"expert {index + 1}" for index in range(count)]


def coefficient_paths(history: Sequence[SearchStep], position: Position | None = None) -> str | None:
    """Each expert's coefficient over the steps: the mean over groups, with the range over groups as a band."""
    steps = [step for step in history if step.c]
    if not steps:
        return None
    count = len(next(iter(steps[-1].c.values())))
    steps = [step for step in steps if all(len(values) == count for values in step.c.values())]
    names = expert_names(position, count)
    grouped = len(steps[-1].c) > 1
    at = [step.step for step in steps]
    with canvas(3.5) as figure:
        axes = figure.subplots()
        ends = []
        for index, name in enumerate(names):
            groups = [[values[index] for values in step.c.values()] for step in steps]
            means = [sum(values) / len(values) for values in groups]
            x, y, _, _ = binned(at, means, 240)
            # The last step is drawn itself and not its bin: it is the result.
            axes.plot([*x, at[-1]], [*y, means[-1]], color=color(index), linestyle=line_style(index))
            if grouped:
                lows = binned(at, [min(values) for values in groups], 240)[2]
                highs = binned(at, [max(values) for values in groups], 240)[3]
                axes.fill_between(x, lows, highs, color=color(index), alpha=0.13, linewidth=0)
            ends.append((means[-1], f"{name}: {quantities.coefficient(means[-1])}", color(index)))
        axes.set_xlim(at[0], max(at[-1], at[0] + 1))
        axes.axhline(0, color=INK, linewidth=0.7) if axes.get_ylim()[0] < 0 else None
        axes.set_xlabel("search step")
        axes.set_ylabel("merging coefficient c")
        label_line_ends(figure, axes, ends)
        return to_svg(figure, "paths")


def coefficients_by_group(position: Position) -> str | None:
    """The learned coefficients along the layers (or modules); None where the whole model has one position."""
    groups = list(position.c)
    if len(groups) < 2:
        return None
    with canvas(3.2) as figure:
        axes = figure.subplots()
        ends = []
        for index, name in enumerate(position.experts):
            values = [position.c[group][index] for group in groups]
            marker = "o" if len(groups) <= 40 else None
            axes.plot(values, color=color(index), linestyle=line_style(index), marker=marker, markersize=3.5)
            ends.append((values[-1], readable(name), color(index)))
        stride = -(-len(groups) // 40)
        ticks = list(range(0, len(groups), stride))
        axes.set_xticks(ticks, [shortened(groups[tick], 22) for tick in ticks], rotation=45, ha="right", fontsize=7.5)
        axes.set_xlim(0, len(groups) - 1)
        axes.set_xlabel("group of weights, in checkpoint order")
        axes.set_ylabel("merging coefficient c")
        label_line_ends(figure, axes, ends)
        return to_svg(figure, "groups")


def loss_curves(history: Sequence[SearchStep]) -> str | None:
    """Left: the objective on the probe set and on its validation part. Right: each task against its own start."""
    total = [(step.step, step.loss) for step in history if step.loss is not None]
    tasks = list(dict.fromkeys(name for step in history for name in step.losses))
    if len(total) < 2 and not tasks:
        return None
    with canvas(3.3) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
        if total:
            _noisy_line(left, total, color(0), "-", "probe set")
        validation = [(step.step, step.validation_loss) for step in history if step.validation_loss is not None]
        if validation:
            marker = "o" if len(validation) <= 40 else None
            x, y = zip(*validation, strict=True)
            left.plot(x, y, color="#d55e00", linestyle="--", marker=marker, markersize=3.5, label="validation")
        left.set_title("Objective")
        left.set_xlabel("search step")
        left.set_ylabel("loss")
        if total or validation:
            left.legend(loc="upper right")
        ends = []
        for index, name in enumerate(tasks):
            line = [(step.step, step.losses[name]) for step in history if name in step.losses]
            relative = _relative(line)
            if relative:
                last = _noisy_line(right, relative, color(index), line_style(index), None)
                ends.append((last, readable(name), color(index)))
        right.axhline(1, color=INK, linewidth=0.7)
        right.set_title("Per task")
        right.set_xlabel("search step")
        right.set_ylabel("loss / loss at the start")
        if history[-1].step > history[0].step:
            right.set_xlim(history[0].step, history[-1].step)
        label_line_ends(figure, right, ends)
        return to_svg(figure, "losses")


def training_curves(training: Mapping[str, Sequence[TrainingStep]]) -> str | None:
    """One small panel a training run: losses of different tasks have different scales and no common axis."""
    logs = {key: steps for key, steps in training.items() if steps}
    if not logs:
        return None
    rows = -(-len(logs) // _PANELS_A_ROW)
    columns = -(-len(logs) // rows)
    with canvas(1.95 * rows + 0.15, WIDTH if columns > 2 else WIDTH * columns / 3) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (key, steps) in zip(grid.flat, logs.items(), strict=False):
            kind, _, name = key.partition(":")
            _noisy_line(
                axes, [(step.step, step.loss) for step in steps], KIND_COLORS.get(kind, color(0)), "-", None, bins=60
            )
            axes.set_title(shortened(f"{kind.capitalize()}: {readable(name)}", 26))
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
            axes.locator_params(nbins=4)
        for index, axes in enumerate(grid.flat):
            if index >= len(logs):
                axes.set_visible(False)
            elif index + columns >= len(logs):
                axes.set_xlabel("training step")
        for axes in grid[:, 0]:
            axes.set_ylabel("training loss")
        return to_svg(figure, "training")


def _noisy_line(
    axes: Axes, line: Sequence[tuple[int, float]], shade: str, style: str, label: str | None, bins: int = 160
) -> float:
    """Draw the binned mean with the spread of each bin; returns where the line ends."""
    x, means, lows, highs = binned([step for step, _ in line], [value for _, value in line], bins)
    axes.plot(x, means, color=shade, linestyle=style, label=label, marker="o" if len(x) == 1 else None)
    if len(x) < len(line):
        axes.fill_between(x, lows, highs, color=shade, alpha=0.14, linewidth=0)
    return means[-1]


def _relative(line: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Values over their start: the mean of the first fiftieth, because one noisy step must not set the scale."""
    head = line[: max(1, len(line) // 50)]
    start = sum(value for _, value in head) / len(head)
    if not (math.isfinite(start) and start > 0):
        return []
    return [(step, value / start) for step, value in line]
