"""Learned coefficients: the file is checked, and each tensor is merged with its group's numbers."""

from __future__ import annotations

import json

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.merging import combine_learned, read_coefficients

GOOD = {"granularity": "layer", "experts": ["a", "b"], "c": {"layer.0": [0.5, -0.25], "embeddings": [1, 2.0]}}


def test_each_tensor_uses_its_group() -> None:
    combine = combine_learned(GOOD)
    base, vectors = torch.zeros(2), [torch.ones(2), 10 * torch.ones(2)]
    assert combine("encoder.layer.0.output.dense.weight", base, vectors).tolist() == [-2.0, -2.0]
    assert combine("embeddings.word_embeddings.weight", base, vectors).tolist() == [21.0, 21.0]
    still = [torch.zeros(2), torch.zeros(2)]
    assert combine("encoder.layer.1.output.dense.weight", base, still).tolist() == [0.0, 0.0]
    with pytest.raises(InputError, match=r"no c for group 'layer\.1'"):
        combine("encoder.layer.1.output.dense.weight", base, vectors)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"c": None}, "'c'"),
        ({"c": [1, 2]}, "'c' a mapping"),
        ({"experts": "ab"}, "'experts' must be a list"),
        ({"granularity": "tensor"}, "granularity 'tensor' is not one of global, layer, module"),
        ({"c": {"layer.0": [0.5]}}, "c.layer.0 must hold 2 finite numbers"),
        ({"c": {"layer.0": 0.5}}, "c.layer.0 must hold 2 finite numbers"),
        ({"c": {"layer.0": [0.5, float("nan")]}}, "c.layer.0 must hold 2 finite numbers"),
        ({"c": {"layer.0": [0.5, "1"]}}, "c.layer.0 must hold 2 finite numbers"),
    ],
)
def test_bad_files(tmp_path, change, words) -> None:
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(InputError) as caught:
        read_coefficients(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"c": {}}', "no json"])
def test_files_that_are_no_coefficients(tmp_path, text) -> None:
    path = tmp_path / "coefficients.json"
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)):
        read_coefficients(path)
    with pytest.raises(InputError, match="nowhere"):
        read_coefficients(tmp_path / "nowhere.json")
