"""docs/plans.md holds what `scalemerge plan` prints today. To write it anew: python tests/planning/test_pages.py"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalemerge.cli import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "plans.md"
BLOCK = re.compile(r"```console\n\$ scalemerge (plan [^\n]*)\n(.*?)```", re.DOTALL)


def printed(command: str) -> str:
    result = CliRunner().invoke(app, [part.replace("recipes/", f"{ROOT}/recipes/") for part in shlex.split(command)])
    assert result.exit_code == 0, result.output
    return "".join(f"{line.rstrip()}\n" for line in result.output.splitlines() if line.strip())


@pytest.mark.parametrize(("command", "text"), BLOCK.findall(PAGE.read_text()))
def test_the_page_shows_what_is_printed(command: str, text: str) -> None:
    assert printed(command) == text


def test_the_page_shows_each_backbone() -> None:
    shown = " ".join(command for command, _ in BLOCK.findall(PAGE.read_text()))
    assert all(f"qwen3-{size}.yaml" in shown for size in ("0.6b", "4b", "8b"))


if __name__ == "__main__":
    renewed = BLOCK.sub(lambda m: f"```console\n$ scalemerge {m[1]}\n{printed(m[1])}```", PAGE.read_text())
    PAGE.write_text(renewed)
