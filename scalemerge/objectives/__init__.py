"""Training objectives, used by training and by positioning alike.

A loss is a plain function of embeddings by role (query, positive, negatives, sentence1, sentence2, text) and of targets
(score, label), with its settings as keyword arguments: the signature is the schema. `LOSSES` is the registry.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalemerge.errors import InputError
from scalemerge.objectives.cosent import cosent
from scalemerge.objectives.infonce import infonce
from scalemerge.objectives.supcon import supcon

LOSSES: dict[str, Callable[..., Tensor]] = {"infonce": infonce, "cosent": cosent, "supcon": supcon}


def check_parameters(name: str, parameters: dict[str, Any], where: str) -> None:
    """Refuse settings that the loss does not have. Raises InputError naming `where`."""
    settings = [
        key for key, value in inspect.signature(LOSSES[name]).parameters.items() if value.kind is value.KEYWORD_ONLY
    ]
    for key, value in parameters.items():
        if key not in settings:
            raise InputError(f"{where}: loss '{name}' has no parameter '{key}'; it has {', '.join(settings)}")
        if key in ("temperature", "scale") and not (_is_number(value) and value > 0):
            raise InputError(f"{where}: '{key}' must be a positive number, not {value!r}")
        if key == "margin" and not (value is None or _is_number(value)):
            raise InputError(f"{where}: 'margin' must be a number or null, not {value!r}")
        if key == "symmetric" and not isinstance(value, bool):
            raise InputError(f"{where}: 'symmetric' must be true or false, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def compute_loss(
    name: str,
    embeddings: dict[str, Tensor],
    targets: dict[str, Tensor],
    parameters: dict[str, Any],
    matryoshka: Sequence[tuple[int, float]] = (),
) -> Tensor:
    """The loss `name` of embeddings by role [n, D] and targets by name [B]. A scalar tensor.

    matryoshka: (dimension, weight) of each length at which to take it; the result is their weighted mean
    (Kusupati et al. 2022, arXiv 2205.13147). Raises InputError for a dimension that the embeddings do not have.
    """

    def at(dimension: int) -> Tensor:
        cut = {role: shortened(rows, dimension) for role, rows in embeddings.items()}
        return LOSSES[name](**cut, **targets, **parameters)

    if not matryoshka:
        return LOSSES[name](**embeddings, **targets, **parameters)
    losses = torch.stack([at(dimension) for dimension, _ in matryoshka])
    weights = losses.new_tensor([weight for _, weight in matryoshka])
    return (losses * weights).sum() / weights.sum()


def shortened(embeddings: Tensor, dimension: int) -> Tensor:
    """The first `dimension` components of [n, D], normalized; the full length as it is."""
    full = embeddings.shape[1]
    if dimension > full:
        raise InputError(f"loss.matryoshka: dimension {dimension} is more than the embeddings' {full}; lower it")
    return embeddings if dimension == full else F.normalize(embeddings[:, :dimension], dim=-1)
