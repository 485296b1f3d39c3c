"""Gram matrices against dense ones in float64, whole or in small row blocks; groups and cosines."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from scalemerge.task_vectors import (
    GRANULARITIES,
    TaskVectorStore,
    cosines,
    gram_matrices,
    group_grams,
    group_names,
    moved,
)


def dense(base, experts, names) -> torch.Tensor:
    rows = torch.stack([torch.cat([(e[n] - base[n]).double().flatten() for n in names]) for e in experts])
    return rows @ rows.T


@pytest.mark.parametrize("block_bytes", [1, 30, 64 * 2**20])
def test_equals_the_dense_product(tensors, model_folder, monkeypatch, block_bytes) -> None:
    base, experts = tensors(0), [tensors(seed) for seed in (1, 2, 3, 4)]
    folders = {f"e{i}": model_folder(f"e{i}", expert) for i, expert in enumerate(experts)}
    store = TaskVectorStore(model_folder("base", base), folders)
    monkeypatch.setattr(store, "row_blocks", partial(store.row_blocks, block_bytes=block_bytes))
    read: list[int] = []
    grams = gram_matrices(store, progress=read.append)
    assert set(grams) == set(base)
    for name, gram in grams.items():
        assert gram.dtype == torch.float64 and gram.shape == (4, 4)
        torch.testing.assert_close(gram, dense(base, experts, [name]), rtol=1e-12, atol=0)
    assert sum(read) == 5 * 4 * sum(tensor.numel() for tensor in base.values())  # every byte once
    if block_bytes == 1:
        assert len(read) == sum(tensor.shape[0] for tensor in base.values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_group_sums_equal_the_whole(tensors, model_folder, granularity) -> None:
    base, experts = tensors(0), [tensors(seed) for seed in (1, 2, 3)]
    folders = {f"e{i}": model_folder(f"e{i}", expert) for i, expert in enumerate(experts)}
    grams = gram_matrices(TaskVectorStore(model_folder("base", base), folders))
    groups = group_names(grams, granularity)
    by_group = group_grams(grams, groups)
    assert by_group.shape == ({"global": 1, "layer": 4, "module": 5}[granularity], 3, 3)
    for gram, members in zip(by_group, groups.values(), strict=True):
        torch.testing.assert_close(gram, dense(base, experts, members), rtol=1e-12, atol=0)
    torch.testing.assert_close(by_group.sum(0), dense(base, experts, list(base)), rtol=1e-12, atol=0)


def test_float64_accumulation_keeps_small_beside_large() -> None:
    """1e4 products of 1 beside one of 1e10: float32 sums would lose them all."""

    class Store:
        names, experts = ["w"], ["one"]

        def row_blocks(self, name):
            yield None, None

        def task_vector(self, expert, name, start, stop):
            return torch.cat([torch.full((1,), 1e5), torch.ones(10_000)])

    assert gram_matrices(Store())["w"].item() == 1e10 + 10_000


def test_moved_leaves_out_what_no_expert_changed(tensors, model_folder) -> None:
    base, tuned = tensors(0), tensors(1)
    still = "embeddings.LayerNorm.weight"
    tuned[still] = base[still].clone()
    grams = gram_matrices(TaskVectorStore(model_folder("base", base), {"one": model_folder("one", tuned)}))
    assert set(moved(grams)) == set(base) - {still}


def test_cosines_of_known_angles_and_of_a_zero_vector() -> None:
    vectors = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    half = 0.5**0.5
    expected = torch.tensor(
        [[1, half, 0, -1], [half, 1, 0, -half], [0, 0, 0, 0], [-1, -half, 0, 1]], dtype=torch.float64
    )
    torch.testing.assert_close(cosines(vectors @ vectors.T), expected, rtol=1e-14, atol=1e-14)
