"""A plan as tables in the terminal, or as lines of text where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from scalemerge.planning.plan import Line, Plan

PARTS = ("weights", "others", "gathered", "activ.", "GB a rank", "GB sent", "compute s", "wire s")


def print_plan(plan: Plan) -> None:
    """Of the sharded ways, in each format, the fewest ranks that fit and all of them."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    shape, hardware, assumed = plan.shape, plan.hardware, plan.assumptions
    console.print(
        f"{shape.kind}: {shape.numbers / 1e9:.2f}B numbers, {shape.linear_numbers / 1e9:.2f}B of them in linear layers"
        f"; {plan.experts} experts; {plan.devices} x {hardware.name} of {hardware.memory / 1e9:.0f} GB"
    )
    console.print(f"Assumed: {assumed.tokens} tokens a text. Times are floors at the data sheet's peaks, not measured.")
    for stage in ("training", "positioning"):
        table = _table(f"{stage}, one step", ("way", *PARTS, "fits"))
        for line in _shown(plan, stage):
            memory = line.memory
            parts = (memory.weights, memory.others, memory.gathered, memory.activations, memory.total, line.sent)
            numbers = [f"{part / 1e9:.2f}" for part in parts]
            table.add_row(line.way, *numbers, f"{line.compute:.3f}", f"{line.wire:.3f}", "yes" if line.fits else "no")
        console.print(table)
        chosen = plan.chosen[stage]
        if chosen is None:
            console.print(f"{stage}: nothing fits; it takes more devices, smaller chunk_tokens or a smaller format")
        else:
            console.print(f"{stage}: the shortest step that fits: {chosen.way}, {chosen.seconds:.3f} s at least")
    if plan.devices > 1:
        naive = f"{plan.naive_bytes / 1e9:.1f} GB a step"
        console.print(f"A search with E + 1 weights under plain ZeRO-3 would send {naive}.")
    table = _table("the whole study", ("part", "GPU hours at least"))
    for part, hours in plan.hours.items():
        table.add_row(part, f"{hours:,.2f}")
    console.print(table)
    console.print(f"Examples: {sum(plan.examples.values()):,} in all; every run of a sweep trains on all of them.")


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _shown(plan: Plan, stage: str) -> Iterator[Line]:
    fits: set[str] = set()
    for line in plan.lines:
        if line.stage != stage:
            continue
        form = line.way.rsplit(" ", 1)[-1]
        if line.way.startswith("sharded") and form in fits and f"over {plan.devices}," not in line.way:
            continue
        if line.way.startswith("sharded") and not line.fits and f"over {plan.devices}," not in line.way:
            continue
        if line.way.startswith("sharded") and line.fits:
            fits.add(form)
        yield line
