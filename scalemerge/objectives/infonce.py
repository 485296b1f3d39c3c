"""InfoNCE with in-batch and hard negatives.

    loss = -log( exp(s(q, p)/t) / sum_j exp(s(q, d_j)/t) )        s: cosine or dot product of the embeddings given

over all documents d_j of the batch: every positive and every hard negative. Source: van den Oord et al. 2018
(arXiv 1807.03748); in-batch form Karpukhin et al. 2020 (arXiv 2004.04906). `margin` leaves out documents that look like
false negatives, s(q, d_j) > s(q, p) + margin, as the Qwen3-Embedding models do (arXiv 2506.05176).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def infonce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    margin: float | None = None,
) -> Tensor:
    """query, positive [B, D]; negatives [H, D], any number, shared by all queries. Returns a scalar, float32 or better.

    symmetric: also positives against all queries, the mean of both directions.
    """
    documents = positive if negatives is None or not len(negatives) else torch.cat([positive, negatives])
    loss = _one_direction(query, documents, temperature, margin)
    if symmetric:
        loss = (loss + _one_direction(positive, query, temperature, margin)) / 2
    return loss


def _one_direction(anchors: Tensor, documents: Tensor, temperature: float, margin: float | None) -> Tensor:
    similarity = anchors @ documents.T
    own = torch.arange(len(anchors), device=anchors.device)
    if margin is not None:
        threshold = similarity[own, own].detach().unsqueeze(1) + margin
        false_negative = similarity.detach() > threshold
        false_negative[own, own] = False
        similarity = similarity.masked_fill(false_negative, float("-inf"))
    return F.cross_entropy(similarity / temperature, own)
