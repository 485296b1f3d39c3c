"""The store: differences as they are on disk; every wrong set of experts refused in one line that names the file."""

from __future__ import annotations

import re

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.task_vectors import TaskVectorStore

DENSE = "encoder.layer.0.attention.output.dense.weight"


def test_task_vectors_are_float32_differences(tensors, model_folder) -> None:
    base, one, two = tensors(0), tensors(1), tensors(2)
    store = TaskVectorStore(
        model_folder("base", base), {"one": model_folder("one", one), "two": model_folder("two", two)}
    )
    assert store.experts == ["one", "two"] and set(store.names) == set(base)
    for name in store.names:
        for found, tuned in zip(store.task_vectors(name), (one, two), strict=True):
            assert found.dtype == torch.float32 and torch.equal(found, tuned[name] - base[name])
    assert torch.equal(store.task_vector(1, DENSE, 2, 5), (two[DENSE] - base[DENSE])[2:5])


def test_bfloat16_folders_are_subtracted_in_float32(tensors, model_folder) -> None:
    """The difference of two bfloat16 numbers needs more digits than bfloat16 has."""
    base = {name: tensor.bfloat16() for name, tensor in tensors(0).items()}
    tuned = {name: tensor.bfloat16() for name, tensor in tensors(1).items()}
    store = TaskVectorStore(model_folder("base", base), {"one": model_folder("one", tuned)})
    found = store.task_vector(0, DENSE)
    assert torch.equal(found, tuned[DENSE].float() - base[DENSE].float())
    assert not torch.equal(found, (tuned[DENSE] - base[DENSE]).float())


def test_row_blocks_cover_every_row_once(tensors, model_folder) -> None:
    store = TaskVectorStore(model_folder("base", tensors(0)), {"one": model_folder("one", tensors(1))})
    name = "embeddings.word_embeddings.weight"
    assert list(store.row_blocks(name)) == [(None, None)]
    for block_bytes in (1, 24, 50, 24 * 10):
        blocks = list(store.row_blocks(name, block_bytes))
        assert [row for start, stop in blocks for row in range(start, stop)] == list(range(11))
        assert all((stop - start) * 24 <= max(block_bytes, 24) for start, stop in blocks)


def test_a_pooler_that_only_the_base_has_is_left_out(tensors, model_folder) -> None:
    tuned = tensors(1)
    del tuned["pooler.dense.weight"]
    store = TaskVectorStore(model_folder("base", tensors(0)), {"one": model_folder("one", tuned)})
    assert "pooler.dense.weight" not in store.names and DENSE in store.names


def test_integer_buffers_are_no_task_vectors(tensors, model_folder) -> None:
    base = {**tensors(0), "embeddings.position_ids": torch.arange(5)}
    store = TaskVectorStore(model_folder("base", base), {"one": model_folder("one", tensors(1))})
    assert "embeddings.position_ids" not in store.names


def test_a_base_with_a_head_fits_experts_without_one(tensors, model_folder) -> None:
    base = {f"bert.{name}": tensor for name, tensor in tensors(0).items()}
    base["cls.predictions.bias"] = torch.zeros(11)
    folder = model_folder("base", base, architectures=["BertForMaskedLM"])
    store = TaskVectorStore(folder, {"one": model_folder("one", tensors(1))})
    assert torch.equal(store.task_vector(0, DENSE), tensors(1)[DENSE] - tensors(0)[DENSE])


def refused(base, experts) -> str:
    with pytest.raises(InputError) as caught:
        store = TaskVectorStore(base, experts)
        for name in store.names:
            store.task_vectors(name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    "field, value",
    [("model_type", "roberta"), ("hidden_size", 12), ("num_hidden_layers", 3), ("num_attention_heads", 3),
     ("intermediate_size", 9), ("hidden_act", "relu"), ("vocab_size", 12)],
)  # fmt: skip
def test_another_architecture_or_vocabulary(tensors, model_folder, field, value) -> None:
    expert = model_folder("odd", tensors(1), **{field: value})
    message = refused(model_folder("base", tensors(0)), {"good": model_folder("good", tensors(2)), "odd": expert})
    assert message.startswith(str(expert / "config.json")) and field in message and str(value) in message


def test_another_shape_under_the_same_configuration(tensors, model_folder) -> None:
    tuned = {**tensors(1), "embeddings.word_embeddings.weight": torch.zeros(12, 6)}
    expert = model_folder("odd", tuned)
    message = refused(model_folder("base", tensors(0)), {"odd": expert})
    assert str(expert) in message and "[12, 6]" in message and "[11, 6]" in message


def test_a_missing_and_an_extra_tensor(tensors, model_folder) -> None:
    base = model_folder("base", tensors(0))
    fewer = tensors(1)
    del fewer[DENSE]
    expert = model_folder("fewer", fewer)
    message = refused(base, {"fewer": expert})
    assert str(expert) in message and f"'{DENSE}' is missing" in message
    expert = model_folder("more", {**tensors(1), "encoder.layer.7.output.dense.weight": torch.zeros(2)})
    message = refused(base, {"more": expert})
    assert str(expert) in message and "encoder.layer.7.output.dense.weight" in message


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_safetensors(tensors, model_folder, keep) -> None:
    expert = model_folder("cut", tensors(1))
    file = expert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(model_folder("base", tensors(0)), {"cut": expert})
    assert str(file) in message and "truncated or corrupt" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("guilty", ["base", "expert"])
def test_numbers_that_are_none_name_the_file_that_has_them(tensors, model_folder, value, guilty) -> None:
    content = {"base": tensors(0), "expert": tensors(1)}
    content[guilty][DENSE][1, 2] = value
    folders = {name: model_folder(name, each) for name, each in content.items()}
    message = refused(folders["base"], {"good": model_folder("good", tensors(2)), "bad": folders["expert"]})
    assert message.startswith(str(folders[guilty] / "model.safetensors")) and re.search(rf"'{DENSE}'.*NaN", message)


def test_folders_that_are_no_models(tensors, model_folder, tmp_path) -> None:
    base = model_folder("base", tensors(0))
    assert str(tmp_path / "nowhere") in refused(base, {"x": tmp_path / "nowhere"})
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refused(base, {"x": tmp_path / "empty"})
    no_config = model_folder("no_config", tensors(1))
    (no_config / "config.json").unlink()
    assert str(no_config / "config.json") in refused(base, {"x": no_config})
    broken = model_folder("broken", tensors(1))
    (broken / "config.json").write_text("{")
    assert "not valid JSON" in refused(base, {"x": broken})
    (broken / "config.json").write_text("[]")
    assert str(broken / "config.json") in refused(base, {"x": broken})
    assert "no experts" in refused(base, {})
