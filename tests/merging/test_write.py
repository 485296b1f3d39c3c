"""Merged folders: the right numbers, loadable everywhere, written in little memory, whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scalemerge.checkpoints.reader import Checkpoint
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.merging import combine_learned, find_method, write_merged
from scalemerge.merging.write import Storage
from scalemerge.task_vectors import GRANULARITIES, TaskVectorStore, group_names

C = [0.5, -0.25, 0.3]


def learned(store, granularity, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    groups = group_names(store.names, granularity)
    c = {group: torch.randn(len(store.experts), generator=generator).tolist() for group in groups}
    return {"granularity": granularity, "experts": store.experts, "c": c}


def write(store, folder, combine=None, **options):
    described = {
        "title": "t",
        "base": "the/base",
        "method": "self_positioning",
        "experts": dict.fromkeys(store.experts, "x"),
    }
    chosen = combine or combine_learned({"granularity": "global", "c": {"global": C[: len(store.experts)]}})
    return write_merged(store, folder, chosen, description={**described, "c": C}, key="k", **options)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_learned_weights_equal_the_dense_formula(family, tmp_path, read, explicit_merge, granularity) -> None:
    base, experts = family
    store = TaskVectorStore(base, experts)
    found = learned(store, granularity)
    groups = group_names(store.names, granularity)
    c_of = {name: found["c"][group] for group, members in groups.items() for name in members}
    assert write(store, tmp_path / "out", combine_learned(found)) == 1.0
    written, expected = read(tmp_path / "out"), explicit_merge(base, experts, c_of.__getitem__)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == torch.float32
        torch.testing.assert_close(written[name].double(), tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "method, parameters, c", [("average", {}, [1 / 3] * 3), ("task_arithmetic", {"lambda": 0.7}, [0.7] * 3)]
)
def test_static_methods_equal_the_dense_formula(family, tmp_path, read, explicit_merge, method, parameters, c) -> None:
    base, experts = family
    chosen = find_method(method, "x")
    write(TaskVectorStore(base, experts), tmp_path / "out", lambda name, w, t: chosen(w, t, parameters))
    for name, tensor in explicit_merge(base, experts, lambda name: c).items():
        torch.testing.assert_close(read(tmp_path / "out")[name].double(), tensor, rtol=1e-6, atol=1e-6)


def assert_loads_everywhere(folder, base, weights, texts) -> None:
    """AutoModel without missing or unexpected keys; SentenceTransformer and Encoder embed as the explicit merge."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    _, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reference = Encoder.load(base)
    reference.backbone.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    expected = reference.encode(texts)
    assert (expected - Encoder.load(base).encode(texts)).abs().max() > 1e-3  # the merge moved the model
    torch.testing.assert_close(Encoder.load(folder).encode(texts), expected, rtol=0, atol=1e-5)
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


def test_a_tiny_folder_loads_everywhere(family, tmp_path, explicit_merge, texts) -> None:
    base, experts = family
    write(TaskVectorStore(base, experts), tmp_path / "out")
    assert_loads_everywhere(tmp_path / "out", base, explicit_merge(base, experts, lambda name: C), texts)


def test_minilm_loads_everywhere(minilm, nudged, tmp_path, explicit_merge, texts) -> None:
    experts = {name: nudged(minilm, tmp_path / name, seed, 0.05) for seed, name in enumerate("ab")}
    write(TaskVectorStore(minilm, experts), tmp_path / "out")
    assert_loads_everywhere(tmp_path / "out", minilm, explicit_merge(minilm, experts, lambda name: C[:2]), texts)


def test_bfloat16_storage_is_stated_and_keeps_large_deltas(family, tmp_path, read, capsys) -> None:
    base, experts = family
    share = write(TaskVectorStore(base, experts), tmp_path / "out", dtype="bfloat16")
    assert share > 0.99 and "warning" not in capsys.readouterr().err
    assert {tensor.dtype for tensor in read(tmp_path / "out").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    from transformers import AutoModel

    assert AutoModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_tiny_deltas_that_bfloat16_swallows_are_reported(family, nudged, tmp_path, capsys) -> None:
    """The base on the bfloat16 grid and deltas of 0.2 % at c = 0.1: most of each delta is rounded away."""
    from safetensors.torch import load_file, save_file

    plain, _ = family
    base = nudged(plain, tmp_path / "base", 0, 0.0)
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    store = TaskVectorStore(base, {"a": nudged(base, tmp_path / "a", 1, 0.002)})
    combine = combine_learned({"granularity": "global", "c": {"global": [0.1]}})
    assert write(store, tmp_path / "exact", combine) == 1.0
    assert "warning" not in capsys.readouterr().err
    share = write(store, tmp_path / "out", combine, dtype="bfloat16")
    assert 0.0 < share < 0.5
    assert f"only {100 * share:.1f} % of the merged delta survives bfloat16" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "scalemerge.json").read_text())["delta_survival"] == share
    delta, kept = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for name in store.names:
        merged = load_file(tmp_path / "exact" / "model.safetensors")[name]
        delta = torch.cat([delta, (merged.double() - weights[name].double()).flatten()])
        kept = torch.cat([kept, (merged.bfloat16().double() - weights[name].double()).flatten()])
    assert share == pytest.approx(float(kept @ delta / (delta @ delta)), rel=1e-6)


