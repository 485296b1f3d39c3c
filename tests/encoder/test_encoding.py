"""Pooling, grouping and encoding against naive loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.encoder import POOLINGS, Encoder, pool


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    left=st.booleans(),
    how=st.sampled_from(POOLINGS),
    seed=st.integers(0, 10**6),
)
def test_pool_equals_a_loop_over_rows(lengths, left, how, seed) -> None:
    """Either side of padding; what stands in the padding never matters."""
    width = max(lengths)
    hidden = torch.randn(len(lengths), width, 5, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    expected = []
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if left else slice(0, length)
        mask[row, real] = 1
        states = hidden[row, real]
        expected.append({"cls": states[0], "last": states[-1], "mean": states.mean(0)}[how])
    hidden[mask == 0] = 1e6
    torch.testing.assert_close(pool(hidden, mask, how), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_pool_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="'max' is not one of cls, mean, last"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "max")


@pytest.mark.parametrize("how", POOLINGS)
def test_padding_side_does_not_matter(how: str, tiny_folders) -> None:
    """The same encoder with the tokenizer's padding on the left and on the right."""
    encoder = Encoder.load(tiny_folders("qwen3"), pooling=how)
    texts = ["a", "a longer text", "of three"]
    found = []
    for side in ("left", "right"):
        encoder.tokenizer.padding_side = side
        found.append(encoder.encode(texts))
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def bert(tiny_folders) -> Encoder:
    return Encoder.load(tiny_folders("bert"))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30), count=st.integers(1, 8))
def test_groups_come_back_in_order(bert: Encoder, lengths, count) -> None:
    """The inverse order restores the rows; the number of groups depends on the numbers alone; none is empty."""
    features = [{"input_ids": [row + 5] * length, "attention_mask": [1] * length} for row, length in enumerate(lengths)]
    groups, inverse = bert.groups(features, count)
    assert len(groups) == min(count, len(lengths))
    first = torch.cat([group["input_ids"][:, 0] for group in groups])
    assert first[inverse].tolist() == [row + 5 for row in range(len(lengths))]
    sizes = [len(group["input_ids"]) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    real = sum(int(group["attention_mask"].sum()) for group in groups)
    assert real == sum(lengths)


def test_grouped_forward_equals_one_by_one(bert: Encoder, texts: list[str]) -> None:
    features = bert.tokenize(texts)
    groups, inverse = bert.groups(features, 4)
    with torch.inference_mode():
        grouped = bert(groups)[inverse]
    torch.testing.assert_close(grouped, bert.encode(texts, batch_size=1), rtol=1e-4, atol=1e-5)


def test_encode_edge_cases(bert: Encoder) -> None:
    assert bert.encode([]).shape == (0, 32)
    assert bert.tokenize([]) == []
    with pytest.raises(ValueError, match="0 texts into 4 groups"):
        bert.groups([], 4)
    assert bert.encode(["", "   "]).isfinite().all()
    long = bert.tokenize(["x" * 500])[0]["input_ids"]
    assert len(long) == bert.max_length


def test_encode_restores_training_mode_and_applies_the_prompt(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("bert")).train()
    with_prompt = encoder.encode(["b"], prompt="a ")
    assert encoder.training
    torch.testing.assert_close(with_prompt, encoder.encode(["a b"]))
    assert (with_prompt - encoder.encode(["b"])).abs().max() > 1e-3


def test_unused_pooler_is_frozen_and_all_else_trains(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("bert"))
    groups, _ = encoder.groups(encoder.tokenize(["a", "bb"]), 1)
    encoder(groups).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
