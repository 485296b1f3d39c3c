"""`evaluate`: scores one model folder on a suite with mteb itself, and picks up where a killed run stopped.

Every task's result is saved by mteb when it is ready, as <output_dir>/mteb/results/<model>/<revision>/<task>.json, the
leaderboard's layout. Which of them still hold is decided here and not by mteb, for two reasons: mteb takes a complete
result for valid whatever data it was made from (its dataset revision is compared only when splits are missing), and a
file cut off by a kill would stop it. A saved result counts when the model's revision (the folder), the task's
fingerprint (files and options) and mteb's version are those of now.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

from scalemerge.checkpoints.revision import model_revision
from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import EvaluationTask, Suite, mteb_name
from scalemerge.evaluation.reading import fingerprint
from scalemerge.evaluation.suites import check

if TYPE_CHECKING:
    from scalemerge.evaluation.model import ScoredEncoder, TextEncoder

# Called before each task with (tasks done, all tasks, the task's name), and with (all, all, "") at the end.
Progress = Callable[[int, int, str], None]


def evaluate(
    model_path: str | Path,
    suite: Suite,
    *,
    model_name: str,
    output_dir: str | Path,
    batch_size: int = 64,
    progress: Progress | None = None,
    device: str = "cpu",
    encoder: TextEncoder | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Score a model on a suite.

    model_path: a sentence-transformers folder (or `package:<name>/<folder>`).
    model_name: how the results are filed ("base", "merge:slerp"); scores are told apart by the weights, not by it.
    encoder: the model already loaded, where the caller has it; it must be the one in the folder.
    verbose: let mteb and datasets log and draw their progress bars.

    Returns {"scores": {task: points 0 to 100}, "by_type": {type: mean}, "mean": mean over types, "seconds": wall time
    of this call, "scored": tasks that were not served from saved results, "task_seconds": {task: seconds when it was
    scored}, "revision": hash of the weights, "suite": the suite with hub tasks' types filled in}.
    Raises InputError for bad data, a folder that is no model, or a model that gives no finite score.
    """
    started = time.monotonic()
    folder = _model_folder(model_path)
    revision = model_revision(folder)
    mteb_version = _mteb_version()
    check(suite)
    run = _Run(folder, revision, model_name, Path(output_dir) / "mteb", batch_size, device, encoder, verbose)
    if any(task.folder is None for task in suite):
        from scalemerge.evaluation.tasks import resolve

        suite = resolve(suite)
    saved: dict[str, dict[str, Any]] = {}
    scored = []
    for done, task in enumerate(suite):
        if progress:
            progress(done, len(suite), task.name)
        entry = run.saved(task, mteb_version)
        if entry is None:
            run.score(task)
            entry = run.saved(task, mteb_version)
            if entry is None:
                raise RuntimeError(f"mteb left no result of task '{task.name}' in {run.result_path(task)}")
            scored.append(task.name)
        saved[task.name] = entry
    if progress:
        progress(len(suite), len(suite), "")
    scores = {name: entry["points"] for name, entry in saved.items()}
    for name, points in scores.items():
        if not math.isfinite(points):
            raise InputError(f"{folder}: task '{name}' has no finite score; the model gives every text the same "
                             "embedding, train or merge it again")  # fmt: skip
    by_type, mean = aggregate(suite, scores)
    return {
        "scores": scores,
        "by_type": by_type,
        "mean": mean,
        "seconds": time.monotonic() - started,
        "scored": scored,
        "task_seconds": {name: entry["seconds"] for name, entry in saved.items()},
        "revision": revision,
        "suite": suite,
    }


def aggregate(suite: Suite, scores: dict[str, float]) -> tuple[dict[str, float], float]:
    """The mean over the tasks of each type, and the unweighted mean over the types."""
    types = dict.fromkeys(task.type for task in suite)
    by_type = {kind: fmean(scores[task.name] for task in suite if task.type == kind) for kind in types}
    return by_type, fmean(by_type.values())


