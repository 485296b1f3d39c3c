"""The search, on a tiny BERT and two experts really trained from it: it gets better, it is the same every time, it
stops, it keeps the best, and a search that was killed ends where an unbroken one does."""

from __future__ import annotations

import json
import random

import pytest
import torch

from scalemerge.errors import InputError
from scalemerge.merging import read_coefficients
from scalemerge.positioning import POSITIONS
from scalemerge.task_vectors import GRANULARITIES, TaskVectorStore


def history_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def lengths(result) -> float:
    value = result["lambda"]
    return sum(value.values()) / len(value) if isinstance(value, dict) else value


@pytest.mark.parametrize("kind", POSITIONS)
def test_lowers_the_objective(make_search, kind) -> None:
    """From a poor start (hardly any of the experts), on probe and validation rows alike."""
    search = make_search(position=kind, start=[0.05, 0.05], steps=40, validate_every=5)
    result = search.run()
    assert result["validation"]["best"] < result["validation"]["start"] - 0.02
    assert result["validation"]["start"] == pytest.approx(1.0)  # each loss over its value at the start
    history = history_of(search.folder)
    early, late = history[:8], history[-8:]
    assert sum(line["loss"] for line in late) < sum(line["loss"] for line in early)
    assert lengths(result) > lengths(history[0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_coefficients_file(make_search, problem, granularity) -> None:
    search = make_search(granularity=granularity, steps=4)
    result = search.run()
    stored = read_coefficients(search.folder / "coefficients.json")
    assert stored == json.loads(json.dumps(result))
    assert stored["experts"] == list(problem["experts"]) and stored["granularity"] == granularity
    groups = set(search.model.groups)
    assert set(stored["c"]) == groups
    assert {"global": len(groups) == 1, "layer": len(groups) == 3, "module": len(groups) > 10}[granularity]
    rows = torch.stack([
        torch.cat([TaskVectorStore(problem["base"], {name: folder}).task_vector(0, tensor).double().flatten()
                   for members in search.model.groups.values() for tensor in members])
        for name, folder in problem["experts"].items()
    ])  # fmt: skip
    torch.testing.assert_close(torch.tensor(stored["gram"], dtype=torch.float64), rows @ rows.T, rtol=1e-6, atol=0)
    assert not (search.folder / "state.safetensors").exists()
    cost = json.loads((search.folder / "cost.json").read_text())
    assert cost["examples"] > 4 * 2 * 12 and cost["tokens"] > cost["examples"] and cost["flops"] > 0
    for line in history_of(search.folder):
        assert {"step", "loss", "losses", "a", "lambda", "c"} <= set(line) and set(line["c"]) == groups


def test_is_deterministic_and_depends_on_the_seed(make_search) -> None:
    first, second, other = make_search("one"), make_search("two"), make_search("three", seed=1)
    for search in (first, second, other):
        search.run()
    written = [(search.folder / "coefficients.json").read_bytes() for search in (first, second, other)]
    assert written[0] == written[1] != written[2]
    assert history_of(first.folder) == history_of(second.folder)


def test_stops_when_validation_does_not_improve(make_search) -> None:
    search = make_search(learning_rate=1e-20, steps=50, validate_every=3, patience=2)
    assert search.run()["steps"] == 6
    assert len(history_of(search.folder)) == 6


def test_keeps_the_best_by_validation(make_search, monkeypatch) -> None:
    """Validation says: better at steps 2 and 4, worse from then on. What step 4 left is what is written."""
    search = make_search(steps=10, validate_every=2)
    scripted = iter([1.0, 0.9, 0.8, 0.85, 0.95, 0.99])
    monkeypatch.setattr(
        search.objective, "validation_losses", lambda c=None: dict.fromkeys(search.objective.tasks, next(scripted))
    )
    result = search.run()
    assert result["best_step"] == 4 and result["steps"] == 10
    assert result["validation"] == {"start": 1.0, "best": 0.8}
    history = history_of(search.folder)
    assert result["c"] == history[4]["c"] != history[9]["c"]  # a line has c before its step: after four of them
    assert [line["step"] for line in history if "validation_loss" in line] == [1, 3, 5, 7, 9]


class Interrupted(RuntimeError):
    pass


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("granularity", ["global", "layer"])
def test_resume_ends_bit_for_bit_where_an_unbroken_search_does(make_search, monkeypatch, seed, granularity) -> None:
    settings = {"granularity": granularity, "steps": 9, "sample_rows": 1 + seed}
    whole = make_search("whole", **settings)
    whole.run()
    draw = random.Random(seed)
    for attempt in range(2):  # killed twice, at any step, before or after the optimizer has moved
        search = make_search("broken", **settings)
        step_of, limit, late = search._step, draw.randrange(1 + 4 * attempt, 9), draw.random() < 0.5

        def step(optimizer, batches, state, step_of=step_of, limit=limit, late=late):
            if state.step == limit and not late:
                raise Interrupted
            record = step_of(optimizer, batches, state)
            if state.step == limit:
                raise Interrupted
            return record

        monkeypatch.setattr(search, "_step", step)
        with pytest.raises(Interrupted):
            search.run()
        assert not (search.folder / "coefficients.json").exists()
    search = make_search("broken", **settings)
    search.run()
    assert (search.folder / "coefficients.json").read_bytes() == (whole.folder / "coefficients.json").read_bytes()
    assert history_of(search.folder) == history_of(whole.folder)


def test_resume_of_another_search_is_refused(make_search, monkeypatch) -> None:
    search = make_search(key="one")
    step_of = search._step

    def step(optimizer, batches, state):
        if state.step == 4:
            raise Interrupted
        return step_of(optimizer, batches, state)

    monkeypatch.setattr(search, "_step", step)
    with pytest.raises(Interrupted):
        search.run()
    with pytest.raises(InputError, match=r"state\.safetensors: belongs to other experts"):
        make_search(key="two").run()


@pytest.mark.parametrize("kind", POSITIONS)
def test_mu_lowers_lambda(make_search, kind) -> None:
    free = make_search("free", position=kind, steps=15).run()
    bound = make_search("bound", position=kind, steps=15, mu=2.0).run()
    assert lengths(bound) < lengths(free) - 0.05


def test_losses_are_divided_by_those_of_the_own_expert(make_search, problem) -> None:
    search = make_search(normalize_losses="expert", steps=2)
    result = search.run()
    for number, task in enumerate(problem["experts"]):
        c = torch.zeros(1, 2)
        c[0, number] = 1.0
        assert result["loss_scales"][task] == pytest.approx(search.objective.validation_losses(c)[task], rel=1e-6)
    none = make_search("none", normalize_losses="none", steps=2).run()
    assert none["loss_scales"] == dict.fromkeys(problem["experts"], 1.0)


def test_an_expert_at_c_1_is_that_expert(make_search, problem) -> None:
    """The merged layers at c = (0, 1) embed as the second expert's own folder does."""
    from scalemerge.encoder import Encoder

    search = make_search()
    search.model.place(torch.tensor([[0.0, 1.0]]))
    texts = ["rain bread 7", "violin"]
    with torch.no_grad():
        found = search.model.encoder.encode(texts)
    expert = Encoder.load(list(problem["experts"].values())[1])
    torch.testing.assert_close(found, expert.encode(texts), rtol=0, atol=1e-6)


def test_a_loss_that_is_no_number_stops_the_search(make_search, monkeypatch) -> None:
    search = make_search()
    monkeypatch.setattr(search.objective, "value", lambda *_: float("nan"))
    with pytest.raises(InputError, match=r"lower positioning\.learning_rate"):
        search.run()


def test_the_order_of_visits_is_recorded_and_counts(make_search, problem) -> None:
    names = list(problem["experts"])
    result = make_search(order=names[::-1], steps=2).run()
    assert result["order"] == names[::-1] and result["experts"] == names


# ---- how the layers compute ------------------------------------------------------------------------------------------


def test_recomputing_activations_changes_no_bit_of_the_search(make_search) -> None:
    plain = make_search("plain", steps=4).run()
    for level in ("cheap", "all"):
        assert make_search(level, steps=4, recompute=level).run()["c"] == plain["c"]


def test_sums_apart_take_nearly_the_same_steps(make_search) -> None:
    """Equal but for rounding, which bfloat16 makes visible: W0 x + delta x is rounded elsewhere than (W0 + delta) x."""
    last = {}
    for sums in ("merge", "split"):
        search = make_search(sums, steps=6, sums=sums, precision="bf16")
        search.run()
        last[sums] = history_of(search.folder)[-1]["c"]["global"]
    assert last["split"] == pytest.approx(last["merge"], rel=0.05) and last["split"] != last["merge"]


@pytest.mark.parametrize("form, tolerance", [("bfloat16", 0.01), ("int8", 0.01), ("int4", 0.1)])
def test_compressed_task_vectors_find_nearly_the_same_position(make_search, form, tolerance) -> None:
    """Measured here: 0.0006, 0.0005 and 0.02. A format that is not used at all would change nothing."""
    dense, compressed = make_search("dense").run(), make_search(form, task_vectors=form).run()
    difference = max(abs(a - b) for a, b in zip(dense["c"]["global"], compressed["c"]["global"], strict=True))
    assert 0 < difference < tolerance
    assert compressed["gram"] != dense["gram"], "the Gram matrix is that of what is held"


def test_sampled_rows_lower_the_objective_too(make_search) -> None:
    result = make_search(sample_rows=4, steps=15).run()
    assert result["validation"]["best"] < result["validation"]["start"] - 0.01


# ---- L-BFGS ----------------------------------------------------------------------------------------------------------


def test_lbfgs_converges_on_the_whole_probe_set_and_beats_adam(make_search) -> None:
    search = make_search("lbfgs", optimizer="lbfgs", steps=40)
    result = search.run()
    assert result["converged"] and result["evaluations"] <= 25
    assert result["gradient_norm"]["end"] <= 1e-3 * result["gradient_norm"]["start"]
    history = history_of(search.folder)
    assert len(history) == result["evaluations"] and history[0]["loss"] == result["probe_loss"]["start"]
    adam = make_search("adam", steps=40)
    adam.run()
    reached = adam.objective.differentiate(adam.objective.whole_probe(), result["loss_scales"]).value
    assert result["probe_loss"]["end"] <= reached + 1e-6


def test_lbfgs_is_deterministic_and_resumes_without_repeating_an_evaluation(make_search, monkeypatch) -> None:
    whole = make_search("whole", optimizer="lbfgs")
    whole.run()
    for limit in (0, 1, 5):
        search = make_search("broken", optimizer="lbfgs")
        made, differentiate = [0], search.objective.differentiate

        def counted(rounds, scales, made=made, limit=limit, differentiate=differentiate):
            if made[0] == limit:
                raise Interrupted
            made[0] += 1
            return differentiate(rounds, scales)

        monkeypatch.setattr(search.objective, "differentiate", counted)
        with pytest.raises(Interrupted):
            search.run()
    search = make_search("broken", optimizer="lbfgs")
    made, differentiate = [0], search.objective.differentiate
    monkeypatch.setattr(
        search.objective, "differentiate", lambda *a: (made.__setitem__(0, made[0] + 1), differentiate(*a))[1]
    )
    result = search.run()
    assert made[0] == result["evaluations"] - 6, "six evaluations were made before"
    assert (search.folder / "coefficients.json").read_bytes() == (whole.folder / "coefficients.json").read_bytes()
    assert history_of(search.folder) == history_of(whole.folder)


@pytest.mark.parametrize("chunk_tokens", [30, 200])
def test_the_gradient_cache_takes_the_same_steps(make_search, chunk_tokens) -> None:
    plain = make_search("plain", steps=6).run()
    cached = make_search("cached", steps=6, chunk_tokens=chunk_tokens).run()
    assert torch.tensor(cached["c"]["global"]) == pytest.approx(torch.tensor(plain["c"]["global"]), abs=1e-5)
