"""Backbones of every kind: padding on either side, decoders that see later tokens, and the choice of attention."""

from __future__ import annotations

import json

import pytest
import torch

from scalemerge.encoder import Encoder
from scalemerge.encoder.attention import sees_later_tokens

DECODERS = ("qwen3", "mistral", "llama", "gemma", "gemma2", "gemma3")
KINDS = ("bert", "xlm-roberta", "modernbert", *DECODERS)
# Gemma 2 caps its attention's logits, which SDPA cannot
WAYS = [(kind, way) for kind in DECODERS for way in ("sdpa", "eager") if (kind, way) != ("gemma2", "sdpa")]
TEXTS = ["a", "a longer text", "of three", "and one more that is longer than all the others"]


def states(encoder: Encoder, tokens: list[int], padding: int = 0, side: str = "right") -> torch.Tensor:
    """Token states [L, D] of one row, without what `padding` padding tokens on a side add."""
    pad, mask = [encoder.tokenizer.pad_token_id] * padding, [0] * padding
    left, right = (pad, []) if side == "left" else ([], pad)
    row = torch.tensor([left + tokens + right])
    real = [*mask, *[1] * len(tokens)] if side == "left" else [*[1] * len(tokens), *mask]
    with torch.no_grad():
        hidden = encoder.backbone(input_ids=row, attention_mask=torch.tensor([real])).last_hidden_state[0]
    return hidden[padding:] if side == "left" else hidden[: len(tokens)]


# ---- padding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_alone_and_in_a_batch(kind, side, pooling, bidirectional, backbones, tmp_path) -> None:
    """Whatever its neighbours, wherever the tokenizer's folder says that padding goes."""
    encoder = Encoder.load(backbones(kind))
    encoder.tokenizer.padding_side = side
    encoder.save(tmp_path)
    encoder = Encoder.load(tmp_path, pooling=pooling, bidirectional=bidirectional)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), alone, rtol=1e-4, atol=1e-5)


def test_absolute_positions_are_padded_on_the_right(backbones) -> None:
    """Only there: a decoder keeps the side that its folder says."""
    assert Encoder.load(backbones("qwen3")).tokenizer.padding_side == "left"
    assert Encoder.load(backbones("bert")).tokenizer.padding_side == "right"


# ---- both directions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [(0, "right"), (3, "right"), (3, "left")])
@pytest.mark.parametrize("kind, attention", WAYS)
def test_later_tokens_are_seen_only_if_asked(kind, padding, attention, backbones) -> None:
    """And padding never is, with a mask and where transformers leaves the mask out."""
    for bidirectional in (False, True):
        encoder = Encoder.load(backbones(kind), bidirectional=bidirectional, attention=attention)
        assert encoder.bidirectional == bidirectional
        one, other = (states(encoder, [10, 11, 12, last], *padding) for last in (20, 21))
        seen = bool((one[:3] - other[:3]).abs().max() > 1e-3)
        assert seen == bidirectional
        torch.testing.assert_close(one, states(encoder, [10, 11, 12, 20]), rtol=1e-4, atol=1e-4)


def test_a_window_reaches_both_ways(tiny_model, tmp_path) -> None:
    """One layer, a window of 4: the first token sees the fifth, but not the sixth."""
    folder = tiny_model(tmp_path, "mistral", sliding_window=4, num_hidden_layers=1)
    encoder = Encoder.load(folder, bidirectional=True)
    before = states(encoder, [10] * 8)[0]
    assert not torch.allclose(before, states(encoder, [10] * 4 + [11] + [10] * 3)[0], atol=1e-4)
    torch.testing.assert_close(before, states(encoder, [10] * 5 + [11] + [10] * 2)[0])


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "llama", "gemma", "gemma3"])
def test_direction_survives_folders(kind, backbones, tmp_path, texts, sentence_transformer) -> None:
    """Ours and sentence-transformers', in batches with and without padding."""
    encoder = Encoder.load(backbones(kind), bidirectional=True)
    encoder.save(tmp_path)
    ours = encoder.encode(texts[:9])
    assert (ours - Encoder.load(backbones(kind)).encode(texts[:9])).abs().max() > 1e-2
    again = Encoder.load(tmp_path)
    assert again.bidirectional
    torch.testing.assert_close(again.encode(texts[:9]), ours, rtol=0, atol=0)
    theirs = sentence_transformer(str(tmp_path))
    for size in (1, 9):
        found = torch.from_numpy(theirs.encode(texts[:9], batch_size=size))
        torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
def test_an_encoder_is_left_as_it_is(kind, backbones, tmp_path) -> None:
    """Its tokens see later ones anyway; its configuration says nothing of it."""
    encoder = Encoder.load(backbones(kind), bidirectional=True)
    assert sees_later_tokens(encoder.backbone)
    encoder.save(tmp_path)
    assert "is_causal" not in json.loads((tmp_path / "config.json").read_text())


def test_a_decoder_that_ignores_the_switch_is_refused(backbones, monkeypatch, refused) -> None:
    from transformers import Qwen3Model

    whole = Qwen3Model.forward
    monkeypatch.setattr(Qwen3Model, "forward", lambda self, **inputs: whole(self, is_causal=True, **inputs))
    assert not Encoder.load(backbones("qwen3")).bidirectional
    refused(lambda: Encoder.load(backbones("qwen3"), bidirectional=True), "Qwen3Model ignores", "transformers 5.2")


def test_gradient_checkpointing_keeps_the_direction(backbones) -> None:
    encoder = Encoder.load(backbones("qwen3"), bidirectional=True).train()
    features = encoder.tokenize(TEXTS)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            encoder.backbone.gradient_checkpointing_enable()
        encoder.zero_grad()
        encoder([encoder.pad(features)])[:, 0].sum().backward()
        gradients.append(encoder.backbone.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", DECODERS)
def test_no_keys_and_values_are_kept(kind, backbones) -> None:
    """There is no next token: a cache would only take memory."""
    encoder = Encoder.load(backbones(kind))
    assert encoder.backbone(**encoder.pad(encoder.tokenize(["a"]))).past_key_values is None


# ---- which attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_attention_is_chosen(kind, backbones) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        encoder = Encoder.load(backbones(kind), attention=attention)
        assert encoder.backbone.config._attn_implementation == attention
        found.append(encoder.encode(TEXTS))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_attention_that_is_not_there(backbones, refused, monkeypatch) -> None:
    from transformers import utils

    for name in ("is_flash_attn_2_available", "is_kernels_available"):
        monkeypatch.setattr(utils, name, lambda: False)
    load = lambda attention: lambda: Encoder.load(backbones("bert"), attention=attention)  # noqa: E731
    refused(load("flash_attention_2"), "'flash_attention_2' needs a GPU", "pip install flash-attn", "sdpa")
    refused(load("flash"), "'flash' is not one of sdpa, eager")
