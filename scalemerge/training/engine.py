"""The engine that trains: plain, DDP, DeepSpeed ZeRO or FSDP2, as `accelerate launch` says, and proof that it runs.

Accelerate falls back silently: with `use_cpu: true` a DeepSpeed configuration trains plain DDP, an FSDP configuration
on CPU trains unsharded. So after `prepare` the engine asked for is compared with the one that runs.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from scalemerge.errors import InputError
from scalemerge.recipe import Training


def resolve_precision(settings: Training, device: str) -> str:
    """Accelerate's name of the precision asked for; bf16 on a GPU without it is refused."""
    if settings.precision == "bf16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        raise InputError("training.precision: this GPU has no bfloat16; use precision: fp32")
    return "bf16" if settings.precision == "bf16" else "no"


def make_accelerator(settings: Training) -> Any:
    """An Accelerator for the launch environment: gloo on CPU processes, the backend's own choice elsewhere."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it keeps the precision of the model trained before; the process group stays
    on_cpu = not torch.cuda.is_available()
    handlers = []
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return Accelerator(
        mixed_precision=resolve_precision(settings, "cpu" if on_cpu else "cuda"),
        cpu=True if on_cpu and not deepspeed and not fsdp else None,
        kwargs_handlers=handlers or None,
    )


def running_engine(accelerator: Any) -> str:
    """The name of the engine that runs: plain, ddp, zero1, zero2, zero3 or fsdp2."""
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1].upper()
    if kind == "DEEPSPEED":
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if kind == "FSDP":
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "plain"


def verify_engine(accelerator: Any, asked: str) -> str:
    """Compare the engine asked for, by the recipe and by the launcher, with the one that runs. Raises InputError."""
    running = running_engine(accelerator)
    launched = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        launched = f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        launched = "fsdp2"
    if launched and launched != running:
        raise InputError(
            f"accelerate configuration: it asks for {launched} but {running} runs; set use_cpu: false "
            "(with DS_ACCELERATOR=cpu on a machine without GPU), or choose another configuration"
        )
    if asked != "auto" and asked != running:
        raise InputError(
            f"training.engine: {asked} was asked for but {running} runs; start with "
            f"'accelerate launch --config_file accelerate_configs/{asked}.yaml -m scalemerge train ...'"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise InputError(
            f"accelerate configuration: {world} processes were started but the engine sees {accelerator.num_processes}"
        )
    if running.startswith("zero") or running == "fsdp2":
        raise InputError(f"training.engine: {running} is not supported yet; use ddp or plain")
    return running
