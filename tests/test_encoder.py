"""The encoder against naive loops and against sentence-transformers, both ways, and folders that are no model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.encoder import POOLINGS, Encoder, local_folder, package_folder, pool, read_modules
from scalemerge.errors import InputError

KINDS = ("bert", "xlm-roberta", "modernbert", "qwen3", "mistral")
TOLERANCE = 1e-5  # the issue's: sentence-transformers and we round in different orders


@pytest.fixture(scope="module")
def sentence_transformer() -> Callable:
    """SentenceTransformer on the CPU, or a skip."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return lambda *args, **options: library.SentenceTransformer(*args, device="cpu", **options)


def embeddings_of(model, texts: list[str], **options) -> torch.Tensor:
    return torch.from_numpy(model.encode(texts, **options))


# ---- pooling and grouping ----------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    left=st.booleans(),
    how=st.sampled_from(POOLINGS),
    seed=st.integers(0, 10**6),
)
def test_pool_equals_a_loop_over_rows(lengths, left, how, seed) -> None:
    """Either side of padding; what stands in the padding never matters."""
    width = max(lengths)
    hidden = torch.randn(len(lengths), width, 5, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    expected = []
    for row, length in enumerate(lengths):
        real = slice(width - length, width) if left else slice(0, length)
        mask[row, real] = 1
        states = hidden[row, real]
        expected.append({"cls": states[0], "last": states[-1], "mean": states.mean(0)}[how])
    hidden[mask == 0] = 1e6
    torch.testing.assert_close(pool(hidden, mask, how), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_pool_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="'max' is not one of cls, mean, last"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "max")


@pytest.mark.parametrize("how", POOLINGS)
def test_padding_side_does_not_matter(how: str, tiny_folders) -> None:
    """The same encoder with the tokenizer's padding on the left and on the right."""
    encoder = Encoder.load(tiny_folders("qwen3"), pooling=how)
    texts = ["a", "a longer text", "of three"]
    found = []
    for side in ("left", "right"):
        encoder.tokenizer.padding_side = side
        found.append(encoder.encode(texts))
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def bert(tiny_folders) -> Encoder:
    return Encoder.load(tiny_folders("bert"))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30), count=st.integers(1, 8))
