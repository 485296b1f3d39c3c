"""Evaluation on held-out rows: figures against brute force, what is trained on, the best weights, kill and resume."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from scalemerge.data.plan import BatchPlan
from scalemerge.data.probe import load_tasks
from scalemerge.data.tasks import TaskRows
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.objectives import compute_loss
from scalemerge.recipe import Recipe, dump_recipe
from scalemerge.training import Job, expert_job, joint_job
from scalemerge.training import loop as training_loop
from scalemerge.training import validation as validation_module
from scalemerge.training.validation import Validation, average_ranks, mrr_at_10, neighbour_accuracy, spearman

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Recipe]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


# ---- metrics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 1024])
def test_mrr_against_sorting(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(validation_module, "BLOCK", block)
    torch.manual_seed(0)
    query = F.normalize(torch.randn(40, 4, dtype=torch.float64), dim=1)
    texts = F.normalize(torch.randn(30, 4, dtype=torch.float64), dim=1)
    ids = [random.Random(number).randrange(30) for number in range(70)]  # texts occur more than once
    total, ranks = 0.0, []
    for row in range(40):
        others = [float(query[row] @ texts[each]) for each in set(ids) - {ids[row]}]
        ranks.append(1 + sum(score > float(query[row] @ texts[ids[row]]) for score in others))
        total += 1 / ranks[-1] if ranks[-1] <= 10 else 0.0
    assert min(ranks) <= 10 < max(ranks)
    codes = [each * 2**58 + 2**63 for each in ids]  # 64 bits, as fingerprints are
    assert mrr_at_10(query, texts[ids], torch.arange(40), codes) == pytest.approx(total / 40, abs=1e-12)


def test_a_model_that_embeds_all_alike_scores_nothing() -> None:
    same = F.normalize(torch.ones(40, 4), dim=1)
    assert mrr_at_10(same, same, torch.arange(40), range(40)) == 0
    assert neighbour_accuracy(same, torch.arange(40) // 2) == 0
    assert spearman((same * same).sum(1), torch.arange(40.0)) == 0


def test_spearman_against_scipy() -> None:
    made = random.Random(1)
    for values in (5, 1000):
        first, second = ([float(made.randrange(values)) for _ in range(200)] for _ in range(2))
        second = [a + b for a, b in zip(first, second)]
        assert average_ranks(torch.tensor(first)).tolist() == rankdata(first).tolist()
        expected = spearmanr(first, second).statistic
        assert spearman(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block", [7, 1024])
def test_neighbour_accuracy_against_loops(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(validation_module, "BLOCK", block)
    torch.manual_seed(0)
    label = torch.tensor([number // 3 for number in range(30)] + [100, 101])  # two that no other text shares
    text = F.normalize(torch.randn(11, 8)[label.clamp(max=10)] + 0.7 * torch.randn(32, 8), dim=1)
    right = 0
    for row in range(30):
        nearest = max((other for other in range(32) if other != row), key=lambda other: float(text[row] @ text[other]))
        right += int(label[nearest] == label[row])
    assert 3 < right < 27
    assert neighbour_accuracy(text, label) == pytest.approx(right / 30)


def test_the_figures_are_those_of_the_finished_model(make_recipe: Make, tmp_path: Path) -> None:
    """Every kind at once, from the saved folder, without any of the code that evaluates."""
    recipe = make_recipe(evaluation_rows=21, max_steps=3, learning_rate=1e-4, dropout=0.1)
    job = joint_job(recipe, load_tasks(recipe), "all")
    training_loop.train(job, tmp_path / "out")
    encoder, last = Encoder.load(tmp_path / "out"), evaluations(tmp_path / "out")[-1]
    assert last["step"] == job.total_steps
    for name, rows in job.held.items():
        data, found = rows.data, last["tasks"][name]
        assert found["rows"] == len(rows) == (20 if name == "names" else 21)
        prompts = recipe.tasks[name].prompts

        def embed(texts: list[str], prompt: str = prompts.query) -> Tensor:
            return encoder.encode(texts, prompt=prompt)

        targets: dict[str, Any] = {}
        if name == "scored":
            roles = {role: embed(data[role]) for role in ("sentence1", "sentence2")}
            targets = {"score": torch.tensor(data["score"])}
            metric = ("spearman", spearmanr((roles["sentence1"] * roles["sentence2"]).sum(1), data["score"]).statistic)
        elif name == "names":
            roles = {"text": embed(data["text"])}
            targets = {"label": torch.tensor([int(label[1:]) for label in data["label"]])}
            nearest = (roles["text"] @ roles["text"].T).fill_diagonal_(-2).argmax(1)
            metric = ("neighbour_accuracy", float((targets["label"][nearest] == targets["label"]).float().mean()))
        else:
            roles = {"query": embed(data["query"]), "positive": embed(data["positive"], prompts.document)}
            documents = list(data["positive"])
            if name == "hard":
                negatives = [text for texts in data["negatives"] for text in texts]
                roles["negatives"] = embed(negatives, prompts.document)
                documents += negatives
            unique = {text: encoder.encode([text], prompt=prompts.document)[0] for text in documents}
            total = 0.0
            for query, own in zip(roles["query"], data["positive"]):
                rank = 1 + sum(bool(query @ unique[text] > query @ unique[own]) for text in unique if text != own)
                total += 1 / rank if rank <= 10 else 0.0
            metric = ("mrr_at_10", total / len(rows))
        assert found[metric[0]] == pytest.approx(metric[1], abs=1e-5), name
        losses = []
        bounds = [len(rows) * part // 3 for part in range(4)]  # of at most 8 rows
        counts = [len(texts) for texts in data["negatives"]] if name == "hard" else []
        for start, stop in pairwise(bounds):
            part = {role: values[start:stop] for role, values in roles.items() if role != "negatives"}
            if name == "hard":
                part["negatives"] = roles["negatives"][sum(counts[:start]) : sum(counts[:stop])]
            cut = {key: values[start:stop] for key, values in targets.items()}
            loss = recipe.tasks[name].loss
            assert loss is not None
            losses.append(float(compute_loss(loss.name, part, cut, loss.parameters)))
        assert found["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4), name
    metrics = [value for each in last["tasks"].values() for key, value in each.items() if key not in ("loss", "rows")]
    assert len(metrics) == 4 and last["score"] == pytest.approx(sum(metrics) / 4)


# ---- what is held out --------------------------------------------------------------------------------------------


def trained_texts(job: Job) -> dict[str, set[int]]:
    """Anchors of all rows that the plan gives, by task, over enough steps to see every row."""
    found: dict[str, set[int]] = {name: set() for name in job.tasks}
    settings = job.settings
    for batch in BatchPlan(job.tables, dict.fromkeys(job.tables, 40), settings.batch_size, 0, 2):
        found[batch.task] |= {batch.table.anchor(row) for row in batch.rows}
    return found


@pytest.mark.parametrize("streamed", [False, True])
def test_held_out_rows_are_never_trained_on(make_recipe: Make, streamed: bool) -> None:
    recipe = make_recipe(streamed=streamed, evaluation_rows=12)
    data = load_tasks(recipe)
    joint = joint_job(recipe, data, "all")
    held = set().union(*(rows.anchors() for rows in joint.held.values()))
    trained = trained_texts(joint)
    assert len(trained["search"]) > 50 and not held & set().union(*trained.values())
    both = joint.held["search"].anchors() & joint.held["hard"].anchors()
    assert len(both) > 6 or streamed, "queries of two tasks are mostly held out together"
    for name in recipe.tasks:
        job = expert_job(recipe, data, name)
        assert list(job.held[name].ids) == list(joint.held[name].ids), "one recipe holds out the same rows"
        assert not trained_texts(job)[name] & job.held[name].anchors()
        for part in (data[name].probe, data[name].validation):
            assert not part.anchors() & held, "what positioning learns from is another part"


def test_without_evaluations_nothing_is_held_out(make_recipe: Make) -> None:
    recipe = make_recipe(["search"], evaluate_every=None)
    data = load_tasks(recipe)
    job = expert_job(recipe, data, "search")
    assert not job.held and job.tables["search"] is data["search"].train
    evaluated = make_recipe(["search"], max_steps=None)
    less = expert_job(evaluated, data, "search")
    assert isinstance(less.tables["search"], TaskRows)
    assert less.steps["search"] == round(len(less.tables["search"]) / 8), "passes over the rows that are trained on"
    assert less.key() != job.key()
    assert replace(job, settings=replace_settings(job, prefetch=0, trackers=["wandb"])).key() == job.key()


def replace_settings(job: Job, **changes: Any) -> Any:
    return job.settings.model_copy(update=changes)


# ---- in the loop -------------------------------------------------------------------------------------------------


def test_evaluating_changes_nothing_of_the_training(make_recipe: Make, tmp_path: Path) -> None:
    trained = {}
    for every in (1, 4):
        recipe = make_recipe(["search"], evaluate_every=every, dropout=0.1)
        training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / str(every))
        trained[every] = weights(tmp_path / str(every))
    assert all(torch.equal(trained[1][name], trained[4][name]) for name in trained[1])
    assert [line["step"] for line in evaluations(tmp_path / "1")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluations(tmp_path / "4")] == [4, 6], "and at the end"
    same = evaluations(tmp_path / "1")[3], evaluations(tmp_path / "4")[0]
    assert same[0]["tasks"] == same[1]["tasks"]


def test_learning_shows_in_the_figures(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(["scored"], epochs=9, max_steps=60, evaluate_every=30)
    training_loop.train(expert_job(recipe, load_tasks(recipe), "scored"), tmp_path / "out")
    recipe = make_recipe(["scored"], max_steps=1, learning_rate=1e-9)
    training_loop.train(expert_job(recipe, load_tasks(recipe), "scored"), tmp_path / "untrained")
    last, before = evaluations(tmp_path / "out")[-1], evaluations(tmp_path / "untrained")[-1]
    assert last["tasks"]["scored"]["loss"] < before["tasks"]["scored"]["loss"]


@pytest.mark.parametrize("chunk_tokens", [60, "auto"])
def test_the_gradient_cache_s_chunks_change_no_figure(make_recipe: Make, tmp_path: Path, chunk_tokens: Any) -> None:
    found = {}
    for name, changes in {"plain": {}, "chunks": {"chunk_tokens": chunk_tokens}}.items():
        recipe = make_recipe(["hard"], learning_rate=1e-6, max_steps=2, **changes)
        training_loop.train(expert_job(recipe, load_tasks(recipe), "hard"), tmp_path / name)
        (line,) = evaluations(tmp_path / name)
        found[name] = line["tasks"]["hard"]
    assert found["plain"] == pytest.approx(found["chunks"], rel=1e-4)


def test_embeddings_that_are_not_finite_end_the_run(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison with NaN is false, so that a model of NaN might rank first."""
    real = validation_module.embeddings_by_role
    spoil = lambda found: {role: values * torch.nan for role, values in found.items()}  # noqa: E731
    monkeypatch.setattr(
        validation_module, "embeddings_by_role", lambda *given, **named: [spoil(each) for each in real(*given, **named)]
    )
    recipe = make_recipe(["search"])
    with pytest.raises(InputError, match=r"after step 2 .* not finite \(task 'search'\); lower learning_rate"):
        training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / "out")


