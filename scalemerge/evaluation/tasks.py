"""Turns task definitions into mteb tasks. Imports mteb (10 s): only `evaluate` imports this module.

mteb's modern task classes do the scoring; ours only replace `load_data`. What small local sets need beside that:
every task has a prompt and `top_ranked`, clustering embeds all rows (mteb's default is 4 % of them) and draws samples
no larger than the set, and STS scores are mapped by the set's own range.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata

from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import HUB, EvaluationTask, Suite
from scalemerge.evaluation.reading import TaskData, fingerprint, read_task

# Our type -> mteb's class, its type name and its category.
_CLASSES: dict[str, tuple[type[AbsTask], str, str]] = {
    "sts": (AbsTaskSTS, "STS", "t2t"),
    "pair_classification": (AbsTaskPairClassification, "PairClassification", "t2t"),
    "reranking": (AbsTaskRetrieval, "Reranking", "t2t"),
    "classification": (AbsTaskClassification, "Classification", "t2c"),
    "clustering": (AbsTaskClustering, "Clustering", "t2c"),
    "retrieval": (AbsTaskRetrieval, "Retrieval", "t2t"),
}
_TYPE_OF = {name: ours for ours, (_, name, _) in _CLASSES.items()}


class _LocalData:
    """The half of a local task that is ours: rows from files instead of a hub data set."""

    definition: EvaluationTask
    dataset: Any
    data_loaded: bool

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Read the files into mteb's form; nothing is downloaded and nothing written."""
        if self.data_loaded:
            return
        task, data = self.definition, read_task(self.definition)
        if task.type in ("retrieval", "reranking"):
            parts = {
                "corpus": Dataset.from_list(data.corpus),
                "queries": Dataset.from_list(data.queries),
                "relevant_docs": data.relevant,
                "top_ranked": data.ranked,
            }
            self.dataset = {"default": {task.split: parts}}
        else:
            splits = {task.split: Dataset.from_list(data.rows)}
            if task.train_split is not None:
                splits[task.train_split] = Dataset.from_list(data.train)
            self.dataset = {"default": DatasetDict(splits)}
        self._adapt(data)
        self.data_loaded = True

    def _adapt(self, data: TaskData) -> None:
        """Settings that depend on the rows."""
        if self.definition.type == "sts":
            scores = [row["score"] for row in data.rows]
            self.min_score, self.max_score = min(scores), max(scores)
        elif self.definition.type == "clustering":
            # Samples are drawn with replacement: more than the set has would only repeat its rows.
            self.max_documents_per_cluster = min(16_384, len(data.rows))


def _settings(task: EvaluationTask) -> dict[str, Any]:
    """Class attributes of mteb's protocol for this type."""
    if task.type == "pair_classification":
        return {"label_column_name": "label"}
    if task.type == "classification":
        return {
            "train_split": task.train_split,
            "samples_per_label": task.options.samples_per_label,
            "n_experiments": task.options.experiments,
        }
    if task.type == "clustering":
        return {
            "input_column_name": "text",
            "label_column_name": "label",
            "max_fraction_of_documents_to_embed": None,
            "n_clusters": task.options.experiments,
        }
    return {}


def build(task: EvaluationTask) -> AbsTask:
    """A fresh mteb task. Fresh each time: mteb's clustering consumes the task's random state.

    Raises InputError for a hub task that mteb does not know.
    """
    if task.folder is None:
        return _hub_task(task.name)
    base, mteb_type, category = _CLASSES[task.type]
    # mteb looks a missing prompt up by the task's name, which some versions do only among their own tasks.
    prompt: Any = {"query": base.abstask_prompt} if base is AbsTaskRetrieval else base.abstask_prompt
    metadata = TaskMetadata(
        name=task.name,
        description=f"{task.type} on local files",
        # Never fetched: the path only names the data, the revision tells one content (and its caps) from another.
        dataset={"path": f"local/{task.name}", "revision": fingerprint(task)},
        type=mteb_type,  # type: ignore[arg-type]
        category=category,  # type: ignore[arg-type]
        eval_splits=[task.split],
        eval_langs=["eng-Latn"],
        main_score=task.metric,
        prompt=prompt,
        bibtex_citation="",
    )
    attributes = {"metadata": metadata, "definition": task, **_settings(task)}
    return type(f"Local_{task.type}", (_LocalData, base), attributes)(seed=task.options.seed)


def _hub_task(name: str) -> AbsTask:
    import mteb

    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise InputError(f"hub suite: mteb does not know the task '{name}' ({str(error)[:120]}); correct it") from None


def resolve(suite: Suite) -> Suite:
    """The suite with the types and metrics of its hub tasks filled in."""
    return Suite(suite.name, tuple(_resolved(task) if task.type == HUB else task for task in suite))


def _resolved(task: EvaluationTask) -> EvaluationTask:
    metadata = _hub_task(task.name).metadata
    kind = _TYPE_OF.get(metadata.type, metadata.type.lower())
    return replace(task, type=kind, metric=metadata.main_score, split=",".join(metadata.eval_splits))
