"""Weights whose rows lie over ranks: who holds which, merged rows gathered a layer ahead, gradients of rows reduced.

Merging commutes with sharding: each rank merges its own rows of W0 and T_i, and only the merged weight is gathered, so
that a step moves the bytes of one model however many experts there are:

    forward     2 P bytes a rank in bfloat16 (4 P in float32), all-gathered
    backward    the same again; and the rows of dW, 4 P in float32, reduce-scattered chunk by chunk

Rows lie as DTensor's Shard(0) puts them: ceil(N / R) to a rank, fewer or none to the last ones. Merged rows are
padded to ceil(N / R), so that what is gathered holds the weight as its first N rows, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

CHUNK_BYTES = {"cuda": 64 * 2**20, "cpu": 8 * 2**20}


def _collective(kind: str) -> Any:
    """torch's collective of one tensor to one tensor, under the name that this version of it prefers."""
    older = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[kind]
    return getattr(dist, f"{kind}_single", None) or getattr(dist, older)


class _Gathering(NamedTuple):
    """A weight under way. own: read until the work is done."""

    key: tuple[int, Any]
    weight: Tensor
    work: Any
    own: Tensor


class Shards:
    """The ranks that share each weight, and the two buffers that gathered weights lie in.

    mesh: one dimension. chunk_bytes: of dW that is there at once (twice, as one is reduced while the next is made).
    reduce_dtype: dW is summed over ranks in it; None: float32, or float64 of a float64 model.
    """

    def __init__(
        self, mesh: DeviceMesh, *, chunk_bytes: int | None = None, reduce_dtype: torch.dtype | None = None
    ) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"rows are sharded over one dimension of a mesh, not {mesh.ndim}")
        self.group = mesh.get_group()
        self.rank, self.world = mesh.get_local_rank(), mesh.size()
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES.get(mesh.device_type, CHUNK_BYTES["cpu"])
        self.reduce_dtype = reduce_dtype
        self._buffers: list[Tensor | None] = [None, None]
        self._next_buffer = 0
        self._order: list[Any] = []
        self._place: dict[int, int] = {}
        self._ahead: _Gathering | None = None

    def share(self, rows: int) -> int:
        """Rows of a rank, but for the last ones."""
        return -(-rows // self.world)

    def bounds(self, rows: int, rank: int | None = None) -> tuple[int, int]:
        """Which of `rows` rows a rank holds, this one by default."""
        start = min(rows, self.share(rows) * (self.rank if rank is None else rank))
        return start, min(rows, start + self.share(rows))

    # ---- gathering -------------------------------------------------------------------------------------------------

    def take(
        self, layer: Any, key: Any, make: Callable[[Any], tuple[Tensor, int]], *, forward: bool, ahead: bool = True
    ) -> Tensor:
        """The gathered weight [N, K] of `layer`, valid until the next but one is taken; starts on the next one.

        make: a layer to its own merged rows [ceil(N / R), K] and N. key: what the merged weight depends on besides the
        layer; a weight gathered ahead under another key is gathered again. forward: which neighbour comes next. ahead:
        False where none follows in that order.
        """
        if id(layer) not in self._place:
            self._place[id(layer)] = len(self._order)
            self._order.append(layer)
        ready, self._ahead = self._ahead, None
        if ready is not None:
            ready.work.wait()
            if ready.key != (id(layer), key):
                ready = None
        if ready is None:
            ready = self._start(layer, key, make)
            ready.work.wait()
        place = self._place[id(layer)] + (1 if forward else -1)
        if ahead and 0 <= place < len(self._order):
            self._ahead = self._start(self._order[place], key, make)
        return ready.weight

    def _start(self, layer: Any, key: Any, make: Callable[[Any], tuple[Tensor, int]]) -> _Gathering:
        own, rows = make(layer)
        whole = self._buffer((len(own) * self.world, *own.shape[1:]), own)
        work = _collective("all_gather")(whole, own, group=self.group, async_op=True)
        return _Gathering((id(layer), key), whole[:rows], work, own)

    def _buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A view of one of the two buffers, in turn; each grows to the largest weight."""
        self._next_buffer = 1 - self._next_buffer
        size = torch.Size(shape).numel() * like.itemsize
        buffer = self._buffers[self._next_buffer]
        if buffer is None or buffer.numel() < size or buffer.device != like.device:
            buffer = self._buffers[self._next_buffer] = None
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
            self._buffers[self._next_buffer] = buffer
        return buffer[:size].view(like.dtype).view(shape)

    def forget(self) -> None:
        """Drop a weight gathered ahead, as it is not the next one; every rank must."""
        if self._ahead is not None:
            self._ahead.work.wait()
            self._ahead = None

    def gather(self, own: Tensor) -> Tensor:
        """Rows [m, K] of every rank as [R m, K]; m must be the same on all."""
        whole = own.new_empty(len(own) * self.world, *own.shape[1:])
        _collective("all_gather")(whole, own.contiguous(), group=self.group)
        return whole

    def any(self, marks: Tensor) -> Tensor:
        """Whether any rank marked an entry; marks: uint8 of one shape, changed in place."""
        dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=self.group)
        return marks

    # ---- gradients of rows -------------------------------------------------------------------------------------------

    def reduced(
        self, share: int, columns: int, like: Tensor, fill: Callable[[int, int, Tensor], None]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Sums over ranks of dW, chunk by chunk: (start, stop, own rows [stop - start, columns]) of this rank's share.

        share: rows of a rank. fill(start, stop, out): writes rows [start, stop) of every rank's share of the local dW
        into out [R, stop - start, columns]; rows that do not exist must be zero. One chunk is summed while the next is
        made.
        """
        made = torch.float64 if like.dtype == torch.float64 else torch.float32
        dtype = self.reduce_dtype or made
        step = max(1, self.chunk_bytes // max(1, self.world * columns * made.itemsize))
        waiting: tuple[int, int, Any, Tensor, Tensor] | None = None
        for start in range(0, share, step):
            stop = min(share, start + step)
            local = torch.zeros(self.world, stop - start, columns, dtype=made, device=like.device)
            fill(start, stop, local)
            local = local.to(dtype).flatten(0, 1)
            own = local.new_empty(stop - start, columns)
            work = _collective("reduce_scatter")(own, local, group=self.group, async_op=True)
            if waiting is not None:
                yield self._finished(waiting, made)
            waiting = start, stop, work, own, local
        if waiting is not None:
            yield self._finished(waiting, made)

    @staticmethod
    def _finished(waiting: tuple[int, int, Any, Tensor, Tensor], dtype: torch.dtype) -> tuple[int, int, Tensor]:
        start, stop, work, own, _ = waiting
        work.wait()
        return start, stop, own.to(dtype)
