"""What benchmarks/kernels.py says about its figures: targets reached or not, a Markdown summary, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels_grid import LAYERS, TARGET_LAYER

Figures = Sequence[dict[str, Any]]
LAYER_WAYS = (
    "merged", "merged_on_the_fly", "merged_chunked", "merged_sampled",
    "chunked_cublas", "explicit_merge", "checkpointed", "trainable", "frozen",
)  # fmt: skip
_COLOURS = {
    "merged": "#2f6fb0", "merged_sampled": "#7fb2e0", "chunked_cublas": "#d08a3c", "explicit_merge": "#b8bec6",
    "checkpointed": "#7d858f", "frozen": "#dfe3e7",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A ratio of two medians of the target layer (N = K = 4096, E = 4, bf16) and what it may be at most."""

    what: str
    rows: int
    format: str
    pass_: str
    variant: str
    beside: str
    limit: float


TARGETS = (
    Target("full step / trainable linear, M = 32768", 32768, "dense", "full", "merged", "trainable", 1.05),
    Target("full step / trainable linear, M = 4096", 4096, "dense", "full", "merged", "trainable", 1.20),
    Target("full step, int4 / trainable linear, M = 4096", 4096, "int4", "full", "merged", "trainable", 1.10),
    Target("full step, 1/8 of rows sampled / trainable, M = 32768",
           32768, "dense", "full", "merged_sampled", "trainable", 0.80),
    Target("merged_linear, M = 64 / reading E + 1 weights once",
           64, "dense", "kernel", "merged_linear", "read_weights_once", 1.15),
    Target("coefficient_grad / weight-gradient product, M = 4096",
           4096, "dense", "kernel", "coefficient_grad", "weight_gradient_product", 1.05),
    Target("coefficient_grad / weight-gradient product, M = 32768",
           32768, "dense", "kernel", "coefficient_grad", "weight_gradient_product", 1.05),
)  # fmt: skip


def _medians(figures: Figures, metric: str = "seconds_median") -> dict[tuple[Any, ...], float]:
    """(model, layer, rows, experts, format, pass, variant) -> value."""
    keys = ("model", "layer", "rows", "experts", "format", "pass", "variant")
    return {tuple(row[key] for key in keys): row["value"] for row in figures if row["metric"] == metric}


def target_table(figures: Figures) -> list[str]:
    """Markdown lines; also with the wall-clock (eager) ratio, in which launching counts."""
    medians, eager = _medians(figures), _medians(figures, "eager_seconds")
    model, layer = TARGET_LAYER
    n, k = LAYERS[model][layer]
    dtypes = {row["dtype"] for row in figures if row["model"] == model and row["layer"] == layer}
    lines = [
        f"Targets are for N = {n}, K = {k}, E = 4, bfloat16; measured here: {', '.join(sorted(dtypes)) or 'none'}.",
        "",
        "| target | measured | at most | | with launching, by the wall clock |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        keys = [
            (model, layer, target.rows, 4, target.format, target.pass_, way) for way in (target.variant, target.beside)
        ]
        if not all(key in medians for key in keys):
            lines.append(f"| {target.what} | not measured | {target.limit:.2f} | | |")
            continue
        ratio = medians[keys[0]] / medians[keys[1]]
        wall = f"{eager[keys[0]] / eager[keys[1]]:.3f}" if all(key in eager for key in keys) else ""
        verdict = "reached" if ratio <= target.limit else "**not reached**"
        lines.append(f"| {target.what} | {ratio:.3f} | {target.limit:.2f} | {verdict} | {wall} |")
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def layer_table(figures: Figures) -> list[str]:
    """One line a case: medians of a full step and, in brackets, their ratio to the trainable linear."""
    medians, shares = _medians(figures), _medians(figures, "share_of_roofline")
    peaks = _medians(figures, "peak_bytes")
    cases = list(dict.fromkeys(key[:5] for key in medians if key[5] == "full"))
    measured = {key[6] for key in medians if key[5] == "full"}
    ways = [way for way in LAYER_WAYS if way in measured]
    lines = [
        f"| layer | M | E | format | {' | '.join(ways)} | share of roofline, merged / trainable "
        "| peak MiB, merged / explicit_merge |",
        "|" + "---|" * (len(ways) + 6),
    ]
    for case in cases:
        model, layer, rows, experts, form = case
        base = medians.get((*case, "full", "trainable"))
        cells = []
        for way in ways:
            value = medians.get((*case, "full", way))
            ratio = f" ({value / base:.2f})" if value is not None and base is not None else ""
            cells.append("" if value is None else _duration(value) + ratio)
        share = " / ".join(f"{shares.get((*case, 'full', way), 0):.0%}" for way in ("merged", "trainable"))
        peak = " / ".join(f"{peaks.get((*case, 'full', way), 0) / 2**20:.1f}" for way in ("merged", "explicit_merge"))
        cells += [share, peak]
        lines.append(f"| {model} {layer} | {rows} | {experts} | {form} | {' | '.join(cells)} |")
    return lines