class _Run:
    """One model's evaluation: mteb and the weights are loaded when the first task needs them, not before."""

    def __init__(
        self,
        folder: Path,
        revision: str,
        name: str,
        cache: Path,
        batch_size: int,
        device: str,
        encoder: TextEncoder | None,
        verbose: bool,
    ) -> None:
        self.folder, self.revision, self.name, self.cache = folder, revision, name, cache
        self.batch_size, self.device, self.encoder, self.verbose = batch_size, device, encoder, verbose
        self._model: ScoredEncoder | None = None
        self._known: dict[str, tuple[str, int]] = {}

    def result_path(self, task: EvaluationTask) -> Path:
        return self.cache / "results" / mteb_name(self.name).replace("/", "__") / self.revision / f"{task.name}.json"

    def saved(self, task: EvaluationTask, mteb_version: str) -> dict[str, Any] | None:
        """A saved result's points and seconds, or None where there is none that holds for this definition."""
        revision, subsets = self._expected(task)
        try:
            result = json.loads(self.result_path(task).read_text(encoding="utf-8"))
            if result["dataset_revision"] != revision or result["mteb_version"] != mteb_version:
                return None
            splits = [result["scores"][split] for split in task.split.split(",")]
            if any(len(entries) < subsets for entries in splits):
                return None  # mteb saves after every subset of a hub task
            mean = fmean(float(entry["main_score"]) for entries in splits for entry in entries)
            return {"points": round(100.0 * mean, 6), "seconds": float(result["evaluation_time"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _expected(self, task: EvaluationTask) -> tuple[str, int]:
        """The data's revision and the number of subsets a complete result of the task has."""
        if task.name not in self._known:
            if task.folder is None:
                from scalemerge.evaluation.tasks import build

                hub_task = build(task)
                self._known[task.name] = (str(hub_task.metadata.revision), len(hub_task.hf_subsets))
            else:
                self._known[task.name] = (fingerprint(task), 1)
        return self._known[task.name]

    def score(self, task: EvaluationTask) -> None:
        """Run one task; mteb saves its result. What was saved of it before is overwritten."""
        import mteb
        from mteb.cache import ResultCache

        from scalemerge.evaluation.tasks import build

        settings: Any = {"batch_size": self.batch_size, "show_progress_bar": self.verbose}
        self._drop_unreadable(self.result_path(task).parent / "run_settings.jsonl")
        with contextlib.nullcontext() if self.verbose else _quiet():
            try:
                mteb.evaluate(
                    cast(Any, self._load()),
                    build(task),
                    cache=ResultCache(self.cache),
                    overwrite_strategy="always",
                    encode_kwargs=settings,
                    co2_tracker=False,
                    show_progress_bar=self.verbose,
                )
            except (OSError, LookupError) as error:
                if task.folder is not None:
                    raise
                reason = str(error).strip().split("\n")[0]
                raise InputError(f"hub suite: task '{task.name}' cannot be loaded ({reason}); go online, or use the "
                                 "shared or docs suite") from error  # fmt: skip

    def _load(self) -> ScoredEncoder:
        if self._model is None:
            from scalemerge.evaluation.model import ScoredEncoder

            if self.encoder is None:
                from scalemerge.encoder import Encoder

                self.encoder = Encoder.load(self.folder, device=self.device)
            self._model = ScoredEncoder(self.encoder, name=self.name, revision=self.revision, folder=self.folder)
        return self._model

    @staticmethod
    def _drop_unreadable(path: Path) -> None:
        """mteb appends to this log of settings and stops at a line that a kill cut off."""
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)
        except FileNotFoundError:
            pass
        except ValueError:
            path.unlink()


def _model_folder(path: str | Path) -> Path:
    if str(path).startswith("package:"):
        from scalemerge.encoder import package_folder

        return package_folder(str(path))
    return Path(path)


def _mteb_version() -> str:
    for name in ("mteb-core", "mteb"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    raise InputError("evaluation needs mteb, which is not installed; pip install 'scalemerge[eval]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines, warnings or progress bars of mteb and the libraries under it; what was set before is set again."""
    import datasets
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("mteb", "datasets", "sentence_transformers", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    loading_bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        if loading_bars:
            transformers_logging.enable_progress_bar()
