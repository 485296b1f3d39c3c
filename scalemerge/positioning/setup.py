"""From experts on disk to a model whose weights are W(c): task vectors loaded, Gram matrices made, layers attached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.layers import Coefficients, MergeSettings, attach
from scalemerge.positioning.positions import Position
from scalemerge.progress import Progress
from scalemerge.recipe import Positioning
from scalemerge.task_vectors import TaskVectorStore, gram_matrices, group_grams, group_names, moved


@dataclass
class PositionedModel:
    """An encoder whose weights follow `coefficients`, and the position that they are learned through.

    groups: tensors of each group, in the order of the position's rows. gram: the whole model's Gram matrix [E, E].
    """

    encoder: Encoder
    coefficients: Coefficients
    position: Position
    groups: dict[str, list[str]]
    experts: list[str]
    gram: Tensor
    settings: MergeSettings

    def place(self, c: Tensor | None = None) -> Tensor:
        """Move the model to c [groups, experts], by default to where the position stands. Returns c."""
        value = self.position() if c is None else c
        self.coefficients.set(value.to(self.encoder.device))
        return value


def build(encoder: Encoder, store: TaskVectorStore, settings: Positioning) -> PositionedModel:
    """Attach the experts of `store` to `encoder` (which holds the base weights), in place."""
    total = sum(store.base.specs[name].numel * 4 for name in store.names) * (len(store.experts) + 1)
    with Progress("Gram matrix", total // 2**20, unit="MiB") as progress:
        read = 0

        def advance(count: int) -> None:
            nonlocal read
            before = read // 2**20
            read += count
            progress.advance(read // 2**20 - before)

        grams = gram_matrices(store, progress=advance)
    names = moved(grams)
    if not names:
        raise InputError(f"{store.base_folder}: no expert differs from the base; train the experts first")
    own = dict(encoder.backbone.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in own]
    if missing:
        raise InputError(f"{store.folders[0]}: tensor '{missing[0]}' has no place in the model of {store.base_folder}")
    groups = group_names(names, settings.granularity)
    order = [store.experts.index(name) for name in settings.order] if settings.order else None
    position = Position(settings.position, group_grams(grams, groups), order=order, start=settings.start)
    rows = {name: number for number, members in enumerate(groups.values()) for name in members}
    coefficients = Coefficients(rows, position().detach())
    layers = MergeSettings(precision=settings.sums, sample_rows=settings.sample_rows, recompute=settings.recompute)
    attach(encoder.backbone, {name: store.held(name) for name in names}, coefficients, layers)
    encoder.eval()
    whole = torch.stack(list(grams.values())).sum(0)
    return PositionedModel(encoder, coefficients, position, groups, store.experts, whole, layers)
