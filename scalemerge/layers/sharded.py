"""Linear layers and embeddings whose W0 and T_i lie over ranks, row by row; see gathering.py for what is moved.

    forward     own rows of W(c), gathered; y = x W(c)' + b; x alone is kept
    backward    own rows again, gathered; dX = dY W(c); rows of dW = dY' x of all ranks, summed where they belong;
                dc_i = <own rows of dW, own rows of T_i>: E numbers, to be summed over all ranks once a step

An embedding gathers only the rows that occur on any rank. Low-rank task vectors are small and whole on every rank: they
are never merged, and their dc comes from the rank's own tokens, to be summed over ranks likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from scalemerge.kernels.coefficient_grad import embedding_coefficient_grad, inner_products
from scalemerge.kernels.formats import Packed, TaskVector, accumulation_dtype
from scalemerge.kernels.merge_weights import merge_weights
from scalemerge.layers.coefficients import Coefficients
from scalemerge.layers.embedding import merged_embedding, scaled
from scalemerge.layers.gathering import Shards
from scalemerge.layers.linear import low_rank_product
from scalemerge.layers.merged import MergedLayer
from scalemerge.layers.settings import MergeSettings


class ShardedWeight:
    """This rank's rows of a weight W0 [N, K] and of its task vectors.

    base: own rows [n, K], any floating dtype. task_vectors: as many as the coefficients have terms, of these rows;
    low-rank ones whole, [N, R] and [R, K]. None at all for a weight that no expert changed.
    """

    def __init__(self, base: Tensor, task_vectors: Sequence[TaskVector], rows: int, shards: Shards) -> None:
        self.base, self.rows, self.columns, self.shards = base, rows, base.shape[1], shards
        start, stop = shards.bounds(rows)
        if len(base) != stop - start:
            raise ValueError(f"rank {shards.rank} holds rows {start} to {stop} of {rows}, not {len(base)} rows")
        self.packed = _pack(task_vectors, base)

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.packed.nbytes

    def merged(self, c: Tensor, dtype: torch.dtype) -> Tensor:
        """Own rows of W(c) [ceil(N / R), K] in `dtype`; those that do not exist hold nothing of meaning."""
        count, packed = len(self.base), self.packed
        exact = dtype if self.base.is_cuda else accumulation_dtype(dtype)  # Triton sums in registers, torch in `out`
        out = torch.empty(self.shards.share(self.rows), self.columns, dtype=exact, device=self.base.device)
        own = out[:count]
        if not packed.values or not count:
            own.copy_(self.base)
        else:
            lists = packed.values, packed.scales, packed.groups
            merge_weights(self.base, *lists, c, (count, self.columns), (0, count), (0, self.columns), own)
        return out.to(dtype)

    def coefficient_grad(self, gradient: Tensor, start: int) -> Tensor:
        """<own rows of dW from `start` on, T_i>, [E'] float64. gradient: [m, K]; rows beyond the last are ignored."""
        stop = min(len(self.base), start + len(gradient))
        packed = self.packed
        if stop <= start:
            return torch.zeros(len(packed.values), dtype=torch.float64, device=gradient.device)
        values = [value[start:stop] for value in packed.values]
        scales = [scale[start:stop] if group else scale for scale, group in zip(packed.scales, packed.groups)]
        return inner_products(gradient[: stop - start], values, scales, packed.groups)


def _pack(task_vectors: Sequence[TaskVector], base: Tensor) -> Packed:
    """Packed by hand, as low-rank ones have all N rows and the others a rank's own."""
    if not task_vectors:
        return Packed.of_none(base.shape)
    low = [(i, vector) for i, vector in enumerate(task_vectors) if hasattr(vector, "b")]
    whole = Packed.of([vector for _, vector in low]) if low else None
    rest = [(i, vector) for i, vector in enumerate(task_vectors) if not hasattr(vector, "b")]
    own = Packed.of([vector for _, vector in rest]) if rest else Packed.of_none(base.shape)
    if rest and own.shape != base.shape:
        raise ValueError(f"rows of a task vector have shape {list(own.shape)}, those of the weight {list(base.shape)}")
    places = None
    if whole is not None:
        places = torch.tensor([low[i][0] for i in whole.low_rank.tolist()], device=base.device)  # type: ignore[union-attr]
    return Packed(
        base.shape,
        len(task_vectors),
        tuple(i for i, _ in rest),
        own.values,
        own.scales,
        own.groups,
        places,
        whole.a if whole else None,
        whole.b if whole else None,
    )


def _inside_backward() -> bool:
    """Whether autograd is at work: a forward pass made now is made again, for a checkpointed block."""
    return torch._C._current_graph_task_id() != -1


class ShardedLayer(MergedLayer):
    """A module in place of `original`, whose weight is `weight`; task_vectors: those of its other parameters."""

    def __init__(
        self,
        original: nn.Module,
        task_vectors: Mapping[str, Sequence[TaskVector]],
        coefficients: Coefficients,
        name: str,
        settings: MergeSettings,
        weight: ShardedWeight,
    ) -> None:
        super().__init__(original, task_vectors, coefficients, name, settings)
        if settings.precision == "split" or settings.cache:
            raise ValueError("sharded weights are merged in one sum and not kept; use precision='merge', cache=False")
        self.sharded = weight

    @property
    def weight(self) -> Tensor:
        """Own rows of W0."""
        return self.sharded.base

    def own_coefficients(self) -> tuple[Tensor, Tensor | None]:
        """c of the merged task vectors [E'] and of the low-rank ones [R]."""
        packed = self.sharded.packed
        if not packed.experts:
            return self.weight.new_empty(0, dtype=torch.float32), None
        c = self.coefficients.of(f"{self.name}.weight")
        if c.dim() == 2:
            raise ValueError(f"{self.name}.weight: coefficients by row are not supported for sharded weights")
        merged = c if packed.all_merged else c[list(packed.merged)]
        return merged, None if packed.low_rank is None else c[packed.low_rank]

    def restore(self, written: set[int]) -> nn.Module:
        raise TypeError(f"{self.name}: sharded weights are written from disk (scalemerge merge), not taken from layers")

    def _gathered(self, dtype: torch.dtype, *, forward: bool) -> Tensor:
        """W(c) whole [N, K] in `dtype`, and the next layer's under way."""

        def make(layer: ShardedLayer) -> tuple[Tensor, int]:
            c, _ = layer.own_coefficients()
            return layer.sharded.merged(c.detach(), dtype), layer.sharded.rows

        again = forward and _inside_backward()
        key = (self.coefficients.moves, dtype)
        return self.sharded.shards.take(self, key, make, forward=forward, ahead=not again)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, bias: Tensor | None, layer: ShardedLinear) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = layer._gathered(x.dtype, forward=True)
            y = x @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)
        sample = layer.settings.sample(len(x), x.device) if c.requires_grad else None
        ctx.rows, ctx.layer, ctx.sample = len(x), layer, sample
        ctx.moves = layer.coefficients.moves
        needed = x if sample is None else x[sample]
        ctx.save_for_backward(needed if c.requires_grad and len(c) else x.new_empty(0, x.shape[1]))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        layer, sample = ctx.layer, ctx.sample
        if ctx.moves != layer.coefficients.moves:
            raise RuntimeError(f"{layer.name}: the coefficients moved between forward and backward")
        need_x, need_c, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(dy.device.type, enabled=False):
            dy = dy.to(x.dtype).contiguous()
            dx = dy @ layer._gathered(dy.dtype, forward=False) if need_x else None
            dc = _weight_products(layer.sharded, dy if sample is None else dy[sample], x) if need_c else None
        if dc is not None and sample is not None:
            dc = dc * (ctx.rows / len(sample))
        bias = dy.sum(0, dtype=accumulation_dtype(dy.dtype)) if need_bias else None
        return dx, None if dc is None else dc.float() if x.dtype != torch.float64 else dc, bias, None


