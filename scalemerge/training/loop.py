"""The training loop: one for experts and joint baselines, for one process and for many.

The plan of batches is made before the first step, every step reseeds its random numbers from (seed, step), and the
learning rate is a function of the step; so a checkpoint is weights, optimizer state and a step number, and a run that
was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalemerge.checkpoints.atomic import RECORD, new_folder, open_log, read_json, require_writable, write_json
from scalemerge.data.collate import collate
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.objectives.batches import Feature, batch_losses, token_count
from scalemerge.objectives.gradient_cache import GradientCache
from scalemerge.progress import Progress, say
from scalemerge.recipe import Base, Training
from scalemerge.report.cost import Cost, FlopCounter, peak_bytes
from scalemerge.training.engine import make_accelerator, verify_engine
from scalemerge.training.job import Job


def learning_rate(settings: Training, step: int, total: int) -> float:
    """The rate at a step: linear warm-up, then constant, linear or cosine decay to 0 at the end."""
    warmup = round(total * settings.warmup_ratio)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
    return settings.learning_rate * factor


def finished(folder: Path, key: str) -> Cost | None:
    """The cost of a model that is already trained, or None. Raises InputError when it was trained differently."""
    if not folder.exists():
        return None
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder}: exists but was not written by scalemerge; move it or give another --out")
    record = read_json(folder / RECORD)
    if record.get("key") != key:
        raise InputError(f"{folder}: was trained with another recipe, data or base; delete it or give another --out")
    return Cost.from_dict(record["cost"])


def work_folder(folder: Path) -> Path:
    """Where log and checkpoints are while a model is trained."""
    return folder.with_name(f"{folder.name}.work")


def load_encoder(base: Base) -> Encoder:
    return Encoder.load(
        base.path,
        pooling=base.pooling,
        normalize=base.normalize,
        max_length=base.max_length,
        attention=base.attention,
        trust_remote_code=base.trust_remote_code,
    )


def train(job: Job, folder: Path) -> Cost:
    """Train a model into a sentence-transformers folder, resuming where an earlier run stopped. Returns its cost."""
    key = job.key()
    done = finished(folder, key)
    if done is not None:
        shutil.rmtree(work_folder(folder), ignore_errors=True)
        return done
    require_writable(folder.parent)
    accelerator = make_accelerator(job.settings)
    trainer = _Trainer(job, key, folder, accelerator)
    cost = trainer.run()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return cost


class _Trainer:
    def __init__(self, job: Job, key: str, folder: Path, accelerator: Any) -> None:
        self.job, self.key, self.folder, self.accelerator = job, key, folder, accelerator
        self.work = work_folder(folder)
        self.settings = job.settings
        encoder = load_encoder(job.base)
        _set_dropout(encoder.backbone, self.settings.dropout)
        if self.settings.gradient_checkpointing:
            encoder.backbone.gradient_checkpointing_enable()  # type: ignore[operator]
        self.encoder = encoder
        self.flops = FlopCounter(encoder.backbone)
        optimizer = torch.optim.AdamW(_decay_groups(encoder, self.settings.weight_decay), lr=0.0)
        self.model, self.optimizer = accelerator.prepare(encoder, optimizer)
        self.engine = verify_engine(accelerator, self.settings.engine)
        if self.settings.batch_size < accelerator.num_processes:
            raise InputError(
                f"training.batch_size: {self.settings.batch_size} rows cannot be shared by "
                f"{accelerator.num_processes} processes; raise it"
            )
        self.cost = Cost(device=str(accelerator.device))

    def run(self) -> Cost:
        plan = self.job.plan()
        start = self._resume(len(plan))
        self.model.train()
        log = self._open_log(start)
        with Progress(f"training {self.job.name}", len(plan), done=start) as progress:
            for step in range(start, len(plan)):
                began = time.monotonic()
                record = self._step(step, plan[step].task, plan[step].rows, len(plan))
                self.cost.seconds += time.monotonic() - began
                if log:
                    log.write(json.dumps({**record, "seconds": round(self.cost.seconds, 3)}) + "\n")
                    log.flush()
                progress.advance(1, loss=record["loss"])
                if (step + 1) % self.settings.checkpoint_every == 0 and step + 1 < len(plan):
                    self._checkpoint(step + 1)
        if log:
            log.close()
        self.cost.peak_bytes = peak_bytes(self.cost.device)
        self._finish()
        return self.cost

    def _step(self, step: int, task: str, rows: tuple[int, ...], total: int) -> dict[str, Any]:
        torch.manual_seed((self.job.seed * 1_000_003 + step) % 2**63)
        batch = collate(self.job.tables[task], rows, self.job.tasks[task], self.encoder.tokenize)
        rate = learning_rate(self.settings, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        world = self.accelerator.num_processes
        cache = None
        if self.settings.chunk_tokens is not None:
            cache = GradientCache(self._encode_chunk, self.settings.chunk_tokens, world)
        encode = cache.encode if cache else self._encode
        (loss,) = batch_losses([batch], encode, rank=self.accelerator.process_index, world=world)
        if not torch.isfinite(loss):
            raise InputError(
                f"training {self.job.name}: the loss is {loss.item()} at step {step} (task '{task}'); lower "
                "learning_rate, or look at this task's data"
            )
        if cache:
            (loss * world).backward()  # to the cached embeddings only
            cache.backward(self._backward_chunk)
        else:
            self.accelerator.backward(loss * world)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.cost.examples += len(rows)
        self.cost.tokens += token_count([batch])
        return {
            "step": step,
            "task": task,
            "loss": loss.item(),
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "tokens": self.cost.tokens,
        }

    def _encode(self, features: list[Feature]) -> Tensor:
        groups, inverse = self.encoder.groups(features, self.settings.length_groups)
        self.cost.flops += 3 * self.flops.forward([group["input_ids"].shape for group in groups])
        return self.model(groups)[inverse]

    def _encode_chunk(self, features: list[Feature]) -> Tensor:
        """A chunk of the gradient cache: one padded batch. Forward alone, then forward and backward: 4 in all."""
        padded = self.encoder.pad(features)
        forward = self.flops.forward([padded["input_ids"].shape])
        self.cost.flops += forward * (3 if torch.is_grad_enabled() else 1)
        return self.model([padded])

    def _backward_chunk(self, surrogate: Callable[[], Tensor], last: bool) -> None:
        """Back-propagate one chunk; gradients are averaged over ranks with the last one only."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            self.accelerator.backward(surrogate())

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _checkpoint(self, step: int) -> None:
        """Weights, optimizer and step under a temporary name, then renamed; the one before is dropped last."""
        final = self.work / f"step-{step:08d}"
        temporary = self.work / f"partial-{step:08d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(temporary / "progress.json", {"key": self.key, "step": step, "cost": self.cost.as_dict()})
            temporary.rename(final)
            for old in self.work.glob("step-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self, total: int) -> int:
        for checkpoint in sorted(self.work.glob("step-*"), reverse=True):
            if not (checkpoint / "progress.json").is_file():
                continue
            record = read_json(checkpoint / "progress.json")
            if record["key"] != self.key:
                raise InputError(
                    f"{checkpoint}: belongs to another recipe, data or base; delete {self.work} or give another --out"
                )
            self.accelerator.load_state(str(checkpoint))
            self.cost = Cost.from_dict(record["cost"])
            say(f"training {self.job.name}: resumed at step {record['step']} of {total}")
            return int(record["step"])
        return 0

    def _open_log(self, start: int) -> Any:
        if not self.accelerator.is_main_process:
            return None
        self.work.mkdir(parents=True, exist_ok=True)
        return open_log(self.work / "training.jsonl", start)

    def _finish(self) -> None:
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            weights = {
                name.removeprefix("backbone."): value.detach().cpu().contiguous() for name, value in state.items()
            }
            encoder = self.accelerator.unwrap_model(self.model)
            encoder.prompts = _common_prompts(self.job)
            with new_folder(self.folder) as temporary:
                encoder.save(temporary, state_dict=weights)
                shutil.copy(self.work / "training.jsonl", temporary / "training.jsonl")
                write_json(temporary / RECORD, {"key": self.key, "engine": self.engine, "cost": self.cost.as_dict()})
            shutil.rmtree(self.work, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _common_prompts(job: Job) -> dict[str, str]:
    """Prompts to store with the model: those of its tasks where they agree."""
    found = [task.prompts.model_dump() for task in job.tasks.values()]
    return {key: value for key, value in found[0].items() if value and all(other[key] == value for other in found)}


def _set_dropout(backbone: nn.Module, probability: float) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        for module in backbone.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def _decay_groups(encoder: Encoder, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only: none for biases, norms, and other vectors."""
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    is_matrix: Callable[[nn.Parameter], bool] = lambda parameter: parameter.dim() > 1  # noqa: E731
    return [
        {"params": [p for p in trainable if is_matrix(p)], "weight_decay": weight_decay},
        {"params": [p for p in trainable if not is_matrix(p)], "weight_decay": 0.0},
    ]
