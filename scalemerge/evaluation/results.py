"""results.json: what was scored, on what, at which cost, in which environment. Needs the standard library only.

Schema 1 (extend it, do not rename):

    {"schema": 1, "suite": {"name", "tasks": [{"name", "type", "metric"}]},
     "models": {"base" | "expert:<task>" | "joint:<name>" | "merge:<method>":
                  {"path", "scores": {task: points}, "by_type", "mean", "cost": {...}, "revision", "seconds"}},
     "environment": {"torch", "device", "cpu_count", "commit", ...}}
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import Suite

SCHEMA = 1
_PACKAGES = ("torch", "transformers", "mteb", "sentence-transformers", "safetensors", "numpy", "scikit-learn")


class TaskEntry(TypedDict):
    """A task of the suite."""

    name: str
    type: str
    metric: str


class SuiteEntry(TypedDict):
    """The suite all models of one file were scored on."""

    name: str
    tasks: list[TaskEntry]


class ModelEntry(TypedDict):
    """One model's scores, in points (0 to 100), and what it cost to make."""

    path: str
    scores: dict[str, float]
    by_type: dict[str, float]
    mean: float
    cost: dict[str, Any]
    revision: NotRequired[str]
    seconds: NotRequired[float]


class Results(TypedDict):
    """The whole file."""

    schema: int
    suite: SuiteEntry
    models: dict[str, ModelEntry]
    environment: dict[str, Any]


def load(path: str | Path) -> Results:
    """Read results.json. Raises InputError for a missing, corrupt or unknown file."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run `scalemerge eval` or `scalemerge run` first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); restore it or evaluate again") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path}: field 'schema' is {found!r}, this version reads {SCHEMA}; evaluate again")
    _require(path, "", content, {"suite": dict, "models": dict, "environment": dict})
    _require(path, "suite.", content["suite"], {"name": str, "tasks": list})
    for number, task in enumerate(content["suite"]["tasks"]):
        _require(path, f"suite.tasks[{number}].", task, {"name": str, "type": str, "metric": str})
    fields: dict[str, Any] = {"path": str, "scores": dict, "by_type": dict, "mean": (int, float), "cost": dict}
    for key, model in content["models"].items():
        _require(path, f"models.{key}.", model, fields)
        for task_name, score in model["scores"].items():
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise InputError(f"{path}: field 'models.{key}.scores.{task_name}' is not a number; evaluate again")
    return cast(Results, content)


def save(path: str | Path, results: Results) -> None:
    """Write results.json in one step: a reader, or a run that is killed, never sees half a file."""
    path = Path(path)
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner only
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def record_model(
    path: str | Path,
    suite: Suite,
    model_key: str,
    model_path: str | Path,
    scores: Mapping[str, Any],
    cost: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
) -> Results:
    """Add or replace one model in results.json (made where there is none) and return the whole.

    scores: what `evaluate` returned. `cost` of None keeps what an earlier record of this model said.
    Raises InputError where the file holds scores of another suite: their means cannot be compared.
    """
    path = Path(path)
    resolved: Suite = scores.get("suite", suite)
    described = cast(SuiteEntry, resolved.describe())
    if path.exists():
        results = load(path)
        if results["suite"]["tasks"] != described["tasks"]:
            raise InputError(f"{path}: holds scores of suite '{results['suite']['name']}' with other tasks than "
                             f"'{described['name']}'; write to another folder")  # fmt: skip
    else:
        results = Results(schema=SCHEMA, suite=described, models={}, environment={})
    before = results["models"].get(model_key)
    entry = ModelEntry(
        path=str(model_path),
        scores=dict(scores["scores"]),
        by_type=dict(scores["by_type"]),
        mean=scores["mean"],
        cost=dict(cost) if cost is not None else (before["cost"] if before else {}),
    )
    if "revision" in scores:
        entry["revision"] = scores["revision"]
    if "seconds" in scores:
        entry["seconds"] = scores["seconds"]
    results["models"][model_key] = entry
    results["environment"] = environment(device)
    save(path, results)
    return results


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions (None where a package is absent), machine, commit and date; imports none of the packages."""
    versions: dict[str, Any] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cpu_count": os.cpu_count(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of scalemerge's own checkout; None when installed elsewhere, even inside another repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        asked = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[1] if Path(answer[0]).resolve() == root else None


def _require(path: Path, prefix: str, content: Any, fields: Mapping[str, Any]) -> None:
    for name, kind in fields.items():
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: field '{prefix}{name}' is missing or of another type; evaluate again")
