"""Fixtures of the task-vector tests: model folders made of a configuration and a few tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 8, "hidden_act": "gelu", "vocab_size": 11,
}  # fmt: skip
SHAPES = {
    "embeddings.word_embeddings.weight": (11, 6),
    "embeddings.LayerNorm.weight": (6,),
    "encoder.layer.0.attention.output.dense.weight": (6, 6),
    "encoder.layer.0.attention.output.dense.bias": (6,),
    "encoder.layer.1.attention.output.dense.weight": (6, 6),
    "encoder.layer.1.attention.output.dense.bias": (6,),
    "pooler.dense.weight": (6, 6),
}


@pytest.fixture
def tensors() -> Callable[..., dict[str, Tensor]]:
    """Seeded float32 tensors of a two-layer model."""

    def make(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}

    return make


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors and a configuration (with changes) as a model folder."""

    def write(name: str, content: dict[str, Tensor], **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
        return folder

    return write
