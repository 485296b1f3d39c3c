"""results.json as typed values: the suite, a score per model and task, and what each model cost.

Strict about types (a string where a score belongs is an error that names the field), tolerant about absence (an
unfinished run has fewer models, tasks or costs). Fields that this version does not know are ignored, because the schema
may be extended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from scalemerge.errors import InputError

SCHEMA = 1
KINDS = ("base", "expert", "joint", "merge", "other")
LEARNED = "self_positioning"
_NAMES = {"self_positioning": "Self Positioning", "ties": "TIES", "dare": "DARE", "dare_ties": "DARE-TIES"}


@dataclass(frozen=True)
class SuiteTask:
    """One evaluation task; `type` is the group that its score is averaged in."""

    name: str
    type: str
    metric: str


@dataclass(frozen=True)
class ModelCost:
    """What a model took. `includes` names the models whose cost is already inside these numbers."""

    seconds: float | None = None
    examples: float | None = None
    tokens: float | None = None
    flops: float | None = None
    peak_bytes: float | None = None
    device: str = ""
    includes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelResult:
    """Scores in points (0 to 100); a task that was not scored is absent from `scores`."""

    key: str
    kind: str
    name: str
    path: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    by_type: Mapping[str, float] = field(default_factory=dict)
    mean: float | None = None
    cost: ModelCost = ModelCost()

    @property
    def learned(self) -> bool:
        """Whether the coefficients of this merge were found by gradient descent."""
        return self.kind == "merge" and self.name.startswith(LEARNED)

    @property
    def label(self) -> str:
        """The name within its group: `proportional`, `Task arithmetic`, `Self Positioning`."""
        if self.kind == "base":
            return "Base model"
        if self.kind == "merge":
            if self.name in _NAMES:
                return _NAMES[self.name]
            if self.learned:
                variant = readable(self.name.removeprefix(LEARNED).strip("_-:. "))
                return f"{_NAMES[LEARNED]} ({variant})"
            return readable(self.name).capitalize()
        return readable(self.name)

    @property
    def full_label(self) -> str:
        """The name where no group header stands above it: `Joint: proportional`."""
        if self.kind in ("expert", "joint"):
            return f"{self.kind.capitalize()}: {self.label}"
        return self.label


@dataclass(frozen=True)
class Results:
    """results.json. `models` is in display order: base, experts, joint, static merges, learned merges, others."""

    suite: str
    tasks: tuple[SuiteTask, ...]
    models: tuple[ModelResult, ...]
    environment: Mapping[str, Any]

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The task types in suite order, then any that only a model's `by_type` names."""
        named = [task.type for task in self.tasks] + [name for model in self.models for name in model.by_type]
        return tuple(dict.fromkeys(named))

    @property
    def base(self) -> ModelResult | None:
        """The model that all experts started from."""
        return next(iter(self.of_kind("base")), None)

    def of_kind(self, kind: str) -> tuple[ModelResult, ...]:
        """The models of one group, in display order."""
        return tuple(model for model in self.models if model.kind == kind)

    def find(self, key: str) -> ModelResult | None:
        """The model with this key, if the run has it."""
        return next((model for model in self.models if model.key == key), None)

    def complete(self, model: ModelResult) -> bool:
        """Whether `model` was scored on every task."""
        return model.mean is not None and all(task.name in model.scores for task in self.tasks)

    def mean(self, model: ModelResult) -> float | None:
        """The mean of a completely scored model; means over different tasks must not stand in one column."""
        return model.mean if self.complete(model) else None

    def type_mean(self, model: ModelResult, name: str) -> float | None:
        """The mean over the tasks of type `name`, if all of them were scored."""
        scored = all(task.name in model.scores for task in self.tasks if task.type == name)
        return model.by_type.get(name) if scored else None


def readable(name: str) -> str:
    """A key as words, one line, with control characters (terminal escapes among them) made visible."""
    return "".join(letter if letter.isprintable() else "�" for letter in name.replace("_", " "))


