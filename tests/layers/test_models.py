"""What attached models must stand: attention by SDPA, formats mixed, weights tied or sharded, settings shared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from scalemerge.layers import (
    Coefficients,
    MergedConv1D,
    MergedEmbedding,
    MergedLayer,
    MergedLinear,
    MergedRMSNorm,
    MergeSettings,
    attach,
    detach,
    quantize,
)

C = [0.3, -0.2]


def uniform(vectors):
    return Coefficients.uniform(vectors, torch.tensor(C, dtype=torch.float64, requires_grad=True))


def results(model, tokens, coefficients):
    y = model(**tokens).last_hidden_state * tokens["attention_mask"].unsqueeze(2)
    return y, torch.autograd.grad(y.sin().sum(), coefficients.value)[0]


@pytest.mark.parametrize("backbone", ["bert", "xlm_roberta", "modernbert", "qwen3", "mistral", "gemma3", "t5", "gpt2"])
def test_sdpa_equals_eager(make_backbone, tokens, task_vectors_of, relative_error, backbone) -> None:
    found = {}
    for attention in ("eager", "sdpa"):
        model = make_backbone(backbone)
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        vectors = task_vectors_of(model, 2)
        coefficients = uniform(vectors)
        attach(model, vectors, coefficients)
        found[attention] = results(model, tokens, coefficients)
    assert relative_error(found["sdpa"][0], found["eager"][0]) < 1e-6  # eager attention takes its softmax in float32
    assert relative_error(found["sdpa"][1], found["eager"][1]) < 1e-5


@pytest.mark.parametrize("backbone", ["bert", "qwen3", "gpt2", "t5"])
def test_quantized_and_low_rank_vectors_of_matrices(
    make_backbone, tokens, task_vectors_of, explicit, relative_error, mixed, backbone
) -> None:
    model = make_backbone(backbone)
    plain = copy.deepcopy(model)
    small = task_vectors_of(model, 5)
    vectors = {
        name: mixed(*parameter.shape, seed=i) if parameter.dim() == 2 else small[name]
        for i, (name, parameter) in enumerate(model.named_parameters())
    }
    c = torch.tensor([0.05, -0.02, 0.04, 0.03, -0.01], dtype=torch.float64, requires_grad=True)
    coefficients = Coefficients.uniform(vectors, c)
    mask = tokens["attention_mask"].unsqueeze(2)
    expected_y = explicit(plain, vectors, coefficients, **tokens).last_hidden_state * mask
    (expected,) = torch.autograd.grad(expected_y.sin().sum(), coefficients.value)
    attach(model, vectors, coefficients)
    y, dc = results(model, tokens, coefficients)
    assert relative_error(y, expected_y) < 1e-10 and relative_error(dc, expected) < 1e-10


def test_kinds_of_layers(make_backbone, task_vectors_of) -> None:
    """T5's embeddings (tied, and the one of relative positions), GPT-2's Conv1D and Gemma's norms have their layers."""
    t5 = make_backbone("t5")
    vectors = task_vectors_of(t5, 2)
    attach(t5, vectors, uniform(vectors))
    assert isinstance(t5.shared, MergedEmbedding) and t5.encoder.embed_tokens.weight is t5.shared.weight
    attention = t5.encoder.block[0].layer[0].SelfAttention
    assert isinstance(attention.relative_attention_bias, MergedEmbedding) and isinstance(attention.q, MergedLinear)
    gpt2 = make_backbone("gpt2")
    vectors = task_vectors_of(gpt2, 2)
    attach(gpt2, vectors, uniform(vectors))
    assert isinstance(gpt2.h[0].attn.c_attn, MergedConv1D)
    gemma = make_backbone("gemma3")
    vectors = task_vectors_of(gemma, 2)
    attach(gemma, vectors, uniform(vectors))
    assert isinstance(gemma.norm, MergedRMSNorm) and isinstance(gemma.embed_tokens, MergedEmbedding)


@pytest.mark.parametrize("vectors_are", ["dense", "int8"])
def test_the_state_has_no_task_vectors(make_backbone, task_vectors_of, vectors_are) -> None:
    model = make_backbone("gpt2")
    bytes_before = sum(value.nbytes for value in model.state_dict().values())
    vectors = task_vectors_of(model, 2)
    if vectors_are == "int8":
        vectors = {n: [quantize(v, 8, 32) if v.dim() == 2 else v for v in list_] for n, list_ in vectors.items()}
    attach(model, vectors, uniform(vectors), MergeSettings(cache=True))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert sum(value.nbytes for value in model.state_dict().values()) == bytes_before
    assert sum(p.numel() for p in model.parameters()) * 8 <= bytes_before
    detach(model)
    assert not any(".original" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "fast"}, "strategy must be one of auto, on_the_fly, chunked, not 'fast'"),
        ({"precision": "exact"}, "precision must be 'merge' or 'split', not 'exact'"),
        ({"chunk_bytes": 0}, "chunk_bytes must be positive, not 0"),
        ({"sample_rows": 0}, r"sample_rows must be 1 \(all rows\) or more, not 0"),
        ({"cache": True, "precision": "split"}, "cache=True keeps W"),
    ],
)
def test_settings_that_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        MergeSettings(**settings)


def test_merging_on_the_fly_needs_a_gpu(numbers) -> None:
    linear = nn.Linear(4, 3)
    vectors = {"weight": [numbers(3, 4, dtype=torch.float32)]}
    coefficients = Coefficients.uniform(["l.weight"], torch.ones(1))
    x = torch.ones(2, 4)
    layer = MergedLinear(linear, vectors, coefficients, "l", MergeSettings(strategy="on_the_fly"))
    with pytest.raises(ValueError, match=r"strategy='on_the_fly' needs a GPU.*use 'auto'"):
        layer(x)
    chunked = MergedLinear(linear, vectors, coefficients, "l", MergeSettings(strategy="chunked"))
    assert torch.equal(chunked(x), MergedLinear(linear, vectors, coefficients, "l")(x))


def refusal(model: nn.Module, name: str) -> str:
    parameters = dict(model.named_parameters())
    vectors = {name: [torch.zeros(parameters[name].shape)]}
    with pytest.raises(TypeError) as caught:
        attach(model, vectors, Coefficients.uniform([name], torch.ones(1)))
    assert not any(isinstance(module, MergedLayer) for module in model.modules())
    return str(caught.value)


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_weights_flattened_by_fsdp_are_refused(mark) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    setattr(model[0].weight, mark, True)
    assert refusal(model, "0.weight") == (
        "0.weight: weights flattened by FSDP cannot be merged here; attach before wrapping the model"
    )


def test_weights_partitioned_by_zero_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = nn.Parameter(torch.empty(0))
    model[0].weight.ds_id = 7
    assert "0.weight: this weight is partitioned by ZeRO-3" in refusal(model, "0.weight")


def test_sharded_weights_are_refused(tmp_path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if dist.is_initialized():
        pytest.skip("another test left a process group")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 3))
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
        assert "0.weight: sharded weights (DTensor) cannot be merged in place here" in refusal(model, "0.weight")
    finally:
        dist.destroy_process_group()
