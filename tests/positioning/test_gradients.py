"""Gradients with respect to a, lambda and c, through a real encoder and loss, against central finite differences.

A tiny BERT in float64, three task vectors, InfoNCE: from the learned numbers through the position, the merged layers
and the loss, and back. Relative error below 1e-6 for every position and granularity, also among nearly parallel task
vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scalemerge.layers import Coefficients, attach
from scalemerge.objectives.infonce import infonce
from scalemerge.positioning import POSITIONS, Position
from scalemerge.task_vectors import GRANULARITIES, group_grams, group_names

EXPERTS = 3
Objective = Callable[[], Tensor]


def backbone() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return BertModel(BertConfig(vocab_size=20, max_position_embeddings=8, **sizes), add_pooling_layer=False).double()


def make_task_vectors(model: nn.Module, change: Callable[[list[Tensor]], None]) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    vectors = {}
    for name, parameter in model.named_parameters():
        drawn = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2 for _ in range(EXPERTS)]
        change(drawn)
        vectors[name] = drawn
    return vectors


def build(kind: str, granularity: str, change: Callable[[list[Tensor]], None]) -> tuple[Position, Objective]:
    """A position, and the objective as a function of where it stands."""
    model = backbone().eval()
    vectors = make_task_vectors(model, change)
    grams = {
        name: torch.stack([torch.stack([(one * two).sum() for two in list_]) for one in list_])
        for name, list_ in vectors.items()
    }
    groups = group_names(vectors, granularity)
    position = Position(kind, group_grams(grams, groups), start=[0.4, 0.2, 0.6], dtype=torch.float64)
    with torch.no_grad():  # away from any symmetric point, differently in each group
        for parameter in position.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
    rows = {name: number for number, members in enumerate(groups.values()) for name in members}
    coefficients = Coefficients(rows, position())
    attach(model, vectors, coefficients)
    ids = torch.randint(1, 20, (8, 6), generator=torch.Generator().manual_seed(3))

    def objective() -> Tensor:
        coefficients.set(position())
        embeddings = nn.functional.normalize(model(ids).last_hidden_state.mean(1), dim=-1)
        assert embeddings.dtype == torch.float64
        return infonce(embeddings[:4], embeddings[4:]) + 0.05 * position.length.mean()

    return position, objective


def largest_error(position: Position, objective: Objective, step: float = 1e-5) -> float:
    """Over the learned tensors: |gradient - central differences| / |central differences|."""
    gradients = torch.autograd.grad(objective(), list(position.parameters()))
    errors = []
    with torch.no_grad():
        for parameter, gradient in zip(position.parameters(), gradients, strict=True):
            differences = torch.empty_like(parameter)
            flat, out = parameter.view(-1), differences.view(-1)
            for i in range(len(flat)):
                kept = flat[i].item()
                flat[i] = kept + step
                above = objective()
                flat[i] = kept - step
                out[i] = (above - objective()) / (2 * step)
                flat[i] = kept
            errors.append(float((gradient - differences).norm() / differences.norm()))
    return max(errors)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", POSITIONS)
def test_gradients_by_central_differences(kind, granularity) -> None:
    assert largest_error(*build(kind, granularity, lambda drawn: None)) < 1e-6


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["slerp", "multislerp"])
def test_nearly_parallel_task_vectors(kind, granularity, eps) -> None:
    def change(drawn: list[Tensor]) -> None:
        drawn[1] = 1.3 * drawn[0] + eps * drawn[1]
        drawn[2] = 0.6 * drawn[0] + eps * drawn[2]

    assert largest_error(*build(kind, granularity, change)) < 1e-6


@pytest.mark.parametrize("kind", ["slerp", "multislerp"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_zero_task_vector(kind, which) -> None:
    def change(drawn: list[Tensor]) -> None:
        drawn[which] = torch.zeros_like(drawn[which])

    assert largest_error(*build(kind, "layer", change)) < 1e-6


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize("kind", POSITIONS)
def test_nearly_opposite_task_vectors_have_finite_gradients(kind, eps) -> None:
    def change(drawn: list[Tensor]) -> None:
        drawn[1] = -1.3 * drawn[0] + eps * drawn[1]

    position, objective = build(kind, "global", change)
    value = objective()
    gradients = torch.autograd.grad(value, list(position.parameters()))
    assert torch.isfinite(value) and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_comparison_can_fail() -> None:
    """A gradient that is 1e-5 off is seen."""
    position, objective = build("slerp", "global", lambda drawn: None)
    value = objective

    def scaled() -> Tensor:
        loss = value()
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * (1 + 1e-5))
        return loss

    assert largest_error(position, scaled) > 5e-6
