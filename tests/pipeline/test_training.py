"""The training loop: schedule, resume to the bit, refusal of other settings, engines, two processes against one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalemerge.data.probe import load_tasks
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.recipe import Training, load_recipe
from scalemerge.training import expert_job, joint_job
from scalemerge.training import loop as training_loop
from scalemerge.training.engine import verify_launch

ROOT = Path(__file__).resolve().parents[2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = Training(learning_rate=1.0, warmup_ratio=0.1)
    rates = [training_loop.learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < 0.2
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.02
    cosine = Training(learning_rate=1.0, warmup_ratio=0.0, schedule="cosine")
    assert training_loop.learning_rate(cosine, 50, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("task", ["search", "sts", "topics"])
def test_an_expert_learns_its_task(tiny_recipe: Callable[..., Path], tmp_path: Path, task: str) -> None:
    recipe = load_recipe(tiny_recipe(**{"training.max_steps": 40, "training.epochs": 6}))
    data = load_tasks(recipe)
    cost = training_loop.train(expert_job(recipe, data, task), tmp_path / task)
    losses = [json.loads(line)["loss"] for line in (tmp_path / task / "training.jsonl").read_text().splitlines()]
    steps = len(losses)
    assert steps > 10 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert cost.examples == steps * 16 and cost.tokens > 0 and cost.flops > 0 and cost.seconds > 0
    assert not list(tmp_path.glob("*.work")), "the work folder is gone when the expert is whole"


def test_joint_baseline_sees_as_many_examples_as_all_experts(tiny_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(tiny_recipe())
    data = load_tasks(recipe)
    experts = sum(expert_job(recipe, data, task).total_steps for task in recipe.tasks)
    joint = joint_job(recipe, data, "proportional")
    assert joint.total_steps == experts and len(joint.plan()) == experts
    assert {batch.task for batch in joint.plan()} == set(recipe.tasks)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_killed_and_resumed_training_ends_with_the_same_bits(
    tiny_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    recipe = load_recipe(tiny_recipe(**{"training.dropout": dropout}))
    data = load_tasks(recipe)
    job = joint_job(recipe, data, "proportional")
    training_loop.train(job, tmp_path / "whole")
    real_step = training_loop._Trainer._step
    for stop_at in (1, 7, 14):

        def interrupted(self: Any, step: int, *rest: Any, stop: int = stop_at) -> dict[str, Any]:
            if step == stop:
                raise KeyboardInterrupt
            return real_step(self, step, *rest)

        monkeypatch.setattr(training_loop._Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training_loop.train(job, tmp_path / "parts")
        assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(training_loop._Trainer, "_step", real_step)
    training_loop.train(job, tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "training.jsonl").read_text().splitlines()]
    assert steps == list(range(job.total_steps))


def test_checkpointing_and_the_gradient_cache_change_nothing_and_bf16_little(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    trained = {}
    for name, changes in {
        "plain": {},
        "checkpointed": {"training.gradient_checkpointing": True},
        "cached": {"training.chunk_tokens": 40},
        "bf16": {"training.precision": "bf16"},
        "bf16 cached": {"training.precision": "bf16", "training.chunk_tokens": 40},
    }.items():
        recipe = load_recipe(tiny_recipe(**{"training.learning_rate": 1e-4, **changes}))
        training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / name)
        trained[name] = Encoder.load(tmp_path / name).encode(["apple river", "a stone in the cloud"])
    assert torch.allclose(trained["plain"], trained["checkpointed"], atol=1e-6)
    assert torch.allclose(trained["plain"], trained["cached"], atol=1e-5)
    untrained = Encoder.load(load_recipe(tiny_recipe()).base.path).encode(["apple river", "a stone in the cloud"])
    moved = (trained["plain"] - untrained).norm(dim=1)
    for name in ("bf16", "bf16 cached"):
        difference = (trained["plain"] - trained[name]).norm(dim=1) / moved
        assert 0 < float(difference.max()) < 0.05, "bf16 autocast rounds, but masters stay float32"


def test_another_recipe_in_the_same_folder_is_refused(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe())
    training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / "e")
    changed = load_recipe(tiny_recipe(**{"training.learning_rate": 2e-3}))
    with pytest.raises(InputError, match="another recipe"):
        training_loop.train(expert_job(changed, load_tasks(changed), "search"), tmp_path / "e")


def test_a_diverging_run_stops_with_the_remedy(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe(**{"training.learning_rate": 1e30, "training.schedule": "constant"}))
    with pytest.raises(InputError, match="lower learning_rate"):
        training_loop.train(expert_job(recipe, load_tasks(recipe), "search"), tmp_path / "e")


class _Fake:
    """What verify_launch looks at."""

    def __init__(self, kind: str, processes: int) -> None:
        self.distributed_type, self.num_processes = f"DistributedType.{kind}", processes


def test_silent_fallbacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert verify_launch(_Fake("NO", 1), "auto") == "plain"
    with pytest.raises(InputError, match="zero2 was asked for but plain runs"):
        verify_launch(_Fake("NO", 1), "zero2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="use_cpu: false"):
        verify_launch(_Fake("MULTI_CPU", 2), "auto")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="asks for FSDP but plain runs; FSDP needs GPUs"):
        verify_launch(_Fake("NO", 1), "auto")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(InputError, match="2 processes were started but the engine sees 1"):
        verify_launch(_Fake("NO", 1), "auto")


def test_two_processes_train_the_same_expert_as_one(
    tiny_recipe: Callable[..., Path], tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    changes = {"training.batch_size": 15, "training.learning_rate": 1e-4}
    config = ROOT / "accelerate_configs" / "ddp_cpu.yaml"
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m")
    for task, chunk_tokens in (("search", None), ("sts", 50)):  # the gradient cache against one process without it
        one = command("train", tiny_recipe(**changes), "--task", task, "--out", tmp_path / "one")
        assert one.returncode == 0, one.stderr
        recipe = tiny_recipe(**changes, **{"training.chunk_tokens": chunk_tokens})
        two = command("train", recipe, "--task", task, "--out", tmp_path / "two", launcher=launch)
        assert two.returncode == 0, two.stderr[-3000:]
        record = json.loads((tmp_path / "two/experts" / task / "scalemerge.json").read_text())
        assert record["engine"] == "ddp", "two processes must not have trained alone"
        norms = [
            [
                json.loads(line)["gradient_norm"]
                for line in (tmp_path / which / "experts" / task / "training.jsonl").open()
            ]
            for which in ("one", "two")
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4), (
            "Adam hides a gradient W times too small; its norm does not"
        )
        single, double = (weights(tmp_path / which / "experts" / task) for which in ("one", "two"))
        for name in single:
            if name.endswith("key.bias"):
                continue  # softmax does not see it: its gradient is rounding noise, which Adam scales to full steps
            assert torch.allclose(single[name], double[name], atol=1e-5, rtol=0), name
        texts = [f"apple river {number} stone" for number in range(50)]
        encoded = [Encoder.load(tmp_path / which / "experts" / task).encode(texts) for which in ("one", "two")]
        assert torch.allclose(*encoded, atol=1e-5, rtol=0)
