"""The training loop: one for experts and joint baselines, for one process and for many, under any engine.

The plan of batches is made before the first step, every batch reseeds its random numbers from (seed, number), and the
learning rate is a function of the step; so a checkpoint is weights, optimizer state and a position in the plan, and a
run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalemerge.checkpoints.atomic import RECORD, new_folder, read_json, remove_folder, require_writable, write_json
from scalemerge.data.collate import collate
from scalemerge.distributed.watching import Heartbeats, Preempted, StopRequest
from scalemerge.encoder import Encoder, add_lora, local_folder
from scalemerge.encoder.adapters import merge_adapter
from scalemerge.encoder.loading import Quantization
from scalemerge.errors import InputError
from scalemerge.objectives.batches import Feature, TextBatch, batch_losses, token_count
from scalemerge.objectives.gradient_cache import GradientCache
from scalemerge.progress import Progress, say
from scalemerge.recipe import Base, Training
from scalemerge.report.cost import Cost, FlopCounter, peak_bytes
from scalemerge.training.best import BestWeights
from scalemerge.training.chunks import find_chunk_tokens
from scalemerge.training.engine import Engine, make_accelerator
from scalemerge.training.feeding import Feeder
from scalemerge.training.job import Job
from scalemerge.training.metrics import Meter, StepLog, check_trackers
from scalemerge.training.state import full_shape, load_state, prime, restore_masters, save_state, save_weights
from scalemerge.training.validation import Validation


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


def load_encoder(base: Base, *, quantize: Quantization = "none", empty: bool = False) -> Encoder:
    return Encoder.load(
        base.path,
        pooling=base.pooling,
        normalize=base.normalize,
        max_length=base.max_length,
        attention=base.attention,
        trust_remote_code=base.trust_remote_code,
        bidirectional=base.bidirectional,
        pool_prompt=base.pool_prompt,
        quantize=quantize,
        empty=empty,
    )


def train(job: Job, folder: Path) -> Cost:
    """Train a model into a sentence-transformers folder, resuming where an earlier run stopped. Returns its cost.

    Collective under a launcher: every rank calls it. Raises Preempted (exit code 0) after SIGTERM, when all is saved.
    """
    key = job.key()
    done = finished(folder, key)
    if done is not None:
        remove_folder(work_folder(folder))
        return done
    require_writable(folder.parent)
    check_trackers(job.settings.trackers)
    accelerator = make_accelerator(job.settings, folder.with_name(f"{folder.name}.logs"))
    with StopRequest() as stop, Heartbeats(accelerator.process_index, accelerator.num_processes, stop):
        cost = _Trainer(job, key, folder, accelerator, stop).run()
        accelerator.wait_for_everyone()
    accelerator.free_memory()
    return cost


class _Trainer:
    repeated = 0.0  # FLOPs of forward passes that the gradient cache makes again

    def __init__(self, job: Job, key: str, folder: Path, accelerator: Any, stop: StopRequest) -> None:
        self.job, self.key, self.folder, self.stop = job, key, folder, stop
        self.work = work_folder(folder)
        self.settings = settings = job.settings
        self.base = Path(local_folder(job.base.path))
        if settings.batch_size < accelerator.num_processes:
            raise InputError(
                f"training.batch_size: {settings.batch_size} rows cannot be shared by "
                f"{accelerator.num_processes} processes; raise it"
            )
        encoder = load_encoder(job.base, quantize=settings.lora.quantize if settings.lora else "none")
        encoder.prompts = _common_prompts(job)
        _set_dropout(encoder.backbone, settings.dropout)
        self.flops = FlopCounter(encoder.backbone)
        torch.manual_seed(job.seed)  # the adapter's first matrices are random, and the same on every rank
        if settings.lora:
            add_lora(encoder, settings.lora)
        if settings.gradient_checkpointing:
            encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.encoder = encoder
        optimizer = torch.optim.AdamW(_decay_groups(encoder, settings.weight_decay), lr=0.0)
        self.engine = Engine(accelerator, encoder, optimizer, settings.clip_norm)
        rounded = [] if settings.lora else restore_masters(self.engine, self.base)
        if rounded:
            say(f"training {job.name}: {len(rounded)} weights start rounded to bfloat16, e.g. {rounded[0]}: the base's "
                "files name them otherwise")  # fmt: skip
        self.cost = Cost(device=str(accelerator.device))
        self.chunk_tokens: int | None = None if settings.chunk_tokens == "auto" else settings.chunk_tokens
        self.validation = Validation(job, self.engine, encoder, self.flops)
        self.dtype = getattr(torch, settings.save_dtype)
        keep_best = settings.keep == "best" and job.held
        self.best = BestWeights(self.engine, encoder, self.base, self.work, self.dtype) if keep_best else None
        self.plan = job.plan()
        self.total = math.ceil(len(self.plan) / settings.accumulate)

    def run(self) -> Cost:
        start = self._resume()
        self.engine.model.train()
        main, evaluated = self.engine.rank == 0, start // (self.settings.evaluate_every or self.total)
        shown: dict[str, float] = {}
        name, every = self.job.name, self.settings.checkpoint_every
        numbers = range(start * self.settings.accumulate, len(self.plan))
        meter = Meter(self.engine, self.settings, self.cost, name)
        with (
            StepLog(self.work / "training.jsonl", start, main) as log,
            StepLog(self.work / "evaluation.jsonl", evaluated, main) as evaluations,
            Feeder(self._make_batch, numbers, self.settings.prefetch) as feeder,
            Progress(f"training {name}", self.total, done=start) as progress,
        ):
            for step in range(start, self.total):
                with meter.step(feeder):
                    parts = range(step * self.settings.accumulate, len(self.plan))[: self.settings.accumulate]
                    measured = self._step(step, [next(feeder) for _ in parts], parts)
                asked, tokens = self.engine.sum(float(self.stop.asked), float(measured.pop("tokens")))
                record = meter.record(step, measured, int(tokens), self.repeated)
                log.write(record)
                if self.validation.due(step + 1, self.total):
                    evaluation = self.validation.run(step + 1, self.chunk_tokens, self.cost)
                    shown = {"score": evaluation["score"]}
                    evaluations.write(evaluation)
                    meter.send_evaluation(evaluation)
                    if self.best:
                        self.best.offer(evaluation)
                progress.advance(1, loss=record["loss"], **shown)
                stopping = asked > 0 and step + 1 < self.total
                if stopping or ((step + 1) % every == 0 and step + 1 < self.total):
                    self._checkpoint(step + 1)
                if stopping:
                    say(f"training {name}: stopped by SIGTERM, saved at step {step + 1} of {self.total}")
                    raise Preempted
        meter.close()
        self.cost.peak_bytes = peak_bytes(self.cost.device)
        self._finish()
        return self.cost

    # ---- one step ----------------------------------------------------------------------------------------------

    def _make_batch(self, number: int) -> TextBatch:
        """This rank's share of a batch; runs in the feeder's thread."""
        planned = self.plan.fetch(number)
        return collate(
            planned.table,
            planned.rows,
            self.job.tasks[planned.task],
            self.encoder.tokenize,
            rank=self.engine.rank,
            world=self.engine.world,
        )

    def _step(self, step: int, batches: list[TextBatch], numbers: range) -> dict[str, Any]:
        """Forward, backward and update over the batches of a step, each with negatives of its own only."""
        rate = learning_rate(self.settings, step, self.total)
        self.engine.set_learning_rate(rate)
        losses: dict[str, list[float]] = {}
        for number, batch in zip(numbers, batches, strict=True):
            torch.manual_seed((self.job.seed * 1_000_003 + number + 7_919_000_000 * self.engine.rank) % 2**63)
            loss = self._accumulate(step, batch, len(batches), number == numbers[-1])
            losses.setdefault(batch.task, []).append(loss)
        by_task = {task: sum(values) / len(values) for task, values in losses.items()}
        self.cost.examples += len(batches) * self.settings.batch_size
        return {
            "task": "+".join(by_task),
            "loss": sum(sum(values) for values in losses.values()) / len(batches),
            **({"losses": by_task} if len(by_task) > 1 else {}),
            "learning_rate": rate,
            "gradient_norm": self.engine.step(),
            "tokens": token_count(batches),
        }

    def _accumulate(self, step: int, batch: TextBatch, parts: int, last: bool) -> float:
        """Add a batch's gradient, divided by the batches of the step. Returns its loss."""
        engine, scale = self.engine, self.engine.world / parts
        if self.settings.chunk_tokens is None:
            found: list[float] = []

            def make_loss() -> Tensor:
                (loss,) = batch_losses([batch], self._encode, rank=engine.rank)
                found.append(self._require_finite(loss, step, batch.task))
                return loss * scale

            engine.backward(make_loss, last)
            return found[0]
        if self.chunk_tokens is None:
            texts = [text for of_role in batch.roles.values() for text in of_role]
            self.chunk_tokens = find_chunk_tokens(engine, self._embed, texts)
            say(f"training {self.job.name}: chunk_tokens: auto found {self.chunk_tokens}")
        cache = GradientCache(
            self._encode_chunk, self.chunk_tokens, engine.world, hold=lambda alone: engine.part(last and alone)
        )
        (loss,) = batch_losses([batch], cache.encode, rank=engine.rank)
        value = self._require_finite(loss, step, batch.task)
        (loss * scale).backward()  # to the cached embeddings only
        cache.backward(lambda surrogate, final: engine.backward(surrogate, last and final))
        return value

    def _require_finite(self, loss: Tensor, step: int, task: str) -> float:
        if not torch.isfinite(loss):
            raise InputError(
                f"training {self.job.name}: the loss is {loss.item()} at step {step} (task '{task}'); lower "
                "learning_rate, or look at this task's data"
            )
        return loss.item()

    def _encode(self, features: list[Feature]) -> Tensor:
        """This rank's texts in one call, in groups of length: as many on every rank, as sharded models need it."""
        count = min(self.settings.length_groups, self.settings.batch_size // self.engine.world)
        groups, inverse = self.encoder.groups(features, count)
        self.cost.flops += 3 * self.flops.forward([group["input_ids"].shape for group in groups])
        return self.engine.model(groups)[inverse]

    def _encode_chunk(self, features: list[Feature]) -> Tensor:
        """A chunk of the gradient cache: one padded batch. Forward alone or forward and backward, which is three."""
        padded = self.encoder.pad(features)
        forward = self.flops.forward([padded["input_ids"].shape])
        if torch.is_grad_enabled():
            self.cost.flops += 3 * forward
        else:
            self.cost.flops += forward
            self.repeated += forward
        return self.engine.model([padded])

    def _embed(self, features: list[Feature]) -> Tensor:
        return self.engine.model([self.encoder.pad(features)])

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _checkpoint(self, step: int) -> None:
        """Weights, optimizer and position under a temporary name, then renamed; the one before is dropped last."""
        main = self.engine.rank == 0
        final, temporary = self.work / f"step-{step:08d}", self.work / f"partial-{step:08d}"
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        save_state(self.engine, temporary)
        if main:
            progress = {
                "key": self.key,
                "step": step,
                "world": self.engine.world,
                "engine": self.engine.name,
                "chunk_tokens": self.chunk_tokens,
                "plan": self.plan.state(step * self.settings.accumulate),
                "cost": self.cost.as_dict(),
                "best": self.best.kept if self.best else None,
            }
            write_json(temporary / "progress.json", progress)
            temporary.rename(final)
            for old in self.work.glob("step-*"):
                if old != final:
                    remove_folder(old)
        if self.best:
            self.best.checkpointed()
        self.engine.wait()

    def _resume(self) -> int:
        """Continue from the last whole checkpoint, which rank 0 reads for all. Returns the step to make next."""
        checkpoint, record = self.engine.from_first_rank(self._find_checkpoint)
        if self.best:
            self.best.restore(record and record["best"])
        if record is None:
            return 0
        if record["world"] != self.engine.world or record["engine"] != self.engine.name:
            say(
                f"training {self.job.name}: the checkpoint is of {record['engine']} on {record['world']} rank(s), this "
                f"run is {self.engine.name} on {self.engine.world}: same batches in the same order, rounding differs"
            )
        prime(self.engine, lambda: self._embed(self.encoder.tokenize(["a"])).sum() * 0.0)
        load_state(self.engine, checkpoint, record["step"])
        self.plan.restore(record["plan"])
        self.cost = Cost.from_dict(record["cost"])
        self.chunk_tokens = record["chunk_tokens"]
        say(f"training {self.job.name}: resumed at step {record['step']} of {self.total}")
        return int(record["step"])

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any] | None]:
        for checkpoint in sorted(self.work.glob("step-*"), reverse=True):
            if not (checkpoint / "progress.json").is_file():
                continue
            record = read_json(checkpoint / "progress.json")
            if record["key"] != self.key:
                raise InputError(
                    f"{checkpoint}: belongs to another recipe, data or base; delete {self.work} or give another --out"
                )
            return checkpoint, record
        return self.work, None

    def _finish(self) -> None:
        """The model into its folder: weights streamed tensor by tensor through rank 0, and what describes them."""
        engine, main, dtype = self.engine, self.engine.rank == 0, self.dtype
        streamed = self.folder.with_name(f"{self.folder.name}.weights")
        if main:
            shutil.rmtree(streamed, ignore_errors=True)
            self.encoder.save_description(streamed, dtype=dtype)
        kept = self.best.kept if self.best else {"step": self.total}
        if self.best:
            self.best.place(streamed)
        else:
            save_weights(engine, self.encoder, self.base, streamed, dtype)
        if main:
            with new_folder(self.folder) as partial:
                if self.settings.lora and self.settings.lora.save == "merged":
                    merged_encoder(streamed, dtype).save(partial)
                else:
                    shutil.copytree(streamed, partial, dirs_exist_ok=True, copy_function=os.replace)
                for log in self.work.glob("*.jsonl"):
                    shutil.copy(log, partial / log.name)
                record = {"key": self.key, "engine": engine.name, "kept": kept, "cost": self.cost.as_dict()}
                write_json(partial / RECORD, record)
            shutil.rmtree(streamed, ignore_errors=True)
            remove_folder(self.work)
        engine.wait()


def merged_encoder(folder: Path, dtype: torch.dtype) -> Encoder:
    """The model of an adapter folder with the adapter added to its base's weights, in float32, then in `dtype`."""
    encoder = Encoder.load(folder, dtype=torch.float32)
    merge_adapter(encoder)
    return encoder.to(dtype)


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
    """Weight decay for matrices only: none for biases, norms, and other vectors. Empty groups are left out."""
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if len(full_shape(p)) > 1]
    vectors = [p for p in trainable if len(full_shape(p)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
