"""The noise of row-sampled coefficient gradients, beside the noise that the choice of the batch makes anyway.

    python benchmarks/sampling.py runs/demo --out runs/benchmarks/sampling

RUN is the folder of a finished `scalemerge run`. Two questions:

    gradients   dc at the start of the search: its standard deviation over probe batches (all rows), and over draws of
                one in s rows of one batch, for s = 2, 4, 8, 16; as norms of [E], relative to the mean gradient's norm
    positions   the learned c of searches over all rows that differ in the order of probe batches only, and of searches
                over one in 8 rows: distance of each from the mean c of the former, and the validation objective

Output: sampling.csv (one row a figure), sampling.json and a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from pathlib import Path
from typing import Any

import torch
from finished_run import gradient_at_start, make_search, next_batches, open_run
from measuring import write_figures
from torch import Tensor

from scalemerge import pipeline

SHARES = (2, 4, 8, 16)


def spread(gradients: list[Tensor]) -> float:
    """Standard deviation of vectors [E]: root of the summed unbiased variances."""
    return float(torch.stack(gradients).double().var(0).sum().sqrt())


def gradient_noise(run: pipeline.Run, repeats: int) -> dict[str, float]:
    search = make_search(run, run.out, precision="fp32")
    streams = [next_batches(search) for _ in range(repeats)]
    exact = [gradient_at_start(search, batches)[1] for batches in streams]
    size = float(torch.stack(exact).double().mean(0).norm())
    found = {"batches": spread(exact) / size}
    for share in SHARES:
        search.model.settings.sample_rows = share
        draws = []
        for draw in range(repeats):
            search.model.settings.reseed(draw)
            draws.append(gradient_at_start(search, streams[0])[1])
        found[f"one row in {share}"] = spread(draws) / size
        bias = torch.stack(draws).double().mean(0) - exact[0].double()
        found[f"one row in {share}, mean of {repeats} draws"] = float(bias.norm()) / size
    return found


def learned_position(run: pipeline.Run, seed: int, share: int) -> tuple[Tensor, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        search = make_search(run, Path(folder), seed=seed, sample_rows=share)
        result = search.run()
    c = torch.tensor(list(result["c"].values()), dtype=torch.float64).flatten()
    return c, result["validation"]["best"], search.cost.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished `scalemerge run`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=8, help="probe batches, and draws of rows")
    parser.add_argument("--searches", type=int, default=3, help="searches of each kind; 0: gradients only")
    arguments = parser.parse_args()
    run = open_run(arguments.run, arguments.out)
    common = {"benchmark": "sampling", "model": run.recipe.base.path, "recipe": run.recipe.name,
              "torch": torch.__version__, "date": datetime.date.today().isoformat()}  # fmt: skip
    figures: list[dict[str, Any]] = []

    def add(variant: str, metric: str, value: float, unit: str) -> None:
        figures.append({**common, "variant": variant, "metric": metric, "value": value, "unit": unit})

    lines = ["| dc varies with | standard deviation / norm of the mean dc |", "|---|---|"]
    for variant, value in gradient_noise(run, arguments.repeats).items():
        add(variant, "gradient_deviation", value, "relative")
        lines.append(f"| {variant} | {value:.3f} |")
    lines += [
        "",
        "| search | c | distance from the mean exact c | validation objective | seconds |",
        "|---|---|---|---|---|",
    ]
    found = {
        (share, seed): learned_position(run, seed, share) for share in (1, 8) for seed in range(arguments.searches)
    }
    centre = torch.stack([c for (share, _), (c, _, _) in found.items() if share == 1]).mean(0) if found else None
    for (share, seed), (c, objective, seconds) in found.items():
        name = f"{'all rows' if share == 1 else f'one row in {share}'}, seed {seed}"
        distance = float((c - centre).norm())
        add(name, "distance_from_mean_exact_c", distance, "coefficients")
        add(name, "validation_objective", objective, "relative loss")
        add(name, "search_seconds", seconds, "s")
        numbers = ", ".join(f"{value:.3f}" for value in c.tolist())
        lines.append(f"| {name} | {numbers} | {distance:.3f} | {objective:.4f} | {seconds:.0f} |")
    write_figures(arguments.out, "sampling", figures, {"run": arguments.run.name, "repeats": arguments.repeats})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
