"""One merged layer: forward, backward and a full step, beside the other ways to get the coefficients' gradient.

    python benchmarks/kernels.py --out runs/benchmarks/kernels                       (a CPU: --set small --minutes 4)
    python benchmarks/kernels.py --out runs/gpu --set targets full --minutes 3       (a GPU)

The ways are described in kernels_ways.py, the cases in kernels_grid.py: the sets named run in their order of importance
until the minutes are over; what was left out is recorded. The steps of whole models are in positioning.py.

Seconds: medians and 20/80 % quantiles, all ways of a case in turn (devices.py). share_of_roofline: the least time that
the FLOPs and bytes of the job take at the ceilings measured in this run, over the median. peak_bytes: beyond weights,
task vectors and inputs, over one full step. dc_error: relative, against float32 products of the same inputs.
Output: kernels.csv (one row a figure), kernels.json (settings), kernels.md, kernels.png; replaced after every case.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from devices import Ceilings, Timed, cache_bytes, ceilings, describe, peak_bytes, time_in_turn
from kernels_grid import SETS, TARGET_LAYER, cases
from kernels_report import plot, summary, target_table
from kernels_ways import Case, Inputs, Way, floor_seconds, layer_ways, part_ways, read_once_seconds
from measuring import hide_this_folder, quantiles, write_figures
from torch import Tensor

from scalemerge.kernels.formats import dense_block
from scalemerge.kernels.workspace import release_workspace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Bench:
    """Measures cases and collects their figures."""

    def __init__(self, device: torch.device, dtype: torch.dtype, limits: Ceilings, *, quick: bool) -> None:
        self.device, self.dtype, self.limits, self.quick = device, dtype, limits, quick
        self.where = describe(device)
        self.figures: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}

    def measure(self, case: Case) -> None:
        seconds = 0.02 if self.quick else 0.4
        if not self.quick and (case.model, case.layer) == TARGET_LAYER and self.device.type == "cuda":
            seconds = 1.5
        first = Inputs(case, self.dtype, self.device, 0)
        enough = -(-3 * cache_bytes(self.device) // first.nbytes)
        count = min(24, max(2, enough)) if self.device.type == "cuda" else 1
        sets = [first, *(Inputs(case, self.dtype, self.device, seed) for seed in range(1, count))]
        ways = [layer_ways(inputs) for inputs in sets]
        self._peaks_and_errors(first, ways[0])
        for pass_ in ("forward", "backward", "full"):
            calls = {name: _pass_of([own[name] for own in ways], sets, pass_) for name in ways[0]}
            self._add_times(first, pass_, time_in_turn(calls, count, self.device, seconds))
        parts = [part_ways(inputs) for inputs in sets]
        rotated = {name: lambda number, name=name: parts[number][name]() for name in parts[0]}
        if rotated:
            self._add_times(first, "kernel", time_in_turn(rotated, count, self.device, seconds))
            self.add(case, "kernel", "read_weights_once", "seconds_median", read_once_seconds(sets, self.limits), "s")

    def add(self, case: Case, pass_: str, variant: str, metric: str, value: float, unit: str) -> None:
        self.figures.append({
            "benchmark": "kernels", "model": case.model, "layer": case.layer, "N": case.n, "K": case.k,
            "format": case.format, "pass": pass_, "experts": case.experts, "rows": case.rows, "length": "",
            "dtype": str(self.dtype).removeprefix("torch."), **self.where,
            "variant": variant, "metric": metric, "value": value, "unit": unit,
        })  # fmt: skip

    def _add_times(self, inputs: Inputs, pass_: str, timed: Timed) -> None:
        case = inputs.case
        for variant, seconds in timed.seconds.items():
            low, median, high = quantiles(seconds)
            for metric, value in (("seconds_q20", low), ("seconds_median", median), ("seconds_q80", high)):
                self.add(case, pass_, variant, metric, value, "s")
            if variant in timed.eager:
                self.add(case, pass_, variant, "eager_seconds", timed.eager[variant], "s")
            floor = floor_seconds(variant, pass_, inputs, self.limits)
            self.add(case, pass_, variant, "share_of_roofline", floor / median, "fraction")
        for variant, why in timed.failed.items():
            self.failed[f"{case}, {pass_} of {variant}"] = why

    def _peaks_and_errors(self, inputs: Inputs, ways: dict[str, Way]) -> None:
        expected = _coefficient_gradient(inputs)
        for variant, way in ways.items():

            def step(way: Way = way) -> tuple[Tensor, ...]:
                return torch.autograd.grad(way.forward(), way.wanted, inputs.dy)

            try:
                step()  # compiles
                release_workspace()
                self.add(inputs.case, "full", variant, "peak_bytes", peak_bytes(step, self.device), "B")
                if inputs.c is way.wanted[-1]:
                    error = (step()[-1].double() - expected).norm() / expected.norm()
                    self.add(inputs.case, "full", variant, "dc_error", float(error), "relative")
            except Exception as error:  # the timing meets it again and says which errors are fatal
                self.failed[f"{inputs.case}, memory of {variant}"] = f"{type(error).__name__}: {str(error)[:200]}"


def _pass_of(ways: list[Way], sets: list[Inputs], pass_: str) -> Callable[[int], Any]:
    """The call for devices.time_in_turn. Backward repeats over graphs that are made on first use and kept."""
    kept: dict[int, Tensor] = {}

    def forward(number: int) -> Tensor:
        with torch.no_grad():
            return ways[number].forward()

    def backward(number: int) -> tuple[Tensor, ...]:
        if number not in kept:
            kept[number] = ways[number].forward()
        return torch.autograd.grad(kept[number], ways[number].wanted, sets[number].dy, retain_graph=True)

    def full(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ways[number].forward(), ways[number].wanted, sets[number].dy)

    return {"forward": forward, "backward": backward, "full": full}[pass_]


def _coefficient_gradient(inputs: Inputs) -> Tensor:
    """dc by its formula: float32 products, float64 sums."""
    weight_gradient = inputs.dy.float().T @ inputs.x.detach().float()
    return torch.stack([(weight_gradient * dense_block(v)).sum(dtype=torch.float64) for v in inputs.vectors])


def main() -> None:
    hide_this_folder()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for CSV, JSON, Markdown and PNG")
    parser.add_argument("--set", nargs="+", choices=SETS, help="default: small on a CPU, targets and full on a GPU")
    parser.add_argument("--quick", action="store_true", help="the set quick, hardly timed: does it run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--minutes", type=float, default=4.0, help="no new case is begun after these")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    names = (
        ["quick"] if arguments.quick else arguments.set or (["targets", "full"] if device.type == "cuda" else ["small"])
    )
    limits = ceilings(device, dtype, quick=arguments.quick)
    bench = Bench(device, dtype, limits, quick=arguments.quick)
    todo = cases(names)
    settings: dict[str, Any] = {
        "sets": names, "minutes": arguments.minutes, "bytes_a_second": limits.bytes_a_second,
        "flops_a_second": limits.flops_a_second, "skipped": [], "failed": bench.failed,
    }  # fmt: skip
    for number, case in enumerate(todo):
        settings["skipped"] = [str(other) for other in todo[number:]]
        if time.monotonic() > deadline:
            break
        print(f"{number + 1}/{len(todo)} {case}", flush=True)
        bench.measure(case)
        gc.collect()
        settings["skipped"] = [str(other) for other in todo[number + 1 :]]
        write_figures(arguments.out, "kernels", bench.figures, settings, with_figures=False)
        (arguments.out / "kernels.md").write_text(summary(bench.figures, settings), encoding="utf-8")
    plot(bench.figures, arguments.out / "kernels.png")
    print("\n".join(target_table(bench.figures)))
    print(f"{len(settings['skipped'])} cases left out, {len(bench.failed)} ways failed; see {arguments.out}/kernels.md")


if __name__ == "__main__":
    main()
