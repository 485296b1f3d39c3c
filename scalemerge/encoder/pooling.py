"""Pooling: token states [B, L, D] to one vector a text [B, D]."""

from __future__ import annotations

import torch
from torch import Tensor

POOLINGS = ("cls", "mean", "last")


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """Pool token states [B, L, D] under a mask [B, L] of 0 and 1 into [B, D] float32.

    cls and last take the first and the last token of the mask, whichever side the padding is on. A row without any
    token has the mean zero.
    """
    hidden = hidden.float()
    if how == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if how == "cls":
        index = mask.argmax(1)
    elif how == "last":
        index = (mask * positions).argmax(1)
    else:
        raise ValueError(f"pooling '{how}' is not one of {', '.join(POOLINGS)}")
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]


def without_prompt(mask: Tensor, lengths: Tensor) -> Tensor:
    """An attention mask [B, L] without the first `lengths` [B] real tokens of each row, on either side of padding."""
    return mask * (mask.cumsum(1) > lengths.unsqueeze(1))
