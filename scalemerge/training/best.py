"""The weights of the best evaluation so far, on disk until the model is written.

Each is a folder of its own, `best-00000120` for step 120, written under a temporary name and renamed. The one that the
last checkpoint knows of stays until a later checkpoint knows a better: a run that is killed and resumed thus stands
exactly where it stood, also when it then takes another course (another engine rounds differently).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from scalemerge.checkpoints.atomic import remove_folder, write_json
from scalemerge.encoder import Encoder
from scalemerge.errors import InputError
from scalemerge.progress import say
from scalemerge.training.engine import Engine
from scalemerge.training.state import save_weights


class BestWeights:
    """kept: the record of the evaluation whose weights are kept (see Validation.run), None before the first.

    All methods but the constructor are collective.
    """

    def __init__(self, engine: Engine, encoder: Encoder, base: Path, work: Path, dtype: torch.dtype) -> None:
        self.engine, self.encoder, self.base, self.work, self.dtype = engine, encoder, base, work, dtype
        self.kept: dict[str, Any] | None = None
        self._in_checkpoint: dict[str, Any] | None = None

    def offer(self, record: dict[str, Any]) -> bool:
        """Keep the present weights if they score higher than all before; of equal ones the earlier stay."""
        if self.kept is not None and record["score"] <= self.kept["score"]:
            return False
        final, temporary = self._folder(record), self.work / "partial-best"
        if self.engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        save_weights(self.engine, self.encoder, self.base, temporary, self.dtype)
        if self.engine.rank == 0:
            write_json(temporary / "best.json", record)
            remove_folder(final)
            temporary.rename(final)
        self.kept = record
        self._drop_others()
        return True

    def checkpointed(self) -> None:
        """A checkpoint with the present `kept` has been written."""
        self._in_checkpoint = self.kept
        self._drop_others()

    def restore(self, kept: dict[str, Any] | None) -> None:
        """What a checkpoint knew, None at the start. Raises InputError where its weights are gone."""
        self.kept = self._in_checkpoint = kept
        self.engine.from_first_rank(self._require_kept)
        self._drop_others()

    def place(self, folder: Path) -> None:
        """Put the kept weights file into a folder; they stay where they are too."""
        assert self.kept is not None
        if self.engine.rank == 0:
            say(f"keeps the weights of step {self.kept['step']}, which scored {self.kept['score']:.4f}")
            source, target = self._folder(self.kept) / self.encoder.weights_file, folder / self.encoder.weights_file
            try:
                os.link(source, target)
            except OSError:  # a file system without links
                shutil.copy(source, target)

    def _folder(self, record: dict[str, Any]) -> Path:
        return self.work / f"best-{record['step']:08d}"

    def _require_kept(self) -> None:
        if self.kept and not (self._folder(self.kept) / self.encoder.weights_file).is_file():
            raise InputError(f"{self._folder(self.kept)}: the best weights so far are gone; delete {self.work}")

    def _drop_others(self) -> None:
        if self.engine.rank != 0:
            return
        known = {self._folder(record) for record in (self.kept, self._in_checkpoint) if record}
        for folder in self.work.glob("best-*"):
            if folder not in known:
                remove_folder(folder)