def test_groups_come_back_in_order(bert: Encoder, lengths, count) -> None:
    """The inverse order restores the rows; the number of groups depends on the numbers alone; none is empty."""
    features = [{"input_ids": [row + 5] * length, "attention_mask": [1] * length} for row, length in enumerate(lengths)]
    groups, inverse = bert.groups(features, count)
    assert len(groups) == min(count, len(lengths))
    first = torch.cat([group["input_ids"][:, 0] for group in groups])
    assert first[inverse].tolist() == [row + 5 for row in range(len(lengths))]
    sizes = [len(group["input_ids"]) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    real = sum(int(group["attention_mask"].sum()) for group in groups)
    assert real == sum(lengths)


def test_grouped_forward_equals_one_by_one(bert: Encoder, texts: list[str]) -> None:
    features = bert.tokenize(texts)
    groups, inverse = bert.groups(features, 4)
    with torch.inference_mode():
        grouped = bert(groups)[inverse]
    torch.testing.assert_close(grouped, bert.encode(texts, batch_size=1), rtol=1e-4, atol=TOLERANCE)


def test_encode_edge_cases(bert: Encoder) -> None:
    assert bert.encode([]).shape == (0, 32)
    assert bert.tokenize([]) == []
    assert bert.encode(["", "   "]).isfinite().all()
    long = bert.tokenize(["x" * 500])[0]["input_ids"]
    assert len(long) == bert.max_length


def test_encode_restores_training_mode_and_applies_the_prompt(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("bert")).train()
    with_prompt = encoder.encode(["b"], prompt="a ")
    assert encoder.training
    torch.testing.assert_close(with_prompt, encoder.encode(["a b"]))
    assert (with_prompt - encoder.encode(["b"])).abs().max() > 1e-3


def test_unused_pooler_is_frozen_and_all_else_trains(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("bert"))
    groups, _ = encoder.groups(encoder.tokenize(["a", "bb"]), 1)
    encoder(groups).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# ---- sentence-transformers, both ways ----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_loads_in_sentence_transformers(
    kind, pooling, tiny_folders, texts, tmp_path, sentence_transformer
):
    """SentenceTransformer(path).encode is our encode, prompts included; and our own load of it too."""
    prompts = {"query": "find: ", "document": "text: "}
    encoder = Encoder.load(tiny_folders(kind), pooling=pooling, normalize=pooling != "mean", max_length=40)
    encoder.prompts = prompts
    encoder.save(tmp_path)
    ours = encoder.encode(texts)
    theirs = sentence_transformer(str(tmp_path))
    torch.testing.assert_close(embeddings_of(theirs, texts), ours, rtol=0, atol=TOLERANCE * float(ours.abs().max()))
    prompted = encoder.encode(texts[:9], prompt=prompts["query"])
    torch.testing.assert_close(
        embeddings_of(theirs, texts[:9], prompt_name="query"),
        prompted,
        rtol=0,
        atol=TOLERANCE * float(ours.abs().max()),
    )
    again = Encoder.load(tmp_path)
    assert (again.pooling, again.normalize, again.max_length) == (pooling, pooling != "mean", 40)
    assert again.prompts == prompts
    torch.testing.assert_close(again.encode(texts), ours, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_loads_what_sentence_transformers_saves(
    kind, mode, tiny_folders, texts, tmp_path, sentence_transformer
) -> None:
    """The format of the installed release: one `pooling_mode`, the length in the tokenizer alone."""
    from sentence_transformers import models

    transformer = models.Transformer(str(tiny_folders(kind)), max_seq_length=20)
    pooling = models.Pooling(32, pooling_mode=mode)
    made = sentence_transformer(modules=[transformer, pooling, models.Normalize()], prompts={"query": "q: "})
    made.save_pretrained(str(tmp_path))
    encoder = Encoder.load(tmp_path)
    assert encoder.pooling == {"lasttoken": "last"}.get(mode, mode)
    assert (encoder.normalize, encoder.max_length, encoder.prompts) == (True, 20, {"query": "q: "})
    torch.testing.assert_close(encoder.encode(texts), embeddings_of(made, texts), rtol=0, atol=TOLERANCE)


def test_a_long_length_of_sentence_transformers_is_kept(tiny_model, tmp_path, sentence_transformer) -> None:
    """A folder that says 700 tokens is not cut at 512; a plain transformers folder is, unless told otherwise."""
    from sentence_transformers import models

    plain = tiny_model(tmp_path / "plain", "qwen3", max_position_embeddings=1024)
    made = sentence_transformer(modules=[models.Transformer(str(plain), max_seq_length=700), models.Pooling(32)])
    made.save_pretrained(str(tmp_path / "st"))
    text = "word " * 200
    encoder = Encoder.load(tmp_path / "st")
    assert encoder.max_length == 700
    torch.testing.assert_close(encoder.encode([text]), embeddings_of(made, [text]), rtol=1e-4, atol=1e-4)


def test_minilm_both_ways(minilm, texts, tmp_path, sentence_transformer) -> None:
    encoder = Encoder.load(minilm)
    ours = encoder.encode(texts)
    original = sentence_transformer(str(minilm))
    torch.testing.assert_close(ours, embeddings_of(original, texts), rtol=0, atol=TOLERANCE)
    encoder.save(tmp_path)
    torch.testing.assert_close(embeddings_of(sentence_transformer(str(tmp_path)), texts), ours, rtol=0, atol=TOLERANCE)


def test_plain_transformers_folder(tiny_folders) -> None:
    """Pooled by mean and normalized unless told otherwise; never longer than the tokenizer says."""
    encoder = Encoder.load(tiny_folders("bert"))
    assert (encoder.pooling, encoder.normalize, encoder.max_length, encoder.prompts) == ("mean", True, 48, {})
    other = Encoder.load(tiny_folders("bert"), pooling="cls", normalize=False, max_length=7)
    assert (other.pooling, other.normalize, other.max_length) == ("cls", False, 7)


def test_no_length_beyond_the_positions(tiny_model, tmp_path) -> None:
    """RoBERTa counts positions from padding_idx + 1, so 64 of them hold 62 tokens."""
    for kind, expected in (("bert", 64), ("xlm-roberta", 62)):
        folder = tiny_model(tmp_path / kind, kind)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["model_max_length"] = 10**30
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        encoder = Encoder.load(folder)
        assert encoder.max_length == expected
        assert encoder.encode(["x" * 200]).isfinite().all()


def test_save_with_other_weights(bert: Encoder, tmp_path) -> None:
    """state_dict replaces the weights that are written, as the training loop does."""
    state = {name: value * 0.5 for name, value in bert.backbone.state_dict().items()}
    bert.save(tmp_path, state_dict=state)
    for name, value in Encoder.load(tmp_path).backbone.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_dtype(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("bert"), dtype=torch.bfloat16)
    assert next(encoder.backbone.parameters()).dtype == torch.bfloat16
    embeddings = encoder.encode(["a", "b"])
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))
    full = Encoder.load(tiny_folders("bert")).encode(["a", "b"])
    assert (F.cosine_similarity(full, embeddings) > 0.99).all()


