"""Fixtures of the layer tests: seeded numbers, the explicit merge W(c) that autograd differentiates, tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from scalemerge.layers import Coefficients


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


@pytest.fixture
def explicit() -> Callable[..., Any]:
    """The module called with W(c) = W0 + sum c_i T_i made outside, by autograd alone: the oracle."""

    def call(
        module: nn.Module, vectors: dict[str, list[Tensor]], coefficients: Coefficients, *args: Any, **kwargs: Any
    ) -> Any:
        parameters = dict(module.named_parameters())
        merged = {
            name: parameters[name].detach() + sum(c * vector for c, vector in zip(coefficients.of(name), list_))
            for name, list_ in vectors.items()
        }
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


BACKBONES = {
    "bert": _bert,
    "xlm_roberta": _xlm_roberta,
    "modernbert": _modernbert,
    "qwen3": _qwen3,
    "mistral": _mistral,
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
