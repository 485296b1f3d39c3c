"""A batch of tokenized texts by role, and its loss, in one process or over the ranks of a group.

Training and positioning both go from texts to loss here. Every rank embeds its own rows; embeddings are gathered, and
every rank computes the loss of the whole global batch, with gradients for its own rows only (see `gathering`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import Tensor

from scalemerge.objectives import compute_loss
from scalemerge.objectives.gathering import gather_rows

Feature = dict[str, list[int]]


def row_cuts(rows: int, world: int) -> list[int]:
    """Where each rank's rows of a global batch start, as even as can be; the last entry is the end."""
    return [rows * rank // world for rank in range(world + 1)]


@dataclass(frozen=True)
class TextBatch:
    """roles: tokenized texts; targets: one entry a row of the global batch; negative_counts: how many of `negatives`
    belong to each row. matryoshka: further (dimension, weight) to take the loss at. counts: texts of each role on every
    rank when `roles` holds one rank's share alone; None: `roles` holds the whole batch.
    """

    task: str
    loss: str
    parameters: dict[str, object]
    roles: dict[str, list[Feature]]
    targets: dict[str, Tensor]
    negative_counts: tuple[int, ...] | None = None
    matryoshka: tuple[tuple[int, float], ...] = ()
    counts: dict[str, tuple[int, ...]] | None = None

    def share(self, rank: int, world: int) -> TextBatch:
        """One rank's part of a whole batch: its rows, and the negatives of these rows."""
        if self.counts is not None:
            raise ValueError("this batch is a rank's share already")
        rows = len(next(iter(self.roles.values())))
        bounds = {role: role_bounds(role, rows, world, self.negative_counts) for role in self.roles}
        roles = {role: texts[bounds[role][rank] : bounds[role][rank + 1]] for role, texts in self.roles.items()}
        return replace(self, roles=roles, counts={role: sizes(cuts) for role, cuts in bounds.items()})


def role_bounds(role: str, rows: int, world: int, negative_counts: Sequence[int] | None) -> list[int]:
    """Where each rank's texts of a role start: one text a row, but any number of negatives."""
    cuts = row_cuts(rows, world)
    if role == "negatives" and negative_counts is not None:
        starts = [0, *accumulate(negative_counts)]
        return [starts[cut] for cut in cuts]
    return cuts


def sizes(bounds: Sequence[int]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in pairwise(bounds))


def embeddings_by_role(
    batches: Sequence[TextBatch], encode: Callable[[list[Feature]], Tensor], *, rank: int = 0
) -> list[dict[str, Tensor]]:
    """The embeddings [n, D] of each batch's texts by role, those of all ranks, from one call of `encode`.

    encode: features to embeddings [n, D] in the same order; it is given this rank's texts of all batches.
    """
    local = encode([text for batch in batches for texts in batch.roles.values() for text in texts])
    found, start = [], 0
    for batch in batches:
        embeddings: dict[str, Tensor] = {}
        for role, texts in batch.roles.items():
            mine = local[start : start + len(texts)]
            start += len(texts)
            embeddings[role] = mine if batch.counts is None else gather_rows(mine, batch.counts[role], rank)
        found.append(embeddings)
    return found


def loss_of(batch: TextBatch, embeddings: dict[str, Tensor]) -> Tensor:
    """The loss of a batch from all its embeddings by role. A scalar tensor."""
    device = next(iter(embeddings.values())).device
    targets = {name: target.to(device) for name, target in batch.targets.items()}
    return compute_loss(batch.loss, embeddings, targets, batch.parameters, batch.matryoshka)


def batch_losses(
    batches: Sequence[TextBatch], encode: Callable[[list[Feature]], Tensor], *, rank: int = 0
) -> list[Tensor]:
    """The loss of each batch, from one call of `encode` over all texts of this rank.

    Under data parallelism, where gradients are averaged over ranks, give the batches as each rank's `share` and
    multiply the losses by the number of ranks before backward: each rank's gradient covers its own rows only.
    """
    found = embeddings_by_role(batches, encode, rank=rank)
    return [loss_of(batch, embeddings) for batch, embeddings in zip(batches, found, strict=True)]


def token_count(batches: Sequence[TextBatch]) -> int:
    """Real tokens (no padding) in the texts that these batches hold."""
    return sum(len(text["input_ids"]) for batch in batches for texts in batch.roles.values() for text in texts)
