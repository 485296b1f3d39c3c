"""Evaluation during training: each task's loss and one metric on the rows held out of training.

    pairs, triplets, retrieval    mrr_at_10: reciprocal rank of the positive among all texts held out as positives and
                                  negatives, 0 beyond rank 10; texts as near as the positive rank before it
    scored_pairs                  spearman: rank correlation of cosine and score
    labelled_texts                neighbour_accuracy: whether the nearest other text has the same label

Ties count against the model, so that one which embeds everything alike scores worst and not best. Every rank embeds its
share of each batch and has all embeddings afterwards, [rows, D] of a few hundred rows; the figures differ between world
sizes by rounding alone. No random number is drawn, nothing of the training's state is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalemerge.data.collate import collate
from scalemerge.data.tasks import TaskRows
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.objectives.batches import Feature, TextBatch, embeddings_by_role, loss_of, row_cuts
from scalemerge.objectives.gradient_cache import GradientCache
from scalemerge.report.cost import Cost, FlopCounter
from scalemerge.training.engine import Engine
from scalemerge.training.job import Job

METRICS = {"scored_pairs": "spearman", "labelled_texts": "neighbour_accuracy"}
BLOCK = 1024  # rows of a similarity matrix that exist at a time


def mrr_at_10(query: Tensor, documents: Tensor, own: Tensor, ids: Sequence[int]) -> float:
    """query [n, D], documents [m, D], unit length. own [n]: the document that belongs to each query. ids: what tells
    the documents' texts apart; a text that occurs again counts once."""
    _, numbers = torch.unique(torch.tensor([each - 2**63 for each in ids]), return_inverse=True)
    first = torch.full((int(numbers.max()) + 1,), len(ids)).scatter_reduce(0, numbers, torch.arange(len(ids)), "amin")
    candidates, own = documents[first], numbers[own]
    total = 0.0
    for start in range(0, len(query), BLOCK):
        similarity = query[start : start + BLOCK] @ candidates.T
        ranks = (similarity >= similarity.gather(1, own[start : start + BLOCK, None])).sum(1)  # itself included
        total += float(torch.where(ranks <= 10, 1 / ranks.double(), 0.0).sum())
    return total / len(query)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, those of equal values their mean. float64."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two vectors; 0 where one of them is constant."""
    a, b = (ranks - ranks.mean() for ranks in (average_ranks(first), average_ranks(second)))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else 0.0


def neighbour_accuracy(text: Tensor, label: Tensor) -> float:
    """text [n, D], unit length; label [n]. The share of texts of which every nearest other text has their label; texts
    whose label no other one has are left out."""
    right = counted = 0
    for start in range(0, len(text), BLOCK):
        rows = torch.arange(start, min(start + BLOCK, len(text)))
        similarity = text[rows] @ text.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        same = label[rows, None] == label
        same[torch.arange(len(rows)), rows] = False
        nearest = similarity == similarity.amax(1, keepdim=True)
        has_other = same.any(1)
        right += int(((nearest & ~same).sum(1) == 0)[has_other].sum())
        counted += int(has_other.sum())
    return right / counted if counted else 0.0


