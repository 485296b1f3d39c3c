"""The ready suites: the shared evaluation sets, the built-in docs suite, any folder of the same layout, mteb tasks.

Suites are plain data and importing this module is cheap. `check` reads every file of a suite, so that a wrong field
is found in a second and not after the models before it have been scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import HUB, METRICS, EvaluationTask, Options, Suite

__all__ = [
    "DOCS_TASKS",
    "FAST_OPTIONS",
    "HUB",
    "METRICS",
    "SHARED_TASKS",
    "EvaluationTask",
    "Options",
    "Suite",
    "check",
    "docs_suite",
    "hub_suite",
    "layout_suite",
    "limit",
    "shared_suite",
]  # fmt: skip

SHARED_TASKS = {
    **dict.fromkeys(["sts12", "sts13", "sts14", "sts15", "stsbenchmark", "sick-r"], "sts"),
    **dict.fromkeys(["qqp", "cosqa-pairs"], "pair_classification"),
    "trecqa": "reranking",
    **dict.fromkeys(["banking77", "clinc150", "tweet-emotion", "tweet-irony", "tweet-sentiment"], "classification"),
    **dict.fromkeys(
        ["stackoverflow-titles", "searchsnippets", "googlenews-ts", "googlenews-t", "agnews-8000"], "clustering"
    ),
    **dict.fromkeys(
        ["xquad-en", "medquad", "cosqa", "cranfield", "cisi", "medline", "time-magazine", "lisa"], "retrieval"
    ),
}

# The fast suite: two sets a type (one of reranking, there is no other), capped so that a 22M-parameter model on two
# cores scores them within three minutes. For choosing and for tests; report the full suite.
FAST_OPTIONS = {
    "stsbenchmark": Options(max_rows=1000),
    "sick-r": Options(max_rows=1000),
    "qqp": Options(max_rows=1000),
    "cosqa-pairs": Options(max_rows=300),
    "trecqa": Options(max_queries=40),
    "banking77": Options(max_rows=770, experiments=3),
    "tweet-emotion": Options(max_rows=700, experiments=5),
    "searchsnippets": Options(max_rows=1000, experiments=5),
    "stackoverflow-titles": Options(max_rows=1000, experiments=5),
    "xquad-en": Options(max_queries=300),
    "cosqa": Options(max_queries=200, max_corpus=1000),
}

DOCS_TASKS = (
    ("docs-search", "retrieval"),
    ("code-search", "retrieval"),
    ("docs-paraphrase", "pair_classification"),
    ("docs-topics", "classification"),
    ("docs-modules", "clustering"),
)


def layout_suite(
    name: str,
    data_dir: str | Path,
    tasks: Iterable[tuple[str, str]],
    *,
    options: Mapping[str, Options] | None = None,
    split: str = "test",
    train_split: str = "train",
) -> Suite:
    """A suite over any folder of the shared layout: tasks are (folder, type) pairs, each folder also its task's name.

    Raises InputError for a missing data folder or task folder, an unknown type, or no task at all.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"{data_dir}: no such data folder; give it with --data, SCALEMERGE_DATA or the recipe's data")
    built = []
    for folder, kind in tasks:
        if kind not in METRICS:
            raise InputError(f"suite {name}: type '{kind}' of task '{folder}' is not one of {', '.join(METRICS)}")
        if not (data_dir / folder).is_dir():
            present = ", ".join(sorted(path.name for path in data_dir.iterdir() if path.is_dir())) or "none"
            raise InputError(
                f"{data_dir / folder}: no such folder, wanted by task '{folder}'; folders there: {present}"
            )
        built.append(
            EvaluationTask(
                name=folder,
                type=kind,
                metric=METRICS[kind],
                folder=data_dir / folder,
                split=split,
                train_split=train_split if kind == "classification" else None,
                options=(options or {}).get(folder, Options()),
            )
        )
    return _suite(name, built)


def shared_suite(data_dir: str | Path, names: Sequence[str] | None = None, fast: bool = False) -> Suite:
    """The evaluation sets of the shared layout; `names` picks some, `fast` takes FAST_OPTIONS' subset and caps.

    With both, `names` picks and `fast` caps those that have fast options.
    """
    unknown = [name for name in names or () if name not in SHARED_TASKS]
    if unknown:
        raise InputError(f"shared suite: unknown task '{unknown[0]}'; choose from {', '.join(SHARED_TASKS)}")
    chosen = list(names) if names is not None else list(FAST_OPTIONS if fast else SHARED_TASKS)
    options = FAST_OPTIONS if fast else {}
    pairs = [(name, SHARED_TASKS[name]) for name in chosen]
    return layout_suite("shared-fast" if fast else "shared", data_dir, pairs, options=options)


def docs_suite(data_dir: str | Path, *, options: Mapping[str, Options] | None = None) -> Suite:
    """The built-in suite over the folder that scalemerge.data generated from the installed packages' docstrings."""
    return layout_suite("docs", data_dir, DOCS_TASKS, options=options)


def hub_suite(names: Sequence[str]) -> Suite:
    """mteb tasks by name, for people who are online (or have them cached); types are resolved when mteb is imported."""
    return _suite("hub", [EvaluationTask(name, HUB, "main_score", None) for name in names])


def limit(suite: Suite, **caps: int) -> Suite:
    """The same suite with other options for every local task, for instance `limit(suite, max_rows=200)`."""
    tasks = [task if task.folder is None else replace(task, options=replace(task.options, **caps)) for task in suite]
    return Suite(suite.name, tuple(tasks))


def check(suite: Suite) -> None:
    """Read and validate every file of the local tasks (under a second for the shared suite).

    Raises InputError that names file, line, field and remedy. Hub tasks are checked when mteb loads them.
    """
    from scalemerge.evaluation.reading import read_task

    for task in suite:
        if task.folder is not None:
            read_task(task)


def _suite(name: str, tasks: Sequence[EvaluationTask]) -> Suite:
    names = [task.name for task in tasks]
    if not names:
        raise InputError(f"suite {name}: no task; name at least one")
    twice = sorted({task for task in names if names.count(task) > 1})
    if twice:
        raise InputError(f"suite {name}: task '{twice[0]}' is named twice; name it once")
    return Suite(name, tuple(tasks))