def _weight_products(weight: ShardedWeight, dy: Tensor, x: Tensor) -> Tensor:
    """<rows of dW = dY' x summed over ranks, T_i>, own rows alone: [E'] float64."""
    shards, rows = weight.shards, weight.rows
    share = shards.share(rows)
    dc = torch.zeros(len(weight.packed.values), dtype=torch.float64, device=x.device)
    if not len(dc):
        return dc

    def fill(start: int, stop: int, out: Tensor) -> None:
        for rank in range(shards.world):
            first = min(rows, rank * share + start)
            last = min(rows, rank * share + stop)
            if first < last:
                _product_into(out[rank, : last - first], dy[:, first:last], x)

    for start, _, gradient in shards.reduced(share, weight.columns, x, fill):
        dc += weight.coefficient_grad(gradient, start)
    return dc


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left' right, in out's dtype (float32 or float64)."""
    if left.dtype == out.dtype:
        torch.mm(left.T, right, out=out)
    elif left.is_cuda:
        out.copy_(torch.mm(left.T, right, out_dtype=out.dtype))  # type: ignore[call-overload]
    else:
        torch.mm(left.T.to(out.dtype), right.to(out.dtype), out=out)


class ShardedLinear(ShardedLayer):
    """y = x W(c)' + b(c) in place of nn.Linear, W0 and T_i sharded by rows."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], in x's dtype or the autocast one."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = self.merged("bias") if self.original.bias is not None else None
        c, low_rank = self.own_coefficients()
        y = _Product.apply(flat, c, bias, self)
        if low_rank is not None:
            y = y + low_rank_product(flat, self.sharded.packed, low_rank)
        return y.view(*x.shape[:-1], y.shape[-1])


