"""What is minimized: the task losses of the merged model on probe rows, and their gradient for the coefficients.

    objective = mean over tasks of loss_k / scale_k  +  mu * mean over groups of lambda

`scale_k` is the task's loss at the start or at its own expert, as InfoNCE and CoSENT differ tenfold and the larger
would decide. A step embeds one probe batch of every task in one forward pass (so the weights are merged once a step,
not once a task). On many ranks each embeds its share of every batch; embeddings are gathered, every rank computes the
losses of the whole batches and differentiates them for its own texts, and the gradients of the coefficients, a few
numbers, are added up: exact, whatever the number of ranks. Cost: three products of a forward pass's size, two merges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from scalemerge.data.collate import collate
from scalemerge.data.sampling import batch_stream
from scalemerge.data.tasks import TaskRows
from scalemerge.errors import InputError
from scalemerge.objectives.batches import Feature, TextBatch, batch_losses, token_count
from scalemerge.objectives.gradient_cache import GradientCache
from scalemerge.positioning.setup import PositionedModel
from scalemerge.recipe import Positioning, Task
from scalemerge.report.cost import Cost, FlopCounter


@dataclass(frozen=True)
class Point:
    """The objective where the position stood, its parts, and c [groups, experts] there.

    gradient: of the losses alone for the stored terms' coefficients [groups, terms], all ranks together.
    """

    value: float
    losses: dict[str, float]
    c: Tensor
    gradient: Tensor


class ProbeObjective:
    """The objective of `model` on probe rows, and on validation rows.

    probe, validation: rows by task. tasks: their losses and prompts. cost: of all that was computed here, by all ranks.
    """

    def __init__(
        self,
        model: PositionedModel,
        tasks: Mapping[str, Task],
        probe: Mapping[str, TaskRows],
        validation: Mapping[str, TaskRows],
        settings: Positioning,
        seed: int,
    ) -> None:
        self.model, self.tasks, self.settings, self.seed = model, tasks, settings, seed
        self.group = model.group
        self.cost = Cost(device=str(model.encoder.device))
        self.flops: FlopCounter = model.flops
        self._probe = probe
        self._forwards = 3  # of a forward pass's FLOPs: one alone, or with its backward pass
        for name, rows in [*probe.items(), *validation.items()]:
            size = self._rows_of_batch(rows)
            if size < self.group.world:
                raise InputError(
                    f"positioning.rows_per_step: a batch of {size} rows of task '{name}' cannot be shared by "
                    f"{self.group.world} processes; raise it and probe.rows_per_task"
                )
        self._validation = [batch for batches in self._passes(validation) for batch in batches]

    def _rows_of_batch(self, rows: TaskRows) -> int:
        return min(self.settings.rows_per_step, len(rows))

    def _batches(self, rows: TaskRows) -> Iterator[TextBatch]:
        tokenize, group = self.model.encoder.tokenize, self.group
        for indices in batch_stream(rows, self._rows_of_batch(rows), self.seed):
            yield collate(rows, indices, self.tasks[rows.name], tokenize, rank=group.rank, world=group.world)

    def batches(self, done: int = 0) -> Iterator[list[TextBatch]]:
        """Endless steps, each with this rank's share of one batch of every task; from step `done` on."""
        streams = [islice(self._batches(rows), done, None) for rows in self._probe.values()]
        return (list(batches) for batches in zip(*streams, strict=True))

    def whole_probe(self) -> list[list[TextBatch]]:
        """All probe rows once, in rounds of at most one batch of every task; the same at each call."""
        return self._passes(self._probe)

    def _passes(self, tables: Mapping[str, TaskRows]) -> list[list[TextBatch]]:
        rounds: list[list[TextBatch]] = []
        for rows in tables.values():
            for number, batch in enumerate(islice(self._batches(rows), len(rows) // self._rows_of_batch(rows))):
                if number == len(rounds):
                    rounds.append([])
                rounds[number].append(batch)
        return rounds

    # ---- losses ------------------------------------------------------------------------------------------------

    def _fewest_texts(self, batches: Sequence[TextBatch]) -> int:
        """Texts of the rank that has the fewest: a sharded model needs as many forward passes on every rank."""
        counts = [batch.counts for batch in batches if batch.counts]
        return min(
            (sum(texts) for texts in zip(*(c for of in counts for c in of.values()), strict=True)), default=2**62
        )

    def _embed(self, groups: list[dict[str, Tensor]]) -> Tensor:
        encoder = self.model.encoder
        self.cost.flops += self._forwards * self.flops.forward([group["input_ids"].shape for group in groups])
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return encoder(groups).float()

    def _losses(self, batches: Sequence[TextBatch]) -> list[Tensor]:
        """The loss of each batch, embedded in one forward pass over groups of similar length."""
        wanted = self.settings.length_groups or (1 if self.model.sharded else 4)
        count = min(wanted, self._fewest_texts(batches))
        self._count(batches)

        def encode(features: list[Feature]) -> Tensor:
            groups, inverse = self.model.encoder.groups(features, count)
            return self._embed(groups)[inverse]

        return batch_losses(batches, encode, rank=self.group.rank)

    def _count(self, batches: Sequence[TextBatch]) -> None:
        self.cost.examples += sum(len(next(iter(batch.roles.values()))) for batch in batches)
        self.cost.tokens += token_count(batches)

    def _backward(self, batches: Sequence[TextBatch], weights: Sequence[float]) -> list[float]:
        """Add the gradient of the weighted sum of losses, for this rank's texts. Returns the losses."""

        def total(losses: Sequence[Tensor]) -> Tensor:
            return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

        if self.settings.chunk_tokens is None:
            losses = self._losses(batches)
            total(losses).backward()
        else:
            encoder = self.model.encoder
            cache = GradientCache(
                lambda features: self._embed([encoder.pad(features)]), self.settings.chunk_tokens, self.group.world
            )
            self._count(batches)
            losses = batch_losses(batches, cache.encode, rank=self.group.rank)
            total(losses).backward()  # to the cached embeddings only
            cache.backward(lambda surrogate, last: surrogate().backward())
        return [loss.item() for loss in losses]

    # ---- the objective -----------------------------------------------------------------------------------------

    def differentiate(self, rounds: Sequence[Sequence[TextBatch]], scales: Mapping[str, float]) -> Point:
        """The objective over some batches, and its gradient into the position's parameters, equal on every rank.

        rounds: lists of batches that are embedded together. A task's loss is the mean over its batches.
        """
        model, counts = self.model, Counter(batch.task for batches in rounds for batch in batches)
        c = model.position()
        terms = model.terms(c)
        leaf = terms.detach().to(model.encoder.device).requires_grad_()
        model.coefficients.set(leaf)
        found: dict[str, list[float]] = {task: [] for task in counts}
        for batches in rounds:
            weights = [1 / (counts[batch.task] * len(counts) * scales[batch.task]) for batch in batches]
            for batch, loss in zip(batches, self._backward(batches, weights), strict=True):
                found[batch.task].append(loss)
        model.settle()
        gradient = self.group.sum(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        penalty = self.settings.mu * model.position.length.mean()
        for parameter in model.position.parameters():
            parameter.grad = None
        torch.autograd.backward([terms, penalty], [gradient.to(terms), torch.ones_like(penalty)])
        losses = {task: sum(values) / len(values) for task, values in found.items()}
        return Point(self.value(losses, scales), losses, c.detach(), gradient.cpu())

    @torch.no_grad()
    def value(self, losses: Mapping[str, float], scales: Mapping[str, float]) -> float:
        """The objective of stated losses where the position stands."""
        scaled = [losses[task] / scales[task] for task in losses]
        return sum(scaled) / len(scaled) + self.settings.mu * float(self.model.position.length.mean())

    @torch.no_grad()
    def validation_losses(self, c: Tensor | None = None) -> dict[str, float]:
        """Loss of each task on the validation rows, at c [groups, experts] or where the position stands.

        Rank 0's numbers on every rank: they decide when the search stops.
        """
        self.model.place(c)
        self._forwards = 1
        totals: dict[str, list[float]] = {}
        for batch in self._validation:
            totals.setdefault(batch.task, []).append(self._losses([batch])[0].item())
        self._forwards = 3
        self.model.settle()
        found = {task: sum(values) / len(values) for task, values in totals.items()}
        agreed = self.group.broadcast(torch.tensor(list(found.values()), dtype=torch.float64, device=self.group.device))
        return dict(zip(found, agreed.tolist(), strict=True))

    def scales(self, at_start: dict[str, float]) -> dict[str, float]:
        """What each task's loss is divided by."""
        if self.settings.normalize_losses == "none":
            return dict.fromkeys(at_start, 1.0)
        scales = dict(at_start)
        if self.settings.normalize_losses == "expert":
            for task in scales:
                if task not in self.model.experts:
                    raise InputError(
                        f"positioning.normalize_losses: task '{task}' has no expert of its name; use 'start'"
                    )
                c = torch.zeros(len(self.model.groups), len(self.model.experts))
                c[:, self.model.experts.index(task)] = 1.0
                scales[task] = self.validation_losses(c)[task]
        return {task: max(value, 1e-6) for task, value in scales.items()}

    def total_cost(self) -> Cost:
        """The cost of all ranks together: work added up, the highest peak and the longest time of any."""
        parts = self.group.gather(self.cost.as_dict())
        total = Cost.from_dict(parts[0])
        for name in ("examples", "tokens", "flops"):
            setattr(total, name, sum(part[name] for part in parts))
        total.peak_bytes = max(part["peak_bytes"] for part in parts)
        return total
