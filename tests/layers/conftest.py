"""Fixtures of the layer tests: seeded numbers, the explicit merge W(c) that autograd differentiates, tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from scalemerge.layers import Coefficients, LowRank, MergedLayer, Quantized, quantize


def make_numbers(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


@pytest.fixture
def numbers() -> Callable[..., Tensor]:
    return make_numbers


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """|found - expected| / |expected|, of whole tensors."""

    def error(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        found, expected = found.detach().double(), expected.detach().double()
        return float((found - expected).norm() / expected.norm().clamp(min=1e-300))

    return error


@pytest.fixture
def task_vectors_of() -> Callable[..., dict[str, list[Tensor]]]:
    """E task vectors for every named parameter of a module: a tenth of the weights' size, in the weights' dtype."""

    def make(
        module: nn.Module, experts: int, seed: int = 100, names: Iterable[str] | None = None, scale: float = 0.05
    ) -> dict[str, list[Tensor]]:
        wanted = set(names) if names is not None else None
        return {
            name: [
                make_numbers(*parameter.shape, seed=seed + 31 * number + i, scale=scale, dtype=parameter.dtype)
                for i in range(experts)
            ]
            for number, (name, parameter) in enumerate(module.named_parameters())
            if wanted is None or name in wanted
        }

    return make


def densify(vector: Tensor | Quantized | LowRank, dtype: torch.dtype = torch.float64) -> Tensor:
    """A task vector as plain numbers, from the definition of its format and not by the code under test."""
    if isinstance(vector, Tensor):
        return vector.to(dtype)
    if isinstance(vector, LowRank):
        return vector.b.to(dtype) @ vector.a.to(dtype)
    values = vector.values
    if vector.bits == 4:
        values = torch.stack([values.int() % 16 - 8, values.int() // 16 - 8], dim=2).flatten(1)
    columns = torch.arange(vector.shape[1])
    return values[:, columns].to(dtype) * vector.scales.to(dtype)[:, columns // vector.group_size]


@pytest.fixture
def dense() -> Callable[..., Tensor]:
    return densify


@pytest.fixture
def mixed() -> Callable[..., list[Any]]:
    """One task vector of each format for a matrix: dense, int8, low-rank, int4, low-rank again (of another rank)."""

    def make(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Any]:
        def draw(*shape: int, salt: int) -> Tensor:
            return make_numbers(*shape, seed=seed + salt, scale=0.3, dtype=dtype)

        return [
            draw(rows, columns, salt=1),
            quantize(draw(rows, columns, salt=2), bits=8, group_size=32),
            LowRank(draw(2, columns, salt=3), draw(rows, 2, salt=4)),
            quantize(draw(rows, columns, salt=5), bits=4, group_size=32),
            LowRank(draw(1, columns, salt=6), draw(rows, 1, salt=7)),
        ]

    return make


@pytest.fixture
def newly_saved() -> Callable[[MergedLayer, Callable[[], Any]], tuple[list[int], Any]]:
    """Bytes of each storage that autograd keeps for backward, without W0, T_i and c, and what the call returned."""

    def record(layer: MergedLayer, call: Callable[[], Any]) -> tuple[list[int], Any]:
        held = [layer.coefficients.value, *layer.coefficients.by_row.values(), *layer.parameters()]
        for packed in layer.task_vectors.values():
            held += [*packed.values, *packed.scales, *(t for t in (packed.a, packed.b) if t is not None)]
        known = {tensor.untyped_storage().data_ptr() for tensor in held}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = call()
        assert result.requires_grad
        return sorted(size for size in kept.values() if size), result

    return record


@pytest.fixture
def explicit() -> Callable[..., Any]:
    """The module called with W(c) = W0 + sum c_i T_i made outside, by autograd alone: the oracle."""

    def call(
        module: nn.Module, vectors: dict[str, list[Tensor]], coefficients: Coefficients, *args: Any, **kwargs: Any
    ) -> Any:
        parameters = dict(module.named_parameters())
        merged = {}
        for name, list_ in vectors.items():
            weight, own = parameters[name].detach(), coefficients.of(name)
            own = own.unsqueeze(2) if own.dim() == 2 else own
            merged[name] = weight + sum(c * densify(vector, weight.dtype) for c, vector in zip(own, list_))
        return functional_call(module, merged, args, kwargs)

    return call


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes), add_pooling_layer=False)


def _xlm_roberta() -> nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = XLMRobertaConfig(vocab_size=40, max_position_embeddings=18, pad_token_id=1, **sizes)
    return XLMRobertaModel(config, add_pooling_layer=False)


def _modernbert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertModel(ModernBertConfig(vocab_size=40, max_position_embeddings=32, **tokens, **sizes))


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3Model(Qwen3Config(vocab_size=40, max_position_embeddings=32, use_cache=False, **heads, **sizes))


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MistralModel(MistralConfig(vocab_size=40, max_position_embeddings=32, use_cache=False, **heads, **sizes))


def _gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8, "sliding_window": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Gemma2Model(Gemma2Config(vocab_size=40, max_position_embeddings=32, use_cache=False, **heads, **sizes))


def _gemma3() -> nn.Module:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8, "sliding_window": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(vocab_size=40, max_position_embeddings=32, use_cache=False, **heads, **sizes)
    return Gemma3TextModel(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=40, relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", **sizes)
    return T5EncoderModel(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32}
    return GPT2Model(GPT2Config(vocab_size=40, use_cache=False, bos_token_id=1, eos_token_id=2, **sizes))


BACKBONES = {
    "bert": _bert,
    "xlm_roberta": _xlm_roberta,
    "modernbert": _modernbert,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "t5": _t5,
    "gpt2": _gpt2,
}


@pytest.fixture
def make_backbone() -> Callable[..., nn.Module]:
    """A tiny transformers backbone with seeded random weights, evaluation mode, float64."""

    def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        model = BACKBONES[name]().to(dtype).eval()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):  # norms and biases away from 1 and 0
                parameter.add_(make_numbers(*parameter.shape, seed=number, scale=0.05, dtype=dtype))
        return model

    return make


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """A padded batch: ids [3, 7] and their mask."""
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}
