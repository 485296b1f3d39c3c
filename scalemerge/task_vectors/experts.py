"""What an expert may be on disk, behind one interface: a full checkpoint, a stored task vector, or a LoRA adapter.

    full checkpoint        config.json and safetensors, single or sharded; T = W - W0, in a format chosen when reading
    stored task vector     task_vectors.json (stored.py); keeps its own format
    LoRA adapter           adapter_config.json without a config.json (adapters.py); stays low rank

Which one it is shows in the folder's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import read_json
from scalemerge.checkpoints.reader import Checkpoint, TensorSpec
from scalemerge.checkpoints.revision import model_revision
from scalemerge.encoder.folders import ADAPTER_CONFIG
from scalemerge.errors import InputError
from scalemerge.kernels.formats import TaskVector
from scalemerge.task_vectors.adapters import AdapterExpert
from scalemerge.task_vectors.formats import DEFAULT_GROUP_SIZE, Format, compress
from scalemerge.task_vectors.stored import DESCRIPTION, Rows, StoredExpert, StoredFolder, parts_of

# What must agree between a base and its experts for the difference of their weights to mean anything.
_ARCHITECTURE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "hidden_act",
)


class Expert(Protocol):
    """An expert on disk. changed: tensors it may have a task vector for. names: those, and those it says are zero."""

    folder: Path

    @property
    def names(self) -> frozenset[str]: ...

    @property
    def changed(self) -> frozenset[str]: ...

    def held(self, name: str, rows: Rows = None) -> TaskVector | None:
        """T of a tensor, or rows [start, stop) of it; None for zero. Raises InputError on NaN or infinity."""

    def require_base(self, folder: Path, revision: Callable[[], str]) -> None:
        """Raise InputError unless it belongs to the base in `folder`; revision() hashes that one."""

    @property
    def nbytes(self) -> int:
        """Bytes of what `held` gives, in memory."""

    @property
    def revision(self) -> str:
        """What identifies it. Reads every byte."""


def open_expert(
    folder: str | Path,
    base: Checkpoint,
    form: Format,
    open_shared: Callable[[Path], StoredFolder],
) -> Expert:
    """The expert in a folder. form: what a full checkpoint's task vector is held in.

    Raises InputError for whatever does not fit the base or is none of the three kinds.
    """
    folder = Path(folder)
    if (folder / DESCRIPTION).is_file():
        return StoredExpert(folder, base.specs, open_shared)
    if (folder / "config.json").is_file():
        return FullExpert(folder, base, form)
    if (folder / ADAPTER_CONFIG).is_file():
        return AdapterExpert(folder, base.specs, base.folder)
    inside = sorted(path.parent.name for path in folder.glob(f"*/{DESCRIPTION}"))
    if inside:
        raise InputError(f"{folder}: is a whole store; give the folder of one expert in it: {', '.join(inside)}")
    return FullExpert(folder, base, form)


class FullExpert:
    """A whole model, whose task vectors are differences from the base, made in float32 when asked for."""

    def __init__(self, folder: Path, base: Checkpoint, form: Format) -> None:
        self.folder, self.form = folder, form
        self._base = base
        self._tuned = Checkpoint(folder)
        self._check()
        self.changed = self.names = frozenset(
            name for name, spec in base.specs.items() if name in self._tuned.specs and spec.dtype.is_floating_point
        )

    def _check(self) -> None:
        folder, specs = self.folder, self._tuned.specs
        ours, theirs = _config(self._base.folder), _config(folder)
        for field in _ARCHITECTURE_FIELDS:
            if ours.get(field) != theirs.get(field):
                raise InputError(
                    f"{folder / 'config.json'}: {field} is {theirs.get(field)!r}, the base's is {ours.get(field)!r} "
                    f"({self._base.folder}); experts must be trained from this base"
                )
        if ours.get("vocab_size") != theirs.get("vocab_size"):
            raise InputError(
                f"{folder / 'config.json'}: vocab_size is {theirs.get('vocab_size')}, the base's is "
                f"{ours.get('vocab_size')}; use experts with the base's vocabulary"
            )
        for name, spec in specs.items():
            base = self._base.specs.get(name)
            if base is None:
                raise InputError(
                    f"{folder}: tensor '{name}' is not in the base ({self._base.folder}); experts must be trained from "
                    "this base"
                )
            if base.shape != spec.shape:
                raise InputError(
                    f"{folder}: tensor '{name}' has shape {list(spec.shape)}, the base's is {list(base.shape)}; "
                    "experts must be trained from this base"
                )
        for name, spec in self._base.specs.items():
            if name not in specs and spec.dtype.is_floating_point and not name.startswith("pooler."):
                raise InputError(f"{folder}: tensor '{name}' is missing; the expert's checkpoint is not complete")

    def held(self, name: str, rows: Rows = None) -> TaskVector | None:
        return compress(self.difference(name, rows), self.form) if name in self._tuned.specs else None

    def difference(self, name: str, rows: Rows, base: Tensor | None = None) -> Tensor:
        """W - W0, float32. base: W0 of these rows, float32, where it has been read already."""
        tuned = self._tuned.read(name) if rows is None else self._tuned.read_rows(name, *rows)
        if base is None:
            base = self._base.read(name) if rows is None else self._base.read_rows(name, *rows)
        if rows is not None and tuned.dtype == torch.float32:
            difference = tuned.sub_(base)  # read_rows gave a copy of its own
        else:
            difference = tuned.to(torch.float32) - base.to(torch.float32)
        if not _is_finite(difference):
            self._base.require_finite(name, base)
            self._tuned.require_finite(name, difference)
        return difference

    def require_base(self, folder: Path, revision: Callable[[], str]) -> None:
        """A full checkpoint does not say what it was trained from; its shapes were compared when it was opened."""

    @property
    def nbytes(self) -> int:
        return sum(_held_bytes(self._base.specs[name], self.form) for name in self.changed)

    @cached_property
    def revision(self) -> str:
        return model_revision(self.folder)


def _held_bytes(spec: TensorSpec, form: Format) -> int:
    stays = form in ("int8", "int4") and len(spec.shape) != 2
    parts = parts_of("float32" if stays else form, spec.shape, DEFAULT_GROUP_SIZE, None)
    return sum(part.nbytes for part in parts.values())


def _is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, without a temporary tensor (NaN and infinity pass through min and max)."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _config(folder: Path) -> Mapping[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: not a model configuration; give a complete model folder")
    return {**config, **(config.get("text_config") or {})}
