"""On a CUDA device: every kernel and the layers against float64 on the CPU, equal bits, memory, graphs, torch.compile.

Needs torch, triton, transformers and pytest alone, and no fixture of other files:

    PYTHONPATH=. python -m pytest --noconftest -m gpu tests/kernels/test_gpu.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from scalemerge.kernels.coefficient_grad import coefficient_grad, embedding_coefficient_grad
from scalemerge.kernels.formats import LowRank, Packed, TaskVector, dense_block, quantize
from scalemerge.kernels.merge_weights import merge_weights, merge_weights_triton
from scalemerge.kernels.merged_linear import merged_linear_triton
from scalemerge.kernels.workspace import release_workspace
from scalemerge.layers import Coefficients, MergedLinear, MergeSettings, attach

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: no real kernels"),
]
DEVICE = "cuda"

#: relative error (norms) of y and dX: rounding of the weight, the inputs being exact
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DC_TOLERANCE = 1e-3  # dc needs no rounded weight: float32 sums of products of what is given
RAGGED = (33, 130, 200)  # M, N, K
ODD = (70, 77, 131)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def make_vectors(form: str, experts: int, n: int, k: int, dtype: torch.dtype) -> list[TaskVector]:
    """On the CPU. mixed: dense, int8, int4 in turn, the last one low-rank."""
    made: list[TaskVector] = []
    for i in range(experts):
        kind = ("dense", "int8", "int4")[i % 3] if form == "mixed" else form
        if kind == "low-rank" or (form == "mixed" and i == experts - 1):
            made.append(LowRank(draw(5, k, seed=50 + i, dtype=dtype), draw(n, 5, seed=90 + i, dtype=dtype, scale=0.02)))
            continue
        vector = draw(n, k, seed=10 + i, scale=0.1)
        made.append(vector.to(dtype) if kind == "dense" else quantize(vector, int(kind[3:])))
    return made


def on_device(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    return [vector.to(torch.device(DEVICE)) for vector in vectors]


def exact_weight(base: Tensor, vectors: Sequence[TaskVector], c: Tensor) -> Tensor:
    """W0 + sum c_i T_i in float64 on the CPU; c [E] or [E, N]."""
    total = base.double()
    for value, vector in zip(c.double(), vectors, strict=True):
        dense = dense_block(vector, dtype=torch.float64).double()  # a number times bfloat16 would stay bfloat16
        total = total + (value if value.dim() == 0 else value[:, None]) * dense
    return total


def exact_dc(x: Tensor, dy: Tensor, vectors: Sequence[TaskVector]) -> Tensor:
    weight_gradient = dy.double().T @ x.double()
    return torch.stack([(weight_gradient * dense_block(v, dtype=torch.float64).double()).sum() for v in vectors])


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the norm; NaN never passes a comparison with it."""
    found, expected = found.detach().double().cpu(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def lists_of(vectors: Sequence[TaskVector]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[int]]:
    packed = Packed.of(vectors)
    return packed.values, packed.scales, packed.groups


class Problem:
    """A layer on the device, its inputs, and the exact answers."""

    def __init__(
        self, shape: tuple[int, int, int], form: str, experts: int, dtype: torch.dtype, *, by_row: bool = False
    ) -> None:
        m, n, k = shape
        self.base = draw(n, k, seed=0, dtype=dtype, scale=k**-0.5)
        self.bias = draw(n, seed=1, dtype=dtype)
        self.vectors = make_vectors(form, experts, n, k, dtype)
        self.c = draw(*((experts, n) if by_row else (experts,)), seed=2, scale=1 / experts)
        self.x, self.dy = draw(m, k, seed=3, dtype=dtype), draw(m, n, seed=4, dtype=dtype)

    def layer(self, settings: MergeSettings) -> tuple[MergedLinear, Tensor, Tensor]:
        """The layer, x and c as leaves."""
        linear = nn.Linear(self.base.shape[1], self.base.shape[0], dtype=self.base.dtype, device=DEVICE)
        with torch.no_grad():
            linear.weight.copy_(self.base)
            linear.bias.copy_(self.bias)
        c = self.c.to(DEVICE).requires_grad_()
        if c.dim() == 2:
            coefficients = Coefficients({}, torch.zeros(1, len(c), device=DEVICE), {"layer.weight": c})
        else:
            coefficients = Coefficients.uniform(["layer.weight"], c)
        layer = MergedLinear(linear, {"weight": on_device(self.vectors)}, coefficients, "layer", settings)
        return layer, self.x.to(DEVICE).requires_grad_(), c

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        weight = exact_weight(self.base, self.vectors, self.c)
        y = self.x.double() @ weight.T + self.bias.double()
        if self.c.dim() == 2:
            gradient = self.dy.double().T @ self.x.double()
            dc = torch.stack([(gradient * dense_block(v, dtype=torch.float64)).sum(1) for v in self.vectors])
        else:
            dc = exact_dc(self.x, self.dy, self.vectors)
        return y, self.dy.double() @ weight, dc

    def step(self, settings: MergeSettings) -> tuple[Tensor, Tensor, Tensor]:
        layer, x, c = self.layer(settings)
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, c), self.dy.to(DEVICE))


