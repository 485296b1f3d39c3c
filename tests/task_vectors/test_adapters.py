"""LoRA adapters as experts, against peft's own merged weights; whatever changes the sum otherwise refused by name."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank, dense_block
from scalemerge.layers import Coefficients, attach
from scalemerge.task_vectors import TaskVectorStore, gram_matrices
from scalemerge.task_vectors.compression import Compression, compress_folders

peft = pytest.importorskip("peft", reason="peft is not installed")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL = ["query", "key", "value", "dense"]

KINDS = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 6,
        "rank_pattern": {"query": 7, "layer.1.attention.self.key": 2, "^encoder.layer.0.output.dense": 5},
        "alpha_pattern": {"value": 9, "layer.1.attention.self.(query|key)": 31},
    },
    "patterns-rslora": {"r": 3, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"query": 7},
                        "alpha_pattern": {"value": 9}},
    "embedding": {"r": 4, "lora_alpha": 5, "target_modules": ["query", "position_embeddings"]},
}  # fmt: skip


def adapter(base, folder, dtype=torch.float32, seed=0, model_class="AutoModel", **config):
    """Write an adapter with random matrices on the model in `base`; return the weights that peft merges, by name."""
    import transformers

    model = getattr(transformers, model_class).from_pretrained(base, dtype=torch.float64)
    settings = {"target_modules": ALL, "exclude_modules": r"(.*\.)?pooler\..*", **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data.to(dtype).double()
    wrapped.save_pretrained(folder)
    save_file({name: value.to(dtype) for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return dict(wrapped.merge_and_unload().named_parameters())


@pytest.fixture
def base(tiny_folders):
    return tiny_folders("bert")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_what_peft_merges(base, tmp_path, kind, dtype) -> None:
    merged = adapter(base, tmp_path / "a", dtype, **KINDS[kind])
    store = TaskVectorStore(base, {"a": tmp_path / "a"})
    moved = 0
    for name, weight in merged.items():
        delta = weight.detach() - store.base.read(name).double()
        found = store.task_vector(0, name)
        assert found.dtype == torch.float32 and found.shape == delta.shape
        torch.testing.assert_close(found.double(), delta, rtol=1e-5, atol=1e-6)
        (held,) = store.held(name)
        if delta.any():
            moved += 1
            assert isinstance(held, LowRank)
            exact = held.b.double() @ held.a.double()  # in float64 nothing but the scaling is rounded
            torch.testing.assert_close(exact, delta, rtol=1e-6, atol=1e-7)
            for rows in ((0, 5), (3, len(delta)), (2, 2)):
                torch.testing.assert_close(store.task_vector(0, name, *rows), found[rows[0] : rows[1]])
                (part,) = store.held(name, rows)
                assert torch.equal(part.a, held.a) and torch.equal(part.b, held.b[rows[0] : rows[1]])
        else:
            assert not dense_block(held).any()
    assert moved == (3 if kind == "embedding" else 12)


def test_conv1d_lies_the_other_way(tmp_path) -> None:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=13, n_positions=8)).save_pretrained(
        tmp_path / "base"
    )
    merged = adapter(tmp_path / "base", tmp_path / "a", target_modules=["c_attn", "c_proj"], r=3, lora_alpha=5,
                     exclude_modules=None, fan_in_fan_out=True)  # fmt: skip
    store = TaskVectorStore(tmp_path / "base", {"a": tmp_path / "a"})
    for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"):
        delta = merged[name].detach() - store.base.read(name).double()
        assert delta.any()
        torch.testing.assert_close(store.task_vector(0, name).double(), delta, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(store.task_vector(0, name, 1, 3).double(), delta[1:3], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_model_with_a_head(tmp_path, base) -> None:
    """Its names begin with the model's; the base's do not."""
    merged = adapter(base, tmp_path / "a", model_class="BertForMaskedLM", r=2, target_modules=["query"])
    store = TaskVectorStore(base, {"a": tmp_path / "a"})
    name = "encoder.layer.0.attention.self.query.weight"
    delta = merged[f"bert.{name}"].detach() - store.base.read(name).double()
    assert delta.any()
    torch.testing.assert_close(store.task_vector(0, name).double(), delta, rtol=1e-5, atol=1e-6)


def test_peft_is_not_needed(base, tmp_path, monkeypatch) -> None:
    adapter(base, tmp_path / "a", r=2)
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    store = TaskVectorStore(base, {"a": tmp_path / "a"})
    assert any(vector.any() for name in store.names for vector in store.task_vectors(name))


def test_adapters_beside_a_whole_model_and_a_store(base, tiny_model, tmp_path) -> None:
    """Layers at random coefficients against the dense sum; the Gram matrix counts cross terms of experts alone."""
    from transformers import AutoModel

    whole = tiny_model(tmp_path / "whole", "bert", 7)
    adapter(base, tmp_path / "a", r=3, lora_alpha=6)
    adapter(base, tmp_path / "b", seed=1, r=2, lora_alpha=3, target_modules=["query", "position_embeddings"])
    compress_folders(base, {"whole": whole, "a": tmp_path / "a"}, tmp_path / "s", Compression("int8", shared_base=True))
    folders = {"a": tmp_path / "a", "whole": whole, "b": tmp_path / "b", "stored": tmp_path / "s" / "whole"}
    store = TaskVectorStore(base, folders)
    for name, gram in gram_matrices(store).items():
        rows = torch.stack([store.task_vector(i, name).double().flatten() for i in range(4)])
        torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-12, atol=0)
    model, dense = (AutoModel.from_pretrained(base).eval() for _ in range(2))
    c = torch.tensor([[0.4, -0.2, 0.3, 0.25]])
    names = [name for name, _ in model.named_parameters() if name in store.names]
    rows = Coefficients(dict.fromkeys(names, 0), c @ store.mixing.T)
    attach(model, {name: store.held(name) for name in names}, rows)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            for x, vector in zip(c[0], store.task_vectors(name), strict=True):
                parameter += x * vector
        ids = torch.arange(20).view(2, 10)
        found, wanted = model(ids).last_hidden_state, dense(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_is_compressed_like_any_expert(base, tmp_path) -> None:
    """svd of at least its rank loses bfloat16's digits alone; what it did not touch is not stored."""
    adapter(base, tmp_path / "a", r=3, lora_alpha=6)
    adapter(base, tmp_path / "b", seed=1, r=3, lora_alpha=6)
    written = compress_folders(base, {"a": tmp_path / "a"}, tmp_path / "s", Compression("svd", rank=3))
    store = TaskVectorStore(base, {"s": tmp_path / "s" / "a", "b": tmp_path / "b"})
    assert store.names == TaskVectorStore(base, {"a": tmp_path / "a"}).names
    assert len(written.errors) == 12 and all(each.sums.relative_error < 5e-3 for each in written.errors)
    assert len(store.members[0].own.changed) == 12


