"""The engine that trains: plain, DDP, DeepSpeed ZeRO or FSDP2, as `accelerate launch` says, and proof that it runs.

Accelerate falls back silently: with `use_cpu: true` a DeepSpeed configuration trains plain DDP, an FSDP configuration
on CPU trains unsharded. So the launcher's wish is compared with what Accelerate set up, and after `prepare` the
prepared objects are looked at: their class, stage, partitioned parameters and world size.

Gradients are averaged over ranks by every engine: a loss of the global batch, of which a rank differentiates its own
rows only, is multiplied by the world size before backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalemerge.distributed.group import TIMEOUT_MINUTES, from_first_rank, launched_world
from scalemerge.errors import InputError
from scalemerge.recipe import Training
from scalemerge.training.build_locks import remove_stale_locks


def launched_with(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def deepspeed_launched() -> bool:
    return launched_with("ACCELERATE_USE_DEEPSPEED")


def fsdp_launched() -> bool:
    return launched_with("ACCELERATE_USE_FSDP")


def resolve_precision(settings: Training, device: str) -> str:
    """Accelerate's name of the precision asked for; bf16 on a GPU without it is refused."""
    if settings.precision == "bf16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        raise InputError("training.precision: this GPU has no bfloat16; use precision: fp32")
    return "bf16" if settings.precision == "bf16" else "no"


def make_accelerator(settings: Training, logs: Path | None = None) -> Any:
    """An Accelerator for the launch environment: gloo on CPU processes, the backend's own choice elsewhere.

    Raises InputError when Accelerate set up another engine than the launcher or the recipe asked for: before a model is
    loaded. logs: where trackers write.
    """
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it keeps the precision of the model trained before; the process group stays
    on_cpu = not torch.cuda.is_available()
    sharded = deepspeed_launched() or fsdp_launched()
    handlers = []
    if launched_world() > 1 or sharded:
        timeout = timedelta(minutes=TIMEOUT_MINUTES)
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else None, timeout=timeout))
    if deepspeed_launched():
        _require_deepspeed(on_cpu)
    accelerator = Accelerator(
        mixed_precision=resolve_precision(settings, "cpu" if on_cpu else "cuda"),
        cpu=True if on_cpu and not sharded else None,
        kwargs_handlers=handlers or None,
        log_with=list(settings.trackers) or None,
        project_dir=str(logs) if logs else None,
    )
    verify_launch(accelerator, settings.engine)
    if accelerator.state.deepspeed_plugin is not None:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = max(1, settings.batch_size // accelerator.num_processes)
        config["gradient_accumulation_steps"] = 1  # boundaries are set by hand, see Engine.backward
        config["gradient_clipping"] = settings.clip_norm
        config["steps_per_print"] = 10**9
        if settings.precision == "bf16":  # or the chunks of a gradient cache would be added up in bfloat16
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return accelerator


def _require_deepspeed(on_cpu: bool) -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise InputError("accelerate configuration: DeepSpeed is not installed; pip install 'scalemerge[train]'") from (
            None
        )
    if on_cpu and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise InputError("accelerate configuration: DeepSpeed on CPU processes needs DS_ACCELERATOR=cpu; export it")
    remove_stale_locks()


def configured_engine(accelerator: Any) -> str:
    """The name of the engine that Accelerate has set up: plain, ddp, zero1, zero2, zero3, zero3_offload or fsdp2."""
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1].upper()
    if kind == "DEEPSPEED":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        offloads = [(zero.get(f"offload_{what}") or {}).get("device", "none") for what in ("optimizer", "param")]
        offloaded = any(device not in ("none", None) for device in offloads)
        return f"zero{zero['stage']}" + ("_offload" if offloaded else "")
    if kind == "FSDP":
        return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
    return "ddp" if accelerator.num_processes > 1 else "plain"


