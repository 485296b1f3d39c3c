"""Read a run folder: results.json must be there; everything else may be missing, and what is missing is listed.

A report is most wanted when a run is half done or went wrong, so absence is a note and not an error. Damage is an error
(InputError with file and field), with one exception: the last line of a .jsonl log may be cut short by a killed
process, which is noted. A resumed run writes steps again; the later line counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalemerge.errors import InputError
from scalemerge.report.results import Results, mapping, number, parse_results, readable, text

WHOLE_MODEL = "whole model"
_RECIPE_LIMIT = 100_000


@dataclass(frozen=True)
class Position:
    """position/coefficients.json. Groups are `global`, layers or modules; every list follows the order of `experts`."""

    method: str
    granularity: str
    experts: tuple[str, ...]
    c: Mapping[str, tuple[float, ...]]
    gram: Mapping[str, tuple[tuple[float, ...], ...]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The remaining fields (a, lambda, order, order_effect, seed, steps, validation_loss ...), shown as they are."""


@dataclass(frozen=True)
class SearchStep:
    """One line of position/history.jsonl. `scale` is lambda, averaged over groups where each has its own."""

    step: int
    loss: float | None
    losses: Mapping[str, float]
    validation_loss: float | None
    scale: float | None
    c: Mapping[str, tuple[float, ...]]
    seconds: float | None


@dataclass(frozen=True)
class TrainingStep:
    """One line of a training.jsonl."""

    step: int
    loss: float
    learning_rate: float | None
    seconds: float | None


@dataclass(frozen=True)
class RunData:
    """All that a run folder tells. `training` goes from model key (`expert:sts`, `joint:proportional`) to its log."""

    name: str
    results: Results
    position: Position | None = None
    history: tuple[SearchStep, ...] = ()
    training: Mapping[str, tuple[TrainingStep, ...]] = field(default_factory=dict)
    recipe: str = ""
    missing: tuple[str, ...] = ()


def read_run(folder: Path | str) -> RunData:
    """Read DIR. Raises InputError where results.json is absent or a file is damaged."""
    folder = Path(folder)
    if not (folder / "results.json").is_file():
        raise InputError(f"{folder}: no results.json here; write it with `scalemerge eval` or `scalemerge run`")
    results = parse_results(_read_json(folder / "results.json"), str(folder / "results.json"))
    missing: list[str] = []
    position = _read_position(folder / "position" / "coefficients.json", missing)
    history = _read_history(folder / "position" / "history.jsonl", missing)
    training = _read_training(folder, results, missing)
    recipe = folder / "recipe.yaml"
    recipe_text = ""
    if recipe.is_file():
        recipe_text = recipe.read_text(encoding="utf-8", errors="replace")[:_RECIPE_LIMIT]
    else:
        missing.append("recipe.yaml: not here, so this page cannot show the settings of the run")
    missing = _unscored(results) + missing
    return RunData(folder.resolve().name, results, position, history, training, recipe_text, tuple(missing))


def _unscored(results: Results) -> list[str]:
    notes = []
    if not results.models:
        notes.append("results.json: no model has been scored yet")
    absent = {"base": "the base model", "expert": "any expert", "joint": "a joint baseline", "merge": "a merged model"}
    notes += [f"results.json: no scores of {what}" for kind, what in absent.items() if not results.of_kind(kind)]
    if results.of_kind("merge") and not any(model.learned for model in results.models):
        notes.append("results.json: no learned merge (merge:self_positioning)")
    for model in results.models:
        if not results.complete(model):
            done = sum(task.name in model.scores for task in results.tasks)
            notes.append(
                f"{readable(model.key)}: scored on {done} of {len(results.tasks)} tasks; "
                "its mean is not comparable and stays out of the verdict"
            )
        elif model.cost.seconds is None and model.kind != "base":
            notes.append(f"{readable(model.key)}: no cost recorded")
    return notes


def _read_position(path: Path, missing: list[str]) -> Position | None:
    if not path.is_file():
        missing.append("position/coefficients.json: no learned coefficients (scalemerge position)")
        return None
    raw = dict(mapping(_read_json(path), str(path)))
    names = raw.pop("experts", None)
    if not isinstance(names, list) or not names:
        raise InputError(f"{path}: field 'experts' must be a list of names; run `scalemerge position` again")
    experts = tuple(text(name) for name in names)
    c = _vectors(raw.pop("c", None), len(experts), f"{path}: c")
    gram = _grams(raw.pop("gram", None), len(experts), f"{path}: gram")
    if not gram:
        missing.append("position/coefficients.json: no Gram matrix, so no angles between task vectors")
    method, granularity = text(raw.pop("method", None)), text(raw.pop("granularity", None))
    return Position(method, granularity, experts, c, gram, raw)


