"""`evaluate` runs mteb, saves every task, serves no stale score. The encoder needs no weights: a few seconds."""

from __future__ import annotations

import json
import socket

import pytest

pytest.importorskip("mteb", reason="mteb is not installed")

from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import METRICS
from scalemerge.evaluation.scorer import aggregate, evaluate
from scalemerge.evaluation.suites import Options, layout_suite

ENOUGH = Options(experiments=2)


@pytest.fixture
def suite(tiny_data, tiny_tasks):
    return layout_suite("tiny", tiny_data, tiny_tasks, options={name: ENOUGH for name, _ in tiny_tasks})


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"the network was asked for: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_every_type_is_scored_offline_and_saved_as_the_leaderboard_has_it(
    suite, make_model_folder, make_encoder, tmp_path, no_network, capfd
):
    seen = []
    folder = make_model_folder("m")
    result = evaluate(
        folder, suite, model_name="merge:x", output_dir=tmp_path / "out", encoder=make_encoder(),
        progress=lambda *state: seen.append(state),
    )  # fmt: skip
    assert set(result["scores"]) == {task.name for task in suite} and set(result["by_type"]) == set(METRICS)
    assert all(0.0 <= score <= 100.0 for score in result["scores"].values())
    assert result["scores"]["tiny-search"] == 100.0  # each query is the text of its document
    assert result["mean"] == pytest.approx(sum(result["scores"].values()) / 6)
    assert seen[0] == (0, 6, "tiny-sts") and seen[-1] == (6, 6, "")
    saved = tmp_path / "out/mteb/results/scalemerge__merge-x" / result["revision"]
    assert {path.name for path in saved.glob("*.json")} == {f"{t.name}.json" for t in suite} | {"model_meta.json"}
    assert json.loads((saved / "model_meta.json").read_text())["revision"] == result["revision"]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_scores_are_reproducible_and_resumed(suite, make_model_folder, make_encoder, tmp_path):
    folder = make_model_folder("m")
    first = evaluate(folder, suite, model_name="m", output_dir=tmp_path / "a", encoder=make_encoder())
    fresh = evaluate(folder, suite, model_name="m", output_dir=tmp_path / "b", encoder=make_encoder())
    assert fresh["scores"] == first["scores"] and len(fresh["scored"]) == 6
    idle = make_encoder()
    again = evaluate(folder, suite, model_name="m", output_dir=tmp_path / "a", encoder=idle)
    assert again["scores"] == first["scores"] and again["scored"] == [] and idle.calls == 0


def test_a_killed_run_scores_only_what_is_missing(suite, make_model_folder, make_encoder, tmp_path):
    folder = make_model_folder("m")
    first = evaluate(folder, suite, model_name="m", output_dir=tmp_path, encoder=make_encoder())
    saved = tmp_path / "mteb/results/scalemerge__m" / first["revision"]
    (saved / "tiny-pairs.json").unlink()
    cut = saved / "tiny-search.json"
    cut.write_text(cut.read_text()[:200])
    log = saved / "run_settings.jsonl"
    log.write_text(log.read_text()[:-20])
    again = evaluate(folder, suite, model_name="m", output_dir=tmp_path, encoder=make_encoder())
    assert again["scored"] == ["tiny-pairs", "tiny-search"] and again["scores"] == first["scores"]


def test_two_models_of_one_name_and_base_share_no_score(suite, make_model_folder, make_encoder, tmp_path):
    first = evaluate(make_model_folder("a", b"1"), suite, model_name="m", output_dir=tmp_path, encoder=make_encoder())
    other = evaluate(
        make_model_folder("b", b"2"), suite, model_name="m", output_dir=tmp_path, encoder=make_encoder(3.0)
    )
    assert other["revision"] != first["revision"] and len(other["scored"]) == 6
    assert other["scores"]["tiny-sts"] != first["scores"]["tiny-sts"]


def test_changed_data_or_caps_are_scored_again(tiny_data, rows_writer, make_model_folder, make_encoder, tmp_path):
    folder = make_model_folder("m")

    def score(**caps: int):
        suite = layout_suite("t", tiny_data, [("tiny-sts", "sts")], options={"tiny-sts": Options(**caps)})
        return evaluate(folder, suite, model_name="m", output_dir=tmp_path, encoder=make_encoder())

    whole = score()
    assert score()["scored"] == []
    assert score(max_rows=8)["scored"] == ["tiny-sts"]
    assert score()["scored"] == ["tiny-sts"]
    rows = [{"sentence1": "a b", "sentence2": "a c", "score": 3}, {"sentence1": "a", "sentence2": "b", "score": 1.5}]
    rows_writer(tiny_data / "tiny-sts/test.jsonl.gz", rows)
    changed = score()
    assert changed["scored"] == ["tiny-sts"] and changed["scores"] == {"tiny-sts": 100.0} != whole["scores"]


def test_broken_models_are_an_input_error(tiny_data, make_model_folder, make_encoder, tmp_path):
    suite = layout_suite("t", tiny_data, [("tiny-sts", "sts")])
    encoder = make_encoder()
    whole = encoder.encode
    encoder.encode = lambda texts, **_: whole(texts) * float("nan")
    with pytest.raises(InputError, match="contain NaN"):
        evaluate(make_model_folder("nan"), suite, model_name="m", output_dir=tmp_path, encoder=encoder)
    encoder.encode = lambda texts, **_: whole(["same"] * len(texts))
    with pytest.raises(InputError, match="no finite score"):
        evaluate(make_model_folder("flat", b"2"), suite, model_name="m", output_dir=tmp_path, encoder=encoder)


def test_bad_data_stops_before_the_model_is_touched(tiny_data, make_model_folder, make_encoder, tmp_path):
    suite = layout_suite("t", tiny_data, [("tiny-sts", "sts"), ("tiny-search", "retrieval")])
    (tiny_data / "tiny-search/qrels.test.tsv").unlink()
    encoder = make_encoder()
    with pytest.raises(InputError, match=r"qrels\.test\.tsv: no such file"):
        evaluate(make_model_folder("m"), suite, model_name="m", output_dir=tmp_path, encoder=encoder)
    assert encoder.calls == 0


def test_mean_is_over_types_not_tasks(tiny_data):
    suite = layout_suite("t", tiny_data, [("tiny-sts", "sts"), ("tiny-pairs", "sts"), ("tiny-search", "retrieval")])
    by_type, mean = aggregate(suite, {"tiny-sts": 10.0, "tiny-pairs": 30.0, "tiny-search": 80.0})
    assert by_type == {"sts": 20.0, "retrieval": 80.0} and mean == 50.0


def test_hub_tasks_get_their_type_from_mteb_and_unknown_ones_are_refused():
    from scalemerge.evaluation.suites import hub_suite
    from scalemerge.evaluation.tasks import resolve

    resolved = resolve(hub_suite(["STS12", "SciFact"]))
    assert [(task.type, task.metric) for task in resolved] == [("sts", "cosine_spearman"), ("retrieval", "ndcg_at_10")]
    with pytest.raises(InputError, match="does not know the task 'STS99'"):
        resolve(hub_suite(["STS99"]))
