"""Writing stores: figures, bytes, resuming, and that nothing partial looks whole; the verb on the command line."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge.encoder import read_modules
from scalemerge.errors import InputError
from scalemerge.task_vectors import TaskVectorStore, compression
from scalemerge.task_vectors.compression import Compression, compress_folders
from scalemerge.task_vectors.stored import DESCRIPTION, WEIGHTS

HOWS = [Compression("int4", 32), Compression("svd", rank=2), Compression("int8", shared_base=True)]
FRESH = ["a", "b", "errors.csv"]


@pytest.fixture
def family(tensors, model_folder):
    base = tensors(0)
    experts = {n: {key: base[key] + 1e-2 * value for key, value in tensors(i + 1).items()} for i, n in enumerate("ab")}
    return model_folder("base", base), {name: model_folder(name, each) for name, each in experts.items()}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def times(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", HOWS,
                         ids=lambda how: how.form)  # fmt: skip
def test_errors_are_those_of_what_is_read_back(family, tmp_path, how) -> None:
    """Every row of errors.csv, computed anew from the two stores."""
    base, experts = family
    written = compress_folders(base, experts, tmp_path / "s", how)
    dense = TaskVectorStore(base, experts)
    store = TaskVectorStore(base, {name: tmp_path / "s" / name for name in experts})
    with open(tmp_path / "s" / "errors.csv") as file:
        rows = list(csv.DictReader(file))
    modules = {name.rpartition(".")[0] for name in dense.names}
    assert len(rows) == 2 * len(modules) == len(written.errors)
    for row in rows:
        members = [name for name in dense.names if name.rpartition(".")[0] == row["module"]]
        i = dense.experts.index(row["expert"])
        t, s, w = (torch.cat([value.flatten().double() for value in each]) for each in (
            [dense.task_vector(i, name) for name in members],
            [store.task_vector(i, name) for name in members],
            [dense.base.read(name) for name in members],
        ))  # fmt: skip
        assert float(row["relative_error"]) == pytest.approx(float((t - s).norm() / t.norm()), rel=1e-4, abs=1e-9)
        assert float(row["cosine"]) == pytest.approx(float(t @ s / t.norm() / s.norm()), rel=1e-5)
        assert float(row["weight_error"]) == pytest.approx(float((t - s).norm() / w.norm()), rel=1e-4, abs=1e-9)
        assert int(row["bfloat16_bytes"]) == 2 * len(t)
    stored = sum(
        tensor.nbytes for file in (tmp_path / "s").rglob("*.safetensors") for tensor in load_file(file).values()
    )
    assert written.nbytes == stored == store.held_bytes
    assert written.bfloat16_bytes == 2 * 2 * sum(dense.base.specs[name].numel for name in dense.names)
    lines = written.lines()
    assert f"{stored / written.bfloat16_bytes:.3f}x" in lines[-1] and len(lines) == 1 + 5 + 2 + 1
    worst = max(written.errors, key=lambda each: each.sums.relative_error)
    assert lines[1].startswith(f"{worst.expert}: {worst.module}")


def test_blocks_of_rows_make_the_same_store(family, tmp_path, monkeypatch) -> None:
    base, experts = family
    for form in ("int4", "int8", "bfloat16"):
        compress_folders(base, experts, tmp_path / form, Compression(form, shared_base=True))
        monkeypatch.setattr(compression, "_BLOCK_BYTES", 50)
        compress_folders(base, experts, tmp_path / f"{form}-blocks", Compression(form, shared_base=True))
        monkeypatch.undo()
        for part in ("a", "b", "shared"):
            whole, blocks = (load_file(tmp_path / name / part / WEIGHTS) for name in (form, f"{form}-blocks"))
            assert whole.keys() == blocks.keys()
            assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_memory_is_one_block_not_one_model(tmp_path, live_bytes) -> None:
    """Eight tensors of 32 MiB in float32: three at most are mapped from files at a time, the rest are 8 MiB blocks."""
    size = 2**23
    for number, name in enumerate(("base", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
        generator = torch.Generator().manual_seed(number)
        tensors = {f"layer.{i}.weight": torch.randn(size // 1024, 1024, generator=generator) for i in range(8)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        del tensors
    with live_bytes() as memory:
        compress_folders(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "s", Compression("int4"))
    assert memory.peak < 4.5 * 4 * size
    assert memory.peak > 8 * 2**20, "the counter counts"


def test_minilm_s_bytes(minilm, tmp_path) -> None:
    """At most 0.28 of bfloat16's, which the issue asks for."""
    expert = tmp_path / "expert"
    shutil.copytree(minilm, expert)
    weights = load_file(expert / "model.safetensors")
    for value in weights.values():
        if value.is_floating_point():
            value += 1e-3 * torch.randn(value.shape)
    save_file(weights, expert / "model.safetensors", metadata={"format": "pt"})
    written = compress_folders(minilm, {"x": expert}, tmp_path / "s", Compression("int4"))
    files = sum(path.stat().st_size for path in (tmp_path / "s" / "x").glob("task_vectors*"))
    assert written.nbytes <= files <= 0.28 * written.bfloat16_bytes


