"""The ways to compute y = x W(c)' and its gradients that benchmarks/kernels.py compares; what each must at least cost.

    merged              MergedLinear, strategy auto: what `attach` puts into a model
    merged_on_the_fly, merged_chunked     the same with the strategy fixed (GPU, up to 1024 rows: where auto chooses)
    merged_sampled      dc estimated from one row in eight (MergeSettings(sample_rows=8))
    frozen              a plain linear layer without any gradient of its weight: 2 products
    trainable           a plain linear layer that is trained: 3 products
    explicit_merge      W(c) = W0 + sum c_i T_i by autograd, then F.linear (functional_call does this, for a layer)
    checkpointed        the same inside torch.utils.checkpoint
    chunked_cublas      chunks merged into one buffer, the vendor's product, no overlap; dW in chunks of float32, one
                        multi-dot over each

Parts alone, pass "kernel":

    merge_weights  merged_linear  coefficient_grad      kernels/*.py
    weight_gradient_product                             dY' x by the vendor's library, in the activations' dtype
    weight_gradient_multidot                            the dc of chunked_cublas
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from devices import Ceilings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalemerge.kernels.coefficient_grad import coefficient_grad, inner_products
from scalemerge.kernels.formats import LowRank, Packed, TaskVector, dense_block, quantize
from scalemerge.kernels.merge_weights import merge_weights
from scalemerge.kernels.merged_linear import merged_linear_triton
from scalemerge.layers import Coefficients, MergedLinear, MergeSettings

FORMATS = ("dense", "int8", "int4", "rank32")
SAMPLE = 8
RANK = 32
CHUNK_BYTES = 16 * 2**20
FEW_ROWS = 1024  # up to here both strategies are measured


@dataclass(frozen=True)
class Case:
    """One layer W [n, k] of a model, x [rows, k], `experts` task vectors in a format."""

    model: str
    layer: str
    n: int
    k: int
    rows: int
    experts: int
    format: str

    def __str__(self) -> str:
        return f"{self.model}/{self.layer} N={self.n} K={self.k} M={self.rows} E={self.experts} {self.format}"


class Inputs:
    """Fresh random tensors of a case. x and c are leaves that want gradients; dy is the gradient that comes in."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(scale)

        scale = case.k**-0.5
        self.case = case
        self.x = draw(case.rows, case.k).to(dtype).requires_grad_()
        self.dy = draw(case.rows, case.n).to(dtype)
        self.weight = draw(case.n, case.k, scale=scale).to(dtype)
        self.c = (draw(case.experts).abs_() / case.experts).requires_grad_()
        self.vectors: list[TaskVector] = []
        for _ in range(case.experts):
            if case.format == "rank32":
                a, b = draw(RANK, case.k).to(dtype), draw(case.n, RANK, scale=0.05 * scale / RANK**0.5).to(dtype)
                self.vectors.append(LowRank(a, b))
                continue
            vector = draw(case.n, case.k, scale=0.05 * scale)
            bits = {"int8": 8, "int4": 4}.get(case.format)
            self.vectors.append(quantize(vector, bits) if bits else vector.to(dtype))
        self.packed = Packed.of(self.vectors)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + sum(vector.nbytes for vector in self.vectors) + self.x.nbytes + self.dy.nbytes


@dataclass
class Way:
    """forward() makes y; `wanted` are the tensors whose gradients make a whole step."""

    forward: Callable[[], Tensor]
    wanted: tuple[Tensor, ...]


# ---- whole layers --------------------------------------------------------------------------------------------------


def layer_ways(inputs: Inputs) -> dict[str, Way]:
    x, c, case = inputs.x, inputs.c, inputs.case
    trained = inputs.weight.clone().requires_grad_()

    def explicit() -> Tensor:
        return F.linear(x, _merged_by_autograd(inputs, c))

    def checkpointed() -> Tensor:
        def body(x: Tensor, c: Tensor) -> Tensor:
            return F.linear(x, _merged_by_autograd(inputs, c))

        return checkpoint(body, x, c, use_reentrant=False, preserve_rng_state=False)

    ways = {"merged": Way(_merged_layer(inputs), (x, c))}
    if case.format != "rank32":
        if x.is_cuda and case.rows <= FEW_ROWS:
            ways["merged_on_the_fly"] = Way(_merged_layer(inputs, strategy="on_the_fly"), (x, c))
            ways["merged_chunked"] = Way(_merged_layer(inputs, strategy="chunked"), (x, c))
        if case.rows >= 2 * SAMPLE:
            ways["merged_sampled"] = Way(_merged_layer(inputs, sample_rows=SAMPLE), (x, c))
        packed = inputs.packed
        ways["chunked_cublas"] = Way(lambda: ChunkedCublas.apply(x, c, inputs.weight, packed), (x, c))
    ways["explicit_merge"] = Way(explicit, (x, c))
    ways["checkpointed"] = Way(checkpointed, (x, c))
    ways["trainable"] = Way(lambda: F.linear(x, trained), (x, trained))
    ways["frozen"] = Way(lambda: F.linear(x, inputs.weight), (x,))
    return ways


def _merged_layer(inputs: Inputs, **settings: Any) -> Callable[[], Tensor]:
    linear = nn.Linear(inputs.case.k, inputs.case.n, bias=False, device="meta")
    linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
    coefficients = Coefficients.uniform(["layer.weight"], inputs.c)
    layer = MergedLinear(linear, {"weight": inputs.vectors}, coefficients, "layer", MergeSettings(**settings))
    return lambda: layer(inputs.x)