def part_table(figures: Figures) -> list[str]:
    """One line a case and part: median and share of the roofline."""
    medians, shares = _medians(figures), _medians(figures, "share_of_roofline")
    lines = ["| layer | M | E | format | part | median | share of roofline |", "|---|---|---|---|---|---|---|"]
    for key, value in medians.items():
        if key[5] == "kernel":
            model, layer, rows, experts, form, _, part = key
            share = f"{shares[key]:.0%}" if key in shares else ""
            lines.append(f"| {model} {layer} | {rows} | {experts} | {form} | {part} | {_duration(value)} | {share} |")
    return lines


def summary(figures: Figures, settings: dict[str, Any]) -> str:
    """The Markdown of kernels.md."""
    one, skipped, failed = figures[0], settings["skipped"], settings["failed"]
    lines = [
        f"# Kernels and layers on {one['device']}",
        "",
        f"torch {one['torch']}, triton {one['triton'] or 'absent'}, driver {one['driver'] or 'none'}, {one['date']}, "
        f"{one['dtype']}. Ceilings measured in the same run: copying {settings['bytes_a_second'] / 1e9:.1f} GB/s "
        f"(read and written), products {settings['flops_a_second'] / 1e12:.3f} TFLOP/s.",
        "",
        *target_table(figures),
        "",
        "## A full step of a layer: forward, dX and dc (or dW); ratio to the trainable linear in brackets",
        "",
        *layer_table(figures),
        "",
        "## Parts alone",
        "",
        *part_table(figures),
        "",
        f"{len(skipped)} cases were left out for want of time; {len(failed)} ways failed.",
    ]
    lines += [f"* {name}: {why}" for name, why in failed.items()]
    return "\n".join(lines) + "\n"


def plot(figures: Figures, path: Path) -> None:
    """Bars of a full step's ratio to the trainable linear by rows, a panel a format, for the layer measured most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    medians = {key: value for key, value in _medians(figures).items() if key[5] == "full"}
    count: dict[tuple[Any, ...], int] = {}
    for key in medians:
        if (*key[:6], "trainable") in medians:
            group = (key[0], key[1], key[3])
            count[group] = count.get(group, 0) + 1
    if not count:
        return
    model, layer, experts = max(count, key=lambda group: (count[group], group[2]))
    one = next(row for row in figures if (row["model"], row["layer"]) == (model, layer))
    here = {
        (key[4], key[2], key[6]): v for key, v in medians.items() if (key[0], key[1], key[3]) == (model, layer, experts)
    }
    formats = list(dict.fromkeys(form for form, _, _ in here))
    figure, panels = plt.subplots(
        len(formats),
        1,
        figsize=(10, 1 + 2.3 * len(formats)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    rows = sorted({number for _, number, _ in here})
    ways = [way for way in _COLOURS if any(name == way for _, _, name in here)]
    width = 0.84 / len(ways)
    for axes, form in zip(panels[:, 0], formats):
        for place, way in enumerate(ways):
            found = [
                (at, here[form, number, way] / here[form, number, "trainable"])
                for at, number in enumerate(rows)
                if (form, number, way) in here and (form, number, "trainable") in here
            ]
            where = [at + (place - (len(ways) - 1) / 2) * width for at, _ in found]
            heights = [ratio - 1 for _, ratio in found]
            bars = axes.bar(where, heights, width, bottom=1, color=_COLOURS[way], label=way)
            if way == "merged":
                axes.bar_label(bars, [f"{ratio:.2f}" for _, ratio in found], padding=2, fontsize=8)
        axes.axhline(1, color="#222", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
        axes.set_title(form, loc="left", fontsize=10)
        axes.set_ylabel("time / trainable")
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xticks(range(len(rows)), [f"M = {number}" for number in rows])
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS[way]) for way in ways]
    figure.legend(handles, ways, loc="outside lower center", ncols=len(ways), frameon=False, fontsize=9)
    shape = f"N = {one['N']}, K = {one['K']}, E = {experts}, {one['dtype']}"
    figure.suptitle(f"A full step of {model} {layer} ({shape}) on {one['device']}", fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)
