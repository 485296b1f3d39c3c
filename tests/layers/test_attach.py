"""attach and detach on transformers models, against functional_call over the explicitly merged dictionary."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from scalemerge.layers import (
    Coefficients,
    MergedConv1D,
    MergedEmbedding,
    MergedLayer,
    MergedLinear,
    MergeSettings,
    attach,
    detach,
)
from scalemerge.task_vectors import group_names

EXPERTS = 3
BACKBONES = ["bert", "xlm_roberta", "modernbert", "qwen3", "mistral", "gemma2", "gemma3", "t5", "gpt2"]
GRANULARITIES = ["global", "layer", "module"]


def positioned(model, vectors, granularity, seed=3):
    """Random coefficients per group, of both signs."""
    groups = group_names(vectors, granularity)
    rows = {name: number for number, members in enumerate(groups.values()) for name in members}
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(len(groups), EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()
    return Coefficients(rows, c)


def masked_loss(output, tokens) -> torch.Tensor:
    """Sum over real tokens: nn.Embedding drops the gradient of padding rows, so padding must not reach the loss."""
    return (torch.sin(output.last_hidden_state) * tokens["attention_mask"].unsqueeze(-1)).sum()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equals_the_explicit_merge(
    make_backbone, tokens, task_vectors_of, explicit, relative_error, backbone, granularity
) -> None:
    model = make_backbone(backbone)
    plain = copy.deepcopy(model)
    vectors = task_vectors_of(model, EXPERTS)
    coefficients = positioned(model, vectors, granularity)
    c = coefficients.value
    expected_out = explicit(plain, vectors, coefficients, **tokens)
    (expected,) = torch.autograd.grad(masked_loss(expected_out, tokens), c)
    layers = attach(model, vectors, coefficients, MergeSettings(chunk_bytes=3 * 16 * 8))
    assert {layer.settings.chunk_bytes for layer in layers} == {3 * 16 * 8}  # one object serves all
    out = model(**tokens)
    (found,) = torch.autograd.grad(masked_loss(out, tokens), c)
    mask = tokens["attention_mask"].bool()
    assert relative_error(out.last_hidden_state[mask], expected_out.last_hidden_state[mask]) < 1e-10
    assert relative_error(found, expected) < 1e-10
    kinds = {type(layer) for layer in layers}
    assert (MergedConv1D if backbone == "gpt2" else MergedLinear) in kinds and MergedEmbedding in kinds
    assert not any(isinstance(m, nn.Linear) for n, m in model.named_modules() if not n.endswith("original"))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_detach_gives_the_plain_merged_model(
    make_backbone, tokens, task_vectors_of, relative_error, backbone, granularity
) -> None:
    model = make_backbone(backbone)
    plain = copy.deepcopy(model)
    vectors = task_vectors_of(model, EXPERTS)
    coefficients = positioned(model, vectors, granularity)
    attach(model, vectors, coefficients)
    with torch.no_grad():
        while_attached = model(**tokens).last_hidden_state
    assert detach(model) is model
    assert not any(isinstance(module, MergedLayer) for module in model.modules())
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, parameter in plain.named_parameters():
        merged = parameter.detach() + sum(
            c * vector for c, vector in zip(coefficients.of(name).detach(), vectors[name])
        )
        assert relative_error(state[name], merged) < 1e-14
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer)
    with torch.no_grad():
        assert relative_error(model(**tokens).last_hidden_state, while_attached) < 1e-10


def test_state_dict_has_base_weights_and_no_task_vectors(make_backbone, task_vectors_of) -> None:
    model = make_backbone("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vectors = task_vectors_of(model, EXPERTS)
    attach(model, vectors, positioned(model, vectors, "global"))
    state = model.state_dict()
    assert {name.replace(".original", "") for name in state} == before.keys()
    for name, value in state.items():
        assert torch.equal(value, before[name.replace(".original", "")])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_base_weights_are_not_copied(make_backbone, task_vectors_of) -> None:
    model = make_backbone("bert")
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    vectors = task_vectors_of(model, EXPERTS)
    attach(model, vectors, positioned(model, vectors, "global"))
    assert {n.replace(".original", ""): p.data_ptr() for n, p in model.named_parameters()} == places


def test_modules_without_task_vectors_stay_as_they_are(make_backbone, task_vectors_of) -> None:
    model = make_backbone("bert")
    untouched = model.encoder.layer[0].intermediate.dense
    names = ["encoder.layer.1.intermediate.dense.weight", "embeddings.LayerNorm.bias"]
    vectors = task_vectors_of(model, EXPERTS, names=names)
    assert len(attach(model, vectors, positioned(model, vectors, "global"))) == 2
    assert model.encoder.layer[0].intermediate.dense is untouched
    assert isinstance(model.encoder.layer[1].intermediate.dense, MergedLinear)


@pytest.mark.parametrize("backbone", ["bert", "qwen3"])
def test_gradient_checkpointing(make_backbone, tokens, task_vectors_of, backbone) -> None:
    model = make_backbone(
        backbone
    ).train()  # checkpointing acts in training mode; the tiny configurations' dropout is 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    vectors = task_vectors_of(model, EXPERTS)
    coefficients = positioned(model, vectors, "layer")
    attach(model, vectors, coefficients)
    (expected,) = torch.autograd.grad(masked_loss(model(**tokens), tokens), coefficients.value)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    (found,) = torch.autograd.grad(masked_loss(model(**tokens), tokens), coefficients.value)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast_bfloat16_is_close(make_backbone, tokens, task_vectors_of, relative_error, backbone) -> None:
    model = make_backbone(backbone, torch.float32)
    vectors = task_vectors_of(model, EXPERTS, scale=0.01)
    coefficients = positioned(model, vectors, "global")
    attach(model, vectors, coefficients)
    exact = model(**tokens)
    (expected,) = torch.autograd.grad(masked_loss(exact, tokens), coefficients.value)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**tokens)
    (found,) = torch.autograd.grad(masked_loss(out, tokens).float(), coefficients.value)
    assert relative_error(out.last_hidden_state, exact.last_hidden_state) < 0.03
    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_models_run(make_backbone, tokens, task_vectors_of, relative_error, backbone) -> None:
    model = make_backbone(backbone, torch.bfloat16)
    vectors = {
        name: [vector.float() for vector in list_]
        for name, list_ in task_vectors_of(model, EXPERTS, scale=0.02).items()
    }
    coefficients = positioned(model, vectors, "global")
    attach(model, vectors, coefficients)
    out = model(**tokens).last_hidden_state
    masked_loss(model(**tokens), tokens).float().backward()
    assert torch.isfinite(coefficients.value.grad).all()
    detach(model)
    assert relative_error(model(**tokens).last_hidden_state, out) < 0.02


class Tied(nn.Module):
    """One parameter in two modules (an embedding's table is also the output's) and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.block = nn.Linear(4, 4)
        self.again = self.block

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(torch.tanh(self.block(self.table(ids)))))


