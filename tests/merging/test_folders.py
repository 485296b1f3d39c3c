"""merge_folders: what `scalemerge merge` does with flags alone."""

from __future__ import annotations

import json

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.merging.folders import merge_folders


@pytest.fixture
def merge(family, tmp_path):
    base, experts = family

    def call(**changes):
        arguments = {
            "base": str(base), "experts": experts, "out": tmp_path / "out", "method": "average", "parameters": {},
        }  # fmt: skip
        return merge_folders(**(arguments | changes))

    return call


def test_static(merge, family, tmp_path, read, explicit_merge) -> None:
    assert merge(method="task_arithmetic", parameters={"lambda": 0.25}) == 1.0
    for name, tensor in explicit_merge(*family, lambda name: [0.25] * 3).items():
        torch.testing.assert_close(read(tmp_path / "out")[name].double(), tensor, rtol=1e-6, atol=1e-6)
    record = json.loads((tmp_path / "out" / "scalemerge.json").read_text())
    assert record["method"] == "task_arithmetic" and record["parameters"] == {"lambda": 0.25}
    assert set(record["experts"]) == {"a", "b", "c"}


def test_coefficients(merge, family, tmp_path, read, explicit_merge) -> None:
    path = tmp_path / "coefficients.json"
    c = [0.1, -0.2, 0.9]
    path.write_text(json.dumps({"granularity": "global", "experts": ["a", "b", "c"], "c": {"global": c}}))
    merge(coefficients=path)
    for name, tensor in explicit_merge(*family, lambda name: c).items():
        torch.testing.assert_close(read(tmp_path / "out")[name].double(), tensor, rtol=1e-6, atol=1e-6)
    record = json.loads((tmp_path / "out" / "scalemerge.json").read_text())
    assert record["method"] == "self_positioning" and record["c"] == {"global": c}


def test_bad_flags_leave_nothing(merge, family, tmp_path) -> None:
    path = tmp_path / "coefficients.json"
    path.write_text(json.dumps({"granularity": "global", "experts": ["b", "a", "c"], "c": {"global": [1, 2, 3]}}))
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    _, experts = family
    for changes, words in [
        ({"method": "tie"}, "--method: no merge method 'tie'"),
        ({"method": "task_arithmetic", "parameters": {"lamda": 1.0}}, "--set: method 'task_arithmetic'"),
        ({"method": "task_arithmetic", "parameters": {"lambda": float("nan")}}, "finite number"),
        ({"dtype": "float8"}, "--dtype float8: choose one of float32, bfloat16, float16"),
        ({"base": str(tmp_path / "nowhere")}, "nowhere: no such model folder"),
        ({"experts": {**experts, "d": tmp_path / "nowhere"}}, "nowhere"),
        ({"coefficients": path}, "coefficients.json: learned for experts b, a, c"),
        ({"coefficients": tmp_path / "none.json"}, "none.json: cannot be read"),
        ({"out": full}, "full: exists and is not empty"),
        ({"out": full / "x"}, "x: exists and is not empty"),
        ({"out": full / "x" / "y"}, "full/x"),
    ]:
        with pytest.raises(InputError) as caught:
            merge(**changes)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled(merge, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    merge()
    assert (tmp_path / "out" / "model.safetensors").is_file()
