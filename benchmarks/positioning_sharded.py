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
from measuring import LiveBytes, ResidentGrowth, hide_this_folder, write_figures
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # vocabulary, width, layers: BERT's
    "tiny": (4096, 256, 4),
    "base": (30522, 768, 12),
    "large": (30522, 1024, 24),
}


class Wire:
    """Counts the bytes of collectives by kind, where torch.distributed is called; by ours, and by FSDP2."""

    KINDS = {  # function: kind, place and name of the tensor that counts
        "all_gather_into_tensor": ("gathered", 0, "output_tensor"),
        "all_gather_single": ("gathered", 0, "output"),
        "reduce_scatter_tensor": ("scattered", 1, "input"),
        "reduce_scatter_single": ("scattered", 1, "input"),
        "all_reduce": ("reduced", 0, "tensor"),
    }

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> Wire:
        self._originals = {name: getattr(dist, name) for name in self.KINDS if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(name, original))
        return self

    def _counting(self, name: str, original: Any) -> Any:
        kind, place, keyword = self.KINDS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            self.bytes[kind] += (args[place] if len(args) > place else kwargs[keyword]).nbytes
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
    config = BertConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, dtype="bfloat16",
                        num_attention_heads=width // 64, intermediate_size=4 * width)  # fmt: skip
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


def bytes_held(backbone: nn.Module) -> int:
    """Bytes of weights and task vectors, sharded or whole."""
    total = sum(parameter.nbytes for parameter in backbone.parameters())
    for layer in backbone.modules():
        total += layer.sharded.nbytes if hasattr(layer, "sharded") else 0  # type: ignore[union-attr]
        vectors = getattr(layer, "task_vectors", None)
        total += sum(packed.nbytes for packed in vectors.values()) if isinstance(vectors, dict) else 0
    return total


