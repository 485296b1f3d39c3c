"""Positioning beyond one device: who holds what, and a model of which each rank reads its own rows alone.

    replicated  every rank holds W0 and all T_i and embeds its share of each probe batch
    sharded     every rank holds its rows of them (layers/sharded.py); biases, norms and small tables are whole

A mesh has two dimensions: replicas of the model, and the ranks that share one. Sums over ranks, not means: each rank
differentiates the loss of the whole batch for its own texts, and the coefficients' gradients are added up once a step.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from scalemerge.distributed.group import Group
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank, TaskVector
from scalemerge.layers import Coefficients, MergeSettings, attach
from scalemerge.layers.gathering import Shards
from scalemerge.layers.sharded import ShardedEmbedding, ShardedLayer, ShardedLinear, ShardedWeight
from scalemerge.recipe import Positioning
from scalemerge.task_vectors import TaskVectorStore

FITS = 0.7  # of a device's free memory: the rest is for activations
LEAST_EMBEDDING = 2**20  # numbers; smaller tables are whole on every rank


def replicated_bytes(store: TaskVectorStore) -> int:
    """Bytes of W0 in float32 and of all task vectors as they are held."""
    return sum(spec.numel * 4 for spec in store.base.specs.values()) + store.held_bytes


def free_bytes(group: Group) -> int:
    """Free memory of this rank's device; a CPU's is shared by the ranks of the machine."""
    if group.device.type == "cuda":
        return int(torch.cuda.mem_get_info(group.device)[0])
    import psutil  # comes with accelerate

    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def choose_sharding(settings: Positioning, store: TaskVectorStore, group: Group) -> str:
    """ "replicated" or "sharded", the same on every rank. Raises InputError for shard_ranks that do not divide."""
    ranks = settings.shard_ranks or group.world
    if group.world % ranks:
        raise InputError(
            f"positioning.shard_ranks: {ranks} does not divide the {group.world} processes; give a divisor of them"
        )
    if ranks == 1:
        return "replicated"
    if settings.sharding != "auto":
        return settings.sharding
    fits = replicated_bytes(store) < FITS * free_bytes(group)
    return "replicated" if all(group.gather(fits)) else "sharded"


def make_shards(group: Group, shard_ranks: int | None = None) -> Shards:
    """The ranks that share a copy of the model with this one: neighbours, so of one machine as far as may be."""
    ranks = shard_ranks or group.world
    mesh = init_device_mesh(group.device.type, (group.world // ranks, ranks), mesh_dim_names=("replicate", "shard"))
    return Shards(mesh["shard"])


def attach_sharded(
    encoder: Encoder,
    store: TaskVectorStore,
    moved: list[str],
    coefficients: Coefficients,
    settings: MergeSettings,
    shards: Shards,
    device: torch.device,
    *,
    least_embedding: int = LEAST_EMBEDDING,
) -> list[ShardedLayer]:
    """Fill an empty encoder (parameters on the meta device) from the store, in place; collective.

    Linear layers and large embeddings become sharded layers, read row by row; everything else is read whole and merged
    by the ordinary layers. moved: the tensors that have task vectors. Raises InputError for a weight that the base's
    files lack.
    """
    backbone: Any = encoder.backbone
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # never used, see freeze_unused; files may lack it, and its output would be gathered
    names = set(moved)
    sharded: dict[int, ShardedLayer] = {}
    for module_name, module in backbone.named_modules():
        kind = _sharded_kind(module, least_embedding)
        if kind is None:
            continue
        weight = f"{module_name}.weight"
        _require(store, weight)
        rows, (start, stop) = len(module.weight), shards.bounds(len(module.weight))  # type: ignore[arg-type]
        base = store.base.require_finite(weight, store.base.read_rows(weight, start, stop)).to(device)
        if kind is ShardedEmbedding:
            base = base.float()  # it decides the dtype of the hidden states
        vectors = [_whole_low_rank(v.to(device), rows, shards) for v in _held(store, names, weight, (start, stop))]
        module.weight = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        others: dict[str, list[TaskVector]] = {}
        if getattr(module, "bias", None) is not None:
            _fill(module, "bias", f"{module_name}.bias", store, device)
            if held := _held(store, names, f"{module_name}.bias"):
                others["bias"] = [vector.to(device) for vector in held]
        own = ShardedWeight(base, vectors, rows, shards)
        sharded[id(module)] = kind(module, others, coefficients, module_name, settings, own)
    rest = _fill_rest(backbone, store, device, names)
    for module in list(backbone.modules()):
        if not isinstance(module, ShardedLayer):
            for child_name, child in list(module._modules.items()):
                if child is not None and id(child) in sharded:
                    module._modules[child_name] = sharded[id(child)]
    backbone.to(device)
    attach(backbone, rest, coefficients, settings)
    return list(sharded.values())


def _sharded_kind(module: nn.Module, least_embedding: int) -> type[ShardedLayer] | None:
    if type(module) is nn.Linear:
        return ShardedLinear
    table = type(module) is nn.Embedding or "ScaledWordEmbedding" in type(module).__name__
    if isinstance(module, nn.Embedding) and table and module.max_norm is None:
        return ShardedEmbedding if module.weight.numel() >= least_embedding else None
    return None


def _held(store: TaskVectorStore, moved: set[str], name: str, rows: tuple[int, int] | None = None) -> list[TaskVector]:
    return store.held(name, rows) if name in moved else []


def _require(store: TaskVectorStore, name: str) -> None:
    if name not in store.base.specs:
        raise InputError(f"{store.base_folder}: the weights lack '{name}'; give a complete model folder")


def _fill(module: nn.Module, parameter: str, name: str, store: TaskVectorStore, device: torch.device) -> None:
    """Read a parameter whole, as float32."""
    _require(store, name)
    value = store.base.require_finite(name, store.base.read(name))
    if value.is_floating_point():
        value = value.float()
    module.register_parameter(parameter, nn.Parameter(value.to(device), requires_grad=False))


def _fill_rest(
    backbone: nn.Module, store: TaskVectorStore, device: torch.device, moved: set[str]
) -> dict[str, list[TaskVector]]:
    """Read what is still on the meta device; tied parameters once. Returns the task vectors of what was read."""
    filled: dict[int, nn.Parameter] = {}
    rest: dict[str, list[TaskVector]] = {}
    for module_name, module in backbone.named_modules():
        for parameter, value in list(module._parameters.items()):
            if value is None or not value.is_meta:
                continue
            name = f"{module_name}.{parameter}"
            if id(value) not in filled:
                _fill(module, parameter, name, store, device)
                filled[id(value)] = module._parameters[parameter]  # type: ignore[assignment]
                if held := _held(store, moved, name):
                    rest[name] = [vector.to(device) for vector in held]
            module.register_parameter(parameter, filled[id(value)])
    return rest


def _whole_low_rank(vector: TaskVector, rows: int, shards: Shards) -> TaskVector:
    """A low-rank task vector whole on every rank: its own rows of b gathered."""
    if not isinstance(vector, LowRank):
        return vector
    padded: Tensor = vector.b.new_zeros(shards.share(rows), vector.b.shape[1])
    padded[: len(vector.b)] = vector.b
    return LowRank(vector.a, shards.gather(padded)[:rows])
