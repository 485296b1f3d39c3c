"""LoRA adapters: training, folders both ways, merging; and QLoRA as far as a machine without a GPU goes."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge.encoder import Encoder, add_lora
from scalemerge.recipe import Lora

pytest.importorskip("peft", reason="peft is not installed")
KINDS = ("bert", "modernbert", "qwen3", "mistral")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(folder, *, seed: int = 0, **settings) -> Encoder:
    """An encoder with an adapter that does something: peft starts it at zero."""
    options = {key: settings.pop(key) for key in ("bidirectional", "pooling") if key in settings}
    encoder = Encoder.load(folder, **options)
    torch.manual_seed(seed)
    add_lora(encoder, Lora(rank=4, alpha=12, **settings))
    for name, parameter in encoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return encoder


@pytest.mark.parametrize("checkpointing", ["no", "before", "after", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_trains(kind, checkpointing, tiny_folders, texts) -> None:
    """Every parameter that may learn gets a gradient, poolers have no adapter, and recomputing changes nothing."""
    encoder = Encoder.load(tiny_folders(kind))
    before = encoder.encode(texts[:9])
    if checkpointing == "before":
        encoder.backbone.gradient_checkpointing_enable()
    torch.manual_seed(0)
    add_lora(encoder, Lora(rank=4))
    if checkpointing in ("after", "reentrant"):
        encoder.backbone.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    torch.testing.assert_close(encoder.encode(texts[:9]), before)  # an adapter starts as nothing
    encoder.train()
    groups, _ = encoder.groups(encoder.tokenize(texts[:9]), 2)
    encoder(groups)[:, 0].sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name and "pooler" not in name for name in trained)
    assert {name for name, parameter in encoder.named_parameters() if parameter.grad is not None} == trained
    linears = [name for name, _ in encoder.named_modules() if name.endswith("base_layer")]
    assert len(trained) == 2 * len(linears)
    plain = Encoder.load(tiny_folders(kind))
    torch.manual_seed(0)
    add_lora(plain, Lora(rank=4))
    plain.train()(plain.groups(plain.tokenize(texts[:9]), 2)[0])[:, 0].sum().backward()
    for (name, one), (_, other) in zip(encoder.named_parameters(), plain.named_parameters(), strict=True):
        if name in trained:
            torch.testing.assert_close(one.grad, other.grad)


def test_settings_are_honoured(tiny_folders) -> None:
    encoder = adapted(tiny_folders("qwen3"), targets=["q_proj", "v_proj"], dropout=0.25)
    weights = encoder.weights_to_save()
    assert {name.split(".")[-3] for name, _ in weights} == {"q_proj", "v_proj"}  # ... q_proj.lora_A.weight
    assert {len(tensor) for name, tensor in weights if "lora_A" in name} == {4}
    layer = encoder.backbone.base_model.model.layers[0].self_attn.q_proj
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (3.0, 0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_folder_loads_everywhere(kind, tiny_folders, texts, tmp_path, sentence_transformer) -> None:
    """Ours, sentence-transformers' and peft's own names: equal embeddings, and no weights of the base in it."""
    from peft import get_peft_model_state_dict

    encoder = adapted(tiny_folders(kind), pooling="mean")
    encoder.max_length, encoder.prompts = 40, {"query": "q: "}
    encoder.save(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [WEIGHTS]
    assert not (tmp_path / "config.json").exists()  # transformers would look for model.safetensors beside it
    expected = get_peft_model_state_dict(encoder.backbone)
    stored = load_file(tmp_path / WEIGHTS)
    assert set(stored) == set(expected) == {name for name, _ in encoder.weights_to_save()}
    for name, value in expected.items():
        torch.testing.assert_close(stored[name], value, rtol=0, atol=0)
    ours = encoder.encode(texts[:20])
    assert (ours - Encoder.load(tiny_folders(kind)).encode(texts[:20])).abs().max() > 1e-3
    again = Encoder.load(tmp_path)
    assert (again.max_length, again.prompts) == (40, {"query": "q: "})
    assert not [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    torch.testing.assert_close(again.encode(texts[:20]), ours, rtol=0, atol=0)
    theirs = torch.from_numpy(sentence_transformer(str(tmp_path)).encode(texts[:20]))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_merged_weights(kind, tiny_folders, texts, tmp_path, sentence_transformer) -> None:
    """A plain model of the base's names; the encoder itself keeps its adapter."""
    encoder = adapted(tiny_folders(kind))
    ours = encoder.encode(texts[:20])
    encoder.save(tmp_path, merged=True)
    assert not (tmp_path / CONFIG).exists()
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_folders(kind)))
    assert {name: value.shape for name, value in merged.items()} == {name: value.shape for name, value in base.items()}
    torch.testing.assert_close(Encoder.load(tmp_path).encode(texts[:20]), ours, rtol=0, atol=1e-5)
    theirs = torch.from_numpy(sentence_transformer(str(tmp_path)).encode(texts[:20]))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode(texts[:20]), ours, rtol=0, atol=0)
    assert encoder.weights_file == WEIGHTS


