"""The processes that work together: who this one is, and the few things that they tell each other outside of tensors.

What decides the course of a run is read once, by rank 0, and told to the others: ranks may not see the same disk, or
see it at different moments.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalemerge.errors import InputError

TIMEOUT_MINUTES = 10


def launched_world() -> int:
    """How many processes the launcher says it started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def from_first_rank(make: Callable[[], Any], rank: int, world: int) -> Any:
    """What `make` gives on rank 0, on every rank; an InputError it raises is raised on every rank."""
    if world == 1:
        return make()
    box: list[Any] = [None, None]
    if rank == 0:
        try:
            box[0] = make()
        except InputError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise InputError(box[1])
    return box[0]


@dataclass(frozen=True)
class Group:
    """All processes of a launch. A single process needs no process group and makes no collective.

    owned: whether the process group was made here, and is to be closed here.
    """

    rank: int
    world: int
    device: torch.device
    owned: bool = False

    @classmethod
    def launched(cls) -> Group:
        """The group that the launcher's environment describes: NCCL where each process has a GPU, else gloo.

        Raises InputError under a DeepSpeed or FSDP configuration: these engines shard what is trained, and here nothing
        as large as a layer is.
        """
        for variable, engine in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
            if os.environ.get(variable, "false").lower() == "true":
                raise InputError(
                    f"accelerate configuration: asks for {engine}, but positioning shards by itself "
                    "(positioning.sharding); use accelerate_configs/ddp.yaml or multi_node_ddp.yaml"
                )
        world, on_gpu = launched_world(), torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(device)
        if world == 1:
            return cls(0, 1, device)
        owned = not dist.is_initialized()
        if owned:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=TIMEOUT_MINUTES))
        return cls(dist.get_rank(), dist.get_world_size(), device, owned)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, make: Callable[[], Any]) -> Any:
        return from_first_rank(make, self.rank, self.world)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A small object of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def agree(self, what: str, value: str, remedy: str) -> None:
        """Raise InputError on every rank unless all have the same value. what: its name in the error."""
        values = self.gather(value)
        other = next((rank for rank, found in enumerate(values) if found != values[0]), None)
        if other is not None:
            raise InputError(f"{what}: rank 0 has {values[0]}, rank {other} has {values[other]}; {remedy}")

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave together: a process that ends while others still talk to it takes them along."""
        if self.owned:
            dist.barrier()
            dist.destroy_process_group()
