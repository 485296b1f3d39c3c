"""Differences of two folders against whole tensors in float64, and what cannot be compared named."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scalemerge.checkpoints.reader import Checkpoint
from scalemerge.errors import InputError
from scalemerge.inspecting import Difference, diff_folders
from scalemerge.inspecting import diff as module
from scalemerge.inspecting.tables import print_differences


def changed(folder, target, edit, dtype=None):
    """A copy of a model folder with its tensors edited in place."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    tensors = {name: value if dtype is None else value.to(dtype) for name, value in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def noise(size, seed=0):
    def edit(tensors):
        generator = torch.Generator().manual_seed(seed)
        for value in tensors.values():
            value += size * torch.randn(value.shape, generator=generator)

    return edit


def reference(a, b, names):
    """The figures of some tensors, as their definitions have them."""
    x = torch.cat([a[name].double().flatten() for name in names])
    y = torch.cat([b[name].double().flatten() for name in names])
    d = y - x
    rounded = {
        dtype: (y.to(getattr(torch, dtype)).double() - x.to(getattr(torch, dtype)).double())
        for dtype in ("bfloat16", "float16")
    }
    return {
        "numbers": len(x),
        "norm_a": float(x.norm()),
        "norm_b": float(y.norm()),
        "norm_delta": float(d.norm()),
        "relative_norm": float(d.norm() / x.norm()),
        "cosine": float(x @ y / x.norm() / y.norm()),
        "survival": {dtype: min(1.0, float(kept @ d / (d @ d))) for dtype, kept in rounded.items()},
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "survival":
            assert found[name] == pytest.approx(value, rel=1e-9)
        else:
            assert found[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("granularity", ["module", "layer", "global"])
def test_figures(kind, granularity, tiny_folders, tmp_path, monkeypatch) -> None:
    """By module and in total, whatever the blocks of rows."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 500)
    monkeypatch.setattr(module, "_PART", 37)
    base = tiny_folders(kind)
    other = changed(base, tmp_path / "b", noise(1e-3))
    found = diff_folders(base, other, granularity=granularity)
    a, b = (load_file(folder / "model.safetensors") for folder in (base, other))
    assert_same(found.total.as_dict(), reference(a, b, list(a)))
    from scalemerge.task_vectors.groups import group_names

    groups = group_names(sorted(a), granularity)
    assert list(found.modules) == list(groups)
    for group, names in groups.items():
        assert_same(found.modules[group].as_dict(), reference(a, b, names))
    assert not (found.only_a or found.only_b or found.shapes or found.integers)


def test_blocks_are_small(tiny_folders, tmp_path, monkeypatch) -> None:
    """No tensor is read whole."""
    largest = []
    rows = Checkpoint.read_rows
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2000)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a whole tensor was read"))
    monkeypatch.setattr(Checkpoint, "read_rows", lambda *given: largest.append((value := rows(*given)).nbytes) or value)
    read = []
    diff_folders(tiny_folders("bert"), tiny_folders("bert"), progress=read.append)
    sizes = [spec.nbytes for spec in Checkpoint(tiny_folders("bert")).specs.values()]
    assert max(largest) <= 2000 < max(sizes)
    assert sum(read) == 2 * sum(sizes)


def test_what_survives(tiny_folders, tmp_path) -> None:
    """Of a base in bfloat16, steps far below its spacing vanish; float16 holds more of them; equal models lose none."""
    base = changed(tiny_folders("bert"), tmp_path / "a", lambda tensors: None, torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    shutil.copytree(base, tmp_path / "b")
    save_file({name: value.float() * (1 + 2**-12) for name, value in tensors.items()},
              tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    total = diff_folders(base, tmp_path / "b").total
    assert total.survival("bfloat16") == 0.0 and total.relative_norm == pytest.approx(2**-12)
    assert total.survival("float16") < 0.9
    same = diff_folders(base, base).total
    assert same.square == 0 and same.survival("bfloat16") == same.cosine == 1.0


@given(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=8), st.integers(1, 7))
def test_sums_add_up(values, cut) -> None:
    a = torch.tensor(values)
    b = a.flip(0) * 0.5
    whole = Difference.of(a, b)
    parts = Difference.of(a[:cut], b[:cut]) + Difference.of(a[cut:], b[cut:])
    assert astuple(parts) == pytest.approx(astuple(whole), rel=1e-9, abs=1e-9)
    assert parts.numbers == len(values) and abs(whole.cosine) <= 1 + 1e-9


def test_what_is_not_compared_is_named(tiny_folders, tmp_path, capsys) -> None:
    base = tiny_folders("bert")

    def edit(tensors):
        del tensors["encoder.layer.0.output.dense.bias"]
        tensors["embeddings.word_embeddings.weight"] = torch.zeros(270, 32)
        tensors["extra.weight"] = torch.ones(2)
        tensors["embeddings.position_ids"] = torch.arange(3)

    other = changed(base, tmp_path / "b", edit)
    found = diff_folders(base, other)
    assert found.only_a == ["encoder.layer.0.output.dense.bias"]
    assert found.only_b == ["embeddings.position_ids", "extra.weight"]
    assert found.shapes == {"embeddings.word_embeddings.weight": ((261, 32), (270, 32))}
    assert found.total.square == 0 and "embeddings.word_embeddings" not in found.modules
    third = changed(other, tmp_path / "c", lambda tensors: tensors["embeddings.position_ids"].add_(1))
    assert diff_folders(other, third).integers == ["embeddings.position_ids"]
    json.dumps(found.as_dict(), allow_nan=False)
    print_differences(found)
    shown = capsys.readouterr().out
    for text in (
        "only in A: encoder.layer.0.output.dense.bias",
        "only in B: embeddings.position_ids, extra.weight",
        "has shape [261, 32] in A, [270, 32] in B",
        "kept in bfloat16",
        "encoder.layer.1.output.dense",
    ):
        assert text in shown
    assert [line for line in shown.splitlines() if line.lstrip().startswith("total")]


def test_a_tensor_from_nothing(tiny_folders, tmp_path) -> None:
    """Where A is zero the relative norm is infinite, and JSON has null."""
    zero = changed(tiny_folders("bert"), tmp_path / "z", lambda tensors: [value.zero_() for value in tensors.values()])
    total = diff_folders(zero, tiny_folders("bert")).total
    assert total.relative_norm == math.inf and total.cosine == 0
    assert json.loads(json.dumps(total.as_dict(), allow_nan=False))["relative_norm"] is None


def test_bad_folders(tiny_folders, tmp_path) -> None:
    base = tiny_folders("bert")
    with pytest.raises(InputError, match="--granularity row: choose one of global, layer, module"):
        diff_folders(base, base, granularity="row")
    with pytest.raises(InputError, match="no such model folder"):
        diff_folders(base, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config.json, so no whole model"):
        diff_folders(base, tmp_path / "empty")
    with pytest.raises(InputError, match="no tensor name in common"):
        diff_folders(base, changed(base, tmp_path / "other", lambda tensors: _rename(tensors)))

    def spoil(tensors):
        tensors["encoder.layer.0.output.dense.weight"][1, 1] = float("inf")

    with pytest.raises(InputError, match=r"tensor 'encoder.layer.0.output.dense.weight' holds NaN or infinity"):
        diff_folders(base, changed(base, tmp_path / "inf", spoil))


def _rename(tensors):
    for name in list(tensors):
        tensors[f"other.{name}"] = tensors.pop(name)
