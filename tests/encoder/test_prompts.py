"""Prompts: pooled or not, the default one, and lowercasing, as sentence-transformers has them."""

from __future__ import annotations

import json

import pytest
import torch

from scalemerge.encoder import Encoder, pool, read_modules
from scalemerge.objectives.gradient_cache import GradientCache

PROMPT = "find what answers this: "
SIDES = [
    ("bert", "right"), ("xlm-roberta", "left"), ("modernbert", "left"), ("qwen3", "left"), ("qwen3", "right"),
    ("mistral", "left"), ("mistral", "right"),
]  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("kind, side", SIDES)
def test_prompts_left_out_as_sentence_transformers_does(
    kind, side, pooling, tiny_folders, texts, tmp_path, sentence_transformer
) -> None:
    encoder = Encoder.load(tiny_folders(kind), pool_prompt=False, pooling=pooling)
    encoder.tokenizer.padding_side = side
    encoder.save(tmp_path)
    assert json.loads((tmp_path / "1_Pooling/config.json").read_text())["include_prompt"] is False
    ours = encoder.encode(texts[:20], prompt=PROMPT)
    theirs = sentence_transformer(str(tmp_path))
    assert theirs.tokenizer.padding_side == side
    torch.testing.assert_close(torch.from_numpy(theirs.encode(texts[:20], prompt=PROMPT)), ours, rtol=0, atol=1e-5)
    again = Encoder.load(tmp_path)
    assert again.pool_prompt is False
    torch.testing.assert_close(again.encode(texts[:20], prompt=PROMPT), ours, rtol=0, atol=0)
    pooled = Encoder.load(tmp_path, pool_prompt=True).encode(texts[:20], prompt=PROMPT)
    changed = (pooled - ours).abs().max() > 1e-3
    assert changed == (pooling != "last")  # the last token is behind the prompt anyway


def test_the_mean_is_of_the_text_alone(tiny_folders) -> None:
    """By hand: states of prompt and text together, the mean over the text's."""
    encoder = Encoder.load(tiny_folders("qwen3"), pool_prompt=False, normalize=False)
    (feature,) = encoder.tokenize(["abc"], prompt="xy: ")
    assert feature["prompt_length"] == [4]  # bytes are tokens here
    tokens = torch.tensor([feature["input_ids"]])
    with torch.no_grad():
        states = encoder.backbone(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(encoder.encode(["abc"], prompt="xy: ")[0], states[0, 4:].mean(0))


def test_prompted_and_plain_texts_in_one_batch(tiny_folders, texts) -> None:
    """Queries with the prompt and documents without, grouped, chunked and one by one."""
    encoder = Encoder.load(tiny_folders("mistral"), pool_prompt=False)
    queries, documents = texts[:7], texts[7:14]
    features = encoder.tokenize(queries, PROMPT) + encoder.tokenize(documents)
    assert [("prompt_length" in feature) for feature in features] == [True] * 7 + [False] * 7
    expected = torch.cat([encoder.encode(queries, prompt=PROMPT, batch_size=1), encoder.encode(documents)])
    groups, inverse = encoder.groups(features, 3)
    with torch.no_grad():
        torch.testing.assert_close(encoder(groups)[inverse], expected, rtol=1e-4, atol=1e-5)
    cache = GradientCache(lambda chunk: encoder([encoder.pad(chunk)]), 64)
    torch.testing.assert_close(cache.encode(features).detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_backbone_gets_tokens_and_their_mask_only(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("qwen3"), pool_prompt=False)
    given: list[set[str]] = []
    encoder.backbone.register_forward_pre_hook(lambda module, _, inputs: given.append(set(inputs)), with_kwargs=True)
    encoder.encode(["a"], prompt=PROMPT)
    assert given == [{"input_ids", "attention_mask"}]


def test_nothing_but_a_prompt_that_was_cut_is_finite(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("mistral"), pool_prompt=False, max_length=8)
    assert encoder.encode(["text", ""], prompt="a prompt longer than that").isfinite().all()
    assert pool(torch.ones(1, 2, 3), torch.zeros(1, 2), "mean").eq(0).all()


def test_the_prompt_is_pooled_unless_told_otherwise(tiny_folders) -> None:
    encoder = Encoder.load(tiny_folders("bert"))
    assert encoder.pool_prompt is True
    batch = encoder.pad(encoder.tokenize(["a"], PROMPT))
    assert set(batch) == {"input_ids", "attention_mask"}


# ---- the default prompt ------------------------------------------------------------------------------------------


def test_default_prompt_both_ways(tiny_folders, texts, tmp_path, sentence_transformer) -> None:
    """Used when no prompt is given, not when an empty one is."""
    made = Encoder.load(tiny_folders("bert"))
    made.prompts, made.default_prompt_name = {"topic": "topic: "}, "topic"
    made.save(tmp_path)
    encoder, theirs = Encoder.load(tmp_path), sentence_transformer(str(tmp_path))
    assert (encoder.default_prompt_name, theirs.default_prompt_name) == ("topic", "topic")
    ours = encoder.encode(texts[:9])
    torch.testing.assert_close(torch.from_numpy(theirs.encode(texts[:9])), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, encoder.encode(texts[:9], prompt="topic: "))
    assert (ours - encoder.encode(texts[:9], prompt="")).abs().max() > 1e-3


def test_a_default_prompt_that_is_gone(tiny_folders, tmp_path, refused, sentence_transformer) -> None:
    """Not written, as sentence-transformers would not load the folder; refused when read."""
    encoder = Encoder.load(tiny_folders("bert"))
    encoder.default_prompt_name = "topic"
    encoder.save(tmp_path)
    sentence_transformer(str(tmp_path))
    assert Encoder.load(tmp_path).default_prompt_name is None
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": ""}, "default_prompt_name": "topic"}))
    refused(lambda: read_modules(tmp_path), path.name, "'topic' is none of the prompts")


# ---- lowercasing -------------------------------------------------------------------------------------------------


def test_lowercasing_both_ways(tiny_folders, tmp_path, sentence_transformer) -> None:
    words = ["RAIN and Bread", "Élan РЕКА", "quiet"]
    Encoder.load(tiny_folders("bert")).save(tmp_path / "cased")
    path = tmp_path / "cased/sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": 40, "do_lower_case": True}))
    encoder = Encoder.load(tmp_path / "cased")
    ours = encoder.encode(words)
    torch.testing.assert_close(ours, encoder.encode([word.lower() for word in words]))
    assert (ours - Encoder.load(tiny_folders("bert")).encode(words)).abs().max() > 1e-3
    encoder.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/sentence_bert_config.json").read_text())["do_lower_case"] is True
    for folder in ("cased", "again"):
        theirs = sentence_transformer(str(tmp_path / folder))
        torch.testing.assert_close(torch.from_numpy(theirs.encode(words)), ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(Encoder.load(tmp_path / folder).encode(words), ours, rtol=0, atol=0)