class _Rows(torch.autograd.Function):
    """W(c)[ids]: the rows that occur on any rank are gathered, each from the rank that holds it."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, c: Tensor, layer: ShardedEmbedding) -> Tensor:
        weight = layer.sharded
        shards, packed, base = weight.shards, weight.packed, weight.base
        occurs = torch.zeros(weight.rows, dtype=torch.uint8, device=ids.device)
        occurs[ids] = 1
        rows = shards.any(occurs).nonzero().squeeze(1)
        cuts = torch.tensor([shards.bounds(weight.rows, r)[0] for r in range(shards.world)] + [weight.rows])
        starts = torch.searchsorted(rows, cuts.to(rows.device)).tolist()
        counts = [stop - start for start, stop in pairwise(starts)]
        longest = max(counts)
        slots = torch.empty(weight.rows, dtype=torch.long, device=ids.device)
        for rank, (start, stop) in enumerate(pairwise(starts)):
            slots[rows[start:stop]] = torch.arange(stop - start, device=ids.device) + rank * longest
        own = rows[starts[shards.rank] : starts[shards.rank + 1]] - shards.bounds(weight.rows)[0]
        merged = torch.zeros(longest, weight.columns, dtype=base.dtype, device=ids.device)
        if len(own):
            if packed.values:
                lists = packed.values, packed.scales, packed.groups
                merged[: len(own)] = merged_embedding(own, c.detach(), base, *lists)
            else:
                merged[: len(own)] = base[own]
        slot = slots[ids]
        ctx.save_for_backward(slot, own)
        ctx.layer, ctx.longest = layer, longest
        return shards.gather(merged)[slot]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:  # type: ignore[override]
        slot, own = ctx.saved_tensors
        weight, longest = ctx.layer.sharded, ctx.longest
        packed = weight.packed
        if not ctx.needs_input_grad[1]:
            return None, None, None
        rank_of, row_of = slot // longest, slot % longest
        dc = torch.zeros(len(packed.values), dtype=torch.float64, device=dy.device)

        def fill(start: int, stop: int, out: Tensor) -> None:
            inside = (row_of >= start) & (row_of < stop)
            place = rank_of[inside] * (stop - start) + row_of[inside] - start
            out.flatten(0, 1).index_add_(0, place, dy[inside].to(out.dtype))

        if len(dc):
            for start, stop, gradient in weight.shards.reduced(longest, weight.columns, dy, fill):
                ids = own[start:stop]
                if len(ids):
                    lists = packed.values, packed.scales, packed.groups
                    dc += embedding_coefficient_grad(ids, gradient[: len(ids)].contiguous(), *lists)
        return None, dc if dy.dtype == torch.float64 else dc.float(), None


class ShardedEmbedding(ShardedLayer):
    """W(c)[ids] in place of nn.Embedding, W0 and T_i sharded by rows."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., K]."""
        flat = ids.reshape(-1)
        c, low_rank = self.own_coefficients()
        y = _Rows.apply(flat, c, self)
        if low_rank is not None:
            packed = self.sharded.packed
            b, a = packed.b[flat], packed.a  # type: ignore[index]
            exact = accumulation_dtype(y.dtype)
            y = y + ((b.to(exact) * low_rank.to(exact)) @ a.to(exact)).to(y.dtype)  # type: ignore[union-attr]
        return scaled(y, self.original).view(*ids.shape, y.shape[-1])
