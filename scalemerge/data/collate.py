"""From rows of a task to a batch of tokenized texts by role, with targets: what the losses take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from scalemerge.data.sources import TEXT_ROLES
from scalemerge.data.tasks import TaskRows
from scalemerge.objectives.batches import Feature, TextBatch, role_bounds, sizes
from scalemerge.recipe import Task

Tokenize = Callable[[Sequence[str], str], list[Feature]]


def label_number(label: str) -> int:
    """63 bits of a label: the same in every batch and on every rank, without a list of all labels."""
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little") >> 1


def collate(
    rows: TaskRows, indices: Sequence[int], task: Task, tokenize: Tokenize, *, rank: int = 0, world: int = 1
) -> TextBatch:
    """Tokenize the texts of some rows: of all of them, or of one rank's share with the targets of all.

    Prompts: queries and symmetric texts get the query prompt, positives and negatives the document prompt.
    """
    assert task.loss is not None
    table = rows.data[list(indices)]
    prompts, roles = task.prompts, {}
    texts = {role: list(table[role]) for role in TEXT_ROLES[rows.kind]}
    negative_counts: tuple[int, ...] | None = None
    if rows.kind == "triplets":
        negative_counts = tuple(len(negatives) for negatives in table["negatives"])
        texts["negatives"] = [text for negatives in table["negatives"] for text in negatives]
    counts = {}
    for role, of_role in texts.items():
        bounds = role_bounds(role, len(indices), world, negative_counts)
        counts[role] = sizes(bounds)
        prompt = prompts.document if role in ("positive", "negatives") else prompts.query
        roles[role] = tokenize(of_role[bounds[rank] : bounds[rank + 1]], prompt)
    targets = {}
    if rows.kind == "scored_pairs":
        targets["score"] = torch.tensor(table["score"], dtype=torch.float32)
    elif rows.kind == "labelled_texts":
        targets["label"] = torch.tensor([label_number(label) for label in table["label"]], dtype=torch.int64)
    dimensions = task.loss.matryoshka or []
    return TextBatch(
        task=rows.name,
        loss=task.loss.name,
        parameters=dict(task.loss.parameters),
        roles=roles,
        targets=targets,
        negative_counts=negative_counts,
        matryoshka=tuple(zip(dimensions, task.loss.matryoshka_weights or [1.0] * len(dimensions), strict=True)),
        counts=counts if world > 1 else None,
    )
