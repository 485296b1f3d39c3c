"""One self-contained page: DIR/report.html, made to be mailed, archived and opened years later.

Nothing is fetched: CSS and SVG are inline, there is no script and no font file, and a content security policy forbids
the browser to load anything even if a file of the run tried to make it. Everything that comes from files is escaped by
jinja2 (autoescape); only the SVGs, in which matplotlib has escaped the text, go in as they are. There is no date
and no random id in it, so the same run gives the same bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalemerge.checkpoints.atomic import write_text
from scalemerge.report import curves, plots, quantities
from scalemerge.report.drawing import GRID, INK
from scalemerge.report.extras import require
from scalemerge.report.reading import Position, RunData, read_run
from scalemerge.report.results import KINDS, Results, readable
from scalemerge.report.tables import GROUP_TITLES, Column, best_values, is_best, task_columns, type_column
from scalemerge.report.verdict import Verdict, verdict

TEMPLATE = "template.html.j2"
GLOSSARY = {
    "Expert": "a model trained from the base model on one task only.",
    "Task vector": "an expert's weights minus the base model's weights, T = W − W₀.",
    "Merging coefficients": "the weights c of the sum W₀ + Σ cᵢTᵢ that makes the merged model.",
    "Self Positioning": "finds the coefficients by gradient descent on a small probe set (Li et al. 2024, "
    "arXiv 2410.15035).",
    "Static merge": "a merge whose coefficients follow a rule, without training (average, task arithmetic, TIES).",
    "Joint baseline": "one model trained on all tasks at once, with a given data mixture.",
    "Probe set": "the few examples that the search sees: balanced across tasks, not in training or test data.",
    "Gram matrix": "the inner products of the task vectors; their angles and norms follow from it.",
    "λ (lambda)": "how far from the base model the merged model lies; the a's give the direction.",
    "Mean": "the unweighted mean over task types of the mean over the tasks of a type, in points (0 to 100).",
    "Cost": "the cost of a merge includes the experts that it needed; × joint is relative to the best joint baseline.",
}


def write_report(folder: Path | str) -> Path:
    """Write DIR/report.html atomically and return its path.

    Raises InputError where results.json is missing, a file is damaged, or the extra `report` is not installed.
    """
    folder = Path(folder)
    page = render_report(read_run(folder))
    target = folder / "report.html"
    write_text(target, page)
    return target


def render_report(run: RunData) -> str:
    """The page as a string; a pure function of what was read."""
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        points=quantities.points,
        signed=quantities.signed,
        coefficient=quantities.coefficient,
        seconds=quantities.seconds,
        duration=quantities.duration,
        ratio=quantities.ratio,
        count=quantities.count,
        memory=quantities.memory,
        readable=readable,
    )
    outcome = verdict(run.results)
    costs = [model for model in run.results.models if model.kind != "base" and model.cost.seconds is not None]
    devices = {model.cost.device for model in costs}
    context = {
        "run": run,
        "results": run.results,
        "verdict": outcome,
        "bars": _bars(outcome),
        "table": _score_table(run.results, outcome),
        "costs": costs,
        "one_device": len(devices) < 2,
        "device": next(iter(devices)) if len(devices) == 1 else "",
        "coefficients": _coefficients(run.position),
        "position_facts": _facts(run.position.facts, leave_out=("a",)) if run.position else {},
        "figures": {name: _inline(svg) for name, svg in _figures(run).items() if svg},
        "environment": _facts(run.results.environment),
        "commands": _commands(run),
        "glossary": GLOSSARY,
    }
    return str(environment.get_template(TEMPLATE).render(context))


def _figures(run: RunData) -> dict[str, str | None]:
    position = run.position
    return {
        "scores": plots.scores_by_type(run.results),
        "cost": plots.cost_against_quality(run.results) or plots.cost_against_quality(run.results, "flops"),
        "paths": curves.coefficient_paths(run.history, position),
        "groups": curves.coefficients_by_group(position) if position else None,
        "losses": curves.loss_curves(run.history),
        "gram": plots.gram_cosines(position) if position else None,
        "training": curves.training_curves(run.training),
    }


def _inline(svg: str) -> object:
    """The SVG with its two theme colours as CSS variables, marked as safe: matplotlib escaped the text in it."""
    themed = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    return require("markupsafe").Markup(themed)


def _bars(outcome: Verdict) -> list[dict[str, Any]]:
    """The candidate and its rivals as bars of their gain over the base (or over the lowest of them)."""
    if outcome.candidate is None or outcome.candidate.mean is None:
        return []
    rows: list[dict[str, Any]] = [{"model": outcome.candidate, "role": "candidate", "comparison": None}]
    rows += [{"model": one.rival, "role": one.against, "comparison": one} for one in outcome.comparisons]
    means = [row["model"].mean for row in rows]
    floor = min(means) - 0.12 * max(1.0, max(means) - min(means))
    for row, mean in zip(rows, means, strict=True):
        row["width"] = f"{100 * (mean - floor) / (max(means) - floor):.1f}"
    return rows


def _score_table(results: Results, outcome: Verdict) -> dict[str, Any]:
    """Header and rows of the score table; cells carry their shade, which is their distance from the base model."""
    columns: list[Column] = [("Mean", results.mean)]
    types = []
    for name in results.types:
        tasks = task_columns(results, name)
        columns += tasks or [type_column(results, name)]
        types.append({"name": name, "tasks": max(1, len(tasks))})
    metrics = {task.name: task.metric for task in results.tasks}
    heads = [{"name": name, "metric": metrics.get(name, "")} for name, _ in columns[1:]]
    # Peaks go by position: a task may be called like its type, or "Mean".
    numbered: list[Column] = [(str(index), get) for index, (_, get) in enumerate(columns)]
    peaks = best_values(results.models, numbered)
    base = results.base
    differences: dict[tuple[str, str], float] = {}
    for model in results.models if base else ():
        for name, get in numbered:
            value, reference = get(model), get(base) if base else None
            if value is not None and reference is not None:
                differences[model.key, name] = value - reference
    widest = max((abs(value) for value in differences.values()), default=0.0)
    reference_seconds = outcome.joint.rival.cost.seconds if outcome.joint else None
    groups = []
    for kind in KINDS:
        rows = []
        for model in results.of_kind(kind):
            cells = []
            for name, get in numbered:
                value, difference = get(model), differences.get((model.key, name))
                cells.append(
                    {
                        "value": value,
                        "difference": difference,
                        "best": is_best(value, peaks[name]),
                        "shade": _shade(difference, widest),
                    }
                )
            spent = model.cost.seconds
            relative = spent / reference_seconds if spent is not None and reference_seconds else None
            rows.append({"model": model, "cells": cells, "relative": relative, "complete": results.complete(model)})
        if rows:
            groups.append({"title": GROUP_TITLES[kind], "rows": rows})
    return {
        "types": types,
        "heads": heads,
        "groups": groups,
        "columns": len(columns) + (3 if outcome.joint else 2),
        "has_base": base is not None,
    }


def _shade(difference: float | None, widest: float) -> str:
    """Blue above the base, orange below, by a square root: half a point must be visible beside ten."""
    if difference is None or widest <= 0 or abs(difference) < quantities.TIE_POINTS:
        return ""
    strength = 0.05 + 0.4 * (abs(difference) / widest) ** 0.5
    return f"background:rgba({'0,114,178' if difference > 0 else '213,94,0'},{strength:.2f})"


def _coefficients(position: Position | None) -> list[dict[str, Any]]:
    """A row per expert: mean coefficient, its range over groups, norm of the task vector."""
    if position is None:
        return []
    gram = plots.whole_gram(position)
    rows = []
    for index, name in enumerate(position.experts):
        values = [group[index] for group in position.c.values()]
        a = position.facts.get("a")
        share = a[index] if isinstance(a, list) and len(a) == len(position.experts) else None
        rows.append(
            {
                "name": name,
                "c": sum(values) / len(values) if values else None,
                "range": (min(values), max(values)) if len(values) > 1 else None,
                "a": float(share) if isinstance(share, int | float) else None,
                "norm": gram[index][index] ** 0.5 if gram and gram[index][index] >= 0 else None,
            }
        )
    return rows


def _facts(raw: Mapping[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Any JSON as label and one line of text; long values are cut."""
    facts = {}
    for name, value in raw.items():
        if name in leave_out or value is None:
            continue
        if isinstance(value, float):
            shown = f"{value:.6g}"
        elif isinstance(value, str | int):
            shown = str(value)
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            shown = " → ".join(value) if name == "order" else ", ".join(value)
        else:
            shown = json.dumps(value, ensure_ascii=False)
        facts[readable(name)] = shown if len(shown) <= 400 else f"{shown[:399]}…"
    return facts


def _commands(run: RunData) -> list[str]:
    commit = run.results.environment.get("commit")
    lines = [f"git checkout {shlex.quote(str(commit))}"] if commit else []
    name = shlex.quote(run.name or "RUN")
    lines.append(f"scalemerge run {name}/recipe.yaml --out {shlex.quote(f'{run.name}-again')}")
    lines.append(f"scalemerge report {name}")
    return lines
