"""Memory beyond W0, the T_i and the activations: at most two chunks, counted in bytes, forward and backward.

A chunk is `chunk_bytes`, or one row of W (forward) and 16 columns (backward) where those are more.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalemerge.kernels.workspace import release_workspace
from scalemerge.layers import (
    Coefficients,
    LowRank,
    MergedConv1D,
    MergedEmbedding,
    MergedLinear,
    MergeSettings,
    quantize,
)

ROWS, OUT, IN, EXPERTS = 8, 96, 160, 3
WEIGHT = OUT * IN * 4  # in float32, which blocks are summed in
NUMBERS = 1024  # c, dc and the sums of single experts: a few vectors of EXPERTS float64 numbers

CHUNKS = {
    "a row": IN * 4,
    "16 columns": 16 * OUT * 4,
    "48 columns": 48 * OUT * 4,
    "33 rows": 33 * IN * 4,
    "all": WEIGHT,
}
CASES = {  # base, task vectors, activations, autocast, precision
    "float32": (torch.float32, torch.float32, torch.float32, False, "merge"),
    "bfloat16 vectors": (torch.float32, torch.bfloat16, torch.float32, False, "merge"),
    "int8": (torch.float32, 8, torch.float32, False, "merge"),
    "int4": (torch.float32, 4, torch.float32, False, "merge"),
    "all bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, False, "merge"),
    "bfloat16 and int4": (torch.bfloat16, 4, torch.bfloat16, False, "merge"),
    "autocast": (torch.float32, torch.float32, torch.float32, True, "merge"),
    "autocast and bfloat16 vectors": (torch.float32, torch.bfloat16, torch.float32, True, "merge"),
    "split": (torch.float32, torch.float32, torch.float32, False, "split"),
    "split and autocast": (torch.float32, torch.bfloat16, torch.float32, True, "split"),
    "split, bfloat16 and int8": (torch.bfloat16, 8, torch.bfloat16, False, "split"),
}


@pytest.fixture(autouse=True)
def no_buffers_of_others():
    release_workspace()
    yield
    release_workspace()


def make_vectors(kind, rows, columns):
    drawn = [torch.randn(rows, columns, generator=torch.Generator().manual_seed(i)) for i in range(EXPERTS)]
    return [quantize(one, kind, 32) for one in drawn] if isinstance(kind, int) else [one.to(kind) for one in drawn]


def make_layer(kind, base, vectors, **settings):
    """MergedLinear or MergedConv1D whose W lies [OUT, IN] or [IN, OUT]."""
    if kind == "linear":
        module, layer = nn.Linear(IN, OUT, bias=False), MergedLinear
    else:
        from transformers.pytorch_utils import Conv1D

        module, layer = Conv1D(IN, OUT), MergedConv1D  # [OUT, IN] too: inputs and outputs change places
    module = module.to(base)
    c = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    vectors = {"weight": make_vectors(vectors, OUT, IN)}
    return layer(module, vectors, Coefficients.uniform(["l.weight"], c), "l", MergeSettings(**settings)), c


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("case", CASES)
def test_two_chunks_at_most(live_bytes, case, chunk, kind) -> None:
    base, vectors, dtype, autocast, precision = CASES[case]
    layer, c = make_layer(kind, base, vectors, chunk_bytes=CHUNKS[chunk], precision=precision)
    x = torch.randn(ROWS, IN if kind == "linear" else OUT).to(dtype).requires_grad_()
    chunks = 2 * max(CHUNKS[chunk], 16 * OUT * 4, IN * 4)
    with live_bytes() as memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    cast = x.numel() * 2 if autocast else 0
    assert memory.peak <= y.nbytes + cast + chunks + NUMBERS
    least = min(CHUNKS[chunk], WEIGHT) // 2  # widths are rounded down to powers of two
    assert memory.peak >= y.nbytes + least, "the count sees the merged blocks"

    release_workspace()
    dy = torch.randn_like(y)
    with live_bytes() as memory:
        dx, dc = torch.autograd.grad(y, (x, c), dy)
    cast = dx.numel() * 2 if autocast else 0
    assert memory.peak <= dx.nbytes + cast + chunks + NUMBERS
    assert memory.peak >= dx.nbytes + least
    assert memory.live <= dx.nbytes + dc.nbytes + chunks + NUMBERS


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_buffers_are_reused(live_bytes, chunk) -> None:
    """A stack of layers takes no more than one: what a second pass adds is activations alone."""
    layer, c = make_layer("linear", torch.float32, torch.bfloat16, chunk_bytes=CHUNKS[chunk])
    x = torch.randn(ROWS, IN)
    layer(x).sum().backward()
    with live_bytes() as memory:
        ys = [layer(x) for _ in range(5)]
        torch.autograd.grad(sum(y.sum() for y in ys), c)
    assert memory.largest <= ys[0].nbytes


def test_the_counter_sees_the_explicit_merge(live_bytes) -> None:
    """The assertions above can fail: the same product over a merged weight makes tensors of the weight's size."""
    w, vector = torch.zeros(256, 256), torch.ones(256, 256)
    c, x = torch.tensor(0.5, requires_grad=True), torch.ones(4, 256)
    with live_bytes() as memory:
        (x @ (w + c * vector).T).sum().backward()
    assert memory.largest >= w.nbytes and memory.peak >= 2 * w.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_costs_one_weight_in_the_dtype_of_the_product(live_bytes, dtype) -> None:
    layer, _ = make_layer("linear", torch.float32, torch.float32, cache=True)
    x = torch.randn(ROWS, IN, dtype=dtype)
    with live_bytes() as memory, torch.no_grad():
        y = layer(x)
    assert 0 <= memory.live - y.nbytes - OUT * IN * dtype.itemsize <= NUMBERS