# ---- kernels alone -------------------------------------------------------------------------------------------------

FORMS = ("dense", "int8", "int4")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [RAGGED, ODD])
def test_merge_weights_writes_every_element_of_a_block(form: str, shape: tuple[int, int, int]) -> None:
    _, n, k = shape
    one = Problem(shape, form, 4, torch.bfloat16)
    lists, c = lists_of(on_device(one.vectors)), one.c.to(DEVICE)
    out = torch.full((n - 20, k - 64), float("nan"), device=DEVICE)
    merge_weights(one.base.to(DEVICE), *lists, c, (n, k), (20, n), (64, k), out)
    assert error(out, exact_weight(one.base, one.vectors, one.c)[20:, 64:]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_merge_weights_of_picked_rows(form: str) -> None:
    one = Problem(RAGGED, form, 4, torch.bfloat16)
    index = torch.randint(0, 130, (57,), generator=torch.Generator().manual_seed(9))
    out = torch.full((57, 200), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    lists = lists_of(on_device(one.vectors))
    merge_weights_triton(one.base.to(DEVICE), *lists, one.c.to(DEVICE), out, index=index.to(DEVICE))
    assert error(out, exact_weight(one.base, one.vectors, one.c)[index]) < 5e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_merged_linear(form: str, along_rows: bool, parts: int) -> None:
    one = Problem(RAGGED, form, 4, torch.bfloat16)
    x = one.x if along_rows else one.dy
    lists, c = lists_of(on_device(one.vectors)), one.c.to(DEVICE)
    y = merged_linear_triton(
        x.to(DEVICE), one.base.to(DEVICE), *lists, c, shape=one.base.shape, along_rows=along_rows, parts=parts
    )
    weight = exact_weight(one.base, one.vectors, one.c)
    assert error(y, x.double() @ (weight.T if along_rows else weight)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [RAGGED, ODD, (1000, 130, 200)])
def test_coefficient_grad(form: str, shape: tuple[int, int, int]) -> None:
    one = Problem(shape, form, 4, torch.bfloat16)
    lists, (_, n, k) = lists_of(on_device(one.vectors)), shape
    found = coefficient_grad(one.dy.to(DEVICE), one.x.to(DEVICE), *lists, (n, k), 0, n, 0, k, False)
    assert found.dtype == torch.float64
    assert error(found, exact_dc(one.x, one.dy, one.vectors)) < DC_TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_embedding_coefficient_grad(form: str) -> None:
    one = Problem(RAGGED, form, 4, torch.bfloat16)
    ids = torch.randint(0, 130, (301,), generator=torch.Generator().manual_seed(9))
    gradient = draw(301, 200, seed=5, dtype=torch.bfloat16)
    found = embedding_coefficient_grad(ids.to(DEVICE), gradient.to(DEVICE), *lists_of(on_device(one.vectors)))
    dense = [dense_block(vector, dtype=torch.float64).double() for vector in one.vectors]
    assert error(found, torch.stack([(gradient.double() * vector[ids]).sum() for vector in dense])) < DC_TOLERANCE


# ---- the layer -----------------------------------------------------------------------------------------------------

CASES = [
    *[("dense", experts, torch.bfloat16, RAGGED) for experts in (1, 4, 8, 16)],
    ("int8", 4, torch.bfloat16, ODD), ("int4", 4, torch.bfloat16, ODD), ("int4", 8, torch.bfloat16, RAGGED),
    ("low-rank", 4, torch.bfloat16, RAGGED), ("mixed", 5, torch.bfloat16, ODD),
    ("dense", 4, torch.float16, ODD), ("int4", 4, torch.float16, RAGGED),
    ("dense", 4, torch.float32, ODD), ("int8", 4, torch.float32, RAGGED), ("low-rank", 4, torch.float32, ODD),
]  # fmt: skip


@pytest.mark.parametrize("form, experts, dtype, shape", CASES)
@pytest.mark.parametrize("strategy", ["on_the_fly", "chunked"])
def test_layer_equals_float64(
    form: str, experts: int, dtype: torch.dtype, shape: tuple[int, int, int], strategy: str
) -> None:
    one = Problem(shape, form, experts, dtype)
    found = one.step(MergeSettings(strategy=strategy, chunk_bytes=8192))  # type: ignore[arg-type]
    # the products of low-rank task vectors are rounded to dtype on the way to dc
    dc_tolerance = max(DC_TOLERANCE, 3 * TOLERANCE[dtype]) if form in ("low-rank", "mixed") else DC_TOLERANCE
    for what, expected, limit in zip(
        found, one.expected(), (TOLERANCE[dtype], TOLERANCE[dtype], dc_tolerance), strict=True
    ):
        assert error(what, expected) < limit


@pytest.mark.parametrize("strategy", ["on_the_fly", "chunked"])
def test_coefficients_by_row(strategy: str) -> None:
    one = Problem(RAGGED, "int4", 4, torch.bfloat16, by_row=True)
    found = one.step(MergeSettings(strategy=strategy, chunk_bytes=8192))  # type: ignore[arg-type]
    for what, expected, limit in zip(found, one.expected(), (1e-2, 1e-2, DC_TOLERANCE), strict=True):
        assert error(what, expected) < limit


@pytest.mark.parametrize("rows, form", [(64, "dense"), (300, "dense"), (300, "int4")])
def test_a_large_layer(rows: int, form: str) -> None:
    """N = K = 4096 with the defaults: on the fly for 64 rows, two buffers and a side stream for 300."""
    one = Problem((rows, 4096, 4096), form, 4, torch.bfloat16)
    found = one.step(MergeSettings())
    for what, expected, limit in zip(found, one.expected(), (1e-2, 1e-2, DC_TOLERANCE), strict=True):
        assert error(what, expected) < limit


@pytest.mark.parametrize("strategy", ["on_the_fly", "chunked"])
@pytest.mark.parametrize("form", ["dense", "int4"])
def test_repeats_give_equal_bits(strategy: str, form: str) -> None:
    one = Problem((200, 520, 1000), form, 4, torch.bfloat16)
    settings = MergeSettings(strategy=strategy, chunk_bytes=64 * 1024)  # type: ignore[arg-type]
    first = one.step(settings)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, one.step(settings), strict=True))


