"""Task vectors T_i = W_i - W0, lazily: experts and base stay on disk, memory-mapped, and differences are made in
float32 when asked for, one tensor (or some rows of it) at a time.

Everything that can be wrong with a set of experts is found here, from headers and small files alone, before anything is
computed: another architecture, another vocabulary, a missing or truncated file, an unknown tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import read_json
from scalemerge.checkpoints.reader import Checkpoint
from scalemerge.checkpoints.revision import model_revision
from scalemerge.errors import InputError
from scalemerge.kernels.formats import TaskVector
from scalemerge.task_vectors.formats import Format, compress, decompressed

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


class TaskVectorStore:
    """Base and experts on disk.

    base: folder of the base model. experts: name -> folder, in the order that positions use. form: what task vectors
    are held in; all that is read here, Gram matrices too, is what remains of them in that format.
    """

    def __init__(self, base: str | Path, experts: Mapping[str, str | Path], form: Format = "float32") -> None:
        if not experts:
            raise InputError(f"{base}: no experts given; name at least one expert folder")
        self.form = form
        self.base_folder = Path(base)
        self.base = Checkpoint(base)
        self.experts = list(experts)
        self.folders = [Path(folder) for folder in experts.values()]
        self._checkpoints = [Checkpoint(folder) for folder in self.folders]
        for checkpoint in self._checkpoints:
            self._check(checkpoint)
        shared = set(self.base.specs)
        for checkpoint in self._checkpoints:
            shared &= set(checkpoint.specs)
        #: names of the tensors that base and all experts have, floating point only
        self.names = [name for name, spec in self.base.specs.items() if name in shared and spec.dtype.is_floating_point]

    @cached_property
    def revisions(self) -> list[str]:
        """What identifies the weights of base and experts; hashed once, as it reads every byte."""
        return [model_revision(folder) for folder in (self.base_folder, *self.folders)]

    def _check(self, checkpoint: Checkpoint) -> None:
        ours, theirs = _config(self.base_folder), _config(checkpoint.folder)
        for field in _ARCHITECTURE_FIELDS:
            if ours.get(field) != theirs.get(field):
                raise InputError(
                    f"{checkpoint.folder / 'config.json'}: {field} is {theirs.get(field)!r}, the base's is "
                    f"{ours.get(field)!r} ({self.base_folder}); experts must be trained from this base"
                )
        if ours.get("vocab_size") != theirs.get("vocab_size"):
            raise InputError(
                f"{checkpoint.folder / 'config.json'}: vocab_size is {theirs.get('vocab_size')}, the base's is "
                f"{ours.get('vocab_size')}; use experts with the base's vocabulary"
            )
        for name, spec in checkpoint.specs.items():
            base = self.base.specs.get(name)
            if base is None:
                raise InputError(
                    f"{checkpoint.folder}: tensor '{name}' is not in the base ({self.base_folder}); experts must be "
                    "trained from this base"
                )
            if base.shape != spec.shape:
                raise InputError(
                    f"{checkpoint.folder}: tensor '{name}' has shape {list(spec.shape)}, the base's is "
                    f"{list(base.shape)}; experts must be trained from this base"
                )
        for name, spec in self.base.specs.items():
            if name not in checkpoint.specs and spec.dtype.is_floating_point and not _is_pooler(name):
                raise InputError(
                    f"{checkpoint.folder}: tensor '{name}' is missing; the expert's checkpoint is not complete"
                )

    def task_vector(self, expert: int, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """T_i of a tensor, or rows [start, stop) of it, float32 on the CPU. Raises InputError on NaN or infinity."""
        return decompressed(self._difference(expert, name, start, stop), self.form)

    def _difference(self, expert: int, name: str, start: int | None, stop: int | None) -> Tensor:
        checkpoint = self._checkpoints[expert]
        if start is None or stop is None:
            tuned, base = checkpoint.read(name), self.base.read(name)
        else:
            tuned, base = checkpoint.read_rows(name, start, stop), self.base.read_rows(name, start, stop)
        difference = tuned.to(torch.float32) - base.to(torch.float32)
        if not _is_finite(difference):
            self.base.require_finite(name, base)
            checkpoint.require_finite(name, tuned)
        return difference

    def task_vectors(self, name: str) -> list[Tensor]:
        """T_1 .. T_E of a tensor."""
        return [self.task_vector(expert, name) for expert in range(len(self.experts))]

    def held(self, name: str) -> list[TaskVector]:
        """T_1 .. T_E of a tensor as the merge layers take them, in this store's format."""
        return [compress(self._difference(expert, name, None, None), self.form) for expert in range(len(self.experts))]

    def row_blocks(self, name: str, block_bytes: int = 64 * 2**20) -> Iterator[tuple[int | None, int | None]]:
        """Row ranges of a tensor that keep one float32 block under `block_bytes`; (None, None) for a small one."""
        shape = self.base.specs[name].shape
        if not shape or self.base.specs[name].numel * 4 <= block_bytes:
            yield None, None
            return
        step = max(1, block_bytes // (self.base.specs[name].numel * 4 // shape[0]))
        for start in range(0, shape[0], step):
            yield start, min(shape[0], start + step)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, without a temporary tensor (NaN and infinity pass through min and max)."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _is_pooler(name: str) -> bool:
    return name.startswith("pooler.")


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'}: not a model configuration; give a complete model folder")
    return {**config, **(config.get("text_config") or {})}
