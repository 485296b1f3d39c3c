"""Supervised contrastive loss: texts of one label together, others apart.

    loss = mean over anchors of  -1/|P| sum_{p in P} log( exp(s(a, p)/t) / sum_{j != a} exp(s(a, j)/t) )

P: the other texts with the anchor's label; anchors without one are left out. Source: Khosla et al. 2020
(arXiv 2004.11362), the L_out form.
"""

from __future__ import annotations

import torch
from torch import Tensor


def supcon(text: Tensor, label: Tensor, *, temperature: float = 0.05) -> Tensor:
    """text [B, D]; label [B] integers. Returns a scalar; 0 when no label occurs twice."""
    similarity = text @ text.T / temperature
    itself = torch.eye(len(text), dtype=torch.bool, device=text.device)
    log_probability = similarity - torch.logsumexp(similarity.masked_fill(itself, float("-inf")), dim=1, keepdim=True)
    same = (label.unsqueeze(0) == label.unsqueeze(1)) & ~itself
    count = same.sum(1)
    per_anchor = log_probability.masked_fill(~same, 0).sum(1) / count.clamp(min=1)
    anchors = (count > 0).to(text.dtype)
    return -(per_anchor * anchors).sum() / anchors.sum().clamp(min=1)
