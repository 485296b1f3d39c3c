"""The gradient cache: the exact gradient of a large batch in the memory of a small chunk (Gao et al. 2021, GradCache).

A contrastive loss couples all embeddings of a batch, but its gradient reaches the model through each text's embedding
alone. So a step has three phases:

    1. embed all texts chunk by chunk, without a graph
    2. compute the loss over the (gathered) embeddings and its gradient with respect to them
    3. embed each chunk again, with a graph, and back-propagate <embedding, its gradient>

Any loss works unchanged: `batch_losses` takes `GradientCache.encode` where it takes a plain encoder. Chunks are filled
by tokens, not rows, from texts sorted by length, so that little is padded. Random numbers are replayed, so that dropout
makes the same embeddings in phases 1 and 3. The last chunk of phase 1 keeps its graph and comes first in phase 3, which
saves its second forward pass; one chunk alone is computed once. All ranks make the same number of chunks (a rank with
fewer texts repeats one with a zero gradient), and the last chunk alone may synchronize gradients. Cost: one forward
pass more, less that of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalemerge.objectives.batches import Feature


def chunks_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Row numbers in chunks of at most `budget` tokens, padding included; a longer text has a chunk of its own.

    Longest first, so that memory is at its peak at once. lengths: tokens of each row.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    chunks: list[list[int]] = []
    for row in order:
        if chunks and (len(chunks[-1]) + 1) * lengths[chunks[-1][0]] <= budget:
            chunks[-1].append(row)
        else:
            chunks.append([row])
    return chunks


def split_to(chunks: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in `count` chunks or more: those of most rows are halved; empty ones fill up what rows cannot."""
    chunks = [list(chunk) for chunk in chunks]
    while len(chunks) < count:
        number = max(range(len(chunks)), key=lambda i: len(chunks[i]), default=-1)
        if number < 0 or len(chunks[number]) < 2:
            chunks.append([])
            continue
        half = len(chunks[number]) // 2
        chunks[number : number + 1] = [chunks[number][:half], chunks[number][half:]]
    return chunks


class GradientCache:
    """One step's cache.

    embed: features to embeddings [n, D], through the model that is trained. chunk_tokens: budget of a chunk. world:
    ranks that take part; with more than one, every rank must call `encode` and `backward`. hold: a context for a
    forward pass whose backward pass synchronizes gradients (True) or not (False), as DDP wants to know it beforehand;
    None: no graph is kept in phase 1.
    """

    def __init__(
        self,
        embed: Callable[[list[Feature]], Tensor],
        chunk_tokens: int,
        world: int = 1,
        hold: Callable[[bool], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._embed, self._chunk_tokens, self._world, self._hold = embed, chunk_tokens, world, hold

    def encode(self, features: list[Feature]) -> Tensor:
        """Phase 1: embeddings [n, D] in the order of `features`, a leaf that takes the loss's gradient."""
        self._features = features
        chunks = chunks_by_tokens([len(feature["input_ids"]) for feature in features], self._chunk_tokens)
        self._chunks = split_to(chunks, self._most(len(chunks)))
        self._random: list[Any] = []
        leaf: Tensor | None = None
        self._kept: Tensor | None = None
        for number, chunk in enumerate(self._chunks):
            self._random.append(_random_state())
            texts = [features[row] for row in chunk or [0]]
            if self._hold is not None and number == len(self._chunks) - 1:
                with self._hold(len(self._chunks) == 1):
                    embeddings = self._kept = self._embed(texts)
            else:
                with torch.no_grad():
                    embeddings = self._embed(texts)
            if leaf is None:
                leaf = embeddings.new_zeros(len(features), embeddings.shape[1])
            if chunk:
                leaf[torch.tensor(chunk, device=leaf.device)] = embeddings.detach()
        if leaf is None:
            raise ValueError("a gradient cache needs at least one text on every rank")
        self._leaf = leaf.requires_grad_()
        return self._leaf

    def backward(self, backward: Callable[[Callable[[], Tensor], bool], None]) -> None:
        """Phase 3, after the loss's own backward: `backward(surrogate, last)` for every chunk.

        surrogate: makes the scalar to back-propagate; it runs the model, so it is to be called inside whatever context
        holds back the synchronization of gradients. last: whether this is the chunk that synchronizes.
        """
        gradient = self._leaf.grad
        assert gradient is not None, "back-propagate the loss first"
        order = list(range(len(self._chunks)))
        if self._kept is not None:
            order = [order[-1], *order[:-1]]
        for place, number in enumerate(order):
            chunk = self._chunks[number]

            def surrogate(chunk: list[int] = chunk, state: Any = self._random[number]) -> Tensor:
                embeddings, self._kept = self._kept, None
                if embeddings is None:
                    with _replayed(state):
                        embeddings = self._embed([self._features[row] for row in chunk or [0]])
                if not chunk:
                    return embeddings.sum() * 0.0
                wanted = gradient[torch.tensor(chunk, device=gradient.device)]
                return (embeddings * wanted.to(embeddings.dtype)).sum()

            backward(surrogate, place == len(order) - 1)

    def _most(self, count: int) -> int:
        if self._world == 1:
            return count
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        most = torch.tensor(count, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextmanager
def _replayed(state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Random numbers from a saved state inside the block, and from where they were after it."""
    before = _random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
