"""What is said of models, stores, stored task vectors, adapters and experts, against what was put there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge.adapters import extract_adapter
from scalemerge.errors import InputError
from scalemerge.inspecting import (
    AdapterFolder,
    Experts,
    ModelFolder,
    Store,
    StoredVectors,
    inspect_experts,
    inspect_folder,
)
from scalemerge.inspecting.tables import print_inspected
from scalemerge.task_vectors import TaskVectorStore
from scalemerge.task_vectors.compression import Compression, compress_folders
from tests.adapters.conftest import tuned


@pytest.fixture
def experts(tiny_folders, tmp_path):
    return {name: tuned(tiny_folders("bert"), tmp_path / "experts" / name, seed) for seed, name in enumerate("abc")}


def shown(found, capsys):
    print_inspected(found)
    return capsys.readouterr().out


def assert_plain(found):
    """as_dict is JSON, without NaN."""
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["kind"] == found.kind


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_a_model(kind, tiny_folders, tmp_path, capsys) -> None:
    from scalemerge.encoder import Encoder

    encoder = Encoder.load(tiny_folders(kind), pooling="cls", max_length=40)
    encoder.prompts = {"query": "q: "}
    encoder.save(tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: x\nlicense: 'apache-2.0'\n---\n\n# A model\nlicense: mit\n")
    (tmp_path / "scalemerge.json").write_text(json.dumps({"key": "k", "method": "average"}))
    found = inspect_folder(tmp_path)
    assert isinstance(found, ModelFolder) and found.vectors is None
    tensors = load_file(tmp_path / "model.safetensors")
    assert found.parameters == sum(value.numel() for value in tensors.values())
    assert found.dtypes == {"float32": found.parameters} and found.head == []
    assert found.shards == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    assert found.architecture == {"bert": "BertModel", "qwen3": "Qwen3Model"}[kind] and found.model_type == kind
    assert found.sizes["hidden_size"] == 32 and found.sizes["num_hidden_layers"] == 2
    assert (found.vocab_size, found.table_rows, found.tokens) == (261, 261, 261)
    assert found.encoding.modules[:2] == ["Transformer", "Pooling"] and found.encoding.pooling == "cls"
    assert (found.encoding.max_length, found.encoding.prompts) == (40, {"query": "q: "})
    assert found.licence == "apache-2.0" and found.recorded == {"key": "k", "method": "average"}
    assert_plain(found)
    text = shown(found, capsys)
    for part in ("Transformer, Pooling", "cls", "apache-2.0", '"method": "average"', "261 tokens, 261 rows"):
        assert part in text


def test_heads_shards_and_dtypes(tiny_folders, tmp_path) -> None:
    """Tensors beside the backbone are named; the prefix that a head's model puts before it is none of them."""
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM.from_pretrained(tiny_folders("bert"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    found = inspect_folder(tmp_path)
    assert found.architecture == "BertForMaskedLM" and len(found.shards) > 1
    assert found.head and all(name.startswith("cls.") for name in found.head)
    assert set(found.dtypes) == {"bfloat16"} and found.tokens is None and found.encoding.modules == []
    assert found.tied is True


def test_a_model_beside_its_base(tiny_folders, experts) -> None:
    base = tiny_folders("bert")
    found = inspect_folder(experts["a"], base)
    a, b = (load_file(folder / "model.safetensors") for folder in (base, experts["a"]))
    norm = sum(float((b[name] - a[name]).double().square().sum()) for name in a) ** 0.5
    whole = sum(float(value.double().square().sum()) for value in a.values()) ** 0.5
    assert found.vectors.norms == pytest.approx([norm], rel=1e-6)
    assert found.vectors.relative_norms == pytest.approx([norm / whole], rel=1e-6)
    assert found.vectors.cosines == [[pytest.approx(1)]] and found.vectors.names == ["a"]
    assert inspect_folder(experts["a"], base, vectors=False).vectors is None


def test_several_experts(tiny_folders, experts, tmp_path, capsys) -> None:
    """Norms and cosines, from a run's folder or from folders of all kinds."""
    base = tiny_folders("bert")
    with pytest.raises(InputError, match=r"holds experts \(a, b, c\); give --base"):
        inspect_folder(tmp_path)
    found = inspect_folder(tmp_path, base)
    assert isinstance(found, Experts) and found.names == ["a", "b", "c"]
    store = TaskVectorStore(base, experts)
    flat = torch.stack([torch.cat([store.task_vector(i, name).flatten() for name in store.names]) for i in range(3)])
    flat = flat.double()
    wanted = flat @ flat.T / flat.norm(dim=1) / flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.tensor(found.cosines, dtype=torch.float64), wanted, rtol=1e-6, atol=1e-9)
    assert found.norms == pytest.approx(flat.norm(dim=1).tolist(), rel=1e-6)
    assert_plain(found)
    text = shown(found, capsys)
    assert f"{found.cosines[0][1]:.3f}" in text and f"{found.norms[2]:.4g}" in text
    extract_adapter(base, experts["b"], tmp_path / "lora", 48, embeddings=True)
    mixed = inspect_experts(base, {"b": experts["b"], "lora": tmp_path / "lora"})
    assert mixed.cosines[0][1] > 0.95


@pytest.mark.parametrize("shared", [False, True])
def test_a_store(shared, tiny_folders, experts, tmp_path, capsys) -> None:
    base = tiny_folders("bert")
    written = compress_folders(base, experts, tmp_path / "store", Compression("int8", 32, shared_base=shared))
    found = inspect_folder(tmp_path / "store")  # the base is named by the store
    assert isinstance(found, Store) and [each.expert for each in found.experts] == ["a", "b", "c"]
    assert found.nbytes == written.nbytes and found.bfloat16_bytes == written.bfloat16_bytes
    assert (found.shared is not None) == shared and found.base == str(base)
    assert found.base_revision == TaskVectorStore(base, experts).revisions[0]
    assert {(each.form, each.group_size) for each in found.experts} == {("int8", 32)}
    errors = [each for each in written.errors if each.expert == "b"]
    square, error = sum(each.sums.exact for each in errors), sum(each.sums.error for each in errors)
    assert found.experts[1].relative_error == pytest.approx((error / square) ** 0.5)
    full = inspect_experts(base, experts)
    for one, other in zip(found.vectors.cosines, full.cosines, strict=True):
        assert one == pytest.approx(other, abs=5e-3)
    assert_plain(found)
    text = shown(found, capsys)
    assert "int8" in text and ("(shared base)" in text) == shared and found.base_revision[:12] in text
    alone = inspect_folder(tmp_path / "store" / "b")
    assert isinstance(alone, StoredVectors) and alone == found.experts[1]
    assert "relative error" in shown(alone, capsys)
    assert_plain(alone)
    if not shared:
        beside = inspect_folder(tmp_path / "store" / "b", base)
        assert beside.vectors.norms == pytest.approx([found.vectors.norms[1]])


def test_a_store_without_its_base(tiny_folders, experts, tmp_path, capsys) -> None:
    base = tmp_path / "gone"
    shutil.copytree(tiny_folders("bert"), base)
    compress_folders(base, experts, tmp_path / "store", Compression("bfloat16"))
    base.rename(tmp_path / "moved")
    found = inspect_folder(tmp_path / "store")
    assert found.vectors is None and "no such model folder" in found.note and "--base" in shown(found, capsys)
    assert inspect_folder(tmp_path / "store", tmp_path / "moved").vectors is not None
    assert inspect_folder(tmp_path / "store", vectors=False).note is None
    other = tuned(tiny_folders("bert"), tmp_path / "other", 9)
    with pytest.raises(InputError, match="made from base"):
        inspect_folder(tmp_path / "store", other)


def test_an_adapter(tiny_folders, experts, tmp_path, capsys) -> None:
    base = tiny_folders("bert")
    made = extract_adapter(base, experts["a"], tmp_path / "lora", 4)
    found = inspect_folder(tmp_path / "lora", base)
    assert isinstance(found, AdapterFolder) and found.base == str(base)
    assert (found.peft_type, found.rank, found.alpha, found.rslora) == ("LORA", 4, 4, False)
    assert found.modules == len(made.modules) and found.ranks == {4: found.modules} and found.unusual == {}
    assert found.nbytes == made.nbytes == 4 * found.parameters and found.dtypes == {"float32": found.parameters}
    assert found.recorded["method"] == "extract" and len(found.vectors.norms) == 1
    assert_plain(found)
    assert "rank 4: 12 modules" in shown(found, capsys)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True, "use_rslora": True, "bias": "all"}))
    odd = inspect_folder(tmp_path / "lora")  # what merging refuses can still be looked at
    assert odd.unusual == {"use_dora": True, "bias": "all"} and odd.rslora
    text = shown(odd, capsys)
    assert "rsLoRA" in text and "use_dora" in text