def test_model_card(family, tmp_path) -> None:
    base, experts = family
    write(TaskVectorStore(base, experts), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["base_model_relation"] == "merge" and metadata["library_name"] == "sentence-transformers"
    for words in ("`the/base`", "**self_positioning**", "| a |", "| b |", "| c |", json.dumps(C), "delta survival"):
        assert words in body


def test_carries_tokenizer_and_pooling_but_no_stale_weights_or_records(family, tmp_path, nudged) -> None:
    base, experts = family
    first = nudged(next(iter(experts.values())), tmp_path / "first", 9, 0.01)
    for name in ("pytorch_model.bin", "training.jsonl", "scalemerge.json", "README.md"):
        (first / name).write_text("{}")
    write(TaskVectorStore(base, {"first": first}), tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"config.json", "modules.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "training.jsonl"}
    assert json.loads((tmp_path / "out" / "scalemerge.json").read_text())["key"] == "k"
    assert (tmp_path / "out" / "README.md").read_text() != "{}"


MEASURED = """
import sys
from pathlib import Path
from scalemerge.merging import combine_learned
from scalemerge.merging.write import Storage, write_merged
from scalemerge.task_vectors import TaskVectorStore
root, experts, memory = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def grown():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def merge(base, expert, count, out):
    store = TaskVectorStore(root / base, {f"e{number}": root / expert for number in range(count)})
    combine = combine_learned({"granularity": "global", "c": {"global": [1 / count] * count}})
    write_merged(store, root / out, combine, description={}, key="k", storage=Storage(memory=memory))

merge("small", "small", 1, "first")  # everything is imported and warm
before = grown()
merge("base", "expert", experts, "out")
print(grown() - before)
"""


@pytest.mark.parametrize(("experts", "mib"), [(3, 16), (3, 32), (100, 32)])
def test_resident_memory_is_that_given_whatever_the_tensor(tmp_path, experts, mib) -> None:
    """One tensor of 64 MiB a model in blocks, reading and writing threads and file pages included, in a process."""
    for name, rows in (("small", 16), ("base", 2**18), ("expert", 2**18)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
        tensor = torch.full((rows, 64), 2.0 if name == "expert" else 1.0)
        save_file({"layer.0.weight": tensor}, tmp_path / name / "model.safetensors")
    shown = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), str(experts), str(mib * 2**20)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(shown.stdout) < (1.25 * mib + 8) * 2**20  # what the allocator keeps, and the threads' stacks
    merged = load_file(tmp_path / "out" / "model.safetensors")["layer.0.weight"]
    torch.testing.assert_close(merged, torch.full((2**18, 64), 2.0))


def test_blocks_and_shards_change_nothing(family, tmp_path, read) -> None:
    """Any memory, any shard size: the same bits, in an index that transformers reads."""
    from transformers import AutoModel

    base, experts = family
    store = TaskVectorStore(base, experts)
    write(store, tmp_path / "whole")
    for name, storage in (("blocks", Storage(memory=2**12)), ("shards", Storage(2**13, shard_bytes=30_000))):
        write(store, tmp_path / name, storage=storage)
        found = Checkpoint(tmp_path / name)
        assert sorted(found.names) == sorted(read(tmp_path / "whole"))
        for tensor, value in read(tmp_path / "whole").items():
            assert torch.equal(found.read(tensor), value), tensor
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and files == {path.name for path in (tmp_path / "shards").glob("*.safetensors")}
    loaded = AutoModel.from_pretrained(tmp_path / "shards").state_dict()
    for name, value in AutoModel.from_pretrained(tmp_path / "whole").state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    ("text", "size"), [("512MB", 512 * 10**6), ("2 GiB", 2 * 2**30), ("1.5g", 1_500_000_000), ("750000", 750_000)]
)
def test_sizes(text, size) -> None:
    assert Storage.parse(text, "5GB") == Storage(size, 5 * 10**9)


@pytest.mark.parametrize("text", ["", "much", "-1GB", "12", "0GB", "1XB", "nan"])
def test_bad_sizes(text) -> None:
    with pytest.raises(InputError, match=r"--memory .*: give a size of 64KB or more"):
        Storage.parse(text, "5GB")


def test_an_exception_leaves_no_folder_and_an_old_one_alone(family, tmp_path) -> None:
    store = TaskVectorStore(*family)
    done = []

    def combine(name, base, task_vectors):
        done.append(name)
        if len(done) == 5:
            raise RuntimeError("stop")
        return base + task_vectors[0]

    with pytest.raises(RuntimeError):
        write(store, tmp_path / "out", combine)
    assert not list(tmp_path.iterdir())
    write(store, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    done.clear()
    with pytest.raises(RuntimeError):
        write(store, tmp_path / "out", combine)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


KILLED = """
import os, signal, sys
from pathlib import Path
from scalemerge.merging import write_merged
from scalemerge.task_vectors import TaskVectorStore

base, expert, out = sys.argv[1:]
done = []

def combine(name, w, t):
    done.append(name)
    if len(done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return w + t[0]

write_merged(TaskVectorStore(base, {"a": expert}), Path(out), combine, description={}, key="k")
"""


def test_kill_9_leaves_no_final_folder_and_the_next_try_succeeds(family, tmp_path, read) -> None:
    base, experts = family
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(base), str(experts["a"]), str(out)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    write(TaskVectorStore(base, {"a": experts["a"]}), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(read(out)) == len(read(base))
