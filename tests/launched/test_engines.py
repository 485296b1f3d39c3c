"""Engines end to end, as users start them: the same expert as one process trains, by the engine that was asked for;
and configurations that Accelerate would silently replace by another engine are refused before a model is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalemerge.encoder import Encoder

CONFIGS = Path(__file__).resolve().parents[2] / "accelerate_configs"
CHANGES: dict[str, Any] = {"training.batch_size": 15, "training.learning_rate": 1e-4}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "engine", ["zero3", *(pytest.param(name, marks=slow) for name in ("ddp", "zero1", "zero2", "zero3_offload"))]
)
def test_every_engine_trains_the_expert_of_one_process(
    engine: str,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    finish: Callable[..., Path],
    records: Any,
    same_weights: Callable[..., None],
) -> None:
    one = finish(tiny_recipe(**CHANGES), tmp_path / "one", None)
    # DS_ACCELERATOR is not set: scalemerge itself must say that there is no GPU
    cached = tiny_recipe(**CHANGES, **{"training.chunk_tokens": 50, "training.engine": engine})
    two = finish(cached, tmp_path / "two", engine, environment={"DS_ACCELERATOR": None})
    assert json.loads((two / "scalemerge.json").read_text())["engine"] == engine
    norms = [[record["gradient_norm"] for record in records(folder)] for folder in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4), "Adam hides a gradient W times too small; its norm does not"
    same_weights(one, two, 1e-5)


@slow
@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", "float32"), ("modernbert", "bfloat16")])
def test_other_architectures_under_zero3_load_in_sentence_transformers(
    kind: str,
    dtype: str,
    tiny_recipe: Callable[..., Path],
    tiny_folders: Callable[[str], Path],
    tmp_path: Path,
    finish: Callable[..., Path],
    texts: list[str],
    same_weights: Callable[..., None],
) -> None:
    from sentence_transformers import SentenceTransformer

    base = {"base.path": str(tiny_folders(kind)), "base.pooling": "last" if kind == "qwen3" else "mean"}
    recipe = tiny_recipe(**CHANGES, **base, **{"training.chunk_tokens": 50, "training.save_dtype": dtype})
    expert = finish(recipe, tmp_path / "two", "zero3")
    assert {str(value.dtype) for value in load_file(expert / "model.safetensors").values()} == {f"torch.{dtype}"}
    ours = Encoder.load(expert).encode(texts)
    options = {"dtype": torch.float32}
    theirs = SentenceTransformer(str(expert), device="cpu", model_kwargs=options).encode(texts, convert_to_tensor=True)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
    untrained = Encoder.load(tiny_folders(kind), pooling=base["base.pooling"], max_length=32).encode(texts)
    assert float((ours - untrained).abs().max()) > 1e-3, "it has learned something"
    one = finish(recipe, tmp_path / "one", None)
    same_weights(one, expert, 1e-5 if dtype == "float32" else 2e-3)  # bfloat16 rounds to 1/256


REFUSED: dict[str, tuple[str, dict[str, str], dict[str, str], str]] = {  # file, lines of it, variables, message
    "cpu": (
        "zero2_cpu.yaml",
        {},
        {"ACCELERATE_USE_CPU": "true"},
        "asks for DeepSpeed but ddp runs; set use_cpu: false",
    ),
    "fsdp2": ("fsdp2.yaml", {"num_processes: 8": "num_processes: 2"}, {}, "asks for FSDP but"),
    "engine": ("zero2_cpu.yaml", {}, {}, "zero3 was asked for but zero2 runs"),
    "alone": ("ddp_cpu.yaml", {"num_processes: 2": "num_processes: 1"}, {}, "zero3 was asked for but plain runs"),
}


@pytest.mark.parametrize("case", ["cpu", *(pytest.param(name, marks=slow) for name in REFUSED if name != "cpu")])
def test_a_silent_fallback_is_refused_before_a_model_is_loaded(
    case: str, tiny_recipe: Callable[..., Path], tmp_path: Path, start: Callable[..., Any]
) -> None:
    file, changes, variables, message = REFUSED[case]
    recipe = tiny_recipe(**({"training.engine": "zero3"} if "zero3" in message else {}))
    run = start(recipe, tmp_path / "out", changed_config(file, changes, tmp_path), environment=variables)
    run.wait()
    assert run.errors and all(message in error for error in run.errors), run.output[-3000:]
    assert re.search(r"exitcode +: 2", run.output) or run.process.returncode == 2, run.output[-3000:]
    assert not list((tmp_path / "out").rglob("*.work"))


def changed_config(file: str, changes: dict[str, str], folder: Path) -> Path:
    lines = (CONFIGS / file).read_text().splitlines()
    for old, new in changes.items():
        assert old in lines
        lines[lines.index(old)] = new
    (folder / file).write_text("\n".join(lines) + "\n")
    return folder / file


@slow
def test_use_cpu_in_the_file_never_trains_by_another_engine(
    tiny_recipe: Callable[..., Path], tmp_path: Path, start: Callable[..., Any]
) -> None:
    """The launcher of Accelerate 1.15 leaves it out where the file asks for DeepSpeed; others may hand it on."""
    config = changed_config("zero2_cpu.yaml", {"use_cpu: false": "use_cpu: true"}, tmp_path)
    run = start(tiny_recipe(), tmp_path / "out", config)
    if run.wait() == 0:
        record = json.loads((tmp_path / "out" / "experts" / "search" / "scalemerge.json").read_text())
        assert record["engine"] == "zero2"
    else:
        assert run.errors and all("set use_cpu: false" in error for error in run.errors), run.output[-3000:]


LOAD = """
import json, sys, threading, time
from pathlib import Path
from scalemerge.recipe import Base, Training
from scalemerge.training.engine import make_accelerator
from scalemerge.training.loop import load_encoder
accelerator = make_accelerator(Training())
load_encoder(Base(path=sys.argv[3], max_length=32))  # what libraries need once is not counted
def own():  # memory of this process alone: pages of the mapped file belong to the system, which may drop them
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
before, seen, done = own(), [], threading.Event()
def sample():
    while not done.wait(0.002):
        seen.append(own())