@pytest.mark.parametrize("chunk", [IN * 4, WEIGHT])
def test_low_rank_vectors_are_never_multiplied_out(live_bytes, chunk) -> None:
    pairs = [LowRank(torch.randn(2, IN), torch.randn(OUT, 2)) for _ in range(EXPERTS)]
    c = torch.tensor([0.3, -0.2, 0.1], requires_grad=True)
    linear, settings = nn.Linear(IN, OUT, bias=False), MergeSettings(chunk_bytes=chunk)
    layer = MergedLinear(linear, {"weight": pairs}, Coefficients.uniform(["l.weight"], c), "l", settings)
    x = torch.randn(ROWS, IN, requires_grad=True)
    with live_bytes() as memory:
        layer(x).sum().backward()
    assert memory.largest <= ROWS * IN * 4  # an activation


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_embedding_is_unpacked_for_the_tokens_alone(live_bytes, bits) -> None:
    table, width, tokens = nn.Embedding(5_000, 32), 32, 8
    vectors = {"weight": [quantize(torch.randn(5_000, width), bits, 32) for _ in range(2)]}
    c = torch.full((2,), 0.1, requires_grad=True)
    layer = MergedEmbedding(table, vectors, Coefficients.uniform(["e.weight"], c), "e")
    with live_bytes() as memory:
        layer(torch.arange(tokens)).square().sum().backward()
    assert memory.largest <= tokens * width * 4


def test_detaching_leaves_no_buffer(live_bytes) -> None:
    """Writing the weights out unpacks whole tensors in the buffers; they are given back."""
    from scalemerge.layers import attach, detach

    model = nn.Sequential(nn.Linear(IN, OUT))
    with live_bytes() as memory:
        attach(model, {"0.weight": make_vectors(8, OUT, IN)}, Coefficients.uniform(["0.weight"], torch.ones(EXPERTS)))
        made = memory.live
        detach(model)
        assert memory.peak >= made + WEIGHT
        assert memory.live - made <= NUMBERS