@pytest.mark.parametrize("merged", [False, True])
def test_other_values_are_written(merged, tiny_folders, texts, tmp_path) -> None:
    """state_dict has the backbone's names, the base's weights among them or not."""
    one, other = adapted(tiny_folders("bert")), adapted(tiny_folders("bert"), seed=1)
    state = {name: value for name, value in other.backbone.state_dict().items() if "lora" in name}
    one.save(tmp_path, state_dict=state, merged=merged)
    torch.testing.assert_close(
        Encoder.load(tmp_path).encode(texts[:9]), other.encode(texts[:9]), rtol=0, atol=1e-5 if merged else 0
    )


@pytest.mark.parametrize("merged", [False, True])
def test_a_bidirectional_adapter(merged, tiny_folders, texts, tmp_path, sentence_transformer, capsys) -> None:
    """It survives our folders; sentence-transformers needs it merged, and the user is told."""
    encoder = adapted(tiny_folders("qwen3"), bidirectional=True, save="merged" if merged else "adapter")
    assert ("save: merged" in capsys.readouterr().err) == (not merged)
    encoder.save(tmp_path, merged=merged)
    ours = encoder.encode(texts[:9])
    assert Encoder.load(tmp_path).bidirectional
    torch.testing.assert_close(Encoder.load(tmp_path).encode(texts[:9]), ours, rtol=0, atol=1e-5)
    theirs = torch.from_numpy(sentence_transformer(str(tmp_path)).encode(texts[:9]))
    assert bool((theirs - ours).abs().max() < 1e-4) == merged


def test_the_base_is_named_in_full(tiny_folders, tmp_path, monkeypatch, texts) -> None:
    """A relative path would be found from one folder only."""
    shutil.copytree(tiny_folders("bert"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    encoder = adapted("base")
    encoder.save(tmp_path / "adapter")
    monkeypatch.chdir("/")
    named = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "base")
    assert named["inference_mode"] is True
    assert named["target_modules"] == sorted(named["target_modules"])
    torch.testing.assert_close(Encoder.load(tmp_path / "adapter").encode(texts[:3]), encoder.encode(texts[:3]))


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_refused_settings(tiny_folders, refused) -> None:
    encoder = Encoder.load(tiny_folders("bert"))
    refused(lambda: add_lora(encoder, Lora(targets=["nothing"])), "training.lora.targets", "nothing")
    add_lora(encoder, Lora())
    refused(lambda: add_lora(encoder, Lora()), "training.lora", "adapter already")


def test_without_peft(tiny_folders, refused, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(lambda: add_lora(Encoder.load(tiny_folders("bert")), Lora()), "pip install 'scalemerge[train]'")


def test_without_a_folder(tiny_folders, refused) -> None:
    encoder = Encoder.load(tiny_folders("bert"))
    encoder.backbone = type(encoder.backbone)(encoder.backbone.config)
    encoder.backbone.name_or_path = ""
    refused(lambda: add_lora(encoder, Lora()), "not loaded from a folder")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantization_needs_a_gpu(quantize, tiny_folders, refused, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: Encoder.load(tiny_folders("bert"), quantize=quantize), quantize, "bitsandbytes", "quantize: none")


def test_an_unquantized_base_for_quantized_settings(tiny_folders) -> None:
    with pytest.raises(ValueError, match=r"Encoder\.load"):
        add_lora(Encoder.load(tiny_folders("bert")), Lora(quantize="nf4"))


@pytest.fixture
def adapter(tiny_folders, tmp_path):
    """An adapter folder and its base, to be spoilt."""
    shutil.copytree(tiny_folders("bert"), tmp_path / "base")
    adapted(tmp_path / "base").save(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_base_is_gone(adapter, refused) -> None:
    shutil.rmtree(adapter.parent / "base")
    refused(lambda: Encoder.load(adapter), CONFIG, "base is not there", str(adapter.parent / "base"))


def test_missing_adapter_weights(adapter, refused) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, adapter / WEIGHTS)
    refused(lambda: Encoder.load(adapter), "lacks", name)
    (adapter / WEIGHTS).unlink()
    torch.save({}, adapter / "adapter_model.bin")
    refused(lambda: Encoder.load(adapter), f"{adapter}: no {WEIGHTS};")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base_model_name_or_path": null, "peft_type": "LORA"}',
                                     '{"base_model_name_or_path": "x", "peft_type": "IA3"}'])  # fmt: skip
def test_spoilt_adapter_config(content, adapter, refused) -> None:
    (adapter / CONFIG).write_text(content)
    refused(lambda: Encoder.load(adapter), CONFIG)


def test_truncated_adapter_weights(adapter, refused) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:500])
    refused(lambda: Encoder.load(adapter), str(adapter), "cannot load the adapter")
