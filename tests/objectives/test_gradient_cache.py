"""The gradient cache: the plain gradient, whatever the loss and the chunks; random numbers replayed; equal counts."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.objectives.batches import TextBatch, batch_losses
from scalemerge.objectives.gradient_cache import GradientCache, chunks_by_tokens, split_to


@given(lengths=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 100))
def test_chunks_hold_every_row_once_within_the_budget(lengths, budget) -> None:
    chunks = chunks_by_tokens(lengths, budget)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(lengths)))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * max(lengths[row] for row in chunk) <= budget
    longest = [max(lengths[row] for row in chunk) for chunk in chunks]
    assert longest == sorted(longest, reverse=True), "the largest first"
    for one, two in pairwise(chunks):
        assert (len(one) + 1) * lengths[one[0]] > budget or not two, "no chunk stops before it is full"


@given(sizes=st.lists(st.integers(1, 9), max_size=5), count=st.integers(0, 20))
def test_split_to_keeps_the_rows_and_reaches_the_count(sizes, count) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    chunks = [list(range(start, start + size)) for start, size in zip(starts, sizes)]
    found = split_to(chunks, count)
    assert len(found) == max(count, len(chunks))
    assert [row for chunk in found for row in chunk] == list(range(sum(sizes)))
    assert not any(len(chunk) > 1 for chunk in found) or [] not in found, "nothing is empty while a chunk can be halved"


def features(count: int, start: int = 0) -> list[dict[str, list[int]]]:
    return [{"input_ids": [start + number] + [1] * (number % 4)} for number in range(count)]


def make_batch(loss: str, rows: int, negatives: tuple[int, ...] | None = None) -> TextBatch:
    if loss == "cosent":
        roles = {"sentence1": features(rows), "sentence2": features(rows, 100)}
        return TextBatch("t", loss, {}, roles, {"score": torch.arange(rows) % 3 * 1.0})
    if loss == "supcon":
        return TextBatch("t", loss, {"temperature": 0.2}, {"text": features(rows)}, {"label": torch.arange(rows) % 2})
    roles = {"query": features(rows), "positive": features(rows, 100)}
    if negatives is not None:
        roles["negatives"] = features(sum(negatives), 200)
    return TextBatch("t", loss, {"temperature": 0.2, "symmetric": True}, roles, {}, negatives)


class Table(torch.nn.Module):
    """The smallest encoder, with dropout that can be switched on; it counts its calls."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(300, 8, dtype=torch.float64, generator=generator))
        self.mix = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.float64, generator=generator))
        self.dropout = dropout
        self.calls: list[torch.Tensor] = []

    def forward(self, texts: list[dict[str, list[int]]]) -> torch.Tensor:
        ids = torch.tensor([text["input_ids"][0] for text in texts], dtype=torch.long)
        lengths = torch.tensor([len(text["input_ids"]) for text in texts], dtype=torch.float64).unsqueeze(1)
        found = F.normalize(F.dropout(self.table[ids] @ self.mix * lengths + 1, self.dropout), dim=-1)
        self.calls.append(found.detach().clone())
        return found


def cached(model: Table, batch: TextBatch, cache: GradientCache, scale: float = 1.0) -> torch.Tensor:
    (loss,) = batch_losses([batch], cache.encode)
    (loss * scale).backward()
    assert model.table.grad is None, "the loss's gradient stops at the embeddings"
    cache.backward(lambda surrogate, last: surrogate().backward())
    return loss.detach()


LOSSES = [("infonce", None), ("infonce", (2, 0, 1, 3, 1, 0, 2)), ("cosent", None), ("supcon", None)]


@pytest.mark.parametrize("loss, negatives", LOSSES)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 7, 10**6])
@pytest.mark.parametrize("scale", [1.0, 128.0])
@pytest.mark.parametrize("hold", [None, lambda alone: nullcontext()])
def test_the_plain_gradient(loss, negatives, chunk_tokens, scale, hold) -> None:
    batch = make_batch(loss, 7, negatives)
    plain, model = Table(), Table()
    (expected,) = batch_losses([batch], plain)
    (expected * scale).backward()
    found = cached(model, batch, GradientCache(model, chunk_tokens, hold=hold), scale)
    assert found == pytest.approx(expected.item(), rel=1e-14)
    for name in ("table", "mix"):
        torch.testing.assert_close(getattr(model, name).grad, getattr(plain, name).grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("count", [1, 14, 40])
def test_ranks_with_fewer_texts_make_as_many_chunks(count, monkeypatch) -> None:
    """As if another rank had `count` chunks; past 14 texts the rest is filled with chunks of zero gradient."""
    monkeypatch.setattr(GradientCache, "_most", lambda self, own: max(own, count))
    batch = make_batch("infonce", 7)
    plain, model = Table(), Table()
    batch_losses([batch], plain)[0].backward()
    cached(model, batch, GradientCache(model, 1000, world=2))
    assert len(model.calls) == 2 * count
    torch.testing.assert_close(model.mix.grad, plain.mix.grad, rtol=1e-11, atol=1e-14)


def test_the_kept_graph_saves_a_forward_pass(monkeypatch) -> None:
    """Every chunk but the last of phase 1 is embedded twice; and `hold` is told whether it is the only one."""
    for chunk_tokens, alone in ((5, False), (10**6, True)):
        model, told = Table(), []

        def hold(only: bool, told: list[bool] = told) -> nullcontext[None]:
            told.append(only)
            return nullcontext()

        cache = GradientCache(model, chunk_tokens, hold=hold)
        batch_losses([make_batch("infonce", 7)], cache.encode)[0].backward()
        chunks = len(model.calls)
        assert told == [alone] and (chunks == 1) == alone
        cache.backward(lambda surrogate, last: surrogate().backward())
        assert len(model.calls) == 2 * chunks - 1


def test_the_last_chunk_alone_synchronizes() -> None:
    model = Table()
    cache = GradientCache(model, 5)
    batch_losses([make_batch("infonce", 7)], cache.encode)[0].backward()
    last: list[bool] = []
    cache.backward(lambda surrogate, final: (last.append(final), surrogate().backward())[0])
    assert len(last) > 3 and last == [False] * (len(last) - 1) + [True]


def test_dropout_with_a_kept_graph_is_that_of_one_without() -> None:
    gradients = []
    for hold in (None, lambda alone: nullcontext()):
        torch.manual_seed(3)
        model = Table(dropout=0.5)
        cached(model, make_batch("infonce", 7), GradientCache(model, 6, hold=hold))
        gradients.append(model.mix.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_dropout_is_replayed_and_the_stream_goes_on() -> None:
    torch.manual_seed(3)
    model = Table(dropout=0.5)
    cache = GradientCache(model, 6)
    batch_losses([make_batch("infonce", 7)], cache.encode)[0].backward()
    state = torch.get_rng_state()
    first = list(model.calls)
    model.calls.clear()
    cache.backward(lambda surrogate, last: surrogate().backward())
    assert all(torch.equal(one, two) for one, two in zip(first, model.calls, strict=True))
    assert not torch.equal(first[0], first[1][: len(first[0])])
    assert torch.equal(torch.get_rng_state(), state)


def test_no_texts_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one text"):
        GradientCache(Table(), 5).encode([])
