"""Absence is a note, damage is an error that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scalemerge.errors import InputError
from scalemerge.report.reading import read_run
from tests.report.conftest import make_results, write_json


def test_a_finished_run_misses_nothing(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.missing == ()
    assert run.position is not None
    assert run.position.experts == ("retrieval", "sts", "classification", "clustering")
    assert len(run.history) == 120
    assert run.history[-1].c["global"] == pytest.approx(run.position.c["global"])
    assert len(run.training) == 7
    assert [model.key for model in run.results.models][-1] == "merge:self_positioning"


def test_a_run_with_results_only_lists_what_is_missing(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", make_results())
    run = read_run(tmp_path)
    notes = "\n".join(run.missing)
    for what in ("coefficients.json", "history.jsonl", "experts/sts/training.jsonl", "joint/uniform", "recipe.yaml"):
        assert what in notes


def test_no_results_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no results\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2}', '{"schema": 1, "models": {"base": 3}}', "\xff"])
def test_damaged_results_name_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"results\.json") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_score_that_is_no_number_names_its_field(tmp_path: Path) -> None:
    results = make_results()
    results["models"]["base"]["scores"]["docs_search"] = "61"
    write_json(tmp_path / "results.json", results)
    with pytest.raises(InputError, match=r"models\.base\.scores\.docs_search"):
        read_run(tmp_path)


def test_a_last_line_cut_short_is_a_note_and_one_in_the_middle_an_error(run_folder: Path) -> None:
    log = run_folder / "position" / "history.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 121, "lo')
    run = read_run(run_folder)
    assert len(run.history) == 120
    assert any("cut short" in note for note in run.missing)
    log.write_text('{"step": 1, "lo\n' + whole)
    with pytest.raises(InputError, match="line 1"):
        read_run(run_folder)


def test_a_resumed_search_overwrites_its_steps(run_folder: Path) -> None:
    log = run_folder / "position" / "history.jsonl"
    again = json.loads(log.read_text().splitlines()[49]) | {"loss": 7.0}
    log.write_text(log.read_text() + json.dumps(again) + "\n")
    run = read_run(run_folder)
    assert len(run.history) == 120
    assert run.history[49].loss == 7.0


def test_coefficients_of_the_wrong_length_are_refused(run_folder: Path) -> None:
    path = run_folder / "position" / "coefficients.json"
    raw = json.loads(path.read_text())
    raw["c"] = {"global": [0.1]}
    write_json(path, raw)
    with pytest.raises(InputError, match=r"coefficients\.json: c\.global"):
        read_run(run_folder)


def test_names_in_results_never_lead_outside_the_run(tmp_path: Path, run_folder: Path) -> None:
    shutil.copy(run_folder / "experts" / "sts" / "training.jsonl", tmp_path / "training.jsonl")
    results = make_results()
    results["models"]["expert:../.."] = results["models"]["base"]
    write_json(run_folder / "results.json", results)
    assert "expert:../.." not in read_run(run_folder).training


def test_means_are_computed_where_the_file_has_none(tmp_path: Path) -> None:
    results = make_results()
    expected = {key: model.pop("mean") for key, model in results["models"].items()}
    for model in results["models"].values():
        del model["by_type"]
    write_json(tmp_path / "results.json", results)
    for model in read_run(tmp_path).results.models:
        assert model.mean == pytest.approx(expected[model.key])