def _merged_by_autograd(inputs: Inputs, c: Tensor) -> Tensor:
    total = inputs.weight
    for value, vector in zip(c, inputs.vectors, strict=True):
        total = total + value * dense_block(vector).to(total.dtype)
    return total


def _ranges(count: int, bytes_each: int, multiple: int) -> list[tuple[int, int]]:
    step = max(multiple, CHUNK_BYTES // bytes_each // multiple * multiple)
    return [(start, min(count, start + step)) for start in range(0, count, step)]


def weight_gradient_multidot(dy: Tensor, x: Tensor, packed: Packed) -> Tensor:
    """dc [E] float64: dW by the vendor's product, some rows at a time in float32, and all E inner products of those."""
    total = torch.zeros(packed.experts, dtype=torch.float64, device=x.device)
    for start, stop in _ranges(packed.shape[0], 4 * packed.shape[1], 1):
        rows = dy[:, start:stop].T
        low = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        gradient = torch.mm(rows, x, out_dtype=torch.float32) if low else torch.mm(rows, x)
        values = [value[start:stop] for value in packed.values]
        scales = [scale[start:stop] if group else scale for scale, group in zip(packed.scales, packed.groups)]
        total += inner_products(gradient, values, scales, packed.groups)
    return total


class ChunkedCublas(torch.autograd.Function):
    """The baseline that is left when neither the merge is overlapped nor the inner products are fused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, weight: Tensor, packed: Packed) -> Tensor:
        ctx.save_for_backward(x, c, weight)
        ctx.packed = packed
        y = x.new_empty(len(x), len(weight))
        for start, stop in _ranges(weight.shape[0], weight[0].nbytes, 1):
            block = ChunkedCublas._merge(weight, packed, c, (start, stop), (0, weight.shape[1]))
            torch.mm(x, block.T, out=y[:, start:stop])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, c, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        for start, stop in _ranges(weight.shape[1], weight.shape[0] * weight.itemsize, 256):
            block = ChunkedCublas._merge(weight, ctx.packed, c, (0, weight.shape[0]), (start, stop))
            torch.mm(dy, block, out=dx[:, start:stop])
        return dx, weight_gradient_multidot(dy, x, ctx.packed).to(c.dtype), None, None

    @staticmethod
    def _merge(weight: Tensor, packed: Packed, c: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        out = weight.new_empty(rows[1] - rows[0], columns[1] - columns[0])
        lists = (packed.values, packed.scales, packed.groups)
        return merge_weights(weight, *lists, c.detach(), packed.shape, rows, columns, out)


# ---- parts ---------------------------------------------------------------------------------------------------------


def part_ways(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Calls of single kernels; none for low-rank task vectors, which are not merged."""
    case, packed = inputs.case, inputs.packed
    if case.format == "rank32":
        return {}
    x, dy, c, shape = inputs.x.detach(), inputs.dy, inputs.c.detach(), (case.n, case.k)
    lists = (packed.values, packed.scales, packed.groups)
    out = torch.empty_like(inputs.weight)
    whole = ((0, case.n), (0, case.k))
    ways: dict[str, Callable[[], Any]] = {
        "merge_weights": lambda: merge_weights(inputs.weight, *lists, c, shape, *whole, out),
        "coefficient_grad": lambda: coefficient_grad(dy, x, *lists, shape, 0, case.n, 0, case.k, False),
        "weight_gradient_product": lambda: torch.mm(dy.T, x),
        "weight_gradient_multidot": lambda: weight_gradient_multidot(dy, x, packed),
    }
    if x.is_cuda and case.rows <= FEW_ROWS:
        ways["merged_linear"] = lambda: merged_linear_triton(x, inputs.weight, *lists, c, shape=shape)
    return ways


# ---- floors --------------------------------------------------------------------------------------------------------


def floor_seconds(variant: str, pass_: str, inputs: Inputs, ceilings: Ceilings) -> float:
    """The larger of FLOPs and bytes at the device's ceilings; every input read once, every output written once.

    A full step is a forward and a backward floor. The ways to get dc share one floor, but for merged_sampled.
    """
    case = inputs.case
    product = 2 * case.rows * case.n * case.k
    low_rank = 2 * case.rows * RANK * case.experts * (case.n + case.k) if case.format == "rank32" else 0
    x, y, weight = inputs.x.nbytes, inputs.dy.nbytes, inputs.weight.nbytes
    vectors = sum(vector.nbytes for vector in inputs.vectors)
    if pass_ == "kernel":
        work: dict[str, tuple[float, float]] = {
            "merge_weights": (0, 2 * weight + vectors),
            "merged_linear": (product, x + y + weight + vectors),
            "weight_gradient_product": (product, x + y + weight),
        }
        return ceilings.floor(*work.get(variant, (product, x + y + vectors)))
    merges = variant not in ("frozen", "trainable")
    forward = ceilings.floor(product + low_rank * merges, x + y + weight + vectors * merges)
    third: float = 0 if variant == "frozen" or (case.format == "rank32" and merges) else product
    if variant == "merged_sampled":
        third /= SAMPLE
    size = 2 * x + y + weight + (vectors if merges else weight * (variant == "trainable"))
    if variant == "frozen":
        size -= x
    backward = ceilings.floor(product + third + low_rank * merges, size)
    return {"forward": forward, "backward": backward, "full": forward + backward}[pass_]


def read_once_seconds(inputs: Sequence[Inputs], ceilings: Ceilings) -> float:
    """Seconds to read the base weight and all task vectors once at the measured copy bandwidth."""
    one = inputs[0]
    return (one.weight.nbytes + sum(vector.nbytes for vector in one.vectors)) / ceilings.bytes_a_second
