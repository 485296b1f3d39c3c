"""The page: self-contained, escaped, deterministic, and honest about what is missing."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scalemerge.errors import InputError
from scalemerge.report.html import write_report
from tests.report.conftest import make_results, write_json, write_run

EXTERNAL = re.compile(
    r"""(?:src|href|srcset|data|action|poster)\s*=\s*["']?\s*(?!\#)[^\s"'>]|url\((?!\#)|@import|<script|<link|<iframe|<img""",
    re.IGNORECASE,
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Outline(HTMLParser):
    """Collects ids and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named: Mapping[str, str | None] = dict(attrs)
        self.ids += [value for name, value in named.items() if name == "id" and value]
        for value in named.values():
            self.targets += re.findall(r"url\(#([^)]+)\)", value or "")
        self.targets += [v[1:] for n, v in named.items() if n in ("href", "xlink:href") and v and v.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: Path) -> str:
    """Write the report and read it back."""
    return write_report(folder).read_text(encoding="utf-8")


def test_the_verdict_stands_in_the_first_screen(run_folder: Path) -> None:
    page = page_of(run_folder)
    body = page[page.index("<body>") :]
    assert body.index("Merging wins") < 1500
    assert "+0.9 over the best joint baseline (proportional, 71.3)" in body[:2000]
    assert not (run_folder / ".report.html").exists()
    assert [path.name for path in run_folder.glob(".report*")] == []


@pytest.mark.parametrize("groups", [1, 12])
def test_nothing_outside_is_referenced_and_all_ids_resolve(tmp_path: Path, groups: int) -> None:
    page = page_of(write_run(tmp_path / "run", groups=groups, steps=40))
    assert EXTERNAL.search(page) is None
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.targets) <= set(outline.ids)


def test_names_from_files_are_escaped(tmp_path: Path, run_folder: Path) -> None:
    evil = '<script>alert("x")</script>'
    text = (run_folder / "results.json").read_text()
    encoded = evil.replace('"', '\\"')
    for name in ("docs_search", "uniform", "Retrieval", "H100"):
        text = text.replace(name, f"{encoded}$x_{name}")
    (run_folder / "results.json").write_text(text)
    path = run_folder / "position" / "coefficients.json"
    path.write_text(path.read_text().replace('"sts"', f'"{encoded}"'))
    path = run_folder / "position" / "history.jsonl"
    path.write_text(path.read_text().replace('"sts"', f'"{encoded}"'))
    (run_folder / "recipe.yaml").write_text(evil)
    page = page_of(run_folder)
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert EXTERNAL.search(page) is None


def test_the_same_run_gives_the_same_bytes(run_folder: Path) -> None:
    assert page_of(run_folder) == page_of(run_folder)


def test_no_path_of_the_machine_is_told(run_folder: Path) -> None:
    assert str(run_folder.parent) not in page_of(run_folder)


@pytest.mark.parametrize("gone", ["position", "experts", "joint", "recipe.yaml", "position/history.jsonl"])
def test_a_piece_may_be_missing(run_folder: Path, gone: str) -> None:
    target = run_folder / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = page_of(run_folder)
    assert "What is missing" in page
    assert gone.split("/")[-1] in page


@pytest.mark.parametrize(
    "kept", [(), ("base",), ("joint:uniform",), ("merge:ties",), ("base", "merge:self_positioning")]
)
def test_any_set_of_models_renders(tmp_path: Path, kept: tuple[str, ...]) -> None:
    results = make_results()
    results["models"] = {key: model for key, model in results["models"].items() if key in kept}
    write_json(tmp_path / "results.json", results)
    page = page_of(tmp_path)
    assert "Merging wins" not in page
    assert "Merging loses" not in page


def test_a_finished_run_has_no_missing_section(run_folder: Path) -> None:
    assert "What is missing" not in page_of(run_folder)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_an_absent_package_is_one_line_that_names_the_extra(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(package), *sys.meta_path])
    with pytest.raises(InputError, match=rf"{package}.*scalemerge\[report\]"):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()


class _Absent:
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
