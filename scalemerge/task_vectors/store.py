"""Task vectors T_i of experts on disk, lazily: everything stays memory-mapped, and one tensor (or some rows of it) is
read, and where experts are whole models subtracted in float32, when it is asked for.

Experts of all kinds (experts.py) may be mixed. What can be wrong with a set of experts is found here, from headers and
small files alone, before anything is computed: another architecture, another vocabulary, a missing or truncated file,
an unknown tensor. What was made from another base is found by hash, which reads every byte of the base, so only where
an expert names its base.

Experts of a store with a shared base are T_i = S + R_i. Layers then hold the terms R_1 .. R_E, S, with coefficients
mixing @ c: S enters once, with the sum of its experts' coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from scalemerge.checkpoints.reader import Checkpoint
from scalemerge.checkpoints.revision import model_revision
from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank, TaskVector, dense_block
from scalemerge.task_vectors.experts import Expert, FullExpert, open_expert
from scalemerge.task_vectors.formats import Format
from scalemerge.task_vectors.stored import Rows, StoredExpert, StoredFolder


class TaskVectorStore:
    """Base and experts on disk.

    base: folder of the base model. experts: name -> folder, in the order that positions use. form: what task vectors of
    full checkpoints are held in; stored ones and adapters keep their own format. All that is read here, Gram matrices
    too, is what remains of them in that format.
    verify: hash the base now, where an expert names the base that it was made from; without it, `revisions` does.
    """

    def __init__(
        self, base: str | Path, experts: Mapping[str, str | Path], form: Format = "float32", *, verify: bool = True
    ) -> None:
        if not experts:
            raise InputError(f"{base}: no experts given; name at least one expert folder")
        self.form = form
        self.base_folder = Path(base)
        self.base = Checkpoint(base)
        self.experts = list(experts)
        self.folders = [Path(folder) for folder in experts.values()]
        opened: dict[Path, StoredFolder] = {}

        def open_shared(folder: Path) -> StoredFolder:
            return opened.setdefault(folder, opened.get(folder) or StoredFolder(folder))

        self.members: list[Expert] = [open_expert(folder, self.base, form, open_shared) for folder in self.folders]
        known = frozenset.intersection(*(member.names for member in self.members))
        #: names of the tensors that base and all experts have, floating point only
        self.names = [name for name, spec in self.base.specs.items() if name in known and spec.dtype.is_floating_point]
        uses = [member.shared if isinstance(member, StoredExpert) else None for member in self.members]
        #: each shared base in use, once
        self.shared = list({one.description["sha256"]: one for one in uses if one is not None}.values())
        #: what `held` gives one task vector for: every expert, then every shared base
        self.terms = [*self.experts, *("shared" if not i else f"shared {i + 1}" for i in range(len(self.shared)))]
        #: [terms, E] float32: coefficients of the terms from those of the experts; None where they are the same
        self.mixing: Tensor | None = None
        if self.shared:
            rows = [
                [float(use is not None and use.description["sha256"] == one.description["sha256"]) for use in uses]
                for one in self.shared
            ]
            self.mixing = torch.cat([torch.eye(len(self.experts)), torch.tensor(rows)])
        if verify:
            self.require_base()

    @cached_property
    def base_revision(self) -> str:
        """What identifies the base; reads every byte."""
        return model_revision(self.base_folder)

    def require_base(self) -> None:
        """Raise InputError for an expert that was made from another base. Hashes the base where an expert names one."""
        for member in self.members:
            member.require_base(self.base_folder, lambda: self.base_revision)

    @cached_property
    def revisions(self) -> list[str]:
        """What identifies the weights of base and experts; hashed once, as it reads every byte. See require_base."""
        self.require_base()
        return [self.base_revision, *(member.revision for member in self.members)]

    @property
    def held_bytes(self) -> int:
        """Bytes of all task vectors as they are held, a shared base once."""
        return sum(part.nbytes for part in self._parts)

    @property
    def _parts(self) -> list[Expert | StoredFolder]:
        """What each of `terms` lies in."""
        return [*self.members, *self.shared]

    def task_vector(
        self, expert: int, name: str, start: int | None = None, stop: int | None = None, base: Tensor | None = None
    ) -> Tensor:
        """T_i of a tensor, or rows [start, stop) of it, float32 on the CPU. Raises InputError on NaN or infinity.

        base: W0 of these rows, float32, where the caller has read it already.
        """
        rows = None if start is None or stop is None else (start, stop)
        member = self.members[expert]
        if isinstance(member, FullExpert) and member.form == "float32":
            return member.difference(name, rows, base)
        vector = self._dense(member.held(name, rows), name, rows)
        if isinstance(member, StoredExpert) and member.shared is not None:
            vector = vector + self._dense(member.shared.held(name, rows), name, rows)
        return vector

    def task_vectors(self, name: str) -> list[Tensor]:
        """T_1 .. T_E of a tensor."""
        return [self.task_vector(expert, name) for expert in range(len(self.experts))]

    def held(self, name: str, rows: Rows = None) -> list[TaskVector]:
        """The terms of a tensor as the merge layers take them, one for each of `terms`, each in its own format.

        rows: (start, stop); only these are read (of a low-rank one, the whole of a besides).
        """
        return [self._zero(name, rows) if (vector := part.held(name, rows)) is None else vector for part in self._parts]

    def _shape(self, name: str, rows: Rows) -> tuple[int, ...]:
        shape = self.base.specs[name].shape
        return shape if rows is None else (rows[1] - rows[0], *shape[1:])

    def _dense(self, vector: TaskVector | None, name: str, rows: Rows) -> Tensor:
        return torch.zeros(self._shape(name, rows)) if vector is None else dense_block(vector).to(torch.float32)

    def _zero(self, name: str, rows: Rows) -> TaskVector:
        """A task vector that is nothing, of rank 1 where it can be, so that it takes no memory."""
        shape = self._shape(name, rows)
        if len(shape) != 2:
            return torch.zeros(shape)
        return LowRank(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1))

    def row_blocks(self, name: str, block_bytes: int = 64 * 2**20) -> Iterator[tuple[int | None, int | None]]:
        """Row ranges of a tensor that keep one float32 block under `block_bytes`; (None, None) for a small one."""
        shape = self.base.specs[name].shape
        if not shape or self.base.specs[name].numel * 4 <= block_bytes:
            yield None, None
            return
        step = max(1, block_bytes // (self.base.specs[name].numel * 4 // shape[0]))
        for start in range(0, shape[0], step):
            yield start, min(shape[0], start + step)