# ---- the best weights --------------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], dict[int, dict[str, Tensor]]]:
    """`scored({2: 0.5})` gives evaluations those scores, and returns a dictionary that fills with weights by step."""
    real = Validation.run

    def give(scores: dict[int, float]) -> dict[int, dict[str, Tensor]]:
        seen: dict[int, dict[str, Tensor]] = {}

        def run(self: Validation, step: int, *rest: Any) -> dict[str, Any]:
            seen[step] = {name: tensor.detach().clone() for name, tensor in self.encoder.weights_to_save()}
            return real(self, step, *rest) | {"score": scores[step]}

        monkeypatch.setattr(Validation, "run", run)
        return seen

    return give


def same_weights(folder: Path, expected: dict[str, Tensor]) -> bool:
    found = weights(folder)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


SCORES = {2: 0.2, 4: 0.7, 6: 0.7, 8: 0.1, 10: 0.5}


@pytest.mark.parametrize(("keep", "step"), [("best", 4), ("last", 10)])
def test_the_best_weights_are_kept_of_equal_ones_the_earlier(
    make_recipe: Make, tmp_path: Path, scored: Any, keep: str, step: int
) -> None:
    seen = scored(SCORES)
    recipe = make_recipe(["search"], keep=keep, max_steps=10)
    training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / "out")
    assert same_weights(tmp_path / "out", seen[step])
    assert not same_weights(tmp_path / "out", seen[6]), "steps move the weights"
    record = json.loads((tmp_path / "out" / "scalemerge.json").read_text())
    assert record["kept"]["step"] == step
    assert keep == "last" or record["kept"]["tasks"] == evaluations(tmp_path / "out")[1]["tasks"]
    assert sorted(tmp_path.glob("out*")) == [tmp_path / "out"], "nothing is left behind"
    Encoder.load(tmp_path / "out").encode(["apple"])


