"""A weighted sum of adapters as one adapter: the dense sum, and peft's "cat"; what is no LoRA refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge.adapters import concatenate_adapters, extract_adapter
from scalemerge.errors import InputError
from scalemerge.task_vectors import TaskVectorStore
from tests.adapters.conftest import tuned

peft = pytest.importorskip("peft", reason="peft is not installed")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]},
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": ["query", "key", "intermediate.dense"]},
    "patterns": {
        "r": 2, "lora_alpha": 5, "target_modules": ["query", "word_embeddings"],
        "rank_pattern": {"layer.1.attention.self.query": 6}, "alpha_pattern": {"word_embeddings": 9},
    },
}  # fmt: skip
WEIGHTED = {"plain": 0.7, "rslora": -0.4, "patterns": 1.3}


def adapter(base, folder, seed=0, dtype=torch.float32, **config):
    """An adapter with random matrices on the model in `base`."""
    from transformers import AutoModel

    wrapped = peft.get_peft_model(AutoModel.from_pretrained(base), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    save_file({name: value.to(dtype) for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


@pytest.fixture
def adapters(tiny_folders, tmp_path):
    base = tiny_folders("bert")
    return {
        name: adapter(base, tmp_path / name, number, **config) for number, (name, config) in enumerate(KINDS.items())
    }


def test_is_the_dense_sum(tiny_folders, adapters, tmp_path) -> None:
    base = tiny_folders("bert")
    made = concatenate_adapters(base, adapters, WEIGHTED, tmp_path / "out")
    store = TaskVectorStore(base, {**adapters, "sum": tmp_path / "out"})
    moved = 0
    for name in store.names:
        *parts, found = store.task_vectors(name)
        wanted = sum(c * part.double() for c, part in zip(WEIGHTED.values(), parts, strict=True))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
        moved += bool(found.any())
    assert moved == len(made.ranks)
    ranks = {module.split(".", 3)[-1]: rank for module, rank in made.ranks.items() if "layer.1." in module}
    assert ranks == {
        "attention.self.query": 4 + 3 + 6, "attention.self.value": 4, "attention.self.key": 3, "intermediate.dense": 3,
    }  # fmt: skip
    assert made.ranks["embeddings.word_embeddings"] == 2
    assert made.ranks["encoder.layer.0.attention.self.query"] == 4 + 3 + 2
    json.dumps(made.as_dict())
    assert "ranks 2 to 13" in made.lines()[0]


def test_equals_pefts_cat(tiny_folders, adapters, tmp_path) -> None:
    """The weights that peft merges from its own concatenation, and those it merges from ours."""
    from transformers import AutoModel

    base = tiny_folders("bert")
    concatenate_adapters(base, adapters, WEIGHTED, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(adapters["plain"]), "plain")
    for name in ("rslora", "patterns"):
        theirs.load_adapter(str(adapters[name]), name)
    theirs.add_weighted_adapter(list(WEIGHTED), list(WEIGHTED.values()), "sum", combination_type="cat")
    theirs.set_adapter("sum")
    wanted = dict(theirs.merge_and_unload(adapter_names=["sum"]).named_parameters())
    ours = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / "out"))
    before = load_file(base / "model.safetensors")
    moved = 0
    for name, weight in ours.merge_and_unload().named_parameters():
        torch.testing.assert_close(weight.detach(), wanted[name].detach(), rtol=1e-5, atol=1e-6)
        moved += not torch.equal(weight.detach(), before[name])
    assert moved == 10 - 1  # query, value, key, intermediate.dense in both layers, word_embeddings


def test_one_rank_and_plain_settings(tiny_folders, tmp_path) -> None:
    """Adapters of one shape give a configuration without patterns; a coefficient of 0 leaves an adapter out."""
    base = tiny_folders("qwen3")
    three = {
        name: adapter(base, tmp_path / name, seed, r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
        for seed, name in enumerate("abc")
    }
    made = concatenate_adapters(base, three, {"a": 0.5, "b": 0.0, "c": 0.5}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["base_model_name_or_path"] == str(base)
    assert set(made.ranks.values()) == {6}
    again = concatenate_adapters(base, three, {"a": 0.5, "b": 0.0, "c": 0.5}, tmp_path / "out")
    assert again == made
    with pytest.raises(InputError, match="not this adapter"):
        concatenate_adapters(base, three, {"a": 0.5, "b": 0.1, "c": 0.5}, tmp_path / "out")


def test_extracted_adapters_add_up(tiny_folders, tmp_path) -> None:
    """Whole in rank, the sum of two extracted experts is the sum of their task vectors."""
    base = tiny_folders("modernbert")
    experts = {name: tuned(base, tmp_path / name, seed) for seed, name in enumerate("ab")}
    adapters = {}
    for name, expert in experts.items():
        extract_adapter(base, expert, tmp_path / f"{name}-lora", 48)
        adapters[name] = tmp_path / f"{name}-lora"
    made = concatenate_adapters(base, adapters, {"a": 0.5, "b": -2.0}, tmp_path / "out")
    store = TaskVectorStore(base, {**experts, "sum": tmp_path / "out"})
    for module in made.ranks:
        a, b, found = store.task_vectors(f"{module}.weight")
        torch.testing.assert_close(found, 0.5 * a - 2 * b, rtol=0, atol=2e-5)


def test_stored_in_bfloat16(tiny_folders, adapters, tmp_path) -> None:
    base = tiny_folders("bert")
    made = concatenate_adapters(base, adapters, WEIGHTED, tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert made.nbytes == sum(value.nbytes for value in stored.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = true is not supported"),
        ({"lora_bias": True}, "lora_bias = true is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"modules_to_save": ["LayerNorm"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "kind IA3"),
    ],
)
def test_other_adapters_are_refused_by_name(tiny_folders, adapters, tmp_path, changes, message) -> None:
    path = adapters["rslora"] / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=message) as caught:
        concatenate_adapters(tiny_folders("bert"), adapters, WEIGHTED, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_input(tiny_folders, adapters, tmp_path) -> None:
    base, out = tiny_folders("bert"), tmp_path / "out"
    for coefficients, message in (
        ({"plain": 1.0, "rslora": 1.0}, "--expert patterns: give one coefficient"),
        ({**WEIGHTED, "more": 1.0}, "--expert more: give one coefficient"),
        ({**WEIGHTED, "plain": float("nan")}, "coefficient nan is no finite number"),
        (dict.fromkeys(WEIGHTED, 0.0), "all coefficients are 0"),
    ):
        with pytest.raises(InputError, match=message):
            concatenate_adapters(base, adapters, coefficients, out)
    with pytest.raises(InputError, match="no adapters given"):
        concatenate_adapters(base, {}, {}, out)
    full = tuned(base, tmp_path / "full")
    with pytest.raises(InputError, match="is no LoRA adapter; write one with 'scalemerge extract'"):
        concatenate_adapters(base, {"full": full}, {"full": 1.0}, out)
    with pytest.raises(InputError, match="another model than"):
        concatenate_adapters(full, adapters, WEIGHTED, out)
    with pytest.raises(InputError, match="do not fit into float16"):
        concatenate_adapters(base, adapters, {**WEIGHTED, "plain": 1e9}, out, dtype="float16")
    assert not out.exists()


def test_pooling_must_agree(tiny_folders, tmp_path) -> None:
    from scalemerge.encoder import Encoder

    base = tiny_folders("bert")
    adapters = {}
    for pooling in ("cls", "mean"):
        adapters[pooling] = adapter(base, tmp_path / pooling, r=2, target_modules=["query"])
        encoder = Encoder.load(base, pooling=pooling)
        encoder.prompts = {"query": "q: ", "document": pooling}
        encoder.save_description(tmp_path / "described")
        for path in (tmp_path / "described").rglob("*.json"):
            if path.name != "config.json" or path.parent.name == "1_Pooling":
                target = adapters[pooling] / path.relative_to(tmp_path / "described")
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="pooling is 'mean'"):
        concatenate_adapters(base, adapters, {"cls": 1.0, "mean": 1.0}, tmp_path / "out")
    (adapters["mean"] / "1_Pooling" / "config.json").write_bytes(
        (adapters["cls"] / "1_Pooling" / "config.json").read_bytes()
    )
    concatenate_adapters(base, adapters, {"cls": 1.0, "mean": 1.0}, tmp_path / "out")
    again = Encoder.load(tmp_path / "out")
    assert again.pooling == "cls" and again.prompts == {"query": "q: "}  # that of documents is not common to both


def test_nothing_is_read_beside_the_folder(tiny_folders, tmp_path) -> None:
    """A module's path in modules.json that leads elsewhere, by name or by a link, is not followed."""
    from scalemerge.encoder import Encoder

    base = tiny_folders("bert")
    place = adapter(base, tmp_path / "a", r=2, target_modules=["query"])
    Encoder.load(base).save_description(tmp_path / "described")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (place / name).write_bytes((tmp_path / "described" / name).read_bytes())
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_bytes(
        (tmp_path / "described" / "1_Pooling" / "config.json").read_bytes()
    )
    modules = json.loads((place / "modules.json").read_text())
    for number, path in enumerate(("../secret", "link")):
        modules[1]["path"] = path
        (place / "link").unlink(missing_ok=True)
        (place / "link").symlink_to(tmp_path / "secret")
        (place / "modules.json").write_text(json.dumps(modules))
        out = tmp_path / f"out{number}"
        concatenate_adapters(base, {"a": place}, {"a": 1.0}, out)
        assert not [path for path in out.rglob("*") if path.is_dir()]
        assert len(list((tmp_path / "secret").iterdir())) == 1