def test_memory_beyond_activations_is_two_chunks() -> None:
    chunk = 4 * 2**20
    one = Problem((2048, 4096, 4096), "dense", 4, torch.bfloat16)
    layer, x, c = one.layer(MergeSettings(chunk_bytes=chunk, strategy="chunked"))
    dy = one.dy.to(DEVICE)
    torch.autograd.grad(layer(x), (x, c), dy)  # the libraries allocate their own workspaces once
    torch.cuda.synchronize()
    release_workspace()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, c), dy)
    torch.cuda.synchronize()
    beyond = torch.cuda.max_memory_allocated() - before - y.nbytes - gradients[0].nbytes
    assert beyond <= 2 * chunk + 2**20, f"{beyond / 2**20:.1f} MiB"


def test_a_captured_graph_replays_the_chunked_forward() -> None:
    one = Problem((300, 512, 1024), "dense", 4, torch.bfloat16)
    layer, x, _ = one.layer(MergeSettings(strategy="chunked", chunk_bytes=128 * 1024))
    x = x.detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        y = layer(x)
    x.copy_(draw(300, 1024, seed=77, dtype=torch.bfloat16))
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        assert torch.equal(y, layer(x))


def test_torch_compile() -> None:
    one = Problem(RAGGED, "dense", 4, torch.bfloat16)
    layer, x, c = one.layer(MergeSettings())
    dy = one.dy.to(DEVICE)
    expected = torch.autograd.grad(layer(x), (x, c), dy)
    found = torch.autograd.grad(torch.compile(layer)(x), (x, c), dy)
    for one_, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one_, other)


# ---- models --------------------------------------------------------------------------------------------------------


def tiny(kind: str) -> nn.Module:
    import transformers

    sizes = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(**sizes)
    else:
        config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8)
    pooler = {"add_pooling_layer": False} if kind == "bert" else {}
    model = transformers.AutoModel.from_config(config, **pooler).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.to(DEVICE)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("rows", [2, 40])  # 18 tokens: on the fly; 360: chunked
def test_a_model_step_equals_the_explicit_merge(kind: str, rows: int) -> None:
    model = tiny(kind)
    vectors = {
        name: [draw(*parameter.shape, seed=7 * number + i, scale=0.05).to(DEVICE) for i in range(3)]
        for number, (name, parameter) in enumerate(model.named_parameters())
    }
    ids = torch.randint(5, 99, (rows, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights = draw(rows, 9, 32, seed=5).to(DEVICE)
    c = torch.tensor([0.5, -0.2, 0.3], device=DEVICE, requires_grad=True)
    merged = {
        name: parameter.detach() + sum(value * vector for value, vector in zip(c, vectors[name], strict=True))
        for name, parameter in model.named_parameters()
    }
    expected = functional_call(model, merged, (), {"input_ids": ids}).last_hidden_state
    expected_dc = torch.autograd.grad((expected * weights).sum(), c)[0]
    attach(model, vectors, Coefficients.uniform(vectors, c))
    found = model(input_ids=ids).last_hidden_state
    found_dc = torch.autograd.grad((found * weights).sum(), c)[0]
    assert error(found, expected.double().cpu()) < 1e-4
    assert error(found_dc, expected_dc.double().cpu()) < 1e-3