def test_a_rate_that_rises_too_far_does_not_spoil_the_best(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real metric: after step 12 the rate destroys the model."""
    rate = training_loop.learning_rate
    monkeypatch.setattr(training_loop, "learning_rate", lambda *given: 0.5 if given[1] >= 12 else rate(*given))
    recipe = make_recipe(["scored"], keep="best", max_steps=16, epochs=9, evaluate_every=4)
    training_loop.train(expert_job(recipe, load_tasks(recipe), "scored"), tmp_path / "out")
    found = evaluations(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "scalemerge.json").read_text())["kept"]
    assert kept == max(found, key=lambda line: line["score"]) and kept["step"] <= 12
    assert found[-1]["score"] < kept["score"]


@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_the_best_adapter(make_recipe: Make, tmp_path: Path, scored: Any, save: str) -> None:
    seen = scored({2: 0.9, 4: 0.1})
    recipe = make_recipe(["search"], keep="best", max_steps=4, lora={"rank": 2, "save": save})
    training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / "out")
    if save == "adapter":
        found = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert found.keys() == seen[2].keys() and all(torch.equal(found[name], seen[2][name]) for name in found)
        assert any(not torch.equal(seen[2][name], seen[4][name]) for name in found)
    else:
        assert (tmp_path / "out" / "model.safetensors").is_file()
    Encoder.load(tmp_path / "out").encode(["apple"])


def interrupt(monkeypatch: pytest.MonkeyPatch, job: Job, out: Path, at: int) -> list[str]:
    """Kill a run before it makes step `at`. Returns the folders of best weights that are then there."""
    real = training_loop._Trainer._step

    def interrupted(self: Any, step: int, *rest: Any) -> dict[str, Any]:
        if step == at:
            raise KeyboardInterrupt
        return real(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop._Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training_loop.train(job, out)
    return sorted(path.name for path in training_loop.work_folder(out).glob("best-*"))


def test_killed_and_resumed_it_keeps_the_same_best(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: Any
) -> None:
    scored(SCORES)
    recipe = make_recipe(["search"], keep="best", max_steps=10, dropout=0.1)  # checkpoints at 4 and 8
    job = expert_job(recipe, load_tasks(recipe), "search")
    training_loop.train(job, tmp_path / "whole")
    assert interrupt(monkeypatch, job, tmp_path / "parts", 3) == ["best-00000002"]
    assert interrupt(monkeypatch, job, tmp_path / "parts", 5) == ["best-00000004"]
    assert interrupt(monkeypatch, job, tmp_path / "parts", 9) == ["best-00000004"]
    training_loop.train(job, tmp_path / "parts")
    assert same_weights(tmp_path / "parts", weights(tmp_path / "whole"))
    lines = [[{**line, "seconds": 0} for line in evaluations(tmp_path / name)] for name in ("whole", "parts")]
    assert lines[0] == lines[1] and len(lines[0]) == 5
    kept = [
        json.loads((tmp_path / name / "scalemerge.json").read_text())["kept"]["step"] for name in ("whole", "parts")
    ]
    assert kept == [4, 4]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: Any
) -> None:
    """Under another engine the steps after the checkpoint round differently: a best of them is not this run's."""
    seen = scored({2: 0.5, 4: 0.4, 6: 0.9})
    recipe = make_recipe(["search"], keep="best", max_steps=10)
    job = expert_job(recipe, load_tasks(recipe), "search")
    assert interrupt(monkeypatch, job, tmp_path / "out", 7) == ["best-00000002", "best-00000006"]
    kept = seen[2]
    seen = scored({6: 0.3, 8: 0.1, 10: 0.2})
    training_loop.train(job, tmp_path / "out")
    assert same_weights(tmp_path / "out", kept) and 2 not in seen
    assert [line["score"] for line in evaluations(tmp_path / "out")] == [0.5, 0.4, 0.3, 0.1, 0.2]


def test_best_weights_that_are_gone_are_named(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: Any
) -> None:
    scored(SCORES)
    recipe = make_recipe(["search"], keep="best", max_steps=10)
    job = expert_job(recipe, load_tasks(recipe), "search")
    interrupt(monkeypatch, job, tmp_path / "out", 5)
    shutil.rmtree(tmp_path / "out.work" / "best-00000004")
    with pytest.raises(InputError, match=r"best-00000004: the best weights so far are gone; delete .*out\.work"):
        training_loop.train(job, tmp_path / "out")


# ---- many ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk_tokens", [None, pytest.param(60, marks=pytest.mark.slow)])
def test_two_ranks_find_the_same_figures(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, chunk_tokens: int | None
) -> None:
    """21 rows in batches of two and one of one, of which a rank has none; the rate is too small to move the model."""
    recipe = make_recipe(
        evaluation_rows=21, max_steps=1, learning_rate=1e-7, keep="best", chunk_tokens=chunk_tokens, batch_size=2
    )
    training_loop.train(joint_job(recipe, load_tasks(recipe), "all"), tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    config = ROOT / "accelerate_configs" / f"{engine}_cpu.yaml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--main_process_port", port, "-m", "scalemerge"]
    given = ["train", str(tmp_path / "recipe.yaml"), "--joint", "--alpha", "0", "--out", str(tmp_path / "two")]
    ended = subprocess.run(
        [*launch, *given],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    folder = tmp_path / "two" / "joint" / "all"
    assert json.loads((folder / "scalemerge.json").read_text())["engine"] == engine
    one, two = evaluations(tmp_path / "one"), evaluations(folder)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [2, 4]
    for first, second in zip(one, two):
        assert first["score"] == pytest.approx(second["score"], abs=1e-5)
        for name, figures in first["tasks"].items():
            assert figures == pytest.approx(second["tasks"][name], rel=1e-4), name