def naive_step(folder: Path, store: Any, batch: Any, group: Any) -> tuple[nn.Module, Any]:
    """The same encoder with E + 1 weights in every linear layer, sharded by fully_shard, and one step of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from scalemerge.encoder import Encoder
    from scalemerge.encoder.loading import load_backbone
    from scalemerge.objectives.batches import batch_losses

    c = torch.full((len(store.experts),), 0.25, requires_grad=True)
    backbone = load_backbone(str(folder), folder, dtype=torch.bfloat16)
    mesh = init_device_mesh(group.device.type, (group.world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for name, module in list(backbone.named_modules()):
        if type(module) is nn.Linear and name.startswith("encoder"):
            parent, _, own = name.rpartition(".")
            merged = NaiveMergedLinear(module, store.held(f"{name}.weight"), lambda: c)
            setattr(
                backbone.get_submodule(parent),
                own,
                fully_shard(merged, mesh=mesh, mp_policy=policy, reshard_after_forward=True),
            )
    encoder = Encoder(backbone, _PadOnly(), pooling="mean").to(group.device)

    def step() -> None:
        def encode(features: Any) -> Tensor:
            return encoder([encoder.pad(features)]).float()

        batch_losses([batch], encode, rank=group.rank)[0].backward()
        group.sum(c.grad)
        c.grad = None

    return backbone, step


def sharded_step(folder: Path, store: Any, batch: Any, group: Any, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from scalemerge.encoder import Encoder
    from scalemerge.encoder.loading import empty_backbone
    from scalemerge.positioning import build
    from scalemerge.positioning.objective import ProbeObjective
    from scalemerge.recipe import Positioning

    settings = Positioning(position="linear", precision="bf16", task_vectors="bfloat16", recompute=options.recompute)
    encoder = Encoder(empty_backbone(str(folder), folder), _PadOnly(), pooling="mean")
    built = build(encoder, store, settings, group, sharded=True)
    objective = ProbeObjective(built, {}, {}, {}, settings, 0)
    return built, objective, lambda: objective.differentiate([[batch]], {"t": 1.0})


def one_rank(options: argparse.Namespace) -> None:
    """What each launched process runs; rank 0 writes the figures."""
    from scalemerge.distributed.group import Group
    from scalemerge.objectives.batches import TextBatch
    from scalemerge.task_vectors import TaskVectorStore

    torch.set_num_threads(1)
    group = Group.launched()
    folder = Path(options.folder)
    experts = {f"e{number}": folder / f"e{number}" for number in range(options.own_experts)}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPES[options.shape][0], (2, options.rows, options.length), generator=generator).tolist()
    roles = {name: [{"input_ids": text} for text in of_role] for name, of_role in zip(("query", "positive"), ids)}
    batch = TextBatch("t", "infonce", {}, roles, {}).share(group.rank, group.world)
    found: dict[str, float] = {}
    store = TaskVectorStore(folder / "base", experts, "bfloat16")
    if options.way == "naive":
        model, step = naive_step(folder / "base", store, batch, group)
        step()
        linear = [module for module in model.modules() if isinstance(module, NaiveMergedLinear)]
        found["linear_numbers"] = sum(module.base.numel() for module in linear)
    else:
        with ResidentGrowth() as loading:
            built, _, step = sharded_step(folder / "base", store, batch, group, options)
        with LiveBytes() as watch:
            step()  # the buffers are made
            step()
        found["loading_resident_bytes"] = loading.bytes
        found["model_bytes"] = bytes_held(built.encoder.backbone)
        found["peak_bytes"] = found["model_bytes"] + watch.peak
        weights = [layer.sharded for layer in built.encoder.backbone.modules() if hasattr(layer, "sharded")]
        linear = [
            layer.sharded for layer in built.encoder.backbone.modules() if type(layer).__name__ == "ShardedLinear"
        ]
        found["linear_numbers"] = sum(weight.rows * weight.columns for weight in linear)
        found["largest_layer"] = max(weight.rows * weight.columns for weight in linear)
        found["own_bytes"] = sum(weight.nbytes for weight in weights)
        found["whole_bytes"] = sum(weight.nbytes / len(weight.base) * weight.rows for weight in weights)
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
        found["activation_bytes"] = sum(saved.values())
    with Wire() as wire:
        step()
    seconds = []
    for _ in range(options.steps):
        group.wait()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    found |= {
        "seconds": statistics.median(seconds),
        "gathered_bytes": wire.bytes["gathered"],
        "scattered_bytes": wire.bytes["scattered"],
        "reduced_bytes": wire.bytes["reduced"],
    }
    everyone = group.gather(found)
    if group.first:
        for name in ("peak_bytes", "loading_resident_bytes"):
            if name in found:
                found[name] = max(other[name] for other in everyone)
        Path(options.figures).write_text(json.dumps(found))
    group.close()


def launch(options: argparse.Namespace, folder: Path, world: int, experts: int, way: str) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    figures = folder / "figures.json"
    figures.unlink(missing_ok=True)
    given = {"folder": folder, "figures": figures, "way": way, "own-experts": experts, "shape": options.shape,
             "rows": options.rows, "length": options.length, "steps": options.steps,
             "recompute": options.recompute}  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    chosen = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    command = [*launcher, "--master-port", str(port), __file__, "--rank", *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    if ended.returncode:
        first = ended.stderr.find("Traceback")
        raise SystemExit(f"{way}, {world} ranks, {experts} experts: {ended.stderr[first : first + 4000]}")
    return dict(json.loads(figures.read_text()))


def table(figures: list[dict[str, Any]]) -> str:
    """Markdown: what was moved against the formula, and memory against the formula."""
    lines = [
        "| way | ranks | experts | s a step | gathered MB | / 2P bf16 | reduce-scattered MB | / P fp32 "
        "| peak MB a rank | formula MB | peak / formula |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in figures:
        p = row["linear_numbers"]
        memory = " | | |"
        if "peak_bytes" in row:
            memory = (f" {row['peak_bytes'] / 1e6:,.0f} | {row['formula_bytes'] / 1e6:,.0f} "
                      f"| {row['peak_bytes'] / row['formula_bytes']:.3f} |")  # fmt: skip
        lines.append(
            f"| {row['way']} | {row['ranks']} | {row['experts']} | {row['seconds']:.2f} "
            f"| {row['gathered_bytes'] / 1e6:,.1f} | {row['gathered_bytes'] / (4 * p):.3f} "
            f"| {row['scattered_bytes'] / 1e6:,.1f} | {row['scattered_bytes'] / (4 * p):.3f} |{memory}"
        )
    return "\n".join(lines)


def main() -> None:
    hide_this_folder()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", default="positioning_sharded")
    parser.add_argument("--shape", choices=list(SHAPES), default="base")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ways", nargs="+", choices=["sharded", "naive"], default=["sharded", "naive"])
    parser.add_argument("--rows", type=int, default=8, help="pairs of the whole batch")
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", choices=["none", "all"], default="none")
    for hidden in ("--rank", "--folder", "--figures", "--way", "--own-experts"):
        kind: dict[str, Any] = {"action": "store_true"} if hidden == "--rank" else {}
        parser.add_argument(hidden, help=argparse.SUPPRESS, **kind)
    options = parser.parse_args()
    if options.rank:
        options.own_experts = int(options.own_experts)
        one_rank(options)
        return
    if options.out is None:
        parser.error("--out is needed")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_folders(folder, options.shape, max(options.experts))
        for ranks in options.ranks:
            for experts in options.experts:
                for way in options.ways:
                    row = {
                        "way": way,
                        "ranks": ranks,
                        "experts": experts,
                        **launch(options, folder, ranks, experts, way),
                    }
                    if way == "sharded":
                        row["formula_bytes"] = (
                            row["whole_bytes"] / ranks + 2 * 2 * row["largest_layer"] + row["activation_bytes"]
                        )
                    found.append(row)
                    print(table(found[-1:]).splitlines()[-1], flush=True)
    common = {"benchmark": options.name, "shape": options.shape, "rows": options.rows, "length": options.length,
              "torch": torch.__version__, "date": datetime.date.today().isoformat()}  # fmt: skip
    named = ("way", "ranks", "experts")
    figures = [
        {**common, **{name: row[name] for name in named}, "metric": metric, "value": value,
         "unit": "s" if metric == "seconds" else "1" if metric in ("linear_numbers", "largest_layer") else "B"}
        for row in found for metric, value in row.items() if metric not in named
    ]  # fmt: skip
    write_figures(options.out, options.name, figures, {key: str(value) for key, value in vars(options).items()})
    (options.out / f"{options.name}.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
