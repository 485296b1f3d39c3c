"""Reading model folders: single and sharded, with and without a head, and spoilt in every way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scalemerge.checkpoints.reader import INDEX, SINGLE, Checkpoint, TensorSpec
from scalemerge.errors import InputError

TENSORS = {
    "embeddings.weight": torch.arange(24, dtype=torch.float32).view(8, 3),
    "layer.0.weight": torch.randn(3, 3).to(torch.bfloat16),
    "layer.0.bias": torch.zeros(3, dtype=torch.float16),
    "position_ids": torch.arange(5),
    "scale": torch.tensor(2.5),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = list(TENSORS)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, part in shards.items():
        save_file({name: TENSORS[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(folder), *parts):
        assert part in message, message


@pytest.mark.parametrize("form", ["folder", "sharded"])
def test_reads_what_was_saved(form: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(form))
    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, expected in TENSORS.items():
        assert checkpoint.specs[name] == TensorSpec(tuple(expected.shape), expected.dtype)
        assert checkpoint.specs[name].nbytes == expected.numel() * expected.element_size()
        assert torch.equal(checkpoint.read(name), expected)
        assert checkpoint.read(name).dtype == expected.dtype
    with pytest.raises(KeyError):
        checkpoint.read("nothing")


@given(start=st.integers(0, 8), stop=st.integers(0, 8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_rows(folder: Path, start: int, stop: int) -> None:
    start, stop = min(start, stop), max(start, stop)
    rows = Checkpoint(folder).read_rows("embeddings.weight", start, stop)
    assert torch.equal(rows, TENSORS["embeddings.weight"][start:stop])


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", "AutoModelForMaskedLM"),
        ("bert", "AutoModelForSequenceClassification"),
        ("xlm-roberta", "AutoModelForMaskedLM"),
        ("xlm-roberta", "AutoModelForSequenceClassification"),
        ("modernbert", "AutoModelForMaskedLM"),
        ("qwen3", "AutoModelForCausalLM"),
        ("mistral", "AutoModelForCausalLM"),
    ],
)
def test_a_head_is_taken_off(kind: str, head: str, tiny_folders, tmp_path: Path) -> None:
    """Names and values are those of the backbone saved alone, a pooler the head has no use for aside."""
    import transformers

    getattr(transformers, head).from_pretrained(tiny_folders(kind)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE)
    alone, with_head = Checkpoint(tiny_folders(kind)), Checkpoint(tmp_path)
    assert any(name not in alone.specs for name in stored), "the head adds a prefix"
    missing = set(alone.names) - set(with_head.names)
    assert all(name.startswith("pooler.") for name in missing)
    assert set(with_head.names) <= set(alone.names)
    for name in with_head.names:
        assert torch.equal(with_head.read(name), alone.read(name))


def test_require_finite(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    good = checkpoint.read("layer.0.weight")
    assert checkpoint.require_finite("layer.0.weight", good) is good
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InputError, match=r"model.safetensors: tensor 'layer.0.bias' holds NaN or infinity"):
            checkpoint.require_finite("layer.0.bias", torch.tensor([0.0, bad]))


# ---- spoilt folders ----------------------------------------------------------------------------------------------


def test_no_weights(tmp_path: Path) -> None:
    refused(tmp_path, SINGLE, "safetensors only")
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "no pickle")
    refused(tmp_path / "nowhere")


def test_no_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE)
    refused(tmp_path, "hold no tensors")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    refused(sharded, "b.safetensors", "missing")


def test_shard_without_the_tensor_that_the_index_names(sharded: Path) -> None:
    shutil.copy(sharded / "a.safetensors", sharded / "b.safetensors")
    refused(sharded, "b.safetensors", "lacks tensor")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "x/y.safetensors", "..", "", ".", "a\0b"])
def test_index_outside_the_folder(folder: Path, name: str) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / INDEX).write_text(json.dumps({"weight_map": {"scale": name}}))
    refused(inner, INDEX)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "3", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}'],
)
def test_bad_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX)


@pytest.mark.parametrize("content", ["", "[]", "3", "null", '{"architectures": ["BertForMaskedLM"]', "\udcff"])
def test_bad_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "content", ["{}", '{"architectures": null}', '{"architectures": "x"}', '{"architectures": [3]}']
)
def test_a_config_without_architecture_takes_no_prefix_off(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert sorted(Checkpoint(folder).names) == sorted(TENSORS)


@pytest.fixture(scope="module")
def whole(tiny_folders) -> bytes:
    return (tiny_folders("bert") / SINGLE).read_bytes()


@given(share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_anywhere(whole: bytes, tmp_path: Path, share: float) -> None:
    (tmp_path / SINGLE).write_bytes(whole[: int(share * len(whole))])
    refused(tmp_path, SINGLE, "truncated or corrupt")


@given(keep=st.integers(0, 64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_in_the_header(whole: bytes, tmp_path: Path, keep: int) -> None:
    (tmp_path / SINGLE).write_bytes(whole[:keep])
    refused(tmp_path, SINGLE, "truncated or corrupt")


@given(position=st.integers(0, 2000), byte=st.integers(0, 255), extra=st.binary(max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_a_changed_byte_is_never_a_traceback(
    whole: bytes, tmp_path: Path, position: int, byte: int, extra: bytes
) -> None:
    """Header bytes changed at will, bytes added at the end: it reads, or it is refused."""
    spoilt = bytearray(whole)
    spoilt[position] = byte
    (tmp_path / SINGLE).write_bytes(bytes(spoilt) + extra)
    try:
        checkpoint = Checkpoint(tmp_path)
    except InputError as error:
        assert str(tmp_path) in str(error)
    else:
        assert not extra
        for name in checkpoint.names:
            checkpoint.read(name)
