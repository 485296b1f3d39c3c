"""Folders both ways between the encoder and sentence-transformers, with equal embeddings."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from scalemerge.encoder import POOLINGS, Encoder

KINDS = ("bert", "xlm-roberta", "modernbert", "qwen3", "mistral")
TOLERANCE = 1e-5  # the issue's: sentence-transformers and we round in different orders


def embeddings_of(model, texts: list[str], **options) -> torch.Tensor:
    return torch.from_numpy(model.encode(texts, **options))


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


def test_dtype(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("bert"), dtype=torch.bfloat16)
    assert next(encoder.backbone.parameters()).dtype == torch.bfloat16
    embeddings = encoder.encode(["a", "b"])
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2))
    full = Encoder.load(tiny_folders("bert")).encode(["a", "b"])
    assert (F.cosine_similarity(full, embeddings) > 0.99).all()
