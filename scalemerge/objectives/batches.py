"""A batch of tokenized texts by role, and its loss, in one process or over the ranks of a group.

Training and positioning both go from texts to loss here. Every rank embeds its own rows; embeddings are gathered, and
every rank computes the loss of the whole global batch, with gradients for its own rows only (see `gathering`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor

from scalemerge.objectives import compute_loss
from scalemerge.objectives.gathering import gather_rows

Feature = dict[str, list[int]]


@dataclass(frozen=True)
class TextBatch:
    """roles: tokenized texts; targets: one entry a row; negative_counts: how many of `negatives` belong to each row."""

    task: str
    loss: str
    parameters: dict[str, object]
    roles: dict[str, list[Feature]]
    targets: dict[str, Tensor]
    negative_counts: tuple[int, ...] | None = None

    def bounds(self, role: str, world: int) -> list[int]:
        """Where each rank's part of a role starts; the last entry is the end."""
        rows = len(next(iter(self.roles.values())))
        cuts = [rows * rank // world for rank in range(world + 1)]
        if role == "negatives" and self.negative_counts is not None:
            starts = [0, *accumulate(self.negative_counts)]
            return [starts[cut] for cut in cuts]
        return cuts


def batch_losses(
    batches: Sequence[TextBatch],
    encode: Callable[[list[Feature]], Tensor],
    *,
    rank: int = 0,
    world: int = 1,
) -> list[Tensor]:
    """The loss of each batch, from one call of `encode` over all texts of this rank.

    encode: features to embeddings [n, D] in the same order. Under data parallelism, where gradients are averaged over
    ranks, multiply the losses by `world` before backward: each rank's gradient covers its own rows only.
    """
    features: list[Feature] = []
    parts: list[tuple[int, str, list[int]]] = []
    for number, batch in enumerate(batches):
        for role, texts in batch.roles.items():
            bounds = batch.bounds(role, world)
            features += texts[bounds[rank] : bounds[rank + 1]]
            parts.append((number, role, bounds))
    local = encode(features)
    embeddings: list[dict[str, Tensor]] = [{} for _ in batches]
    start = 0
    for number, role, bounds in parts:
        counts = [stop - begin for begin, stop in pairwise(bounds)]
        mine = local[start : start + counts[rank]]
        start += counts[rank]
        embeddings[number][role] = gather_rows(mine, counts, rank) if world > 1 else mine
    return [
        compute_loss(
            batch.loss,
            embeddings[number],
            {name: target.to(local.device) for name, target in batch.targets.items()},
            batch.parameters,
        )
        for number, batch in enumerate(batches)
    ]


def token_count(batches: Sequence[TextBatch]) -> int:
    """Real tokens (no padding) in the texts of all ranks."""
    return sum(len(text["input_ids"]) for batch in batches for texts in batch.roles.values() for text in texts)
