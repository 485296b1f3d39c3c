"""Fixtures of the encoder's tests: SentenceTransformer, an expected refusal, and more tiny decoders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalemerge.errors import InputError

DECODER_CONFIGS = {
    "llama": "LlamaConfig",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
}


@pytest.fixture(scope="session")
def sentence_transformer() -> Callable:
    """SentenceTransformer on the CPU, or a skip."""
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return lambda *args, **options: library.SentenceTransformer(*args, device="cpu", **options)


@pytest.fixture(scope="session")
def refused() -> Callable:
    """`refused(load, *parts)`: an InputError of one line that has all the parts."""

    def check(load: Callable[[], object], *parts: str) -> None:
        with pytest.raises(InputError) as caught:
            load()
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message

    return check


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, tiny_folders) -> Callable[..., Path]:
    """`backbones(kind)`: as tiny_folders, and Llama and three Gemmas, with a window of 4 where there is one."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in DECODER_CONFIGS:
            return tiny_folders(kind)
        if kind not in made:
            made[kind] = write_decoder(tmp_path_factory.mktemp(kind), kind, tiny_folders("mistral"))
        return made[kind]

    return folder


def write_decoder(folder: Path, kind: str, tokenizer: Path, **changes: Any) -> Path:
    import torch
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if kind in ("gemma2", "gemma3"):
        settings |= {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    config = getattr(transformers, DECODER_CONFIGS[kind])(**(settings | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = transformers.AutoModel.from_config(config)
        for parameter in backbone.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    backbone.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
