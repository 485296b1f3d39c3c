"""A contrastive training step under every engine: tokens/s, peak memory of a rank, bytes on the wire.

    python benchmarks/training_engines.py --out runs/benchmarks/training_engines

Each row is a launch of its own (`accelerate launch`; CPU processes over gloo with the *_cpu.yaml twins, or --gpu and
the configurations without _cpu): engine x ranks x pairs in the global batch x chunk size; whole optimizer steps of a
randomly initialized Qwen3- or BERT-shaped encoder on random token ids of mixed lengths. Peak memory is a rank's highest
resident memory (GPU: allocated). Bytes on the wire are what a ring would send from one rank in a step, by the
collectives that torch's profiler saw: 2(W-1)/W of an all-reduce, (W-1)/W of what an all-gather or a reduce-scatter puts
together. CPU processes share two cores here: compare engines at one number of ranks, not numbers of ranks.
Output: training_engines.csv (one row a figure), .json and a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import hide_this_folder, write_figures

ROOT = Path(__file__).resolve().parents[1]
WIRE = {"all_reduce": 2.0, "allreduce": 2.0, "all_gather": 1.0, "allgather": 1.0, "reduce_scatter": 1.0,
        "broadcast": 1.0, "reduce": 1.0}  # fmt: skip


class _PadOnly:
    """Stands for a tokenizer: ids are made, so only padding is needed."""

    pad_token = "x"

    def pad(self, features: Any, **_: Any) -> dict[str, torch.Tensor]:
        length = max(len(feature["input_ids"]) for feature in features)
        ids = torch.zeros(len(features), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, feature in enumerate(features):
            ids[row, : len(feature["input_ids"])] = torch.tensor(feature["input_ids"])
            mask[row, : len(feature["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask}


def backbone(shape: str, scale: float) -> torch.nn.Module:
    from transformers import AutoModel, BertConfig, Qwen3Config

    width, layers = int(256 * scale), int(4 * scale)
    if shape == "bert":
        config: Any = BertConfig(vocab_size=8192, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                                 intermediate_size=4 * width)  # fmt: skip
    else:
        config = Qwen3Config(vocab_size=8192, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
                             num_key_value_heads=2, head_dim=width // 4, intermediate_size=3 * width)  # fmt: skip
    config.use_cache = False
    torch.manual_seed(0)
    return AutoModel.from_config(config)


def texts(count: int, seed: int) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    lengths = [min(128, max(4, int(generator.lognormvariate(3.4, 0.7)))) for _ in range(count)]
    return [{"input_ids": [generator.randrange(8192) for _ in range(length)]} for length in lengths]


def one_rank(options: argparse.Namespace) -> None:
    """What each launched process runs; rank 0 writes the figures."""
    from scalemerge.encoder import Encoder, freeze_unused
    from scalemerge.objectives.batches import TextBatch, batch_losses
    from scalemerge.objectives.gradient_cache import GradientCache
    from scalemerge.recipe import Training
    from scalemerge.training.engine import Engine, make_accelerator

    precision = "bf16" if options.gpu else "fp32"
    accelerator = make_accelerator(Training(batch_size=options.pairs, precision=precision))
    model = backbone(options.shape, options.scale)
    freeze_unused(model)
    encoder = Encoder(model, _PadOnly(), pooling="last" if options.shape == "qwen3" else "mean")
    engine = Engine(accelerator, encoder, torch.optim.AdamW(encoder.parameters(), lr=1e-4), 1.0)
    whole = TextBatch("t", "infonce", {}, {"query": texts(options.pairs, 1), "positive": texts(options.pairs, 2)}, {})
    batch = whole.share(engine.rank, engine.world) if engine.world > 1 else whole

    def embed(features: Any) -> torch.Tensor:
        return engine.model([encoder.pad(features)])

    def step() -> None:
        if options.chunk:
            cache = GradientCache(embed, options.chunk, engine.world)
            (batch_losses([batch], cache.encode, rank=engine.rank)[0] * engine.world).backward()
            cache.backward(engine.backward)
        else:

            def encode(features: Any) -> torch.Tensor:
                groups, inverse = encoder.groups(features, 4)
                return engine.model(groups)[inverse]

            engine.backward(lambda: batch_losses([batch], encode, rank=engine.rank)[0] * engine.world, True)
        engine.step()

    step()
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    wire = bytes_on_the_wire(profile, engine.world)
    seconds = []
    for _ in range(options.steps):
        engine.wait()
        began = time.perf_counter()
        step()
        if options.gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = (
        torch.cuda.max_memory_allocated() if options.gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    if engine.rank == 0:
        tokens = sum(len(text["input_ids"]) for role in whole.roles.values() for text in role)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in encoder.parameters())
        found = {"engine": engine.name, "parameters": parameters,
                 "seconds": statistics.median(seconds), "tokens_per_second": tokens / statistics.median(seconds),
                 "peak_bytes_rank_0": peak, "wire_bytes_step": wire}  # fmt: skip
        options.figures.write_text(json.dumps(found))
    engine.wait()


def bytes_on_the_wire(profile: Any, world: int) -> float:
    """Bytes one rank sends in a step: sizes of the collectives' inputs by the profiler, as a ring sends them."""
    total = 0.0
    for event in profile.events():
        kind, _, name = event.name.partition(":")
        if kind not in ("gloo", "nccl") or name not in WIRE:
            continue
        elements = 0
        for shape in event.input_shapes or []:
            count = 1
            for size in shape:
                count *= size
            elements = max(elements, count)
        total += WIRE[name] * elements * 4 * (world - 1 if "gather" in name else (world - 1) / world)
    return total


