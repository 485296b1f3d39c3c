"""From experts on disk to a model whose weights are W(c): task vectors loaded, Gram matrices made, layers attached."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from scalemerge.distributed.group import Group
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.layers import Coefficients, MergeSettings, attach
from scalemerge.layers.gathering import Shards
from scalemerge.positioning.positions import Position
from scalemerge.positioning.sharding import attach_sharded, make_shards
from scalemerge.progress import Progress
from scalemerge.recipe import Positioning
from scalemerge.report.cost import FlopCounter
from scalemerge.task_vectors import TaskVectorStore, gram_matrices, group_grams, group_names, moved


@dataclass
class PositionedModel:
    """An encoder whose weights follow `coefficients`, and the position that they are learned through.

    groups: tensors of each group, in the order of the position's rows. gram: the whole model's Gram matrix [E, E].
    mixing: [terms, E], where the store keeps more terms than experts. shards: the ranks that share the weights.
    """

    encoder: Encoder
    coefficients: Coefficients
    position: Position
    groups: dict[str, list[str]]
    experts: list[str]
    gram: Tensor
    settings: MergeSettings
    flops: FlopCounter
    group: Group = field(default_factory=lambda: Group(0, 1, torch.device("cpu")))
    mixing: Tensor | None = None
    shards: Shards | None = None

    @property
    def sharded(self) -> bool:
        return self.shards is not None

    def terms(self, c: Tensor) -> Tensor:
        """Coefficients of the stored terms [groups, terms], from those of the experts [groups, E]."""
        return c if self.mixing is None else c @ self.mixing.to(c).T

    def place(self, c: Tensor | None = None) -> Tensor:
        """Move the model to c [groups, experts], by default to where the position stands. Returns c."""
        value = self.position() if c is None else c
        self.coefficients.set(self.terms(value).to(self.encoder.device))
        return value

    def settle(self) -> None:
        """After the last pass at a position: nothing is left under way between ranks."""
        if self.shards is not None:
            self.shards.forget()


def build(
    encoder: Encoder,
    store: TaskVectorStore,
    settings: Positioning,
    group: Group | None = None,
    *,
    sharded: bool = False,
    least_embedding: int | None = None,
) -> PositionedModel:
    """Attach the experts of `store` to `encoder` (which holds the base weights), in place. Collective.

    sharded: the encoder is empty (Encoder.load(empty=True)), and each rank reads its own rows of base and experts.
    least_embedding: numbers of the smallest table that is sharded.
    """
    group = group or Group(0, 1, encoder.device)
    grams = _grams(store, group)
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
    flops = FlopCounter(encoder.backbone)
    shards = make_shards(group, settings.shard_ranks) if sharded else None
    if shards is not None:
        options = {} if least_embedding is None else {"least_embedding": least_embedding}
        attach_sharded(encoder, store, names, coefficients, layers, shards, group.device, **options)
    else:
        attach(encoder.backbone, {name: store.held(name) for name in names}, coefficients, layers)
    encoder.eval()
    return PositionedModel(
        encoder,
        coefficients,
        position,
        groups,
        store.experts,
        torch.stack(list(grams.values())).sum(0),
        layers,
        flops,
        group,
        store.mixing,
        shards,
    )


def _grams(store: TaskVectorStore, group: Group) -> dict[str, Tensor]:
    """The Gram matrix of each tensor; every rank reads its share of the blocks."""
    total = sum(store.base.specs[name].numel * 4 for name in store.names) * (len(store.experts) + 1) // group.world
    with Progress("Gram matrix", total // 2**20, unit="MiB") as progress:
        read = 0

        def advance(count: int) -> None:
            nonlocal read
            before = read // 2**20
            read += count
            progress.advance(read // 2**20 - before)

        grams = gram_matrices(store, progress=advance, part=(group.rank, group.world))
    if group.world == 1:
        return grams
    summed = group.sum(torch.stack(list(grams.values())).to(group.device)).cpu()
    return dict(zip(grams, summed.unbind(), strict=True))
