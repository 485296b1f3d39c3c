"""CoSENT: pairs with a higher score must be more similar.

    loss = log(1 + sum over score_i > score_j of exp(scale * (s_j - s_i)))        s: cosine of a pair

A ranking loss, so the scale of the scores does not matter. Source: Su Jianlin 2022 (kexue.fm/archives/8847).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosent(sentence1: Tensor, sentence2: Tensor, score: Tensor, *, scale: float = 20.0) -> Tensor:
    """sentence1, sentence2 [B, D]; score [B]. Returns a scalar; 0 when all scores are equal."""
    similarity = F.cosine_similarity(sentence1, sentence2, dim=-1) * scale
    difference = similarity.unsqueeze(0) - similarity.unsqueeze(1)
    ordered = score.unsqueeze(1) > score.unsqueeze(0)
    terms = difference.masked_fill(~ordered, float("-inf")).flatten()
    return torch.logsumexp(torch.cat([terms, terms.new_zeros(1)]), dim=0)
