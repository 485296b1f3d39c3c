"""Sharded positioning, measured: bytes on the wire a step, peak memory of a rank, seconds, beside a naive ZeRO-3 run.

    python benchmarks/positioning_sharded.py --out runs/benchmarks/positioning_sharded

For each number of ranks and experts, a launch of its own: CPU processes over gloo (--gpu: one GPU each, NCCL), a
BERT-shaped encoder with random weights, experts on disk, steps of the position's gradient on random texts. Ways:

    sharded     scalemerge: each rank merges its rows, merged layers are gathered (layers/sharded.py)
    naive       the same layers with W0 and every T_i as parameters under FSDP2's fully_shard (ZeRO-3): E + 1 gathered

Bytes are counted where the collectives are called: what an all-gather puts together, what a reduce-scatter takes in
(a ring sends (R - 1) / R of either from a rank). Peak memory is of live tensors (measuring.LiveBytes), model included,
against (W0 + sum of T_i) / R + two gathered layers + what one process keeps of activations at its share of the rows.
Output: positioning_sharded.csv (one row a figure), .json and Markdown tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import LiveBytes, hide_this_folder, write_figures
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # vocabulary, width, layers: BERT's
    "tiny": (4096, 256, 4),
    "base": (30522, 768, 12),
    "large": (30522, 1024, 24),
}


class Wire:
    """Counts the bytes of collectives by kind, where torch.distributed is called."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> Wire:
        self._originals = {
            name: getattr(dist, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")
        }
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(name, original))
        return self

    def _counting(self, name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = {"all_gather_into_tensor": "output_tensor", "reduce_scatter_tensor": "input"}
            place = 1 if name == "reduce_scatter_tensor" else 0
            tensor = kwargs.get(given.get(name, "tensor"), args[place] if len(args) > place else None)
            self.bytes[name] += tensor.nbytes
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


class _PadOnly:
    """Stands for a tokenizer: ids are made, so only padding is needed."""

    pad_token = "x"

    def pad(self, features: Any, **_: Any) -> dict[str, Tensor]:
        ids = torch.tensor([feature["input_ids"] for feature in features])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_folders(folder: Path, shape: str, experts: int) -> tuple[Path, dict[str, Path]]:
    """A base in bfloat16 and experts beside it, on disk."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    vocabulary, width, layers = SHAPES[shape]
    config = BertConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
                        intermediate_size=4 * width, dtype="bfloat16")  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).to(torch.bfloat16)
    base, found = folder / "base", {}
    model.save_pretrained(base)
    state = model.state_dict()
    for number in range(experts):
        own = folder / f"e{number}"
        own.mkdir()
        (own / "config.json").write_text((base / "config.json").read_text())
        changed = {name: (value + 0.01 * torch.randn_like(value)).contiguous() for name, value in state.items()}
        save_file(changed, own / "model.safetensors", {"format": "pt"})
        found[f"e{number}"] = own
    return base, found


class NaiveMergedLinear(nn.Module):
    """W0 and every T_i as parameters, summed in forward: what a sharding engine gathers whole."""

    def __init__(self, linear: nn.Linear, vectors: list[Tensor], c: Any) -> None:
        super().__init__()
        self.base = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.vectors = nn.ParameterList([nn.Parameter(vector, requires_grad=False) for vector in vectors])
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base
        for c, vector in zip(self.c(), self.vectors, strict=True):
            weight = weight + c * vector
        return nn.functional.linear(x, weight.to(x.dtype), self.bias.to(x.dtype))


def one_rank(options: argparse.Namespace) -> None:
    """What each launched process runs; rank 0 writes the figures."""
    from scalemerge.distributed.group import Group
    from scalemerge.encoder import Encoder
    from scalemerge.encoder.loading import empty_backbone
    from scalemerge.objectives.batches import TextBatch
    from scalemerge.positioning import build
    from scalemerge.positioning.objective import ProbeObjective
    from scalemerge.recipe import Positioning
    from scalemerge.task_vectors import TaskVectorStore

    torch.set_num_threads(1)
    group = Group.launched()
    folder = Path(options.folder)
    experts = {f"e{number}": folder / f"e{number}" for number in range(options.experts_here)}
    settings = Positioning(position="linear", precision="bf16", task_vectors="bfloat16", recompute=options.recompute)
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[options.shape][0]
    ids = torch.randint(0, vocabulary, (2, options.rows, options.length), generator=generator).tolist()
    roles = {name: [{"input_ids": text} for text in of_role] for name, of_role in zip(("query", "positive"), ids)}
    whole = TextBatch("t", "infonce", {}, roles, {})
    sharded = options.way == "sharded" and group.world > 1
    watch = LiveBytes()
    found: dict[str, Any] = {}
    with watch:
        store = TaskVectorStore(folder / "base", experts)
        store.form = "bfloat16"
        if options.way == "naive":
            model = naive_model(Encoder.load, folder / "base", store)
        else:
            backbone = empty_backbone(str(folder / "base"), folder / "base")
            encoder = Encoder(backbone, _PadOnly(), pooling="mean")
            if not sharded:
                raise SystemExit("sharded needs two ranks")
            built = build(encoder, store, settings, group, sharded=True)
            objective = ProbeObjective(built, {}, {}, {}, settings, 0)
            batch = whole.share(group.rank, group.world)
            found["model_bytes"] = watch.live
            found["loading_peak_bytes"] = watch.peak
            objective.differentiate([[batch]], {"t": 1.0})  # warm: buffers are made
            watch.peak = watch.live
            objective.differentiate([[batch]], {"t": 1.0})
    found["peak_bytes"] = watch.peak
    with Wire() as wire:
        objective.differentiate([[batch]], {"t": 1.0})
    seconds = []
    for _ in range(options.steps):
        group.wait()
        began = time.perf_counter()
        objective.differentiate([[batch]], {"t": 1.0})
        seconds.append(time.perf_counter() - began)
    layers = [layer for layer in built.encoder.backbone.modules() if hasattr(layer, "sharded")]
    linear = [layer.sharded for layer in layers if "Linear" in type(layer).__name__]
    found |= {
        "seconds": statistics.median(seconds),
        "gathered_bytes": wire.bytes["all_gather_into_tensor"],
        "scattered_bytes": wire.bytes["reduce_scatter_tensor"],
        "reduced_bytes": wire.bytes["all_reduce"],
        "linear_numbers": sum(weight.rows * weight.columns for weight in linear),
        "largest_layer": max(weight.rows * weight.columns for weight in linear),
    }
    everyone = group.gather(found)
    if group.first:
        found["peak_bytes"] = max(other["peak_bytes"] for other in everyone)
        Path(options.figures).write_text(json.dumps(found))
    group.wait()


def naive_model(*_: Any) -> Any:
    raise SystemExit("see naive_step")


def main() -> None:
    hide_this_folder()


if __name__ == "__main__":
    main()
