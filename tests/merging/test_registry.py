"""Merge methods: their formulas, and that the signature is the schema."""

from __future__ import annotations

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.merging import METHODS, find_method, merge_method


def tensors(experts: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(5, 3, generator=generator) for _ in range(experts + 1)]
    return drawn[0], drawn[1:]


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_average(experts) -> None:
    base, vectors = tensors(experts)
    mean_of_models = torch.stack([(base.double() + vector.double()) for vector in vectors]).mean(0)
    merged = find_method("average", "x")(base, vectors, {})
    torch.testing.assert_close(merged.double(), mean_of_models, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [0.0, 0.4, 1.0, -0.5])
def test_task_arithmetic(length) -> None:
    base, vectors = tensors(3)
    expected = base.double() + length * torch.stack(vectors).double().sum(0)
    merged = find_method("task_arithmetic", "x")(base, vectors, {"lambda": length})
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_are_pure_and_documented(name) -> None:
    base, vectors = tensors(3)
    before = [tensor.clone() for tensor in (base, *vectors)]
    method = find_method(name, "x")
    merged = method(base, vectors, method.check({}, "x"))
    assert merged.shape == base.shape and merged.data_ptr() != base.data_ptr()
    assert all(torch.equal(one, two) for one, two in zip(before, (base, *vectors), strict=True))
    assert method.source and method.function.__doc__


def test_parameters_are_the_keyword_arguments() -> None:
    @merge_method("test_only", source="here")
    def test_only(base, task_vectors, *, lambda_: float = 0.5, density: float = 1.0):
        """A method."""
        return base + lambda_ * density

    try:
        method = find_method("test_only", "x")
        assert method.defaults == {"lambda": 0.5, "density": 1.0}
        assert method.check({"lambda": 2}, "x") == {"lambda": 2, "density": 1.0}
        assert method(torch.zeros(1), [], {"lambda": 2, "density": 0.25}).item() == 0.5
    finally:
        del METHODS["test_only"]


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"lamda": 0.3}, "merges.1.parameters: method 'task_arithmetic' has no parameter 'lamda'; it has lambda"),
        ({"lambda": float("nan")}, "merges.1.parameters: 'lambda' must be a finite number, not nan"),
        ({"lambda": float("inf")}, "'lambda' must be a finite number"),
        ({"lambda": "0.3"}, "'lambda' must be a finite number, not '0.3'"),
        ({"lambda": True}, "'lambda' must be a finite number, not True"),
        ({"lambda": None}, "'lambda' must be a finite number"),
    ],
)
def test_bad_parameters(parameters, words) -> None:
    with pytest.raises(InputError) as caught:
        find_method("task_arithmetic", "x").check(parameters, "merges.1.parameters")
    assert words in str(caught.value)


def test_unknown_method_and_method_without_parameters() -> None:
    with pytest.raises(InputError, match=r"merges\.0: no merge method 'tie'; there are average, task_arithmetic"):
        find_method("tie", "merges.0")
    with pytest.raises(InputError, match="'average' has no parameter 'lambda'; it has none"):
        find_method("average", "x").check({"lambda": 1.0}, "x")
