"""Adapters from full models: as near as a decomposition gets, loaded by peft and by our own reader."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge.adapters import extract_adapter
from scalemerge.adapters.extract import right_factor
from scalemerge.errors import InputError
from scalemerge.task_vectors import TaskVectorStore
from tests.adapters.conftest import tuned

peft = pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(params=["bert", "qwen3", "modernbert"])
def pair(request, tiny_folders, tmp_path):
    """A base and an expert trained, as it were, in every tensor."""
    base = tiny_folders(request.param)
    return base, tuned(base, tmp_path / "expert")


def best_error(delta: torch.Tensor, rank: int) -> float:
    """|T - T_r| / |T| of the nearest matrix of rank r."""
    values = torch.linalg.svdvals(delta.double())
    return float((values[rank:].square().sum() / values.square().sum()).sqrt())


@pytest.mark.parametrize("rank", [1, 4])
def test_is_the_nearest(pair, tmp_path, rank) -> None:
    base, expert = pair
    made = extract_adapter(base, expert, tmp_path / "out", rank)
    store = TaskVectorStore(base, {"full": expert, "adapter": tmp_path / "out"})
    errors = {each.module: each.sums.relative_error for each in made.modules}
    assert len(errors) >= 8
    for module, error in errors.items():
        full, low = store.task_vectors(f"{module}.weight")
        assert error == pytest.approx(best_error(full, rank), rel=1e-4)
        assert float((low - full).norm() / full.norm()) == pytest.approx(error, rel=1e-4)
    every = {name: store.task_vectors(name) for name in store.names if not name.startswith("pooler.")}
    square = sum(float(full.double().square().sum()) for full, _ in every.values())
    left = {name: float(full.double().square().sum()) for name, (full, low) in every.items() if not low.any()}
    assert set(made.left_out) == set(left) and all(
        ("norm" in name.lower()) or name.endswith("bias") or "embed" in name for name in left
    )
    assert made.left_out_share == pytest.approx(sum(left.values()) / square, rel=1e-5)
    error = sum(float((full - low).double().square().sum()) for full, low in every.values())
    assert made.relative_error == pytest.approx((error / square) ** 0.5, rel=1e-4)


def test_peft_loads_it(pair, tmp_path) -> None:
    """peft's merged weights are ours; modules that are not held stay the base's."""
    from transformers import AutoModel

    base, expert = pair
    made = extract_adapter(base, expert, tmp_path / "out", 40, embeddings=True)  # more than the smaller side: whole
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    merged = dict(wrapped.merge_and_unload().named_parameters())
    theirs, ours = load_file(expert / "model.safetensors"), load_file(base / "model.safetensors")
    held = {f"{each.module}.weight" for each in made.modules}
    assert any("embed" in name for name in held)
    for name, weight in merged.items():
        wanted = theirs[name] if name in held else ours[name]
        torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["modules_to_save"]
    assert made.held.relative_error < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_in_fewer_bits(tiny_folders, tmp_path, dtype) -> None:
    base = tiny_folders("bert")
    expert = tuned(base, tmp_path / "expert")
    whole = extract_adapter(base, expert, tmp_path / "float32", 4)
    made = extract_adapter(base, expert, tmp_path / dtype, 4, dtype=dtype)
    assert made.nbytes * 2 == whole.nbytes == sum(each.nbytes for each in whole.modules)
    stored = load_file(tmp_path / dtype / "adapter_model.safetensors")
    assert {str(value.dtype) for value in stored.values()} == {f"torch.{dtype}"}
    assert whole.held.relative_error < made.held.relative_error < whole.held.relative_error * 1.001
    store = TaskVectorStore(base, {"a": tmp_path / dtype, "full": expert})
    name = "encoder.layer.0.output.dense.weight"
    low, full = store.task_vectors(name)
    sums = next(each.sums for each in made.modules if each.module == name.removesuffix(".weight"))
    assert float((low - full).norm() / full.norm()) == pytest.approx(sums.relative_error, rel=1e-5)


def test_conv1d(tmp_path) -> None:
    """GPT-2's weights lie [inputs, outputs]."""
    from transformers import AutoModel, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=32)
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    expert = tuned(tmp_path / "base", tmp_path / "expert")
    made = extract_adapter(tmp_path / "base", expert, tmp_path / "out", 16)
    assert len(made.modules) == 8 and made.held.relative_error < 1e-5
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    wrapped = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), str(tmp_path / "out"))
    merged = dict(wrapped.merge_and_unload().named_parameters())
    theirs = load_file(expert / "model.safetensors")
    for name in (f"{each.module}.weight" for each in made.modules):
        torch.testing.assert_close(merged[name].detach(), theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(60, 44), (44, 60), (50, 50)])
