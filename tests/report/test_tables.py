"""The terminal and Markdown tables: groups, bold winners, and names that cannot break the layout."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from scalemerge.report.results import parse_results
from scalemerge.report.tables import markdown_table, print_scores


def printed(results_json: dict[str, Any], *, width: int = 120, detail: bool = False) -> str:
    """What the terminal shows, as plain text."""
    stream = io.StringIO()
    print_scores(parse_results(results_json), detail=detail, console=Console(file=stream, width=width))
    return stream.getvalue()


def test_groups_types_costs_and_verdict_are_printed(results_json: dict[str, Any]) -> None:
    shown = printed(results_json)
    order = [
        shown.index(words) for words in ("Base model", "Experts", "Joint training", "Merges", "Self Positioning 72")
    ]
    assert order == sorted(order)
    assert "Pair classification" in shown
    assert "1.09×" in shown
    assert "cross library sts" not in shown


def test_eighty_columns_keep_every_number(results_json: dict[str, Any]) -> None:
    shown = printed(results_json, width=80)
    assert "…" not in shown
    row = next(line for line in shown.splitlines() if line.strip().startswith("Self Positioning"))
    assert row.split() == ["Self", "Positioning", "66.7", "82.3", "77.7", "51.2", "83.1", "72.2", "781", "1.09×"]


def test_detail_has_every_task(results_json: dict[str, Any]) -> None:
    shown = printed(results_json, detail=True)
    assert all(task["name"].replace("_", " ") in shown for task in results_json["suite"]["tasks"])


def test_the_best_mean_is_bold_in_markdown(results_json: dict[str, Any]) -> None:
    table = markdown_table(parse_results(results_json))
    assert table.count("**72.2**") == 1
    assert "| Expert: retrieval | **69.2** |" in table
    assert "| cross library sts |" in markdown_table(parse_results(results_json), detail=True)


def test_a_partial_mean_neither_shows_nor_wins(results_json: dict[str, Any]) -> None:
    model = results_json["models"]["merge:ties"]
    del model["scores"]["topic_clusters"]
    model["mean"] = 99.0
    assert "99.0" not in printed(results_json)
    assert "99.0" not in markdown_table(parse_results(results_json))


def test_hostile_names_are_only_text(results_json: dict[str, Any]) -> None:
    results_json["models"]["joint:[bold]x|y\x1b[31m\n"] = results_json["models"].pop("joint:uniform")
    shown = printed(results_json)
    assert "[bold]x|y" in shown
    assert "\x1b" not in shown
    table = markdown_table(parse_results(results_json))
    assert "x\\|y" in table
    assert len(table.split("\n\n")[0].splitlines()) == 2 + len(results_json["models"])


def test_an_empty_run_still_prints() -> None:
    assert "No verdict yet" in printed({"schema": 1, "suite": {"name": "s", "tasks": []}, "models": {}})
