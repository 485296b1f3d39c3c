"""What belongs in a weights file, against what transformers itself writes; folders made of description and weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scalemerge.encoder import Encoder
from scalemerge.encoder.weights import list_weights

KINDS = ("bert", "xlm-roberta", "modernbert", "qwen3", "mistral", "llama", "gemma", "gemma2", "gemma3")


def names_in(file) -> set[str]:
    with safe_open(file, "pt") as stored:
        return set(stored.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_transformers(kind, backbones, tmp_path) -> None:
    encoder = Encoder.load(backbones(kind))
    encoder.backbone.save_pretrained(tmp_path)
    names = [name for name, _ in encoder.weights_to_save()]
    assert len(names) == len(set(names))
    assert set(names) == names_in(tmp_path / encoder.weights_file)


def test_tied_weights_once_and_no_fleeting_buffers() -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "vocab_size": 9}
    names = [weight.name for weight in list_weights(BertForMaskedLM(BertConfig(**size)))]
    assert "bert.embeddings.word_embeddings.weight" in names
    assert "cls.predictions.decoder.weight" not in names
    assert not [name for name in names if "position_ids" in name]
    module = torch.nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("fleeting", torch.ones(1), persistent=False)
    module.one = torch.nn.Linear(1, 1)
    module.two = module.one
    assert [weight.name for weight in list_weights(module)] == ["one.weight", "one.bias", "kept"]


def test_no_value_is_read() -> None:
    """Parameters that have no storage, as a partitioned one has none."""
    from transformers import AutoModel, BertConfig

    with torch.device("meta"):
        backbone = AutoModel.from_config(BertConfig(num_hidden_layers=1))
    assert {weight.own for weight in list_weights(backbone)} == set(backbone.state_dict())


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_description_and_weights_make_the_folder(kind, tiny_folders, tmp_path, texts) -> None:
    encoder = Encoder.load(tiny_folders(kind), pooling="last")
    encoder.save_description(tmp_path / "parts")
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    tensors = {name: tensor.detach() for name, tensor in encoder.weights_to_save()}
    save_file(tensors, tmp_path / "parts" / encoder.weights_file, metadata={"format": "pt"})
    encoder.save(tmp_path / "whole")
    listing = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("parts", "whole")]
    assert listing[0] == listing[1]
    for name in ("parts", "whole"):
        again = Encoder.load(tmp_path / name)
        torch.testing.assert_close(again.encode(texts[:9]), encoder.encode(texts[:9]), rtol=0, atol=0)


def test_save_with_other_weights(tiny_folders, tmp_path) -> None:
    """state_dict replaces the weights that are written, and what it lacks is an error, not an old value."""
    encoder = Encoder.load(tiny_folders("bert"))
    state = {name: value.to(torch.bfloat16) * 0.5 for name, value in encoder.backbone.state_dict().items()}
    encoder.save(tmp_path, state_dict=state)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    del state["embeddings.word_embeddings.weight"]
    with pytest.raises(ValueError, match=r"no 'embeddings\.word_embeddings\.weight'"):
        encoder.save(tmp_path, state_dict=state)


def test_a_saved_folder_needs_no_other(tiny_folders, tmp_path, texts) -> None:
    """The configuration does not point at where the model came from."""
    shutil.copytree(tiny_folders("qwen3"), tmp_path / "origin")
    encoder = Encoder.load(tmp_path / "origin")
    encoder.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "origin")
    assert str(tmp_path) not in (tmp_path / "saved/config.json").read_text()
    again = Encoder.load(tmp_path / "saved")
    torch.testing.assert_close(again.encode(texts[:5]), encoder.encode(texts[:5]), rtol=0, atol=0)