def test_a_real_model(minilm) -> None:
    found = inspect_folder(minilm)
    assert found.parameters > 22_000_000 and (found.tokens, found.table_rows) == (30522, 30522)
    assert found.encoding.modules[:2] == ["Transformer", "Pooling"] and found.encoding.pooling == "mean"


def test_bad_folders(tiny_folders, tmp_path) -> None:
    with pytest.raises(InputError, match="no such model folder"):
        inspect_folder(tmp_path / "none")
    with pytest.raises(InputError, match="holds no model, store, adapter or experts"):
        inspect_folder(tmp_path)
    base = tmp_path / "base"
    shutil.copytree(tiny_folders("bert"), base)
    (base / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        inspect_folder(base)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no adapter_model.safetensors"):
        inspect_folder(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match="truncated or corrupt"):
        inspect_folder(tmp_path / "adapter")


def test_modules_of_others_are_shown(tiny_folders, tmp_path) -> None:
    """A module that scalemerge cannot run is listed, and the reason given."""
    shutil.copytree(tiny_folders("bert"), tmp_path / "m")
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
               {"idx": 1, "path": "1_Dense", "type": "sentence_transformers.models.Dense"}]  # fmt: skip
    (tmp_path / "m" / "modules.json").write_text(json.dumps(modules))
    found = inspect_folder(tmp_path / "m").encoding
    assert found.modules == ["Transformer", "Dense"] and "'Dense' is not supported" in found.problem


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", "3"), ("modules.json", '[{"path": 3}]'), ("modules.json", '{"a": 1}'),
        ("1_Pooling/config.json", "[]"), ("config_sentence_transformers.json", '{"prompts": [1]}'),
        ("config.json", '{"text_config": [1], "architectures": 3, "vocab_size": "x"}'),
        ("README.md", "---\nlicense:\n"), ("tokenizer_config.json", '{"added_tokens_decoder": [3]}'),
    ],
)  # fmt: skip
def test_spoilt_small_files(tiny_folders, tmp_path, file, content, capsys) -> None:
    """Shown with the reason, or refused in one line; never a traceback."""
    from scalemerge.encoder import Encoder

    Encoder.load(tiny_folders("bert")).save(tmp_path)
    (tmp_path / file).write_text(content)
    try:
        print_inspected(inspect_folder(tmp_path))
    except InputError as error:
        assert str(tmp_path) in str(error)
    else:
        assert "26" in capsys.readouterr().out


def test_a_scalar_tensor(tiny_folders, tmp_path) -> None:
    shutil.copytree(tiny_folders("bert"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["scale"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    assert inspect_folder(tmp_path / "m", tmp_path / "m").vectors.norms == [0.0]
