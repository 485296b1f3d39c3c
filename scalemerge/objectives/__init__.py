"""Training objectives, used by training and by positioning alike.

A loss is a plain function of embeddings by role (query, positive, negatives, sentence1, sentence2, text) and of targets
(score, label), with its settings as keyword arguments: the signature is the schema. `LOSSES` is the registry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

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
        if key in ("temperature", "scale") and not (isinstance(value, int | float) and value > 0):
            raise InputError(f"{where}: '{key}' must be a positive number, not {value!r}")


def compute_loss(
    name: str, embeddings: dict[str, Tensor], targets: dict[str, Tensor], parameters: dict[str, Any]
) -> Tensor:
    """The loss `name` of embeddings by role [n, D] and targets by name [B]. A scalar tensor."""
    return LOSSES[name](**embeddings, **targets, **parameters)
