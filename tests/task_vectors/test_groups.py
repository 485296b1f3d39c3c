"""Groups of tensors at each granularity, for the names that the backbones' families use."""

from __future__ import annotations

import pytest

from scalemerge.task_vectors import group_names, group_of


@pytest.mark.parametrize(
    "name, layer, module",
    [
        ("encoder.layer.11.output.dense.weight", "layer.11", "encoder.layer.11.output.dense"),
        ("layers.3.self_attn.q_proj.weight", "layer.3", "layers.3.self_attn.q_proj"),
        ("h.0.attn.c_attn.bias", "layer.0", "h.0.attn.c_attn"),
        ("transformer.blocks.7.ffn.weight", "layer.7", "transformer.blocks.7.ffn"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "layer.2", "encoder.block.2.layer.0.SelfAttention.q"),
        ("embeddings.word_embeddings.weight", "embeddings", "embeddings.word_embeddings"),
        ("embed_tokens.weight", "embeddings", "embed_tokens"),
        ("norm.weight", "other", "norm"),
        ("final_norm.weight", "other", "final_norm"),
    ],
)
def test_group_of(name: str, layer: str, module: str) -> None:
    assert group_of(name, "global") == "global"
    assert group_of(name, "layer") == layer
    assert group_of(name, "module") == module


def test_groups_keep_the_order_of_first_appearance() -> None:
    names = ["norm.weight", "layers.1.a.weight", "layers.1.a.bias", "layers.0.a.weight", "layers.10.a.weight"]
    groups = group_names(names, "layer")
    assert list(groups) == ["other", "layer.1", "layer.0", "layer.10"]
    assert groups["layer.1"] == ["layers.1.a.weight", "layers.1.a.bias"]
    assert sorted(name for members in groups.values() for name in members) == sorted(names)


def test_unknown_granularity() -> None:
    with pytest.raises(ValueError, match="granularity 'tensor'"):
        group_of("a.b", "tensor")
