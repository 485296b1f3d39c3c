"""What a killed search continues from: one small safetensors file, written by rank 0 and read for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scalemerge.checkpoints.atomic import new_file
from scalemerge.errors import InputError

STATE = "state.safetensors"


@dataclass
class State:
    """Where a search stands, beside its tensors; floats survive JSON exactly."""

    step: int = 0
    scales: dict[str, float] = field(default_factory=dict)
    start_validation: float = 0.0
    best_validation: float = float("inf")
    best_step: int = 0
    without_improvement: int = 0
    cost: dict[str, Any] = field(default_factory=dict)


def save_state(folder: Path, key: str, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write the state under its name when it is whole."""
    described = {"key": key, "state": json.dumps(asdict(state))}
    content = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with new_file(folder / STATE) as file:
        file.write(save(content, metadata=described))


def load_state(folder: Path, key: str) -> tuple[State, dict[str, Tensor]] | None:
    """The state written last, or None. Raises InputError for one of another search, or a spoilt file."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = State(**json.loads(metadata["state"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: truncated or corrupt ({error}); delete it to search from the start") from None
    if metadata.get("key") != key:
        raise InputError(f"{path}: belongs to other experts, probe rows or settings; delete {folder}")
    return state, tensors