def launch(config: str, world: int, pairs: int, chunk: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        figures = Path(folder) / "figures.json"
        name = config if options.gpu else f"{config}_cpu"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                   str(ROOT / "accelerate_configs" / f"{name}.yaml"), "--num_processes", str(world),
                   "--main_process_port", str(port), __file__, "--rank", "--figures", str(figures),
                   "--pairs", str(pairs),
                   "--chunk", str(chunk), "--shape", options.shape, "--scale", str(options.scale),
                   "--steps", str(options.steps), *(["--gpu"] if options.gpu else [])]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if not options.gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        if ended.returncode:
            raise SystemExit(f"{config} x {world}: {ended.stderr[-3000:]}")
        return json.loads(figures.read_text())


def main() -> None:
    hide_this_folder()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engines", nargs="+", default=["ddp", "zero1", "zero2", "zero3"])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="pairs in the global batch")
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 1024], help="tokens; 0: no gradient cache")
    parser.add_argument("--shape", choices=["bert", "qwen3"], default="qwen3")
    parser.add_argument("--scale", type=float, default=2.0, help="times 256 wide and 4 layers")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        one_rank(options)
        return
    if options.out is None:
        parser.error("--out is needed")
    figures: list[dict[str, Any]] = []
    lines = ["| engine | ranks | pairs | chunk tokens | tokens/s | peak MiB, rank 0 | MiB on the wire a step |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    units = {"tokens_per_second": "tokens/s", "seconds": "s", "peak_bytes_rank_0": "B", "wire_bytes_step": "B"}
    for world, pairs, chunk, engine in product(options.worlds, options.batches, options.chunks, options.engines):
        found = launch(engine, world, pairs, chunk, options)
        common = {"benchmark": "training_engines", "shape": options.shape, "parameters": found["parameters"],
                  "engine": found["engine"], "world": world, "pairs": pairs, "chunk_tokens": chunk,
                  "torch": torch.__version__, "date": datetime.date.today().isoformat()}  # fmt: skip
        figures += [
            {**common, "metric": metric, "value": found[metric], "unit": unit} for metric, unit in units.items()
        ]
        lines.append(
            f"| {found['engine']} | {world} | {pairs} | {chunk or 'none'} | {found['tokens_per_second']:,.0f} "
            f"| {found['peak_bytes_rank_0'] / 2**20:,.0f} | {found['wire_bytes_step'] / 2**20:,.1f} |"
        )
        print(lines[-1], flush=True)
        write_figures(options.out, "training_engines", figures, {k: str(v) for k, v in vars(options).items()})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