@pytest.mark.parametrize("spectrum", ["flat", "decaying", "rank 3"])
def test_factors_of_matrices(shape, spectrum) -> None:
    """Both ways of decomposing: the exact one to rounding, the random one to a hundredth of the optimum's energy."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if spectrum == "decaying":
        values = 0.8 ** torch.arange(len(values)).double()
    elif spectrum == "rank 3":
        values[3:] = 0
    matrix = (1e-5 * (left * values) @ right).float()
    blocks = [(0, 20), (20, 40), (40, shape[0])]
    before = torch.get_rng_state()

    def read(rows):
        return matrix if rows is None else matrix[rows[0] : rows[1]]

    for side, tolerance in ((1024, 1e-5), (8, 1e-2)):
        a = right_factor(read, shape, blocks, 6, seed=3, exact_side=side)
        assert a.shape == (6, shape[1]) and a.dtype == torch.float64 and bool(a.isfinite().all())
        assert torch.equal(a, right_factor(read, shape, blocks, 6, seed=3, exact_side=side))
        projected = matrix.double() @ torch.linalg.pinv(a, rtol=1e-4) @ a
        kept = float(projected.square().sum() / matrix.double().square().sum())
        best = float(values[:6].square().sum() / values.square().sum())
        assert best * (1 - tolerance) <= kept <= best * (1 + 1e-6)
    assert torch.equal(before, torch.get_rng_state())


def test_a_large_matrix(tmp_path) -> None:
    """Beyond the size of exact decompositions, through the random one, within a thousandth of the least error."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=1040, num_attention_heads=4, num_hidden_layers=1, intermediate_size=1032,
                        vocab_size=30, max_position_embeddings=8)  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "base")
    weight = model.encoder.layer[0].intermediate.dense.weight
    weight.data += 1e-3 * torch.randn(1032, 5) @ torch.randn(5, 1040) + 1e-4 * torch.randn(1032, 1040)
    model.save_pretrained(tmp_path / "expert")
    made = extract_adapter(tmp_path / "base", tmp_path / "expert", tmp_path / "out", 4)
    (module,) = made.modules
    delta = TaskVectorStore(tmp_path / "base", {"e": tmp_path / "expert"}).task_vector(0, f"{module.module}.weight")
    assert module.sums.relative_error == pytest.approx(best_error(delta, 4), rel=1e-3)


def test_goes_on_where_it_stopped(tiny_folders, tmp_path, monkeypatch) -> None:
    base = tiny_folders("bert")
    expert = tuned(base, tmp_path / "expert")
    import scalemerge.adapters.folders as folders

    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract_adapter(base, expert, tmp_path / "out", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert"]
    first = extract_adapter(base, expert, tmp_path / "out", 4)
    before = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    again = extract_adapter(base, expert, tmp_path / "out", 4)
    assert again == first and (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="not this adapter"):
        extract_adapter(base, expert, tmp_path / "out", 5)
    other = extract_adapter(base, expert, tmp_path / "other", 4)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # the same input, the same bytes
    assert other.as_dict() == {**first.as_dict(), "folder": str(tmp_path / "other")}
    json.dumps(first.as_dict(), allow_nan=False)
    assert "left out" in "\n".join(first.lines())
    rows = (tmp_path / "out" / "errors.csv").read_text().splitlines()
    assert len(rows) == 1 + len(first.modules)


def test_sentence_transformers_loads_it(tiny_folders, tmp_path, texts) -> None:
    """Pooling, prompts and tokenizer come along; whole in rank, it encodes as base plus linear task vectors."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from scalemerge.encoder import Encoder

    base = tiny_folders("bert")
    encoder = Encoder.load(base, pooling="cls", max_length=40)
    encoder.prompts = {"query": "q: "}
    with torch.no_grad():
        for name, parameter in encoder.backbone.named_parameters():
            if name.endswith("dense.weight") and "pooler" not in name:
                parameter += 0.05
    encoder.save(tmp_path / "expert")
    made = extract_adapter(base, tmp_path / "expert", tmp_path / "out", 2)
    assert not made.left_out and made.relative_error < 1e-5
    wanted = encoder.encode(texts[:9])
    again = Encoder.load(tmp_path / "out")
    assert (again.pooling, again.max_length, again.prompts) == ("cls", 40, {"query": "q: "})
    torch.testing.assert_close(again.encode(texts[:9]), wanted, rtol=0, atol=1e-4)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts[:9])
    torch.testing.assert_close(torch.from_numpy(theirs), wanted, rtol=0, atol=1e-4)


def test_a_bidirectional_decoder(tiny_folders, tmp_path, texts) -> None:
    """What config.json of the expert says is said where an adapter's folder can say it."""
    from scalemerge.encoder import Encoder

    encoder = Encoder.load(tiny_folders("qwen3"), bidirectional=True)
    with torch.no_grad():
        for name, parameter in encoder.backbone.named_parameters():
            if name.endswith("proj.weight"):
                parameter += 0.05
    encoder.save(tmp_path / "expert")
    extract_adapter(tiny_folders("qwen3"), tmp_path / "expert", tmp_path / "out", 1)
    again = Encoder.load(tmp_path / "out")
    assert again.bidirectional
    torch.testing.assert_close(again.encode(texts[:9]), encoder.encode(texts[:9]), rtol=0, atol=1e-4)


def test_bad_input(tiny_folders, tmp_path) -> None:
    base = tiny_folders("bert")
    expert = tuned(base, tmp_path / "expert")
    with pytest.raises(InputError, match="--rank 0"):
        extract_adapter(base, expert, tmp_path / "out", 0)
    with pytest.raises(InputError, match="--dtype int8"):
        extract_adapter(base, expert, tmp_path / "out", 2, dtype="int8")
    with pytest.raises(InputError, match="no linear layer differs"):
        extract_adapter(base, base, tmp_path / "out", 2)
    shutil.copytree(expert, tmp_path / "nan")
    weights = load_file(expert / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds NaN"):
        extract_adapter(base, tmp_path / "nan", tmp_path / "out", 2)
    with pytest.raises(InputError, match="experts must be trained from this base"):
        extract_adapter(base, tiny_folders("qwen3"), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