def parse_results(raw: object, where: str = "results.json") -> Results:
    """Check and type the content of results.json; `where` names the file in errors."""
    top = mapping(raw, where)
    if top.get("schema") != SCHEMA:
        raise InputError(
            f"{where}: field 'schema' is {top.get('schema')!r}, this version reads {SCHEMA}; evaluate again"
        )
    suite = mapping(top.get("suite") or {}, f"{where}: suite")
    models_raw = mapping(top.get("models") or {}, f"{where}: models")
    tasks = _tasks(suite.get("tasks") or [], f"{where}: suite.tasks")
    if not tasks:
        scored = [name for model in models_raw.values() for name in mapping(model, where).get("scores") or {}]
        tasks = tuple(SuiteTask(name, "all tasks", "") for name in dict.fromkeys(scored))
    models = [_model(key, value, tasks, f"{where}: models.{key}") for key, value in models_raw.items()]
    models.sort(key=lambda model: (KINDS.index(model.kind), model.learned))
    environment = mapping(top.get("environment") or {}, f"{where}: environment")
    return Results(text(suite.get("name")), tasks, tuple(models), environment)


def mapping(value: object, where: str) -> Mapping[str, Any]:
    """`value` as a JSON object, or an InputError that names the place."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object, found {type(value).__name__}; run that stage again")
    return value


def number(value: object, where: str) -> float | None:
    """`value` as a finite number; null, NaN and infinity mean "not known"."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: expected a number, found {value!r}; correct the field or run that stage again")
    return float(value) if math.isfinite(value) else None


def text(value: object) -> str:
    """`value` as one line of text, empty when absent."""
    return "" if value is None else " ".join(str(value).split())


def _tasks(raw: object, where: str) -> tuple[SuiteTask, ...]:
    if not isinstance(raw, list):
        raise InputError(f"{where}: expected a list, found {type(raw).__name__}")
    tasks = []
    for index, entry in enumerate(raw):
        task = mapping(entry, f"{where}[{index}]")
        if not isinstance(task.get("name"), str):
            raise InputError(f"{where}[{index}]: field 'name' is missing; evaluate again to rewrite the file")
        tasks.append(SuiteTask(task["name"], text(task.get("type")) or "all tasks", text(task.get("metric"))))
    return tuple(tasks)


def _model(key: str, raw: object, tasks: tuple[SuiteTask, ...], where: str) -> ModelResult:
    entry = mapping(raw, where)
    prefix, colon, rest = key.partition(":")
    known = prefix in ("expert", "joint", "merge") and bool(colon)
    kind = "base" if key == "base" else prefix if known else "other"
    scores = _numbers(entry.get("scores"), f"{where}.scores")
    by_type = _numbers(entry.get("by_type"), f"{where}.by_type") or _means_by_type(scores, tasks)
    mean = number(entry.get("mean"), f"{where}.mean")
    if mean is None and by_type:
        mean = sum(by_type.values()) / len(by_type)
    cost = _cost(entry.get("cost"), f"{where}.cost")
    return ModelResult(key, kind, rest if known else key, text(entry.get("path")), scores, by_type, mean, cost)


def _numbers(raw: object, where: str) -> dict[str, float]:
    values = {name: number(value, f"{where}.{name}") for name, value in mapping(raw or {}, where).items()}
    return {name: value for name, value in values.items() if value is not None}


def _means_by_type(scores: Mapping[str, float], tasks: tuple[SuiteTask, ...]) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for task in tasks:
        if task.name in scores:
            grouped.setdefault(task.type, []).append(scores[task.name])
    return {name: sum(values) / len(values) for name, values in grouped.items()}


def _cost(raw: object, where: str) -> ModelCost:
    entry = mapping(raw or {}, where)
    includes = entry.get("includes") or []
    if not isinstance(includes, list):
        raise InputError(f"{where}.includes: expected a list of model keys, found {type(includes).__name__}")
    figures = {name: number(entry.get(name), f"{where}.{name}") for name in ("seconds", "examples", "tokens", "flops")}
    peak = number(entry.get("peak_bytes"), f"{where}.peak_bytes")
    return ModelCost(**figures, peak_bytes=peak, device=text(entry.get("device")), includes=tuple(map(text, includes)))
