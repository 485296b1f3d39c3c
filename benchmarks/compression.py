"""What compressed task vectors cost in quality: learn and merge with float32, bfloat16, int8 and int4 task vectors.

    python benchmarks/compression.py runs/demo --out runs/benchmarks/compression

RUN is the folder of a finished `scalemerge run`: its recipe, experts, probe rows and suite are used again. For every
format: bytes of the task vectors; relative error of embeddings and of the coefficients' gradient at the start of the
search, on the first probe batch of every task (float32 activations); then a whole search in that format, the merged
model written twice (from the compressed task vectors, and at the same coefficients from the exact ones), both scored.
Output: compression.csv (one row a figure), compression.json and a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from finished_run import gradient_at_start, make_search, next_batches, open_run
from measuring import write_figures
from torch import Tensor

from scalemerge import pipeline
from scalemerge.layers import MergedLayer
from scalemerge.merging import combine_learned, read_coefficients, write_merged
from scalemerge.task_vectors.formats import FORMATS


def probe_errors(run: pipeline.Run, form: str) -> dict[str, Any]:
    """Embeddings [rows, D] and dc [E] at the start of a search, and the bytes of the task vectors."""
    search = make_search(run, run.out, precision="fp32", task_vectors=form)
    embeddings, dc = gradient_at_start(search, next_batches(search))
    layers = [module for module in search.model.encoder.modules() if isinstance(module, MergedLayer)]
    held = sum(packed.nbytes for layer in layers for packed in layer.task_vectors.values())
    return {"embeddings": embeddings, "dc": dc, "bytes": held}


def scored(run: pipeline.Run, form: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the models merged from compressed and from exact task vectors, after a search in `form`."""
    recipe = run.recipe.model_copy(
        update={"positioning": run.recipe.positioning.model_copy(update={"task_vectors": form})}
    )
    own = replace(run, recipe=recipe, out=out / form)
    pipeline.position(own)
    learned = read_coefficients(own.position_folder / "coefficients.json")
    results = []
    for kind, held in (("compressed", form), ("exact", "float32")):
        folder = own.out / "merged" / kind
        if not folder.is_dir():
            description = {"title": f"{form}, {kind}", "base": recipe.base.path, "method": pipeline.LEARNED}
            store = pipeline.open_store(own, held)
            write_merged(store, folder, combine_learned(learned), description=description, key=f"{form}-{kind}")
        assert run.suite is not None
        name = f"compression-{form}-{kind}"
        results.append(pipeline.score(folder, run.suite, name, name, own.out, recipe.evaluation.batch_size))
    return results[0], results[1]


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished `scalemerge run`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    arguments = parser.parse_args()
    run = open_run(arguments.run, arguments.out)
    recipe, experts = run.recipe, run.experts
    formats = ["float32", *[form for form in arguments.formats if form != "float32"]]
    common = {"benchmark": "compression", "model": recipe.base.path, "recipe": recipe.name, "experts": len(experts),
              "torch": torch.__version__, "date": datetime.date.today().isoformat()}  # fmt: skip
    figures: list[dict[str, Any]] = []
    lines = [
        "| task vectors | bytes | output error | dc error | mean | from exact ones | greatest task change |",
        "|---|---|---|---|---|---|---|",
    ]
    exact: dict[str, Any] = {}
    baseline: dict[str, Any] = {}
    for form in formats:
        probe = probe_errors(run, form)
        compressed, dense = scored(run, form, arguments.out)
        exact, baseline = exact or probe, baseline or compressed
        change = max(abs(compressed["scores"][task] - baseline["scores"][task]) for task in baseline["scores"])
        row = {
            "task_vector_bytes": (probe["bytes"], "B"),
            "output_error": (relative(probe["embeddings"], exact["embeddings"]), "relative"),
            "dc_error": (relative(probe["dc"], exact["dc"]), "relative"),
            "mean": (compressed["mean"], "points"),
            "mean_merged_from_exact": (dense["mean"], "points"),
            "greatest_task_change": (change, "points"),
        }
        figures += [
            {**common, "variant": form, "metric": metric, "value": value, "unit": unit}
            for metric, (value, unit) in row.items()
        ]
        values = [value for value, _ in row.values()]
        lines.append(
            f"| {form} | {values[0] / 2**20:.1f} MiB | {values[1]:.1e} | {values[2]:.1e} | {values[3]:.2f} "
            f"| {values[4]:.2f} | {values[5]:.2f} |"
        )
    write_figures(arguments.out, "compression", figures, {"run": arguments.run.name})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