def test_what_no_expert_changed_is_not_stored(family, tmp_path, tensors, model_folder) -> None:
    base, _ = family
    frozen = "embeddings.word_embeddings.weight"
    tuned = {**tensors(5), frozen: tensors(0)[frozen]}
    expert = model_folder("frozen", tuned)
    compress_folders(base, {"x": expert}, tmp_path / "s", Compression("int4"))
    assert not any(name.startswith(frozen) for name in load_file(tmp_path / "s" / "x" / WEIGHTS))
    store = TaskVectorStore(base, {"x": tmp_path / "s" / "x"})
    assert frozen in store.names and not store.task_vector(0, frozen).any()
    del tuned["pooler.dense.weight"]
    compress_folders(base, {"x": model_folder("headless", tuned)}, tmp_path / "t", Compression("int4"))
    assert "pooler.dense.weight" not in TaskVectorStore(base, {"x": tmp_path / "t" / "x"}).names


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_there_is_kept(family, tmp_path, shared) -> None:
    base, experts = family
    how = Compression("int4", shared_base=shared)
    first = compress_folders(base, experts, tmp_path / "s", how)
    before = times(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "b")
    second = compress_folders(base, experts, tmp_path / "s", how)
    after = times(tmp_path / "s")
    kept = [name for name in before if not name.startswith("b/") and name != "errors.csv"]
    assert kept and all(before[name] == after[name] for name in kept) and before.keys() == after.keys()
    assert second == first
    file = tmp_path / "s" / "a" / WEIGHTS
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    compress_folders(base, experts, tmp_path / "s", how)
    assert file.read_bytes() == good, "a spoilt folder is written again"


def test_a_lost_shared_base_is_made_with_all_that_depends_on_it(family, tmp_path) -> None:
    base, experts = family
    how = Compression("int4", shared_base=True)
    compress_folders(base, experts, tmp_path / "s", how)
    before = times(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "shared")
    compress_folders(base, experts, tmp_path / "s", how)
    assert not any(before[name] == time for name, time in times(tmp_path / "s").items())


def test_one_more_expert_joins_a_store(family, tmp_path, tensors, model_folder) -> None:
    base, experts = family
    compress_folders(base, experts, tmp_path / "s", Compression("int4"))
    more = {**experts, "c": model_folder("c", tensors(9))}
    before = times(tmp_path / "s" / "a")
    compress_folders(base, more, tmp_path / "s", Compression("int4"))
    assert times(tmp_path / "s" / "a") == before and "c" in names(tmp_path / "s")
    compress_folders(base, experts, tmp_path / "t", Compression("int4", shared_base=True))
    with pytest.raises(InputError, match="holds task vectors of other experts or settings"):
        compress_folders(base, more, tmp_path / "t", Compression("int4", shared_base=True))
    assert "c" not in names(tmp_path / "t")


@pytest.mark.parametrize(
    "other", [Compression("int8"), Compression("int4", 32), Compression("int4", shared_base=True)], ids=str
)
def test_other_settings_are_refused_before_anything_is_written(family, tmp_path, other) -> None:
    base, experts = family
    compress_folders(base, {"b": experts["b"]}, tmp_path / "s", Compression("int4"))
    before = times(tmp_path / "s")
    with pytest.raises(InputError, match=r"s/b: holds task vectors of other experts or settings; delete it"):
        compress_folders(base, experts, tmp_path / "s", other)
    assert times(tmp_path / "s") == before and names(tmp_path / "s") == ["b", "errors.csv"]


def test_a_folder_of_something_else_is_left_alone(family, tmp_path) -> None:
    """As where --out is the folder that the experts themselves lie in."""
    base, experts = family
    before = times(tmp_path)
    with pytest.raises(InputError, match=r"a: exists and holds no task vectors; move it or give another --out"):
        compress_folders(base, experts, tmp_path, Compression("int4"))
    assert times(tmp_path) == before
    (tmp_path / "s").mkdir()
    compress_folders(base, experts, tmp_path / "elsewhere", Compression("int4"))
    for target in ("nowhere", "elsewhere/a"):
        (tmp_path / "s" / "a").symlink_to(tmp_path / target)
        with pytest.raises(InputError, match="exists and holds no task vectors"):
            compress_folders(base, experts, tmp_path / "s", Compression("int4"))
        (tmp_path / "s" / "a").unlink()


@pytest.mark.parametrize("name", ["../x", "x/y", "..", ".", "x.partial", "errors.csv", "shared"])
def test_names_that_are_no_folders(family, tmp_path, name) -> None:
    base, experts = family
    with pytest.raises(InputError, match=r"--expert .*cannot be the name of a folder"):
        compress_folders(base, {name: experts["a"]}, tmp_path / "s", Compression("int4", shared_base=name == "shared"))
    assert not (tmp_path / "s").exists() and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "settings, words",
    [({"form": "int2"}, "--format int2"), ({"group_size": 48}, "--group-size 48"), ({"rank": 0}, "--rank 0")],
)  # fmt: skip
def test_bad_settings(settings, words) -> None:
    with pytest.raises(InputError, match=words):
        Compression(**settings)


# ---- interrupted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_none_leave_nothing(family, tmp_path, value) -> None:
    base, experts = family
    file = experts["b"] / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.1.attention.output.dense.weight"][2, 1] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"b/model\.safetensors: tensor .* holds NaN or infinity"):
        compress_folders(base, experts, tmp_path / "s", Compression("int4"))
    assert names(tmp_path / "s") == ["a"], "the first expert is whole, of the second nothing is there"


def test_a_number_too_large_for_the_format(family, tmp_path) -> None:
    base, experts = family
    file = experts["a"] / "model.safetensors"
    weights = load_file(file)
    weights["embeddings.word_embeddings.weight"][0, 0] = torch.finfo(torch.float32).max
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"embeddings\.word_embeddings\.weight' is too large for bfloat16"):
        compress_folders(base, experts, tmp_path / "s", Compression("bfloat16"))
    assert names(tmp_path / "s") == []


@pytest.mark.parametrize("error, words", [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "not writable")])
@pytest.mark.parametrize("when", [1, 2, 3, 4, 5])
def test_a_disk_that_refuses(family, tmp_path, monkeypatch, error, words, when) -> None:
    """At the weights or the description of the first or the second expert, or at errors.csv."""
    base, experts = family
    calls = []
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == when:
            raise OSError(error, os.strerror(error))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=words) as caught:
        compress_folders(base, experts, tmp_path / "s", Compression("int4"))
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "s") == [[], [], ["a"], ["a"], ["a", "b"]][when - 1]
    monkeypatch.undo()
    compress_folders(base, experts, tmp_path / "s", Compression("int4"))
    assert names(tmp_path / "s") == FRESH