def verify_launch(accelerator: Any, asked: str) -> str:
    """Compare the engine asked for, by the launcher and by the recipe, with the one set up. Raises InputError."""
    found = configured_engine(accelerator)
    wanted = "DeepSpeed" if deepspeed_launched() else "FSDP" if fsdp_launched() else None
    family = {"zero": "DeepSpeed", "fsdp": "FSDP"}.get(found[:4])
    if wanted != family:
        remedy = {
            "DeepSpeed": "set use_cpu: false (with DS_ACCELERATOR=cpu on a machine without GPU), and unset "
            "ACCELERATE_USE_CPU",
            "FSDP": "FSDP needs GPUs; on CPU processes use zero3_cpu.yaml",
        }.get(wanted or "", "choose another configuration")
        raise InputError(f"accelerate configuration: it asks for {wanted} but {found} runs; {remedy}")
    if found == "fsdp1":
        raise InputError("accelerate configuration: fsdp_version is 1; set fsdp_version: 2 (fsdp2.yaml)")
    if asked != "auto" and asked != found:
        raise InputError(
            f"training.engine: {asked} was asked for but {found} runs; start with "
            f"'accelerate launch --config_file accelerate_configs/{asked}.yaml -m scalemerge train ...'"
        )
    world = launched_world()
    if accelerator.num_processes != world:
        raise InputError(
            f"accelerate configuration: {world} processes were started but the engine sees "
            f"{accelerator.num_processes}; on CPU processes set distributed_type: MULTI_GPU and use_cpu: false"
        )
    return found


class Engine:
    """A model and its optimizer, prepared: backward of a part, step of the whole, the same under every engine.

    model: what `prepare` made, to be called; name: the engine that runs, verified.
    """

    def __init__(self, accelerator: Any, module: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        self.accelerator, self.clip_norm = accelerator, clip_norm
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.name = configured_engine(accelerator)
        self.deepspeed = self.name.startswith("zero")
        verify_prepared(self)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def torch_optimizer(self) -> Any:
        """The optimizer inside Accelerate's and DeepSpeed's wrappers: param_groups and state."""
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one part of a step; `last`: the part after which gradients are complete.

        DDP, ZeRO-1 and FSDP2 synchronize with the last part only; ZeRO-2 and 3 reduce every part into their shards.
        """
        if self.deepspeed:
            self.model.set_gradient_accumulation_boundary(last)
            yield
            return
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, make_loss: Callable[[], Tensor], last: bool) -> None:
        """Back-propagate one part of a step. make_loss runs the model, or uses what it gave within `part(last)`."""
        with self.part(last):
            (self.model if self.deepspeed else self.accelerator).backward(make_loss())

    def step(self) -> float:
        """Clip, update, clear. Returns the gradient's norm before clipping."""
        if self.deepspeed:
            self.model.step()
            return float(self.model.get_global_grad_norm())
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def sum(self, *values: float) -> list[float]:
        """Numbers added up over all ranks."""
        if self.world == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()

    def from_first_rank(self, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0, on every rank; an InputError it raises is raised on every rank.

        Ranks may not see the same disk, or see it at different moments: what decides the course is read once.
        """
        return from_first_rank(make, self.rank, self.world)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def verify_prepared(engine: Engine) -> None:
    """Look at what `prepare` made: class, stage, world size, partitioned parameters. Raises InputError."""
    name, model, world = engine.name, engine.model, engine.world
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    problem = None
    if name == "ddp":
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            problem = f"the model is a {type(model).__name__}, not DistributedDataParallel"
    elif name == "fsdp2":
        if not any(hasattr(parameter, "full_tensor") for parameter in trained):
            problem = "no parameter is a DTensor"
    elif name.startswith("zero"):
        stage = int(name[4])
        if type(model).__name__ != "DeepSpeedEngine" or model.zero_optimization_stage() != stage:
            problem = f"the model is a {type(model).__name__}, not a DeepSpeed engine of stage {stage}"
        elif model.dp_world_size != world:
            problem = f"DeepSpeed shards over {model.dp_world_size} ranks, not {world}"
        elif stage == 3:
            whole = [p for p in trained if not hasattr(p, "ds_tensor") or p.ds_tensor.ds_numel * world < p.ds_numel]
            if whole or not trained:
                problem = f"{len(whole)} of {len(trained)} parameters are not partitioned"
        elif not _partitioned_optimizer(engine.torch_optimizer, trained, world):
            problem = "the optimizer's parameters are not partitioned"
    if problem:
        raise InputError(f"accelerate configuration: {name} was asked for but {problem}; check the installed versions")


def _partitioned_optimizer(optimizer: Any, trained: list[nn.Parameter], world: int) -> bool:
    """Whether a rank's optimizer holds its share of the numbers alone (padding aside)."""
    own = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    padding = 1024 * world * len(optimizer.param_groups)
    return own <= sum(parameter.numel() for parameter in trained) / world + padding
