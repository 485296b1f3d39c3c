"""The search: Adam on a handful of numbers, through the merged model's own task losses on the probe set.

    objective = mean over tasks of loss_k / scale_k  +  mu * mean over groups of lambda

Each step takes one probe batch of every task, embeds them all in one forward pass (so the weights are merged once a
step, not once a task), and back-propagates to c and from there to a and lambda. `scale_k` is the task's loss at the
start or at its own expert, as InfoNCE and CoSENT differ tenfold and the larger would decide. A second probe set says
when to stop: the position with the lowest validation objective is kept. Source: Li et al. 2024 (arXiv 2410.15035).
Cost of a step: three products of a forward pass's size, plus two merges.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalemerge.checkpoints.atomic import open_log, require_writable, write_json
from scalemerge.data.collate import collate
from scalemerge.data.sampling import batch_stream
from scalemerge.data.tasks import TaskRows
from scalemerge.errors import InputError
from scalemerge.objectives.batches import Feature, TextBatch, batch_losses, token_count
from scalemerge.positioning.setup import PositionedModel
from scalemerge.progress import Progress, say
from scalemerge.recipe import Positioning, Task
from scalemerge.report.cost import Cost, FlopCounter, peak_bytes

STATE, HISTORY, COEFFICIENTS = "state.safetensors", "history.jsonl", "coefficients.json"


@dataclass
class _State:
    """What a resumed search needs beside the tensors; floats survive JSON exactly."""

    step: int = 0
    scales: dict[str, float] = field(default_factory=dict)
    start_validation: float = 0.0
    best_validation: float = float("inf")
    best_step: int = 0
    without_improvement: int = 0
    cost: dict[str, Any] = field(default_factory=dict)


class Search:
    """Learn the position of `model` from probe rows.

    probe, validation: rows by task. tasks: their losses and prompts. key: what must agree for a resume to be the same
    search. folder: where history, state and coefficients go.
    """

    def __init__(
        self,
        model: PositionedModel,
        tasks: Mapping[str, Task],
        probe: Mapping[str, TaskRows],
        validation: Mapping[str, TaskRows],
        settings: Positioning,
        *,
        seed: int,
        folder: Path,
        key: str = "",
    ) -> None:
        self.model, self.tasks, self.settings, self.seed = model, tasks, settings, seed
        self.folder, self.key = folder, key
        self.cost = Cost(device=str(model.encoder.device))
        self.flops = FlopCounter(model.encoder.backbone)
        self._gradients = True
        sizes = {name: min(settings.rows_per_step, len(rows)) for name, rows in probe.items()}
        self._streams = {name: self._batches(rows, sizes[name]) for name, rows in probe.items()}
        self._validation = [
            batch
            for name, rows in validation.items()
            for size in [min(settings.rows_per_step, len(rows))]
            for batch in islice(self._batches(rows, size), max(1, len(rows) // size))
        ]

    def _batches(self, rows: TaskRows, size: int) -> Iterator[TextBatch]:
        tokenize = self.model.encoder.tokenize
        for indices in batch_stream(rows, size, self.seed):
            yield collate(rows, indices, self.tasks[rows.name], tokenize)

    # ---- losses ------------------------------------------------------------------------------------------------

    def _encode(self, features: list[Feature]) -> Tensor:
        encoder = self.model.encoder
        groups, inverse = encoder.groups(features, self.settings.length_groups)
        forward = self.flops.forward([group["input_ids"].shape for group in groups])
        self.cost.flops += forward * (3 if self._gradients else 1)
        device = str(encoder.device).split(":")[0]
        with torch.autocast(device, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return encoder(groups)[inverse].float()

    def _task_losses(self, batches: list[TextBatch]) -> dict[str, Tensor]:
        """The mean loss of each task over the batches given."""
        self.cost.examples += sum(len(next(iter(batch.roles.values()))) for batch in batches)
        self.cost.tokens += token_count(batches)
        found: dict[str, list[Tensor]] = {}
        for batch, loss in zip(batches, batch_losses(batches, self._encode), strict=True):
            found.setdefault(batch.task, []).append(loss)
        return {task: torch.stack(losses).mean() for task, losses in found.items()}

    @torch.no_grad()
    def validation_losses(self, c: Tensor | None = None) -> dict[str, float]:
        """Loss of each task on the validation rows, at c [groups, experts] or where the position stands."""
        self.model.place(c)
        self._gradients = False
        totals: dict[str, list[float]] = {}
        for batch in self._validation:
            totals.setdefault(batch.task, []).append(self._task_losses([batch])[batch.task].item())
        self._gradients = True
        return {task: sum(values) / len(values) for task, values in totals.items()}

    def _objective(self, losses: Mapping[str, Tensor | float], scales: Mapping[str, float]) -> Any:
        scaled = [losses[task] / scales[task] for task in losses]
        return sum(scaled) / len(scaled) + self.settings.mu * self.model.position.length.mean()

    @torch.no_grad()
    def _plain_objective(self, losses: Mapping[str, float], scales: Mapping[str, float]) -> float:
        return float(self._objective(losses, scales))

    def _scales(self, at_start: dict[str, float]) -> dict[str, float]:
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

    # ---- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Search, write coefficients.json, and return what stands in it."""
        require_writable(self.folder)
        position, settings = self.model.position, self.settings
        optimizer = torch.optim.Adam(position.parameters(), lr=settings.learning_rate)
        best = {name: value.detach().clone() for name, value in position.named_parameters()}
        state = self._resume(optimizer, best)
        if not state.scales:
            began = time.monotonic()
            at_start = self.validation_losses()
            state.scales = self._scales(at_start)
            state.start_validation = state.best_validation = self._plain_objective(at_start, state.scales)
            self.cost.seconds += time.monotonic() - began
        streams = {name: islice(stream, state.step, None) for name, stream in self._streams.items()}
        history = open_log(self.folder / HISTORY, state.step)
        with Progress("positioning", settings.steps, done=state.step) as progress:
            while state.step < settings.steps and state.without_improvement < settings.patience:
                began = time.monotonic()
                record = self._step(optimizer, [next(stream) for stream in streams.values()], state)
                state.step += 1
                if state.step % settings.validate_every == 0 or state.step == settings.steps:
                    record["validation_loss"] = self._validate(state, best)
                self.cost.seconds += time.monotonic() - began
                history.write(json.dumps({**record, "seconds": round(self.cost.seconds, 3)}) + "\n")
                history.flush()
                progress.advance(1, loss=record["loss"])
                if state.step % settings.checkpoint_every == 0:
                    self._save(state, optimizer, best)
        history.close()
        position.load_state_dict(best)
        self.cost.peak_bytes = peak_bytes(self.cost.device)
        result = self._result(state)
        write_json(self.folder / "cost.json", self.cost.as_dict())
        write_json(self.folder / COEFFICIENTS, result)
        (self.folder / STATE).unlink(missing_ok=True)
        return result

    def _step(self, optimizer: torch.optim.Optimizer, batches: list[TextBatch], state: _State) -> dict[str, Any]:
        self.model.settings.reseed(self.seed * 1_000_003 + state.step)
        c = self.model.place()
        described = self._describe(c)
        losses = self._task_losses(batches)
        objective = self._objective(losses, state.scales)
        if not torch.isfinite(objective):
            raise InputError(
                f"positioning: the loss is {objective.item()} at step {state.step}; lower positioning.learning_rate"
            )
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        return {
            "step": state.step,
            "loss": objective.item(),
            "losses": {task: loss.item() for task, loss in losses.items()},
            **described,
        }

    def _validate(self, state: _State, best: dict[str, Tensor]) -> float:
        value = self._plain_objective(self.validation_losses(), state.scales)
        if value < state.best_validation:
            state.best_validation, state.best_step, state.without_improvement = value, state.step, 0
            for name, parameter in self.model.position.named_parameters():
                best[name] = parameter.detach().clone()
        else:
            state.without_improvement += 1
        return value

    def _describe(self, c: Tensor) -> dict[str, Any]:
        """a, lambda and c as plain numbers: lists for one group, by group otherwise."""
        names = list(self.model.groups)
        a, length = self.model.position.a.tolist(), self.model.position.length.tolist()
        alone = names == ["global"]
        return {
            "a": a[0] if alone else dict(zip(names, a, strict=True)),
            "lambda": length[0] if alone else dict(zip(names, length, strict=True)),
            "c": dict(zip(names, c.detach().tolist(), strict=True)),
        }

    @torch.no_grad()
    def _result(self, state: _State) -> dict[str, Any]:
        c = self.model.place()
        return {
            "method": "self_positioning",
            "position": self.settings.position,
            "granularity": self.settings.granularity,
            "experts": self.model.experts,
            "order": [self.model.experts[i] for i in self.model.position.order],
            **self._describe(c),
            "gram": self.model.gram.tolist(),
            "order_effect": self.model.position.order_effect(),
            "mu": self.settings.mu,
            "seed": self.seed,
            "steps": state.step,
            "best_step": state.best_step,
            "validation": {"start": state.start_validation, "best": state.best_validation},
            "loss_scales": state.scales,
            "key": self.key,
        }

    # ---- resuming ----------------------------------------------------------------------------------------------

    def _save(self, state: _State, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> None:
        tensors = {f"position.{name}": value.detach() for name, value in self.model.position.named_parameters()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        for number, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        state.cost = self.cost.as_dict()
        described = {"key": self.key, "state": json.dumps(state.__dict__)}
        temporary = self.folder / f"{STATE}.partial"
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, temporary, metadata=described)
        temporary.replace(self.folder / STATE)

    def _resume(self, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> _State:
        path = self.folder / STATE
        if not path.is_file():
            return _State()
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("key") != self.key:
            raise InputError(f"{path}: belongs to other experts, probe rows or settings; delete {self.folder}")
        state = _State(**json.loads(metadata["state"]))
        parameters = dict(self.model.position.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"position.{name}"])
                best[name] = tensors[f"best.{name}"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.cost = Cost.from_dict(state.cost)
        say(f"positioning: resumed at step {state.step} of {self.settings.steps}")
        return state
