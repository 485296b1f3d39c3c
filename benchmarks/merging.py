"""Merging on disk: seconds, bytes/s and peak memory beside mergekit, on the same files in one run.

    pip install mergekit==0.1.5; python benchmarks/merging.py --out runs/benchmarks/merging

Generates a base and experts (Qwen3-shaped, random weights, sharded safetensors; --gigabytes each), then merges them by
the average and by task arithmetic, each in a process of its own, alternating with mergekit's (linear and
task_arithmetic, --lazy-unpickle is its own matter: safetensors are read lazily by both) and repeated. Cold: the files'
pages are dropped from the page cache before (posix_fadvise); warm: they were just read. Peak: a process's highest
resident memory less that after its imports; of it, pages of mapped files are counted as well. Outputs are compared.
Output: merging.csv (one row a repetition), .json, and a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import hide_this_folder, write_figures

PEAK = """
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
"""

OURS = (
    PEAK
    + """
import json, sys, time
from pathlib import Path
from scalemerge.merging.folders import merge_folders
from scalemerge.merging.write import Storage
import scalemerge.encoder, transformers
method, root, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
experts = {path.name: path for path in sorted(root.glob("expert-*"))}
before = peak()
began = time.perf_counter()
parameters = {"lambda": 0.3} if method == "task_arithmetic" else {}
merge_folders(str(root / "base"), experts, out, method, parameters, storage=Storage(shard_bytes=10**9))
seconds = time.perf_counter() - began
print(json.dumps([seconds, peak() - before]))
"""
)

MERGEKIT = (
    PEAK
    + """
import json, sys, time
import yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
method, root, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
experts = sorted(root.glob("expert-*"))
weight = 0.3 if method == "task_arithmetic" else 1.0
text = {"merge_method": "linear" if method == "average" else method, "dtype": "float32",
        "models": [{"model": str(path), "parameters": {"weight": weight}} for path in experts]}
if method != "average":
    text["base_model"] = str(root / "base")
before = peak()
began = time.perf_counter()
options = MergeOptions(copy_tokenizer=False, out_shard_size=10**9, quiet=True, lazy_unpickle=False)
run_merge(MergeConfiguration.model_validate(text), str(out), options)
seconds = time.perf_counter() - began
print(json.dumps([seconds, peak() - before]))
"""
)


def generate(root: Path, experts: int, gigabytes: float) -> int:
    """A base and experts of about so many gigabytes each, float32; the bytes of one."""
    from transformers import AutoModel, Qwen3Config

    from scalemerge.checkpoints.atomic import new_folder

    layers = max(1, round((gigabytes * 1e9 / 4 - 151_936 * 1024) / 15_730_000))
    config = Qwen3Config(vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers,
                         num_attention_heads=16, num_key_value_heads=8, head_dim=128)  # fmt: skip
    made = {"base": 0, **{f"expert-{number}": number for number in range(1, experts + 1)}}
    if all((root / name).is_dir() for name in made):
        return sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for name in made:
        if name != "base":
            for parameter in model.parameters():
                parameter.data.add_(torch.randn(parameter.shape), alpha=1e-3)
        with new_folder(root / name) as folder:
            model.save_pretrained(folder, max_shard_size="1GB")
    return sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))


def drop(root: Path) -> None:
    """Take the files out of the page cache."""
    os.sync()
    for path in root.glob("*/*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(root: Path) -> None:
    for path in root.glob("*/*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.read(2**24):
                pass


def run(script: str, method: str, root: Path, out: Path) -> tuple[float, int]:
    shutil.rmtree(out, ignore_errors=True)
    ended = subprocess.run(
        [sys.executable, "-c", script, method, str(root), str(out)], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"{method}: {ended.stderr[-3000:]}")
    seconds, peak = json.loads(ended.stdout.splitlines()[-1])
    return seconds, peak


def worst(first: Path, second: Path) -> float:
    """The greatest relative difference of two folders' tensors, by tensor, of the tensor's greatest entry."""
    from scalemerge.checkpoints.reader import Checkpoint

    one, other = Checkpoint(first), Checkpoint(second)
    found = 0.0
    for name, spec in one.specs.items():
        step = max(1, 2**24 // max(1, spec.numel // spec.shape[0]))
        for start in range(0, spec.shape[0], step):
            a, b = one.read_rows(name, start, start + step), other.read_rows(name, start, start + step)
            found = max(found, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--files", type=Path, help="folder for the generated models; default OUT/models")
    parser.add_argument("--gigabytes", type=float, default=2.4)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["average", "task_arithmetic"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    root = options.files or options.out / "models"
    size = generate(root, options.experts, options.gigabytes)
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        for cache in ("cold", "warm"):
            for repeat in range(options.repeats):
                for tool, script in (("scalemerge", OURS), ("mergekit", MERGEKIT)):
                    (drop if cache == "cold" else warm)(root)
                    began = time.time()
                    seconds, peak = run(script, method, root, options.out / f"merged-{tool}")
                    rows.append({"method": method, "cache": cache, "repeat": repeat, "tool": tool, "seconds": seconds,
                                 "peak_bytes": peak, "process_seconds": time.time() - began})  # fmt: skip
                    print(rows[-1], flush=True)
        difference = worst(options.out / "merged-scalemerge", options.out / "merged-mergekit")
        print(f"{method}: the outputs differ by at most {difference:.2e} of a tensor's greatest entry")
        for row in rows:
            if row["method"] == method:
                row["difference"] = difference
    details = {"date": str(datetime.date.today()), "model_bytes": size, "experts": options.experts}
    write_figures(options.out, "merging", rows, details)
    for method in options.methods:
        for cache in ("cold", "warm"):
            middle = {}
            for tool in ("scalemerge", "mergekit"):
                of = [row for row in rows if (row["method"], row["cache"], row["tool"]) == (method, cache, tool)]
                middle[tool] = (statistics.median(row["seconds"] for row in of), max(row["peak_bytes"] for row in of))
            ours, theirs = middle["scalemerge"], middle["mergekit"]
            print(
                f"{method}, {cache}: {ours[0]:.1f} s and {ours[1] / 2**20:.0f} MiB; mergekit {theirs[0]:.1f} s and "
                f"{theirs[1] / 2**20:.0f} MiB; ratio of seconds {ours[0] / theirs[0]:.2f}"
            )


if __name__ == "__main__":
    hide_this_folder()
    main()
