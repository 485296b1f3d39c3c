"""From rows of a task to a batch of tokenized texts by role, with targets: what the losses take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from scalemerge.data.sources import TEXT_ROLES
from scalemerge.data.tasks import TaskRows
from scalemerge.objectives.batches import Feature, TextBatch
from scalemerge.recipe import Task

Tokenize = Callable[[Sequence[str], str], list[Feature]]


def label_number(label: str) -> int:
    """63 bits of a label: the same in every batch and on every rank, without a list of all labels."""
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little") >> 1


def collate(rows: TaskRows, indices: Sequence[int], task: Task, tokenize: Tokenize) -> TextBatch:
    """Tokenize the texts of some rows.

    Prompts: queries and symmetric texts get the query prompt, positives and negatives the document prompt.
    """
    assert task.loss is not None
    table = rows.data[list(indices)]
    prompts, roles = task.prompts, {}
    for role in TEXT_ROLES[rows.kind]:
        roles[role] = tokenize(list(table[role]), prompts.document if role == "positive" else prompts.query)
    counts: tuple[int, ...] | None = None
    if rows.kind == "triplets":
        counts = tuple(len(negatives) for negatives in table["negatives"])
        flat = [text for negatives in table["negatives"] for text in negatives]
        roles["negatives"] = tokenize(flat, prompts.document)
    targets = {}
    if rows.kind == "scored_pairs":
        targets["score"] = torch.tensor(table["score"], dtype=torch.float32)
    elif rows.kind == "labelled_texts":
        targets["label"] = torch.tensor([label_number(label) for label in table["label"]], dtype=torch.int64)
    return TextBatch(rows.name, task.loss.name, dict(task.loss.parameters), roles, targets, counts)
