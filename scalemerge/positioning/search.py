"""The search: a handful of numbers moved by the gradient of the probe objective (objective.py).

    adam    a probe batch of every task a step
    lbfgs   the whole probe set an evaluation: deterministic, second order, a few evaluations (lbfgs.py)

A second probe set says when to stop: the position with the lowest validation objective is kept. Source: Li et al. 2024
(arXiv 2410.15035). On many ranks all of them search in step; rank 0 alone writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import open_log, require_writable, write_json
from scalemerge.data.tasks import TaskRows
from scalemerge.distributed.watching import Preempted, StopRequest
from scalemerge.errors import InputError
from scalemerge.objectives.batches import TextBatch
from scalemerge.positioning.lbfgs import Evaluation, minimize
from scalemerge.positioning.objective import Point, ProbeObjective
from scalemerge.positioning.setup import PositionedModel
from scalemerge.positioning.state import STATE, State, load_state, save_state
from scalemerge.progress import Progress, say
from scalemerge.recipe import Positioning, Task
from scalemerge.report.cost import Cost, peak_bytes

HISTORY, COEFFICIENTS = "history.jsonl", "coefficients.json"


class Search:
    """Learn the position of `model` from probe rows.

    probe, validation: rows by task. tasks: their losses and prompts. key: what must agree for a resume to be the same
    search. folder: where history, state and coefficients go. stop: asked when the run is to save and end.
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
        stop: StopRequest | None = None,
    ) -> None:
        self.stop = stop
        self.model, self.settings, self.seed = model, settings, seed
        self.folder, self.key, self.group = folder, key, model.group
        self.objective = ProbeObjective(model, tasks, probe, validation, settings, seed)
        self.cost = self.objective.cost

    def run(self) -> dict[str, Any]:
        """Search, write coefficients.json, and return what stands in it. Collective."""
        if self.group.first:
            require_writable(self.folder)
        position, settings = self.model.position, self.settings
        optimizer = torch.optim.Adam(position.parameters(), lr=settings.learning_rate)
        best = {name: value.detach().clone() for name, value in position.named_parameters()}
        state, evaluations = self._resume(optimizer, best)
        if not state.scales:
            began = time.monotonic()
            at_start = self.objective.validation_losses()
            state.scales = self.objective.scales(at_start)
            state.start_validation = state.best_validation = self.objective.value(at_start, state.scales)
            self.cost.seconds += time.monotonic() - began
        with self._open_history(state.step) as history:
            if settings.optimizer == "lbfgs":
                ending = self._lbfgs(state, best, evaluations, history)
            else:
                ending = self._adam(state, best, optimizer, history)
        position.load_state_dict(best)
        self.cost.peak_bytes = peak_bytes(self.cost.device)
        self.cost = self.objective.total_cost()
        result = {**self._result(state), **ending}
        if self.group.first:
            write_json(self.folder / "cost.json", self.cost.as_dict())
            write_json(self.folder / COEFFICIENTS, result)
            (self.folder / STATE).unlink(missing_ok=True)
        self.group.wait()
        return result

    def _open_history(self, lines: int) -> Any:
        return open_log(self.folder / HISTORY, lines) if self.group.first else nullcontext()

    def _write(self, history: Any, record: dict[str, Any], began: float) -> None:
        self.cost.seconds += time.monotonic() - began
        if history is not None:
            history.write(json.dumps({**record, "seconds": round(self.cost.seconds, 3)}) + "\n")
            history.flush()

    # ---- Adam --------------------------------------------------------------------------------------------------

    def _adam(
        self, state: State, best: dict[str, Tensor], optimizer: torch.optim.Optimizer, history: Any
    ) -> dict[str, Any]:
        settings = self.settings
        batches = self.objective.batches(state.step)
        with Progress("positioning", settings.steps, done=state.step) as progress:
            while state.step < settings.steps and state.without_improvement < settings.patience:
                began = time.monotonic()
                record = self._step(optimizer, next(batches), state)
                state.step += 1
                if state.step % settings.validate_every == 0 or state.step == settings.steps:
                    record["validation_loss"] = self._validate(state, best)
                self._write(history, record, began)
                progress.advance(1, loss=record["loss"])
                asked = self._asked_to_stop()
                if asked or state.step % settings.checkpoint_every == 0:
                    self._save(state, best, _moments(optimizer))
                if asked and state.step < settings.steps:
                    self._preempt(state)
        return {}

    def _step(self, optimizer: torch.optim.Optimizer, batches: list[TextBatch], state: State) -> dict[str, Any]:
        self.model.settings.reseed(self.seed * 1_000_003 + state.step)
        described = self._describe(self.model.position().detach())
        point = self.objective.differentiate([batches], state.scales)
        self._require_finite(point, state.step)
        optimizer.step()
        return {"step": state.step, "loss": point.value, "losses": point.losses, **described}

    def _require_finite(self, point: Point, step: int) -> None:
        if not torch.isfinite(torch.tensor(point.value)):
            raise InputError(
                f"positioning: the loss is {point.value} at step {step}; lower positioning.learning_rate, or look at "
                "the probe rows"
            )

    # ---- L-BFGS ------------------------------------------------------------------------------------------------

    def _lbfgs(
        self, state: State, best: dict[str, Tensor], evaluations: list[Evaluation], history: Any
    ) -> dict[str, Any]:
        """Every evaluation is recorded with its gradient: a resumed search is told them again and goes the same way."""
        rounds, settings, position = self.objective.whole_probe(), self.settings, self.model.position

        def evaluate() -> Evaluation:
            began = time.monotonic()
            self.model.settings.reseed(self.seed * 1_000_003)
            point = self.objective.differentiate(rounds, state.scales)
            self._require_finite(point, state.step)
            found = Evaluation.of(position, point.value)
            record = {
                "step": state.step,
                "loss": point.value,
                "losses": point.losses,
                **self._describe(point.c),
                "gradient_norm": float(found.gradient.norm()),
            }
            state.step += 1
            if state.step % settings.validate_every == 0:
                record["validation_loss"] = self._validate(state, best)
            self._write(history, record, began)
            progress.advance(1, loss=point.value)
            evaluations.append(found)
            self._save(state, best, {}, evaluations)
            if self._asked_to_stop():
                self._preempt(state)
            return found

        with Progress("positioning", settings.steps, done=state.step) as progress:
            found = minimize(position, evaluate, list(evaluations), settings.steps)
        if state.step % settings.validate_every:
            self._validate(state, best)
        return {
            "evaluations": len(evaluations),
            "converged": found.converged,
            "probe_loss": {"start": evaluations[0].value, "end": found.value},
            "gradient_norm": {"start": float(evaluations[0].gradient.norm()), "end": found.gradient_norm},
        }

    # ---- stopping ----------------------------------------------------------------------------------------------

    def _asked_to_stop(self) -> bool:
        """Whether any rank was."""
        asked = torch.tensor(float(self.stop is not None and self.stop.asked), device=self.group.device)
        return float(self.group.sum(asked)) > 0

    def _preempt(self, state: State) -> None:
        say(f"positioning: stopped by SIGTERM, saved at step {state.step} of {self.settings.steps}")
        raise Preempted

    # ---- validation and what is written --------------------------------------------------------------------------

    def _validate(self, state: State, best: dict[str, Tensor]) -> float:
        value = self.objective.value(self.objective.validation_losses(), state.scales)
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
            "c": dict(zip(names, c.tolist(), strict=True)),
        }

    @torch.no_grad()
    def _result(self, state: State) -> dict[str, Any]:
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
            "optimizer": self.settings.optimizer,
            "steps": state.step,
            "best_step": state.best_step,
            "validation": {"start": state.start_validation, "best": state.best_validation},
            "loss_scales": state.scales,
            "key": self.key,
        }

    # ---- resuming ----------------------------------------------------------------------------------------------

    def _save(
        self,
        state: State,
        best: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        evaluations: list[Evaluation] | None = None,
    ) -> None:
        state.cost = self.objective.total_cost().as_dict()
        if not self.group.first:
            return
        tensors: dict[str, Tensor] = {
            f"position.{name}": value for name, value in self.model.position.named_parameters()
        }
        tensors |= {f"best.{name}": value for name, value in best.items()}
        tensors |= moments
        for number, evaluation in enumerate(evaluations or []):
            tensors |= evaluation.tensors(f"evaluation.{number}")
        save_state(self.folder, self.key, state, tensors)

    def _resume(self, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> tuple[State, list[Evaluation]]:
        found = self.group.from_first(lambda: load_state(self.folder, self.key))
        if found is None:
            return State(), []
        state, tensors = found
        with torch.no_grad():
            for name, parameter in self.model.position.named_parameters():
                if self.settings.optimizer == "adam":  # L-BFGS goes its way again from the start
                    parameter.copy_(tensors[f"position.{name}"])
                best[name] = tensors[f"best.{name}"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = value
        if moments:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        count = len({name.split(".")[1] for name in tensors if name.startswith("evaluation.")})
        evaluations = [Evaluation.from_tensors(tensors, f"evaluation.{number}") for number in range(count)]
        if self.group.first:
            self.cost = self.objective.cost = Cost.from_dict(state.cost)
        say(f"positioning: resumed at step {state.step} of {self.settings.steps}")
        return state, evaluations


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"adam.{number}.{name}": torch.as_tensor(value)
        for number, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }
