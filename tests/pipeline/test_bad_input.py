"""Bad input: one line on stderr naming file, field and remedy, exit code 2, nothing trained, nothing half-written."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalemerge import cli

Recipe = Callable[..., Path]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the command line; it must exit with 2 and one line of error, which is returned."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    lines_after = len(errors)
    assert stop.value.code == 2, errors
    assert lines_after == 1
    return errors[0]


def rows(path: Path, *content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        for row in content:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


PAIR = {"query": "q", "positive": "p"}
SCORED = {"sentence1": "a", "sentence2": "b", "score": 1.0}


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("pairs", None, ["data.jsonl.gz", "no such"]),
        ("pairs", [{"question_text": "q", "positive": "p"}], ["no column 'query'", "question_text", "columns"]),
        ("pairs", [], ["data.jsonl.gz", "empty"]),
        ("scored_pairs", [{**SCORED, "score": "high"}, SCORED | {"score": "low"}], ["'score'", "'high'", "number"]),
        ("scored_pairs", ['{"sentence1": "a", "sentence2": "b", "score": NaN}'], ["score", "data.jsonl.gz"]),
        ("scored_pairs", [SCORED] * 100, ["all scores are equal"]),
        ("labelled_texts", [{"text": "a", "label": "x"}] * 9, ["one label"]),
        ("pairs", [{"query": "q", "positive": None}, PAIR], ["row 0", "'positive'", "not a text"]),
        ("pairs", ["{broken"], ["data.jsonl.gz", "cannot be read"]),
        ("pairs", [PAIR] * 3, ["too few", "probe"]),
    ],
)
def test_bad_training_data(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, content: list[object] | None,
    says: list[str],
) -> None:  # fmt: skip
    path = tmp_path / "data.jsonl.gz"
    if content is not None:
        rows(path, *content)
    recipe = tiny_recipe(**{"tasks.bad": {"kind": kind, "sources": [{"path": str(path)}]}})
    line = fails(capsys, "run", recipe, "--out", tmp_path / "out")
    assert all(word in line for word in ["tasks.bad", *says]), line
    assert not list((tmp_path / "out").glob("experts/*"))


def test_unknown_recipe_key_names_the_nearest(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "run", tiny_recipe(**{"training.learning_rat": 1.0}), "--out", tmp_path / "out")
    assert "training: unknown key 'learning_rat'; did you mean 'learning_rate'?" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"merges": [{"method": "averag"}]}, ["merges.0.method", "averag", "average"]),
        ({"merges": [{"method": "task_arithmetic", "parameters": {"lamda": 1}}]}, ["lamda", "lambda"]),
        ({"merges": [{"method": "task_arithmetic", "parameters": {"lambda": "x"}}]}, ["lambda", "finite number"]),
        ({"base.path": "/nowhere/at/all"}, ["/nowhere/at/all"]),
        ({"base.path": "package:no_such_package/model"}, ["no_such_package", "pip install"]),
        ({"data": None}, ["evaluation.suite", "--data DIR"]),
        ({"evaluation.tasks": ["sts99"]}, ["sts99"]),
        ({"tasks.search.loss": {"name": "cosent"}}, ["tasks.search", "infonce"]),
        ({"tasks.search.loss": {"name": "infonce", "parameters": {"temprature": 1}}}, ["temprature", "temperature"]),
        ({"positioning.start": [0.1]}, ["positioning.start", "3 in all"]),
        ({"positioning.order": ["search", "sts", "sts"]}, ["positioning.order"]),
    ],
)
def test_bad_recipe(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object],
    says: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("SCALEMERGE_DATA", raising=False)
    line = fails(capsys, "run", tiny_recipe(**changes), "--out", tmp_path / "out")
    assert all(word in line for word in says), line


def test_missing_recipe_and_unwritable_folder(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot read the recipe" in fails(capsys, "run", tmp_path / "none.yaml")
    (tmp_path / "file").write_text("x")
    assert "--out" in fails(capsys, "run", tiny_recipe(), "--out", tmp_path / "file" / "out")


def test_probe_row_in_the_training_data(
    tiny_recipe: Recipe, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gzip.open(tiny_data / "pairs.jsonl.gz", "rt") as file:
        seen = [json.loads(line) for line in file]
    probe = rows(
        tmp_path / "probe.jsonl.gz", *[{"query": f"new {n}", "positive": f"p {n}"} for n in range(40)], seen[7]
    )
    recipe = tiny_recipe(**{"tasks.search.probe_sources": [{"path": str(probe)}]})
    line = fails(capsys, "run", recipe, "--out", tmp_path / "out")
    assert "tasks.search.probe_sources: probe row p0:40 is in the training data of 'search'" in line


@pytest.fixture
def expert(tiny_folders: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folders("bert"), tmp_path / "expert"))


def merge_fails(capsys: pytest.CaptureFixture[str], base: Path, expert: Path, out: Path) -> str:
    line = fails(capsys, "merge", "--base", base, "--expert", f"one={expert}", "--out", out)
    assert not out.exists()
    return line


def test_expert_of_another_architecture(
    tiny_folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = merge_fails(capsys, tiny_folders("bert"), tiny_folders("modernbert"), tmp_path / "out")
    assert "model_type is 'modernbert', the base's is 'bert'" in line


def test_expert_with_another_vocabulary(
    tiny_folders: Callable[[str], Path], tiny_model: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tiny_model(tmp_path / "other", "bert", vocab_size=300)
    line = merge_fails(capsys, tiny_folders("bert"), other, tmp_path / "out")
    assert "vocab_size is 300, the base's is 261" in line


def test_truncated_and_poisoned_experts(
    tiny_folders: Callable[[str], Path], expert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = expert / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "truncated or corrupt" in merge_fails(capsys, tiny_folders("bert"), expert, tmp_path / "out")
    file.write_bytes(whole)
    tensors = load_file(file)
    name = next(name for name in tensors if tensors[name].dim() == 2)
    tensors[name][0, 0] = float("nan")
    save_file({key: value.clone() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    assert "NaN" in merge_fails(capsys, tiny_folders("bert"), expert, tmp_path / "out")
    assert torch.isnan(tensors[name][0, 0])


def test_positioning_refuses_a_bad_expert_before_computing(
    tiny_recipe: Recipe, tiny_folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe()
    missing = fails(capsys, "position", recipe, "--out", tmp_path / "out")
    assert "no expert for task 'search'" in missing and "scalemerge train" in missing
    flags = [
        flag for task in ("search", "sts", "topics") for flag in ("--expert", f"{task}={tiny_folders('xlm-roberta')}")
    ]
    assert "model_type" in fails(capsys, "position", recipe, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out/position/coefficients.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "RECIPE"], "--task"),
        (["train", "RECIPE", "--task", "nope"], "nope"),
        (["eval", "/no/such/model", "--suite", "shared"], "--data"),
        (["eval", "x", "--suite", "mine"], "--suite"),
        (["report", "/no/such/run"], "/no/such/run"),
        (["merge", "--base", "x"], "--expert"),
        (["frobnicate"], "frobnicate"),
        (["run"], "recipe"),
    ],
)
def test_bad_usage(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    says: str, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.delenv("SCALEMERGE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    recipe = str(tiny_recipe())
    line = fails(capsys, *[recipe if argument == "RECIPE" else argument for argument in arguments])
    assert says in line
