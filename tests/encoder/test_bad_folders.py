"""Folders that are no model, or one we cannot honour: InputError of one line, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalemerge.encoder import Encoder, local_folder, package_folder, read_modules
from scalemerge.errors import InputError


@pytest.fixture
def copy(tiny_folders, tmp_path) -> Path:
    """A sentence-transformers folder of the tiny BERT, to be spoilt."""
    Encoder.load(tiny_folders("bert")).save(tmp_path / "model")
    return tmp_path / "model"


def test_missing_folder(tmp_path, refused) -> None:
    refused(lambda: Encoder.load(tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such model folder")


def test_a_file_is_no_folder(tmp_path, refused) -> None:
    (tmp_path / "model").write_text("x")
    refused(lambda: Encoder.load(tmp_path / "model"), str(tmp_path / "model"), "give a folder")


def test_no_config(copy, refused) -> None:
    (copy / "config.json").unlink()
    refused(lambda: Encoder.load(copy), str(copy), "no config.json")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "nonsense"}', "{}"])
def test_bad_config(copy, content, refused) -> None:
    (copy / "config.json").write_text(content)
    refused(lambda: Encoder.load(copy), str(copy))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_weights(copy, keep, refused) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(lambda: Encoder.load(copy), str(copy), "cannot load a model")


def test_pickle_only(copy, refused) -> None:
    """A pickle can run anything when it is read, so it is not."""
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    refused(lambda: Encoder.load(copy), str(copy), "safetensors")


def test_missing_tensors_are_not_made_up(copy, refused) -> None:
    """transformers fills what the file lacks with random numbers and only warns."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: Encoder.load(copy), str(copy), "encoder.layer.0.attention.self.query.weight")


def test_a_model_with_a_head_loads(tiny_folders, tmp_path, texts) -> None:
    """Its backbone is taken, the head left; a pooler that the file lacks is not needed."""
    from transformers import AutoModelForMaskedLM

    AutoModelForMaskedLM.from_pretrained(tiny_folders("bert")).save_pretrained(tmp_path)
    for file in tiny_folders("bert").glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    ours = Encoder.load(tmp_path).encode(texts[:9])
    torch.testing.assert_close(ours, Encoder.load(tiny_folders("bert")).encode(texts[:9]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["tokenizer*", "tokenizer.json"])
def test_no_tokenizer(copy, pattern, refused) -> None:
    """transformers makes up a tokenizer that knows no word but [UNK], and says nothing."""
    for file in copy.glob(pattern):
        file.unlink()
    refused(lambda: Encoder.load(copy), str(copy), "tokenizer")


def test_unsupported_module(copy, sentence_transformer, tmp_path, refused) -> None:
    """A Dense module after the pooling would silently be left out."""
    from sentence_transformers import models

    made = sentence_transformer(str(copy))
    made.append(models.Dense(32, 8))
    made.save_pretrained(str(tmp_path / "dense"))
    refused(lambda: Encoder.load(tmp_path / "dense"), "modules.json", "'Dense' is not supported")


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode": "max"},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode_weightedmean_tokens": True},
        {},
    ],
)
def test_unsupported_pooling(copy, config, refused) -> None:
    (copy / "1_Pooling/config.json").write_text(json.dumps(config))
    refused(lambda: Encoder.load(copy), "1_Pooling/config.json", "use one of cls, mean, last")


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json",
                                  "sentence_bert_config.json"])  # fmt: skip
@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "3", "null", "[{}]", '{"prompts": 3}', "[[]]"])
def test_spoilt_small_files_are_never_a_traceback(copy, name, content) -> None:
    """Whatever the JSON is: the folder loads as before, or InputError names the file."""
    (copy / name).write_text(content)
    try:
        read_modules(copy)
    except InputError as error:
        assert name in str(error)
        assert "\n" not in str(error)
    else:
        # what still is an object may lack entries that have defaults; a list of modules may not
        assert name.endswith("config_sentence_transformers.json") or name == "sentence_bert_config.json"
        assert content == '{"prompts": 3}' and name == "sentence_bert_config.json"


def test_unknown_pooling_argument(tiny_folders, refused) -> None:
    refused(lambda: Encoder.load(tiny_folders("bert"), pooling="max"), "pooling 'max' is not one of cls, mean, last")


def test_package_references(refused) -> None:
    refused(
        lambda: package_folder("package:no_such_package/model"), "'no_such_package' is not installed", "pip install"
    )
    refused(lambda: package_folder("package:scalemerge/nowhere"), "has no folder 'nowhere'")
    assert package_folder("package:scalemerge/data").name == "data"


def test_a_hub_id_is_the_folder_of_its_snapshot(
    tiny_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the hub's cache is read like any other, with what it says of pooling; an unreachable one is named."""
    import huggingface_hub

    asked: list[str] = []

    def snapshot(name: str, **_: object) -> str:
        asked.append(name)
        if name != "intfloat/e5-base":
            raise OSError("no connection\nand more")
        return str(tiny_folders("bert"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert local_folder("intfloat/e5-base") == str(tiny_folders("bert"))
    assert local_folder(tiny_folders("bert")) == str(tiny_folders("bert")) and asked == ["intfloat/e5-base"]
    assert re.search("gt_all", local_folder("package:scalemerge/data")) is None
    with pytest.raises(InputError, match=r"^someone/else: is no folder and no reachable hub model \(no connection\)$"):
        local_folder("someone/else")