# ---- folders that are no model -----------------------------------------------------------------------------------


def refused(load: Callable[[], object], *parts: str) -> None:
    """An InputError of one line that has all the parts."""
    with pytest.raises(InputError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def copy(tiny_folders, tmp_path) -> Path:
    """A sentence-transformers folder of the tiny BERT, to be spoilt."""
    Encoder.load(tiny_folders("bert")).save(tmp_path / "model")
    return tmp_path / "model"


def test_missing_folder(tmp_path) -> None:
    refused(lambda: Encoder.load(tmp_path / "nowhere"), str(tmp_path / "nowhere"), "no such model folder")


def test_a_file_is_no_folder(tmp_path) -> None:
    (tmp_path / "model").write_text("x")
    refused(lambda: Encoder.load(tmp_path / "model"), str(tmp_path / "model"), "give a folder")


def test_no_config(copy) -> None:
    (copy / "config.json").unlink()
    refused(lambda: Encoder.load(copy), str(copy), "no config.json")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "nonsense"}', "{}"])
def test_bad_config(copy, content) -> None:
    (copy / "config.json").write_text(content)
    refused(lambda: Encoder.load(copy), str(copy))


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_weights(copy, keep) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(lambda: Encoder.load(copy), str(copy), "cannot load a model")


def test_pickle_only(copy) -> None:
    """A pickle can run anything when it is read, so it is not."""
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    refused(lambda: Encoder.load(copy), str(copy), "safetensors")


def test_missing_tensors_are_not_made_up(copy) -> None:
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
    torch.testing.assert_close(ours, Encoder.load(tiny_folders("bert")).encode(texts[:9]), rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("pattern", ["tokenizer*", "tokenizer.json"])
def test_no_tokenizer(copy, pattern) -> None:
    """transformers makes up a tokenizer that knows no word but [UNK], and says nothing."""
    for file in copy.glob(pattern):
        file.unlink()
    refused(lambda: Encoder.load(copy), str(copy), "tokenizer")


def test_unsupported_module(copy, sentence_transformer, tmp_path) -> None:
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
def test_unsupported_pooling(copy, config) -> None:
    (copy / "1_Pooling/config.json").write_text(json.dumps(config))
    refused(lambda: Encoder.load(copy), "1_Pooling/config.json", "use one of cls, mean, last")


def test_pooling_without_the_prompt_is_not_supported(copy) -> None:
    (copy / "1_Pooling/config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    refused(lambda: Encoder.load(copy), "1_Pooling/config.json", "include_prompt")


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


def test_unknown_pooling_argument(tiny_folders) -> None:
    refused(lambda: Encoder.load(tiny_folders("bert"), pooling="max"), "pooling 'max' is not one of cls, mean, last")


def test_package_references() -> None:
    refused(
        lambda: package_folder("package:no_such_package/model"), "'no_such_package' is not installed", "pip install"
    )
    refused(lambda: package_folder("package:scalemerge/nowhere"), "has no folder 'nowhere'")
    assert package_folder("package:scalemerge/data").name == "data"


def test_local_folder_leaves_hub_ids_alone(tiny_folders) -> None:
    assert local_folder("intfloat/e5-base") == "intfloat/e5-base"
    assert local_folder(tiny_folders("bert")) == str(tiny_folders("bert"))
    assert re.search("gt_all", local_folder("package:scalemerge/data")) is None
