"""Selective recomputation: the same numbers from fewer kept bytes, taken off again by detach."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from scalemerge.kernels.workspace import release_workspace
from scalemerge.layers import Coefficients, MergeSettings, attach, detach
from scalemerge.layers.recompute import recompute_blocks, transformer_blocks


def gradient(model, tokens, c):
    output = model(**tokens).last_hidden_state
    return torch.autograd.grad(output.square().sum(), c)[0]


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen3", "mistral"])
@pytest.mark.parametrize("level", ["cheap", "all"])
def test_the_same_bits(make_backbone, task_vectors_of, tokens, name, level) -> None:
    found = {}
    for chosen in ("none", level):
        model = make_backbone(name)
        vectors = task_vectors_of(model, 2)
        c = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
        attach(model, vectors, Coefficients.uniform(vectors, c), MergeSettings(recompute=chosen))
        found[chosen] = gradient(model, tokens, c)
    assert torch.equal(found["none"], found[level])


def test_fewer_bytes_are_kept(make_backbone, task_vectors_of, live_bytes) -> None:
    tokens = {"input_ids": torch.randint(3, 40, (16, 16)), "attention_mask": torch.ones(16, 16, dtype=torch.long)}
    peaks = {}
    for level in ("none", "cheap", "all"):
        model = make_backbone("bert")
        vectors = task_vectors_of(model, 2)
        c = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
        attach(model, vectors, Coefficients.uniform(vectors, c), MergeSettings(recompute=level))
        gradient(model, tokens, c)
        release_workspace()
        with live_bytes() as live:
            gradient(model, tokens, c)
        peaks[level] = live.peak
    assert peaks["cheap"] < 0.9 * peaks["none"] and peaks["all"] < 0.75 * peaks["cheap"]


def test_no_merged_product_is_made_twice(make_backbone, task_vectors_of, tokens, monkeypatch) -> None:
    """ "cheap" makes each product once forward; "all" twice."""
    from scalemerge.layers import product

    made: list[int] = []
    real = product._MergedBlocks.__iter__
    monkeypatch.setattr(product._MergedBlocks, "__iter__", lambda self: made.append(1) or real(self))
    counts = {}
    for level in ("none", "cheap", "all"):
        model = make_backbone("bert")
        vectors = task_vectors_of(model, 2)
        c = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
        attach(model, vectors, Coefficients.uniform(vectors, c), MergeSettings(recompute=level))
        made.clear()
        gradient(model, tokens, c)
        counts[level] = len(made)
    assert counts["cheap"] == counts["none"] and counts["all"] == 1.5 * counts["none"]


def test_detach_and_copies(make_backbone, task_vectors_of, tokens) -> None:
    model = make_backbone("bert")
    kinds = [type(block) for block in transformer_blocks(model)]
    assert len(kinds) == 2
    vectors = task_vectors_of(model, 2)
    c = torch.tensor([0.3, 0.6], dtype=torch.float64)
    attach(model, vectors, Coefficients.uniform(vectors, c), MergeSettings(recompute="cheap"))
    assert all(isinstance(block, kind) for block, kind in zip(transformer_blocks(model), kinds))
    before = model(**tokens).last_hidden_state
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.mul_(2.0)
    assert torch.equal(model(**tokens).last_hidden_state, before)
    assert not torch.allclose(twin(**tokens).last_hidden_state, before), "the copy runs its own blocks"
    detach(model)
    assert [type(block) for block in transformer_blocks(model)] == kinds


def test_refusals() -> None:
    with pytest.raises(ValueError, match="recompute must be one of none, cheap, all"):
        MergeSettings(recompute="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no list of blocks"):
        recompute_blocks(nn.Sequential(nn.Linear(2, 2)), "all")