sampler = threading.Thread(target=sample)
sampler.start()
encoder = load_encoder(Base(path=sys.argv[1], max_length=32))
done.set(); sampler.join()
found = {"peak": max(seen) - before, "after": own() - before,
         "whole": sum(getattr(p, "ds_numel", p.numel()) for p in encoder.parameters()) * 4}
Path(sys.argv[2], f"{accelerator.process_index}.json").write_text(json.dumps(found))
accelerator.wait_for_everyone()
"""


@slow
def test_zero3_loads_shards(
    tmp_path: Path, tiny_model: Callable[..., Path], tiny_folders: Callable[[str], Path], environment: dict[str, str]
) -> None:
    """A base of 60 million parameters of 2 million each at most: no rank holds it whole, at any time."""
    base = tiny_model(tmp_path / "base", "bert", vocab_size=5000, hidden_size=768, intermediate_size=3072,
                      num_hidden_layers=8, num_attention_heads=12)  # fmt: skip
    (tmp_path / "load.py").write_text(LOAD)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "zero3_cpu.yaml")]
    launcher += ["--main_process_port", "0", str(tmp_path / "load.py")]
    variables = {**environment, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    arguments = [*launcher, str(base), str(tmp_path), str(tiny_folders("bert"))]
    done = subprocess.run(arguments, capture_output=True, text=True, env=variables, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        print(f"rank {rank}:", {key: f"{value / 1e6:.0f} MB" for key, value in found.items()})
        assert 0.4 < found["after"] / found["whole"] < 0.65 and found["peak"] / found["whole"] < 0.85