@pytest.mark.parametrize("named", ["first", "second", "both"])
def test_tied_modules_and_parameters_stay_tied(numbers, relative_error, named) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    plain = copy.deepcopy(model)
    tables = [numbers(7, 4, seed=i) for i in range(2)]
    blocks = [numbers(4, 4, seed=5 + i) for i in range(2)]
    vectors = {
        "first": {"table.weight": tables, "block.weight": blocks},
        "second": {"head.weight": tables, "again.weight": blocks},
        "both": {"table.weight": tables, "head.weight": tables, "block.weight": blocks, "again.weight": blocks},
    }[named]
    c = torch.tensor([[0.5, -0.3], [9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    second = named == "both"  # a second name's own coefficients do not count: the weight is one
    rows = {name: int(second and name in ("head.weight", "again.weight")) for name in vectors}
    coefficients = Coefficients(rows, c)
    ids = torch.tensor([1, 2, 2, 6])
    table = plain.table.weight.detach() + c[0, 0] * tables[0] + c[0, 1] * tables[1]
    block = plain.block.weight.detach() + c[0, 0] * blocks[0] + c[0, 1] * blocks[1]
    bias = plain.block.bias.detach()
    hidden = torch.tanh(nn.functional.linear(table[ids], block, bias))
    expected_y = nn.functional.linear(hidden, block, bias) @ table.T
    (expected,) = torch.autograd.grad(expected_y.sin().sum(), c)

    assert len(attach(model, vectors, coefficients)) == 3
    assert model.block is model.again and model.head.weight is model.table.weight
    y = model(ids)
    (found,) = torch.autograd.grad(y.sin().sum(), c)
    assert relative_error(y, expected_y) < 1e-12 and relative_error(found, expected) < 1e-10
    held = {v.data_ptr() for layer in (model.table, model.head) for v in layer.task_vectors["weight"].values}
    assert len(held) == 2  # counted once
    detach(model)
    assert model.head.weight is model.table.weight and model.block is model.again
    assert relative_error(model.table.weight, table.detach()) < 1e-14  # merged once, not twice
    assert relative_error(model.block.weight, block.detach()) < 1e-14


def test_unknown_names_and_wrong_shapes_are_refused_before_anything_changes(make_backbone, task_vectors_of) -> None:
    model = make_backbone("bert")
    vectors = task_vectors_of(model, EXPERTS, names=["encoder.layer.0.output.dense.weight"])
    coefficients = positioned(model, vectors, "global")
    with pytest.raises(ValueError, match=r"no parameter 'encoder\.layer\.9\.weight'"):
        attach(model, {**vectors, "encoder.layer.9.weight": [torch.zeros(1)]}, coefficients)
    with pytest.raises(ValueError, match=r"no coefficients for 'embeddings\.LayerNorm\.bias'"):
        attach(model, {**vectors, "embeddings.LayerNorm.bias": [torch.zeros(16)]}, coefficients)
    name = "encoder.layer.0.output.dense.weight"
    with pytest.raises(ValueError, match=r"output\.dense\.weight: a task vector has shape \(24, 16\)"):
        attach(model, {name: [torch.zeros(24, 16)] * EXPERTS}, coefficients)
    with pytest.raises(ValueError, match="wrap the model"):
        linear = nn.Linear(2, 2)
        attach(linear, {"weight": [torch.zeros(2, 2)]}, Coefficients.uniform(["weight"], torch.ones(1)))
    assert not any(isinstance(module, MergedLayer) for module in model.modules())


def test_the_number_of_task_vectors_must_match_the_coefficients(make_backbone, task_vectors_of, tokens) -> None:
    model = make_backbone("bert")
    vectors = task_vectors_of(model, EXPERTS)
    coefficients = Coefficients.uniform(vectors, torch.ones(EXPERTS + 1, dtype=torch.float64))
    attach(model, vectors, coefficients)
    with pytest.raises(ValueError):
        model(**tokens)


def test_moving_the_coefficients_moves_the_model(make_backbone, task_vectors_of, tokens) -> None:
    model = make_backbone("bert")
    with torch.no_grad():
        base = model(**tokens).last_hidden_state
        vectors = task_vectors_of(model, EXPERTS)
        coefficients = positioned(model, vectors, "global")
        attach(model, vectors, coefficients)
        assert not torch.allclose(model(**tokens).last_hidden_state, base)
        coefficients.set(torch.zeros(1, EXPERTS, dtype=torch.float64))
        torch.testing.assert_close(model(**tokens).last_hidden_state, base, rtol=1e-12, atol=1e-12)
