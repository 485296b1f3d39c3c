"""The sizes of a backbone, from its config.json alone: no weights, and no torch, whose import takes seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalemerge.errors import InputError

_QWEN3: dict[str, Any] = {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}
#: configurations of models that only the hub has: Qwen3 (Qwen team 2025, arXiv 2505.09388). The embedding models of the
#: same names have a few hundred words fewer
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16},
    "Qwen3-4B": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32},
    "Qwen3-8B": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32},
}  # fmt: skip
_DECODERS = ("qwen3", "mistral", "llama")
_ENCODERS = ("bert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Backbone:
    """linear: (rows, columns) of every linear weight in one layer; rest: numbers of biases, norms and small tables."""

    kind: str
    width: int
    layers: int
    linear: tuple[tuple[int, int], ...]
    vocabulary: int
    rest: int
    intermediate: int
    query_width: int
    key_width: int

    @property
    def linear_numbers(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linear)

    @property
    def embedding_numbers(self) -> int:
        return self.vocabulary * self.width

    @property
    def numbers(self) -> int:
        return self.linear_numbers + self.embedding_numbers + self.rest

    @property
    def layer_numbers(self) -> int:
        return sum(rows * columns for rows, columns in self.linear)

    @property
    def largest_linear(self) -> int:
        return max(rows * columns for rows, columns in self.linear)


def read_config(base: str, config: Path | None) -> dict[str, Any]:
    """The configuration that --config names, of the base's folder, or of a known hub model. Raises InputError."""
    path = config or Path(base)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a configuration ({error}); give a model's config.json") from None
        if isinstance(found, dict):
            return found
        raise InputError(f"{path}: not a configuration; give a model's config.json")
    if config is None and base.startswith("package:"):
        from scalemerge.encoder.folders import package_folder

        return read_config(str(package_folder(base)), None)
    name = base.rsplit("/", 1)[-1].replace("Embedding-", "").removesuffix("-Base")
    if config is None and name in KNOWN:
        return KNOWN[name]
    raise InputError(f"{path}: no configuration there, and '{base}' is not one of {', '.join(KNOWN)}; give --config")


def backbone(config: dict[str, Any]) -> Backbone:
    """The sizes behind a configuration. Raises InputError for other architectures and missing fields."""
    kind = config.get("model_type")
    if kind not in (*_DECODERS, *_ENCODERS):
        raise InputError(f"config.json: model_type {kind!r} is not one of {', '.join((*_DECODERS, *_ENCODERS))}")
    try:
        width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner, vocabulary = int(config["intermediate_size"]), int(config["vocab_size"])
        heads = int(config["num_attention_heads"])
        if kind in _ENCODERS:
            linear: tuple[tuple[int, int], ...] = ((width, width),) * 4 + ((inner, width), (width, inner))
            tables = int(config["max_position_embeddings"]) + int(config.get("type_vocab_size", 2))
            biases = layers * (5 * width + inner)
            norms = (2 * layers + 1) * 2 * width
            rest = tables * width + biases + norms
            return Backbone(kind, width, layers, linear, vocabulary, rest, inner, width, width)
        head = int(config.get("head_dim") or width // heads)
        groups = int(config.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config.json: field {error} is missing or no number; give a complete config.json") from None
    query, key = heads * head, groups * head
    linear = (
        (query, width),
        (key, width),
        (key, width),
        (width, query),
        (inner, width),
        (inner, width),
        (width, inner),
    )
    norms = (2 * layers + 1) * width + (2 * head * layers if kind == "qwen3" else 0)
    return Backbone(kind, width, layers, linear, vocabulary, norms, inner, query, key)