def _read_history(path: Path, missing: list[str]) -> tuple[SearchStep, ...]:
    if not path.is_file():
        missing.append("position/history.jsonl: no coefficient paths or probe losses (scalemerge position)")
        return ()
    steps: dict[int, SearchStep] = {}
    for where, line in _read_lines(path, missing):
        step = _step(line, where)
        losses = {name: number(x, f"{where}: losses") for name, x in mapping(line.get("losses") or {}, where).items()}
        scale = line.get("lambda")
        scales = list(scale.values()) if isinstance(scale, Mapping) else [scale]
        known = [x for x in (number(one, f"{where}: lambda") for one in scales) if x is not None]
        steps[step] = SearchStep(
            step,
            number(line.get("loss"), f"{where}: loss"),
            {name: x for name, x in losses.items() if x is not None},
            number(line.get("validation_loss"), f"{where}: validation_loss"),
            sum(known) / len(known) if known else None,
            _vectors(line.get("c"), None, f"{where}: c"),
            number(line.get("seconds"), f"{where}: seconds"),
        )
    return tuple(steps[step] for step in sorted(steps))


def _read_training(folder: Path, results: Results, missing: list[str]) -> dict[str, tuple[TrainingStep, ...]]:
    logs: dict[str, tuple[TrainingStep, ...]] = {}
    for kind, parent in (("expert", "experts"), ("joint", "joint")):
        # Folders are listed, never built from names in results.json: a name must not lead outside the run.
        trained = sorted(path for path in (folder / parent).glob("*") if path.is_dir())
        for path in trained:
            log = path / "training.jsonl"
            if log.is_file():
                logs[f"{kind}:{path.name}"] = _training_steps(log, missing)
        names = [path.name for path in trained] + [model.name for model in results.of_kind(kind)]
        missing += [
            f"{parent}/{readable(name)}/training.jsonl: no training curve"
            for name in dict.fromkeys(names)
            if f"{kind}:{name}" not in logs
        ]
    return logs


def _training_steps(path: Path, missing: list[str]) -> tuple[TrainingStep, ...]:
    steps: dict[int, TrainingStep] = {}
    for where, line in _read_lines(path, missing):
        loss = number(line.get("loss"), f"{where}: loss")
        if loss is None:  # an evaluation or event line
            continue
        step = _step(line, where)
        rate = number(line.get("learning_rate"), f"{where}: learning_rate")
        steps[step] = TrainingStep(step, loss, rate, number(line.get("seconds"), f"{where}: seconds"))
    return tuple(steps[step] for step in sorted(steps))


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); delete it and run that stage again") from None


def _read_lines(path: Path, missing: list[str]) -> list[tuple[str, Mapping[str, Any]]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    filled = [(index, line) for index, line in enumerate(lines, start=1) if line.strip()]
    records = []
    for index, line in filled:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if index == filled[-1][0] and lines[-1].strip():
                missing.append(f"{path.parent.name}/{path.name}: the last line is cut short and was left out")
                continue
            raise InputError(f"{path}: line {index} is not valid JSON ({error}); remove that line") from None
        records.append((f"{path}: line {index}", mapping(record, f"{path}: line {index}")))
    return records


def _step(line: Mapping[str, Any], where: str) -> int:
    step = number(line.get("step"), f"{where}: step")
    if step is None:
        raise InputError(f"{where}: field 'step' is missing; remove that line")
    return int(step)


def _vectors(raw: object, length: int | None, where: str) -> dict[str, tuple[float, ...]]:
    groups = raw if isinstance(raw, Mapping) else {} if raw is None else {WHOLE_MODEL: raw}
    return {text(name): _vector(values, length, f"{where}.{name}") for name, values in groups.items()}


def _vector(raw: object, length: int | None, where: str) -> tuple[float, ...]:
    if not isinstance(raw, list) or (length is not None and len(raw) != length):
        wanted = "a list" if length is None else f"a list of {length} numbers, one an expert"
        raise InputError(f"{where}: expected {wanted}; run `scalemerge position` again")
    return tuple(float("nan") if (x := number(value, where)) is None else x for value in raw)


def _grams(raw: object, size: int, where: str) -> dict[str, tuple[tuple[float, ...], ...]]:
    groups = raw if isinstance(raw, Mapping) else {} if raw is None else {WHOLE_MODEL: raw}
    grams = {}
    for name, rows in groups.items():
        if not isinstance(rows, list) or len(rows) != size:
            raise InputError(f"{where}.{name}: expected {size} rows, one an expert; run `scalemerge position` again")
        grams[text(name)] = tuple(_vector(row, size, f"{where}.{name}") for row in rows)
    return grams
