"""Whole weights and optimizer state out of any engine, and back into any other.

Engines cut them differently: ZeRO-1 and 2 flatten and share out the optimizer's float32 numbers, ZeRO-3 the weights as
well, FSDP2 shards rows. Here a parameter's float32 master and its Adam moments are put together one at a time, on every
rank, so that a checkpoint is the same whatever engine and however many ranks wrote it, nothing but safetensors, and
resumes under another engine or world size. At no time is more than one tensor held whole.

All functions are collective: every rank calls them for the same parameters in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from scalemerge.checkpoints.reader import Checkpoint, TensorSpec
from scalemerge.checkpoints.writer import write_safetensors
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE = "state.safetensors"


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, also where a rank holds a part alone."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_weight(parameter: Tensor) -> Tensor:
    """A whole parameter or buffer: the float32 master where the engine keeps one."""
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()  # type: ignore[attr-defined]
    if parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().view(full_shape(parameter))
    with gathered(parameter):
        return parameter.detach().clone() if hasattr(parameter, "ds_id") else parameter.detach()


@contextmanager
def gathered(parameter: Tensor, modifier: int | None = None) -> Iterator[None]:
    """A ZeRO-3 parameter whole inside the block; with `modifier`, that rank's changes to it are kept."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier):
        yield


def _full_moment(engine: Engine, parameter: nn.Parameter, key: str) -> Tensor:
    if engine.deepspeed:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key).detach().view(full_shape(parameter))
    value = engine.torch_optimizer.state[parameter][key]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _placed_like(own: Any, value: Tensor) -> Tensor:
    """A whole tensor, sharded as `own` is where that is a DTensor (FSDP2)."""
    if not hasattr(own, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements)


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad(), gathered(parameter, modifier=0):
        parameter.copy_(_placed_like(parameter, value).to(parameter.dtype))
    _set_shard(parameter, value, None)


def _set_moment(engine: Engine, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    if engine.deepspeed:
        _set_shard(parameter, value, key)
        return
    own = engine.torch_optimizer.state[parameter][key]
    own.copy_(_placed_like(own, value))


def _set_shard(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """This rank's part of a master (key None) or moment of ZeRO. DeepSpeed's own setter for stage 3 fails where the
    elements do not divide by the ranks, so the part is cut here."""
    from_zero = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
    if not from_zero:
        return
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    flat = value.flatten()
    start = size * dist.get_rank()
    mine = flat.new_zeros(size)
    held = flat[start : start + size]
    mine[: len(held)] = held
    if key is None:
        utils.safe_set_local_fp32_param(parameter, mine)
    else:
        utils.safe_set_local_optimizer_state(parameter, mine, key)


def prime(engine: Engine, zero_loss: Any) -> None:
    """Make the optimizer's state exist: a step at rate 0 on zero gradients. zero_loss: makes a scalar of the model."""
    engine.set_learning_rate(0.0)
    engine.backward(zero_loss, True)
    engine.step()


def restore_masters(engine: Engine, folder: Path) -> list[str]:
    """Set float32 masters to the base's own weights, before the first step. Returns the names that were not found.

    DeepSpeed makes its masters from weights it has rounded to bfloat16 already, so that every expert would differ from
    its base by the rounding, which is as large as what a short training changes. Each rank reads its part of the file.
    """
    if not engine.deepspeed or engine.accelerator.mixed_precision != "bf16":
        return []
    base, missing = Checkpoint(folder), []
    for name, parameter in trained_parameters(engine.model):
        own = name.removeprefix("backbone.")
        if own in base.specs and base.specs[own].shape == full_shape(parameter):
            _set_shard(parameter, base.read(own).to(engine.device, torch.float32), None)
        else:
            missing.append(own)
    return missing


# ---- files -------------------------------------------------------------------------------------------------------


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters by name, without the wrappers' prefix; tied ones once."""
    return [
        (name.removeprefix("module."), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def write_tensors(engine: Engine, path: Path, entries: Iterable[tuple[str, TensorSpec, Any]]) -> None:
    """Stream tensors into a safetensors file on rank 0. entries: name, shape and dtype, a collective that makes it."""
    entries = list(entries)
    makers = {name: (spec, make) for name, spec, make in entries}

    def made(name: str) -> Tensor:
        spec, make = makers[name]
        return make().to(device="cpu", dtype=spec.dtype)

    if engine.rank == 0:
        write_safetensors(path, {name: spec for name, spec, _ in entries}, made)
    else:
        for _, _, make in entries:
            make()


def _link_moments(engine: Engine) -> None:
    """ZeRO-1 and 2 tell parameters where their moments are after the first group's first step, when the later groups
    have none yet (DeepSpeed 0.19); so they are told again."""
    zero: Any = engine.model.optimizer if engine.deepspeed else None
    if hasattr(zero, "single_partition_of_fp32_groups"):
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def save_state(engine: Engine, folder: Path) -> None:
    """Masters and moments of all trained parameters into FOLDER/state.safetensors (float32)."""
    _link_moments(engine)
    entries: list[tuple[str, TensorSpec, Any]] = []
    for name, parameter in trained_parameters(engine.model):
        spec = TensorSpec(full_shape(parameter), torch.float32)
        entries.append((name, spec, lambda p=parameter: full_weight(p)))
        for key in MOMENTS:
            entries.append((f"{key}/{name}", spec, lambda p=parameter, k=key: _full_moment(engine, p, k)))
    write_tensors(engine, folder / FILE, entries)


def load_state(engine: Engine, folder: Path, updates: int) -> None:
    """Read what `save_state` wrote, after `prime`; rank 0 reads and hands out. updates: optimizer steps made so far."""
    _link_moments(engine)
    path = folder / FILE
    stored = safe_open(str(path), framework="pt") if engine.rank == 0 else None
    names = set(stored.keys()) if stored else set()
    for name, parameter in trained_parameters(engine.model):
        for key in (None, *MOMENTS):
            entry = name if key is None else f"{key}/{name}"
            value = torch.empty(full_shape(parameter), dtype=torch.float32, device=engine.device)
            if stored:
                if entry not in names:
                    raise InputError(f"{path}: lacks '{entry}'; delete {folder} to train from the start")
                value.copy_(stored.get_tensor(entry))
            if engine.world > 1:
                dist.broadcast(value, 0)
            if key is None:
                _set_weight(parameter, value)
            else:
                _set_moment(engine, parameter, key, value)
    for state in engine.torch_optimizer.state.values():
        if "step" in state:
            step = state["step"]
            state["step"] = torch.full_like(step, updates) if isinstance(step, Tensor) else updates


def save_weights(engine: Engine, encoder: Encoder, base: Path, folder: Path, dtype: torch.dtype) -> None:
    """The weights file of a finished model: floating-point tensors in `dtype`, from their float32 masters.

    Frozen parameters are read from the base, as an engine may hold them rounded.
    """
    stored = Checkpoint(base) if (base / "config.json").is_file() else None
    entries: list[tuple[str, TensorSpec, Any]] = []
    for name, tensor in encoder.weights_to_save():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        spec = TensorSpec(full_shape(tensor), kept)
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        if stored and frozen and name in stored.specs and stored.specs[name].shape == spec.shape:
            entries.append((name, spec, lambda n=name: stored.read(n)))
        else:
            entries.append((name, spec, lambda t=tensor: full_weight(t)))
    write_tensors(engine, folder / encoder.weights_file, entries)