# ---- refused -----------------------------------------------------------------------------------------------------


def refused(base, folder, *, read=False) -> str:
    with pytest.raises(InputError) as caught:
        store = TaskVectorStore(base, {"x": folder})
        for name in store.names if read else []:
            store.held(name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


def edit(folder, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dora", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["pooler"]),
        ("lora_bias", True), ("trainable_token_indices", [1]), ("layer_replication", [[0, 1]]),
        ("target_parameters", ["x"]), ("alora_invocation_tokens", [3]), ("use_qalora", True),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", 1), ("rank_pattern", [1]), ("peft_type", "LOHA"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(base, tmp_path, field, value) -> None:
    adapter(base, tmp_path / "a", r=2)
    edit(tmp_path / "a", **{field: value})
    message = refused(base, tmp_path / "a")
    assert str(tmp_path / "a" / CONFIG) in message and (field in message or value in message)


def test_real_dora_bias_and_saved_modules(base, tmp_path) -> None:
    for name, settings, words in [
        ("dora", {"use_dora": True}, "use_dora"),
        ("bias", {"bias": "lora_only"}, "bias"),
        ("saved", {"modules_to_save": ["LayerNorm"]}, "modules_to_save"),
    ]:
        adapter(base, tmp_path / name, r=2, **settings)
        assert words in refused(base, tmp_path / name)
        edit(tmp_path / name, use_dora=False, bias="none", modules_to_save=None)
        assert "is no matrix of LoRA" in refused(base, tmp_path / name), "the tensors give it away"


def test_another_base_is_refused_by_hash(base, tmp_path, tiny_model) -> None:
    adapter(base, tmp_path / "a", r=2)
    other = tiny_model(tmp_path / "other", "bert", 5)
    message = refused(other, tmp_path / "a")
    assert str(base) in message and str(other) in message and "another model" in message
    shutil.copytree(base, tmp_path / "copy")
    TaskVectorStore(tmp_path / "copy", {"a": tmp_path / "a"})  # the same bytes elsewhere
    edit(tmp_path / "a", base_model_name_or_path=str(tmp_path / "gone"))
    message = refused(base, tmp_path / "a")
    assert str(tmp_path / "gone") in message and "set base_model_name_or_path" in message
    late = TaskVectorStore(base, {"x": adapted(tmp_path, other)}, verify=False)
    with pytest.raises(InputError, match="another model"):
        _ = late.revisions


def adapted(tmp_path, other):
    adapter(other, tmp_path / "late", r=2)
    return tmp_path / "late"


def test_spoilt_files(base, tmp_path) -> None:
    folder = tmp_path / "a"
    adapter(base, folder, r=4)
    good, config = load_file(folder / WEIGHTS), (folder / CONFIG).read_text()
    some = next(name for name in good if "query.lora_A" in name)

    def with_weights(**changes):
        tensors = {**good, **{name.replace("__", "."): value for name, value in changes.items()}}
        save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)
        return refused(base, folder, read=True)

    assert "has no partner" in with_weights(**{some: None})
    assert "rank 4 and alpha" in with_weights(**{some: good[some][:3], some.replace("_A", "_B"):
                                                 good[some.replace("_A", "_B")][:, :3].contiguous()})  # fmt: skip
    assert "have shapes" in with_weights(**{some: good[some][:, :3].contiguous()})
    assert "have shapes" in with_weights(**{some: good[some][:3]})
    odd = some.replace("query", "elsewhere")
    odd_weights = {odd: good[some].clone(), odd.replace("_A", "_B"): good[some].clone()}
    assert "is not in the base" in with_weights(**odd_weights)
    assert "is no matrix of LoRA" in with_weights(stray=good[some].clone())
    spoilt = good[some].clone()
    spoilt[0, 0] = float("inf")
    assert f"tensor '{some}' holds NaN or infinity" in with_weights(**{some: spoilt})
    save_file(good, folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])
    assert "truncated or corrupt" in refused(base, folder)
    (folder / WEIGHTS).unlink()
    assert f"no {WEIGHTS}" in refused(base, folder)
    save_file({}, folder / WEIGHTS)
    assert "holds no tensors" in refused(base, folder)
    save_file(good, folder / WEIGHTS)
    edit(folder, lora_alpha="much")
    assert "no rank and alpha" in refused(base, folder)
    (folder / CONFIG).write_text("[]")
    assert str(folder / CONFIG) in refused(base, folder)
    (folder / CONFIG).write_text(config)
    TaskVectorStore(base, {"a": folder})


def test_revisions_change_with_the_scaling_and_not_with_the_base_s_place(base, tmp_path) -> None:
    adapter(base, tmp_path / "a", r=4, lora_alpha=8)
    before = TaskVectorStore(base, {"a": tmp_path / "a"}).revisions
    shutil.copytree(base, tmp_path / "copy")
    edit(tmp_path / "a", base_model_name_or_path=str(tmp_path / "copy"), inference_mode=False)
    assert TaskVectorStore(base, {"a": tmp_path / "a"}).revisions == before
    edit(tmp_path / "a", lora_alpha=9)
    assert TaskVectorStore(base, {"a": tmp_path / "a"}).revisions[1] != before[1]
