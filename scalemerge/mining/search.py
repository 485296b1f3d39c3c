"""Exact nearest neighbours by cosine, block by block: never a matrix of all queries by all texts.

Scores of a block are one float32 product; the best so far are merged with the best of the block. Float32 products of
different shapes differ in their last bits, so the size of a block would decide between near ties. Therefore a few more
texts than asked for are kept, scored again in float64, rounded to float32 and ordered by (score, place in the corpus).
That is the true order as long as no text left behind belongs among the first k: the float32 product of two unit vectors
is within D 2^-24 of the true one, so it is enough that the k-th score beats the last one kept by more. Queries for
which it does not (many equal texts at the border) are searched again in float64, with a stable sort.

Cost: 2 Q N D FLOPs, and Q / chunk passes over the corpus; memory chunk x (block + k) scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SPARE = 32  # texts kept beyond k, so that rounding at the border of k is seen
_GATHERED_BYTES = 1 << 26


def top_k(queries: Tensor, corpus: Tensor, k: int, excluded: Tensor, *, block: int = 16384) -> tuple[Tensor, Tensor]:
    """The k best texts for each query, without those excluded for it.

    queries [Q, D] and corpus [N, D]: float32 unit vectors; the corpus may lie on another device and comes over in
    blocks of `block` rows. excluded [P, 2] int64: (query, text). Returns scores [Q, k] float32, descending, -inf where
    the corpus has no more, and the places in the corpus [Q, k] int64, -1 there. Ties are in corpus order; the result
    does not depend on `block`.
    """
    k = min(k, len(corpus))
    width = min(k + _SPARE, len(corpus))
    excluded = excluded.to(queries.device)
    kept, places = _scan(queries, corpus, width, excluded, block)
    scores = pair_scores(queries, corpus, places)
    places, order = places.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    places = places.gather(1, order)
    scores, places = scores[:, :k].contiguous(), places[:, :k].contiguous()
    if width < len(corpus):
        error = 2 * queries.shape[1] * 2.0**-24
        unsure = (scores[:, -1] <= kept[:, -1] + error) & (kept[:, -1] > -torch.inf)
        if unsure.any():
            rows = unsure.nonzero()[:, 0]
            theirs = excluded[unsure[excluded[:, 0]]]
            pairs = torch.stack([torch.searchsorted(rows, theirs[:, 0].contiguous()), theirs[:, 1]], dim=1)
            scores[rows], places[rows] = _scan(queries[rows].double(), corpus, k, pairs, block)
    return scores, places


def _scan(queries: Tensor, corpus: Tensor, k: int, excluded: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Running top k over the blocks. float64 queries: products in float64, rounded to float32, ties in corpus order."""
    stable = queries.dtype == torch.float64
    best = torch.full((len(queries), 0), -torch.inf, device=queries.device)
    places = torch.full((len(queries), 0), -1, dtype=torch.int64, device=queries.device)
    for start in range(0, len(corpus), block):
        part = corpus[start : start + block].to(queries)
        scores = (queries @ part.T).float()
        here = (excluded[:, 1] >= start) & (excluded[:, 1] < start + len(part))
        scores[excluded[here, 0], excluded[here, 1] - start] = -torch.inf
        found, columns = _best(scores, min(k, len(part)), stable)
        best, columns_of_both = _best(torch.cat([best, found], dim=1), min(k, best.shape[1] + found.shape[1]), stable)
        places = torch.cat([places, columns + start], dim=1).gather(1, columns_of_both)
    return best, places.masked_fill(best == -torch.inf, -1)


def _best(scores: Tensor, k: int, stable: bool) -> tuple[Tensor, Tensor]:
    if not stable:
        return scores.topk(k, dim=1)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], order[:, :k]


def pair_scores(queries: Tensor, corpus: Tensor, places: Tensor) -> Tensor:
    """Cosines of queries [Q, D] with the texts at places [Q, K] (-1: none, -inf), summed in float64. [Q, K] float32."""
    result = torch.full(places.shape, -torch.inf, device=queries.device)
    rows = max(1, _GATHERED_BYTES // max(1, places.shape[1] * queries.shape[1] * 8))
    for start in range(0, len(queries), rows):
        part = places[start : start + rows]
        gathered = corpus[part.clamp(min=0).flatten().to(corpus.device)].to(queries.device, torch.float64)
        vectors = queries[start : start + rows].double().unsqueeze(2)
        scores = torch.bmm(gathered.view(*part.shape, -1), vectors).squeeze(2).float()
        result[start : start + rows] = scores.masked_fill(part < 0, -torch.inf)
    return result
