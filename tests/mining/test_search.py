"""The blocked search against brute force in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalemerge.mining import search
from scalemerge.mining.search import pair_scores, top_k


def brute_force(queries: Tensor, corpus: Tensor, k: int, excluded: Tensor) -> tuple[Tensor, Tensor]:
    scores = (queries.double() @ corpus.double().T).float()
    for query, text in excluded.tolist():
        scores[query, text] = -torch.inf
    scores, places = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], places[:, :k].masked_fill(scores[:, :k] == -torch.inf, -1)


def unit(rows: int, seed: int, dimension: int = 24) -> Tensor:
    return F.normalize(torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)), dim=1)


NOBODY = torch.empty(0, 2, dtype=torch.int64)


@given(
    rows=st.integers(1, 9), texts=st.integers(1, 120), k=st.integers(1, 130), block=st.integers(1, 130),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_brute_force(rows: int, texts: int, k: int, block: int, seed: int) -> None:
    queries, corpus = unit(rows, seed), unit(texts, seed + 1000)
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.rand(rows, texts, generator=generator).lt(0.1).nonzero()
    scores, places = top_k(queries, corpus, k, pairs, block=block)
    expected_scores, expected_places = brute_force(queries, corpus, k, pairs)
    assert torch.equal(places, expected_places)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-7)


def test_ties_are_in_corpus_order_whatever_the_block() -> None:
    """60 spellings of five vectors: every border is a tie of more texts than are kept to spare."""
    corpus = unit(5, 1).repeat(60, 1)
    queries, pairs = unit(7, 2), torch.tensor([[0, 3], [0, 8], [4, 0], [6, 299]])
    expected = brute_force(queries, corpus, 20, pairs)
    for block in (1, 7, 64, 299, 300, 1000):
        scores, places = top_k(queries, corpus, 20, pairs, block=block)
        assert torch.equal(places, expected[1]), block
        assert torch.equal(scores, expected[0]), block


def test_ties_are_in_corpus_order_where_all_texts_are_kept() -> None:
    """A corpus no larger than what is kept to spare: nothing is searched twice, the order is made once."""
    corpus = unit(3, 1).repeat(14, 1)
    queries = unit(9, 2)
    expected = brute_force(queries, corpus, 20, NOBODY)
    for block in (5, 42):
        assert torch.equal(top_k(queries, corpus, 20, NOBODY, block=block)[1], expected[1]), block


def test_only_the_unsure_are_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 equal texts near queries 1 and 3, which have texts of their own to leave out; 0 and 2 are far from them."""
    axes = torch.eye(24)
    corpus = torch.cat([unit(200, 1), axes[:1].repeat(80, 1)])
    queries = F.normalize(torch.stack([axes[1] - axes[0], axes[0], axes[2] - axes[0], axes[0] + 0.1 * axes[3]]), dim=1)
    pairs = torch.tensor([[0, 5], [1, 201], [1, 203], [2, 7], [3, 200], [3, 202]])
    again: list[int] = []
    scan = search._scan

    def watched(queries: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        if queries.dtype == torch.float64:
            again.append(len(queries))
        return scan(queries, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "_scan", watched)
    scores, places = top_k(queries, corpus, 20, pairs, block=90)
    assert again == [2]
    expected = brute_force(queries, corpus, 20, pairs)
    assert torch.equal(places, expected[1])
    torch.testing.assert_close(scores, expected[0], rtol=0, atol=1e-7)


def test_near_ties_below_float32_are_told_apart() -> None:
    """Texts 1e-7 apart, less than a float32 product errs: the order is the float64 one for every block."""
    direction = unit(1, 3, 512)
    noise = unit(400, 4, 512)
    corpus = F.normalize(direction + 3e-4 * noise, dim=1)
    queries = unit(6, 5, 512)
    expected = brute_force(queries, corpus, 50, NOBODY)
    for block in (11, 128, 400):
        assert torch.equal(top_k(queries, corpus, 50, NOBODY, block=block)[1], expected[1]), block


def test_the_second_search_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """For texts that differ, float32 and the spare ones are enough."""
    wide: list[torch.dtype] = []
    scan = search._scan
    monkeypatch.setattr(search, "_scan", lambda queries, *rest: wide.append(queries.dtype) or scan(queries, *rest))
    top_k(unit(50, 6, 384), unit(2000, 7, 384), 100, NOBODY, block=300)
    assert wide == [torch.float32]


def test_scores_are_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than queries x block, and the texts gathered for scoring again come in slices."""
    sizes: list[int] = []
    best = search._best
    monkeypatch.setattr(search, "_best", lambda scores, *rest: sizes.append(scores.shape[1]) or best(scores, *rest))
    top_k(unit(8, 8), unit(3000, 9), 10, NOBODY, block=100)
    assert max(sizes) == 100
    monkeypatch.setattr(search, "_GATHERED_BYTES", 24 * 8 * 10 * 3)
    queries, corpus = unit(8, 8), unit(3000, 9)
    places = torch.arange(80).view(8, 10)
    gathered: list[int] = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda left, right: gathered.append(len(left)) or product(left, right))
    sliced = pair_scores(queries, corpus, places)
    assert gathered == [3, 3, 2]
    assert torch.equal(sliced, (queries.double() @ corpus.double().T).float().gather(1, places))


def test_pairs_without_a_text_score_minus_infinity() -> None:
    scores = pair_scores(unit(2, 1), unit(3, 2), torch.tensor([[0, -1], [-1, 2]]))
    assert (scores == -torch.inf).tolist() == [[False, True], [True, False]]
