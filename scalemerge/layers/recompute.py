"""Less activation memory without computing any large product twice: selective recomputation of transformer blocks.

A merge layer keeps no weight for backward, so what remains of a positioning step's memory is activations. Each block is
put under torch's selective activation checkpointing: outputs of the merged products are kept, everything cheap between
them (norms, activation functions, attention on short texts, residuals) is made again in backward. Kept for a block like
BERT's, in units of one hidden state: its input, q, k, v, attention's output product and both feed-forward products'
(1 + 3 + 1 + 4 + 1 = 10) instead of about 16. Exact.

`level="all"` keeps the block's input only and runs the block twice (torch's ordinary checkpointing): the smallest, at
the cost of one more forward pass.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "cheap", "all"]
LEVELS = ("none", "cheap", "all")


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator is torch.ops.scalemerge.merged_product.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's outermost lists of modules that hold weights: its layers."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                found.extend(child)
            else:
                search(child)

    search(model)
    return found


def recompute_blocks(model: nn.Module, level: Recompute) -> None:
    """Put every transformer block under recomputation, in place; "none" takes it off again.

    Raises ValueError for a model without a list of blocks.
    """
    if level not in LEVELS:
        raise ValueError(f"recompute must be one of {', '.join(LEVELS)}, not {level!r}")
    blocks = transformer_blocks(model)
    if not blocks and level != "none":
        raise ValueError(f"{type(model).__name__} has no list of blocks to recompute; use recompute='none'")
    for block in blocks:
        plain: type[nn.Module] = getattr(type(block), "_plain_class", type(block))
        block.__class__ = plain if level == "none" else _recomputing(plain, level)  # type: ignore[arg-type]


@cache
def _recomputing(plain: type[nn.Module], level: Recompute) -> type[nn.Module]:
    """A subclass whose forward is checkpointed; no wrapper, so that names and copies stay as they are."""
    options: dict[str, Any] = {"use_reentrant": False}
    if level == "cheap":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain.forward(self, *args, **kwargs)
        return checkpoint(partial(plain.forward, self), *args, **options, **kwargs)

    return type(plain.__name__, (plain,), {"forward": forward, "_plain_class": plain, "__module__": plain.__module__})
