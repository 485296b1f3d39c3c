"""The house rules of DESIGN.md that a reader cannot see in one file: floors, names, lazy imports, sizes."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scalemerge"
FLOORS = [
    {"errors", "progress", "kernels", "recipe", "encoder", "checkpoints", "objectives", "report", "distributed"},
    {"task_vectors", "data", "merging", "adapters"},
    {"layers", "training", "evaluation", "mining", "planning", "inspecting"},
    {"positioning"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)
SOURCES += sorted((ROOT / "kernels").rglob("*.py"))


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of scalemerge that a file imports anywhere, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it in full"
            names = [node.module or ""]
            if node.module == "scalemerge":
                names = [f"scalemerge.{alias.name}" for alias in node.names]
        else:
            continue
        assert not any(name == "kernels" or name.startswith("kernels.") for name in names), (
            f"{path}: use scalemerge.kernels"
        )
        found |= {name.split(".")[1] for name in names if name.startswith("scalemerge.")}
    return found - {"__version__"}


IMPORTS = {path: imported_rooms(path) for path in SOURCES}


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in SOURCES} - {"__init__"}
    assert rooms <= set(FLOOR), f"say in DESIGN.md and here where {rooms - set(FLOOR)} stands"
    assert not {room for rooms in IMPORTS.values() for room in rooms} - set(FLOOR)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not IMPORTS[path], "import scalemerge stays light"
        return
    above = {other for other in IMPORTS[path] if FLOOR[other] > FLOOR[room]}
    assert not above, f"{room} imports {above} from a floor above"
    if room in ("training", "positioning"):
        assert not IMPORTS[path] & ({"training", "positioning"} - {room})


def test_no_circle_between_rooms() -> None:
    edges: dict[str, set[str]] = {}
    for path, rooms in IMPORTS.items():
        edges.setdefault(room_of(path), set()).update(rooms - {room_of(path)})
    done: set[str] = set()

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, f"a circle: {' -> '.join((*trail, room))}"
        if room not in done:
            for other in sorted(edges.get(room, ())):
                visit(other, (*trail, room))
            done.add(room)

    for room in sorted(edges):
        visit(room, ())


def test_only_the_recipe_knows_yaml() -> None:
    for path in SOURCES:
        names = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert "yaml" not in names or room_of(path) == "recipe", path


# ---- files -------------------------------------------------------------------------------------------------------


def every_python_file() -> list[Path]:
    folders = [PACKAGE, ROOT / "kernels", ROOT / "tests", ROOT / "benchmarks"]
    return [path for folder in folders if folder.is_dir() for path in folder.rglob("*.py")]


def test_files_can_be_read_in_one_sitting() -> None:
    long = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in every_python_file()}
    assert not {path: lines for path, lines in long.items() if lines > 500}


def test_no_drawers() -> None:
    names = {path.name for path in every_python_file()}
    assert not names & {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}


# ---- imports -----------------------------------------------------------------------------------------------------


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter in the repository root, as a person there would."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_transformers_does_not_import_our_kernels() -> None:
    """transformers imports whatever package is called `kernels`; ours beside it must not be taken for it."""
    shown = python(f"""
        import sys
        from transformers import BertConfig, BertModel
        from transformers.utils import is_kernels_available
        import transformers.integrations.hub_kernels
        BertModel(BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9))
        files = [str(getattr(module, "__file__", None)) for module in sys.modules.values()]
        print([file for file in files if file.startswith({str(ROOT / "kernels")!r})], is_kernels_available())
    """)
    installed = (
        importlib.util.find_spec("kernels") is not None and importlib.util.find_spec("kernels").origin is not None
    )
    assert shown == f"[] {installed}"


def test_a_real_package_called_kernels_wins(tmp_path: Path) -> None:
    """A folder without __init__.py gives way to any package, later on sys.path or not."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("REAL = True\n")
    assert python("import kernels; print(kernels.REAL)", PYTHONPATH=str(tmp_path)) == "True"
    last = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.REAL)"
    assert python(last) == "True"
    assert not (ROOT / "kernels" / "__init__.py").exists()


HEAVY = [
    "mteb",
    "datasets",
    "deepspeed",
    "pydantic",
    "accelerate",
    "typer",
    "rich",
    "sentence_transformers",
    "matplotlib",
]


@pytest.mark.parametrize("room", ["layers", "task_vectors", "kernels"])
def test_what_a_gpu_machine_needs(room: str) -> None:
    """torch, safetensors, transformers and triton; importing anything else there fails."""
    modules = [f"scalemerge.{room}"]
    folder = ROOT / "kernels" if room == "kernels" else PACKAGE / room
    modules += [f"scalemerge.{room}.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"]
    python(f"""
        import importlib, sys
        for name in {HEAVY!r}:
            sys.modules[name] = None
        for name in {sorted(modules)!r}:
            importlib.import_module(name)
    """)


def test_the_package_alone_is_light() -> None:
    loaded = python(
        "import sys, scalemerge.cli; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert loaded == "[]"


# ---- the command line --------------------------------------------------------------------------------------------


def test_help_in_under_a_second() -> None:
    """Best of three: the machine may be busy, the command may not be slow."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-m", "scalemerge", "--help"], cwd=ROOT, capture_output=True, check=False
        )
        best = min(best, time.perf_counter() - began)
        assert ended.returncode == 0
        if best < 1:
            break
    assert best < 1, f"scalemerge --help took {best:.2f} s"


def test_every_verb_shows_an_example() -> None:
    from typer.main import get_command
    from typer.testing import CliRunner

    from scalemerge.cli import app

    verbs = list(get_command(app).commands)
    assert {
        "run",
        "train",
        "position",
        "merge",
        "compress",
        "eval",
        "mine",
        "plan",
        "report",
        "diff",
        "inspect",
        "extract",
    } <= set(verbs)
    for verb in verbs:
        shown = CliRunner().invoke(app, [verb, "--help"])
        assert shown.exit_code == 0
        assert f"Example: scalemerge {verb} " in shown.stdout or f"-m scalemerge {verb} " in " ".join(
            shown.stdout.split()
        )