def task_metric(rows: TaskRows, embeddings: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[str, float]:
    """The metric of a task by its kind, its name first. embeddings: of all rows, by role; targets by name."""
    unit = {role: F.normalize(values.float(), dim=-1) for role, values in embeddings.items()}
    name = METRICS.get(rows.kind, "mrr_at_10")
    if name == "spearman":
        return name, spearman((unit["sentence1"] * unit["sentence2"]).sum(1), targets["score"])
    if name == "neighbour_accuracy":
        return name, neighbour_accuracy(unit["text"], targets["label"])
    documents, ids = unit["positive"], [texts[1] for texts in rows.texts]
    if "negatives" in unit:
        documents = torch.cat([documents, unit["negatives"]])
        ids += [text for texts in rows.texts for text in texts[2:]]
    return name, mrr_at_10(unit["query"], documents, torch.arange(len(rows)), ids)


class Validation:
    """The held-out rows of a job, and the model that is trained on the others. Collective: all ranks call `run`."""

    def __init__(self, job: Job, engine: Engine, encoder: Encoder, flops: FlopCounter) -> None:
        self.job, self.engine, self.encoder, self.flops = job, engine, encoder, flops
        self._batches: dict[str, list[tuple[int, TextBatch]]] = {}

    def due(self, step: int, total: int) -> bool:
        """Whether the model is evaluated after so many steps."""
        every = self.job.settings.evaluate_every
        return bool(self.job.held) and (step == total or (every is not None and step % every == 0))

    def run(self, step: int, chunk_tokens: int | None, cost: Cost) -> dict[str, Any]:
        """The record of an evaluation after `step` steps, rank 0's on every rank. Its cost is added to `cost`.

        Raises InputError where embeddings are not finite.
        """
        began, model = time.monotonic(), self.engine.model
        model.eval()
        try:
            with torch.no_grad():
                tasks = {name: self._evaluate(rows, chunk_tokens, cost, step) for name, rows in self.job.held.items()}
        finally:
            model.train()
        seconds = time.monotonic() - began
        cost.seconds += seconds
        score = sum(figures[METRICS.get(self.job.held[name].kind, "mrr_at_10")] for name, figures in tasks.items())
        record = {"step": step, "score": score / len(tasks), "tasks": tasks, "seconds": round(seconds, 3)}
        return self.engine.from_first_rank(lambda: record)  # what decides which weights are kept is one number

    def _evaluate(self, rows: TaskRows, chunk_tokens: int | None, cost: Cost, step: int) -> dict[str, float]:
        if rows.name not in self._batches:
            self._batches[rows.name] = self._tokenize(rows)
        losses: list[float] = []
        parts: dict[str, list[Tensor]] = {}
        targets: dict[str, list[Tensor]] = {}
        for count, batch in self._batches[rows.name]:
            encode = self._encoder(count, chunk_tokens, cost)
            (found,) = embeddings_by_role([batch], encode, rank=self.engine.rank)
            found = {role: values.cpu() for role, values in found.items()}
            if not all(values.isfinite().all() for values in found.values()):
                raise InputError(
                    f"training {self.job.name}: the evaluation after step {step} finds embeddings that are not finite "
                    f"(task '{rows.name}'); lower learning_rate"
                )
            losses.append(float(loss_of(batch, found)))
            for role, values in found.items():
                parts.setdefault(role, []).append(values)
            for name, values in batch.targets.items():
                targets.setdefault(name, []).append(values)
        name, value = task_metric(
            rows,
            {role: torch.cat(values) for role, values in parts.items()},
            {name: torch.cat(values) for name, values in targets.items()},
        )
        return {name: value, "loss": sum(losses) / len(losses), "rows": len(rows)}

    def _tokenize(self, rows: TaskRows) -> list[tuple[int, TextBatch]]:
        """This rank's share of batches as even and at most as large as in training, each with the rows of all ranks."""
        count = -(-len(rows) // self.job.settings.batch_size)
        cuts = row_cuts(len(rows), count)
        task, rank, world = self.job.tasks[rows.name], self.engine.rank, self.engine.world
        return [
            (stop - start, collate(rows, range(start, stop), task, self.encoder.tokenize, rank=rank, world=world))
            for start, stop in pairwise(cuts)
        ]

    def _encoder(self, rows: int, chunk_tokens: int | None, cost: Cost) -> Callable[[list[Feature]], Tensor]:
        """Features of this rank to embeddings in as many model calls on every rank: a rank without rows embeds a dummy.

        rows: those of the batch on all ranks.
        """

        def embed(features: list[Feature]) -> Tensor:
            padded = self.encoder.pad(features)
            cost.flops += self.flops.forward([padded["input_ids"].shape])
            return self.engine.model([padded])

        def encode(features: list[Feature]) -> Tensor:
            given = features or self.encoder.tokenize(["a"])
            if chunk_tokens is not None:
                return GradientCache(embed, chunk_tokens, self.engine.world).encode(given).detach()[: len(features)]
            most = min(self.job.settings.length_groups, max(1, rows // self.engine.world))
            groups, inverse = self.encoder.groups(given, most)
            cost.flops += self.flops.forward([group["input_ids"].shape for group in groups])
            return self.engine.model(groups)[inverse][: len(features)]

        return encode