@pytest.mark.parametrize("moment", ["weights", "description"])
def test_killed_half_way(family, tmp_path, moment) -> None:
    """kill -9 while the second expert is written: no folder of its name; the next run keeps the first and goes on."""
    base, experts = family
    folders = {name: str(path) for name, path in experts.items()}
    code = f"""
        import os, signal
        from scalemerge.task_vectors import compression
        plain, own, seen = compression._Writer._compressed, compression.file_digest, []
        def compressed(self, name):
            seen.append(name)
            if {moment!r} == "weights" and len(seen) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, name)
        def digest(path):
            if {moment!r} == "description" and len(seen) > 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(path)
        compression.file_digest, compression._Writer._compressed = digest, compressed
        compression.compress_folders({str(base)!r}, {folders!r}, compression.Path({str(tmp_path / "s")!r}),
                                     compression.Compression("int4"))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert names(tmp_path / "s") == ["a", "b.partial"]
    assert not (tmp_path / "s" / "b.partial" / DESCRIPTION).exists(), "even the partial folder does not look whole"
    before = times(tmp_path / "s" / "a")
    with pytest.raises(InputError):
        TaskVectorStore(base, {"b": tmp_path / "s" / "b.partial"})
    compress_folders(base, experts, tmp_path / "s", Compression("int4"))
    assert names(tmp_path / "s") == FRESH and times(tmp_path / "s" / "a") == before
    compress_folders(base, experts, tmp_path / "fresh", Compression("int4"))
    for part in "ab":
        for file in (DESCRIPTION, WEIGHTS):
            assert (tmp_path / "s" / part / file).read_bytes() == (tmp_path / "fresh" / part / file).read_bytes()


# ---- the command line, and what is made from a store -----------------------------------------------------------------


def test_the_verb_and_a_merge_from_its_store(tiny_model, tmp_path, command) -> None:
    """Flags alone: the merged folder is a whole model with the expert's pooling, equal to the sum of what is stored."""
    from scalemerge.encoder import Encoder

    plain = tiny_model(tmp_path / "base", "bert", 0)
    for number, name in enumerate("ab"):
        Encoder.load(tiny_model(tmp_path / f"plain-{name}", "bert", number + 1), pooling="cls").save(tmp_path / name)
    experts = [text for name in "ab" for text in ("--expert", f"{name}={tmp_path / name}")]
    ended = command(
        "compress", "--base", plain, *experts, "--format", "int8", "--group-size", 32, "--out", tmp_path / "s"
    )
    assert ended.returncode == 0, ended.stderr
    assert "weight error at c = 1" in ended.stdout and "of bfloat16 task vectors" in ended.stdout
    assert "compressing a" in ended.stderr
    assert names(tmp_path / "s") == FRESH
    assert json.loads((tmp_path / "s" / "a" / DESCRIPTION).read_text())["group_size"] == 32
    again = command(
        "compress", "--base", plain, *experts, "--format", "int8", "--group-size", 32, "--out", tmp_path / "s"
    )
    assert again.returncode == 0 and again.stdout == ended.stdout and "a: is there already" in again.stderr
    stored = [text for name in "ab" for text in ("--expert", f"{name}={tmp_path / 's' / name}")]
    ended = command("merge", "--base", plain, *stored, "--method", "task_arithmetic", "--set", "lambda=0.5",
                    "--out", tmp_path / "merged")  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    store = TaskVectorStore(plain, {name: tmp_path / "s" / name for name in "ab"})
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in store.names:
        wanted = store.base.read(name).double() + 0.5 * sum(vector.double() for vector in store.task_vectors(name))
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-6, atol=1e-6)
    assert read_modules(tmp_path / "merged")["pooling"] == "cls"
    assert not (tmp_path / "merged" / DESCRIPTION).exists()
    assert Encoder.load(tmp_path / "merged").encode(["a text"]).shape == (1, 32)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out", "s"], "give --out, and a RECIPE or --base"),
        (["--base", "base", "--expert", "a=a"], "give --out, and a RECIPE or --base"),
        (["--base", "base", "--expert", "a=a", "--out", "s", "--format", "zip"], "--format zip: choose one of int8"),
        (["--base", "nowhere/at/all", "--expert", "a=a", "--out", "s"], "no such model folder"),
        (["--base", "base", "--expert", "a=gone", "--out", "s"], "gone: no model.safetensors"),
    ],
)
def test_bad_usage(family, tmp_path, monkeypatch, capsys, arguments, words) -> None:
    from scalemerge.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compress", *arguments])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and words in shown and len(shown.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_a_recipe_s_experts(tiny_recipe, tiny_folders, tiny_model, tmp_path, command) -> None:
    """compress RECIPE, position and merge RECIPE --expert NAME=STORE/NAME; another store is another position."""
    recipe = tiny_recipe(**{"merges": [{"method": "self_positioning"}, {"method": "average"}], "positioning.steps": 2})
    run, tasks = tmp_path / "run", ("search", "sts", "topics")
    for number, task in enumerate(tasks):
        tiny_model(run / "experts" / task, "bert", number + 1)
    shown = command("compress", recipe, "--run", run, "--format", "int4", "--shared-base", "--out", run / "store")
    assert shown.returncode == 0, shown.stderr
    assert names(run / "store") == ["errors.csv", "search", "shared", "sts", "topics"]
    experts = [text for task in tasks for text in ("--expert", f"{task}={run / 'store' / task}")]
    shown = command("position", recipe, "--out", run, *experts)
    assert shown.returncode == 0, shown.stderr
    learned = json.loads((run / "position" / "coefficients.json").read_text())
    store = TaskVectorStore(tiny_folders("bert"), {task: run / "store" / task for task in tasks})
    from scalemerge.task_vectors import gram_matrices

    gram = torch.stack(list(gram_matrices(store).values())).sum(0)
    torch.testing.assert_close(torch.tensor(learned["gram"], dtype=torch.float64), gram, rtol=1e-6, atol=1e-9)
    shown = command("position", recipe, "--out", run)
    assert shown.returncode == 2 and "was learned from other experts" in shown.stderr
    shown = command("merge", recipe, "--out", run, *experts)
    assert shown.returncode == 0, shown.stderr
    merged, name = load_file(run / "merged" / "average" / "model.safetensors"), "encoder.layer.0.output.dense.weight"
    wanted = store.base.read(name) + sum(store.task_vectors(name)) / 3
    torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)
