"""Write a store of compressed task vectors, a folder an expert, tensor by tensor:

    OUT/EXPERT/     task_vectors.json and task_vectors.safetensors (stored.py), and the small files that make the expert
                    a sentence-transformers folder (pooling, prompts), for the models merged from it
    OUT/shared/     with a shared base: S, the mean of the task vectors; the experts' folders then hold T_i - S', where
                    S' is what is stored of S, so that its error is not theirs
    OUT/errors.csv  what each module lost (measuring.py)

The peak is one block of rows in float32, its copies, and one tensor compressed; for svd one whole matrix in float64. A
folder appears under its name when it is whole, and is not written again when it is there with the same content.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import (
    PARTIAL,
    explain_os_error,
    new_folder,
    read_json,
    require_writable,
    write_json,
    write_text,
)
from scalemerge.checkpoints.revision import content_key
from scalemerge.checkpoints.writer import write_safetensors
from scalemerge.errors import InputError
from scalemerge.kernels.formats import GROUP_SIZES, TaskVector, dense_block
from scalemerge.progress import Progress, say
from scalemerge.task_vectors.formats import DEFAULT_GROUP_SIZE, compress, low_rank
from scalemerge.task_vectors.measuring import ModuleError, Sums, by_module, errors_csv, summary
from scalemerge.task_vectors.store import TaskVectorStore
from scalemerge.task_vectors.stored import (
    DESCRIPTION,
    SCHEMA,
    WEIGHTS,
    Rows,
    StoredFolder,
    file_digest,
    parts_of,
    split,
)

StoredFormat = Literal["int8", "int4", "bfloat16", "svd"]
STORED_FORMATS: tuple[StoredFormat, ...] = get_args(StoredFormat)
SHARED, ERRORS = "shared", "errors.csv"
_BLOCK_BYTES = 8 * 2**20
_MODULE_FILES = ("modules.json", "sentence_bert_config.json", "sentence_transformer_config.json",
                 "config_sentence_transformers.json")  # fmt: skip


@dataclass(frozen=True)
class Compression:
    """How task vectors are stored. group_size: of int8 and int4. rank: of svd. Raises InputError for bad values."""

    form: StoredFormat = "int4"
    group_size: int = DEFAULT_GROUP_SIZE
    rank: int = 16
    shared_base: bool = False

    def __post_init__(self) -> None:
        if self.form not in STORED_FORMATS:
            raise InputError(f"--format {self.form}: choose one of {', '.join(STORED_FORMATS)}")
        if self.group_size not in GROUP_SIZES:
            raise InputError(f"--group-size {self.group_size}: choose one of {', '.join(map(str, GROUP_SIZES))}")
        if self.rank < 1:
            raise InputError(f"--rank {self.rank}: give 1 or more")

    def form_of(self, shape: tuple[int, ...]) -> str:
        """How a tensor of a shape lies in the file."""
        if self.form == "bfloat16" or (self.form == "svd" and len(shape) != 2):
            return "bfloat16"
        if len(shape) != 2:
            return "float32"
        return "low_rank" if self.form == "svd" else self.form

    def apply(self, exact: Tensor) -> TaskVector:
        """A float32 task vector, or rows of it (not with svd), as it is stored."""
        form = self.form_of(tuple(exact.shape))
        if form == "low_rank":
            return low_rank(exact, self.rank)
        return compress(exact, form, self.group_size, fit=True)  # type: ignore[arg-type]

    @property
    def described(self) -> dict[str, Any]:
        grouped = self.form in ("int8", "int4")
        return {
            "format": self.form,
            "group_size": self.group_size if grouped else None,
            "rank": self.rank if self.form == "svd" else None,
        }


@dataclass(frozen=True)
class Written:
    """What is in the store: errors by expert and module, bytes of all tensors, the same in bfloat16."""

    errors: list[ModuleError]
    nbytes: int
    bfloat16_bytes: int

    def lines(self) -> list[str]:
        return summary(self.errors, self.nbytes, self.bfloat16_bytes)


def write_store(store: TaskVectorStore, out: Path, how: Compression) -> Written:
    """Write the experts of `store` into the folder `out`; those that are there already are kept.

    Raises InputError for names that are no folders, something else standing there, NaN or infinity, a full disk.
    """
    _check_names(store.experts, how)
    base, *revisions = store.revisions
    own = [content_key([SCHEMA, asdict(how), base, revision]) for revision in revisions]
    all_of_them = content_key([SCHEMA, asdict(how), base, sorted(revisions)])
    keys = [content_key([key, all_of_them]) for key in own] if how.shared_base else own
    require_writable(out)
    whole = {name: _is_whole(out / name, key) for name, key in zip(store.experts, keys, strict=True)}
    shared: StoredFolder | None = None
    if how.shared_base:
        whole[SHARED] = _is_whole(out / SHARED, all_of_them)
        if not whole[SHARED]:
            _Writer(store, how, None, None, all_of_them).write(out / SHARED)
            whole = dict.fromkeys(whole, False)  # they are differences from what has been written just now
        shared = StoredFolder(out / SHARED)
    for number, (name, key) in enumerate(zip(store.experts, keys, strict=True)):
        if whole[name]:
            say(f"compressing {name}: is there already")
        else:
            _Writer(store, how, number, shared, key).write(out / name)
    written = _read_back(store, out, shared)
    write_text(out / ERRORS, errors_csv(written.errors))
    return written


class _Writer:
    """Writes one folder: expert `number`, less the shared base where there is one; or with None the shared base."""

    def __init__(
        self, store: TaskVectorStore, how: Compression, number: int | None, shared: StoredFolder | None, key: str
    ) -> None:
        self.store, self.how, self.number, self.shared, self.key = store, how, number, shared, key
        members = range(len(store.experts)) if number is None else [number]
        self.names = [
            name for name in store.names
            if (shared is not None and name in shared.forms) or any(_changed(store, i, name) for i in members)
        ]  # fmt: skip
        self.sums: dict[str, Sums] = {}

    def write(self, final: Path) -> None:
        store, shape = self.store, {name: self.store.base.specs[name].shape for name in self.names}
        described = self.how.described
        forms = {name: self.how.form_of(shape[name]) for name in self.names}
        parts = {name: parts_of(forms[name], shape[name], described["group_size"], described["rank"])
                 for name in self.names}  # fmt: skip
        specs = {name + suffix: spec for name in self.names for suffix, spec in parts[name].items()}
        waiting: dict[str, Tensor] = {}
        total = sum(store.base.specs[name].numel for name in self.names) * 4
        with new_folder(final) as folder, Progress(f"compressing {final.name}", total // 2**20, unit="MiB") as progress:
            done = 0

            def made(part: str) -> Tensor:
                nonlocal done
                if not waiting:
                    name = next(names)
                    waiting.update({name + suffix: tensor for suffix, tensor in self._compressed(name).items()})
                    before, done = done, done + store.base.specs[name].numel * 4
                    progress.advance(done // 2**20 - before // 2**20)
                return waiting.pop(part)

            names = iter(self.names)
            write_safetensors(folder / WEIGHTS, specs, made)
            if self.number is not None:
                _carry_modules(store.folders[self.number], folder)
            tensors = {name: {"shape": list(shape[name]), "form": forms[name], "sums": asdict(self.sums[name])}
                       for name in self.names}  # fmt: skip
            write_json(folder / DESCRIPTION, self._description(folder, described, tensors))

    def _description(self, folder: Path, described: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
        store, number = self.store, self.number
        base, *revisions = store.revisions
        digest = None if self.shared is None else self.shared.description["sha256"]
        return {
            "schema": SCHEMA,
            **described,
            "base": {"path": str(store.base_folder), "revision": base},
            "expert": None if number is None else {"name": store.experts[number], "revision": revisions[number]},
            "shared": None if digest is None else {"folder": SHARED, "sha256": digest},
            "sha256": file_digest(folder / WEIGHTS),
            "key": self.key,
            "unchanged": sorted(set(store.names) - set(self.names)),
            "tensors": tensors,
        }

    def _compressed(self, name: str) -> dict[str, Tensor]:
        """The parts of a tensor, made block by block of rows, and its sums."""
        whole = self.how.form_of(self.store.base.specs[name].shape) == "low_rank"
        blocks = [(None, None)] if whole else self.store.row_blocks(name, _BLOCK_BYTES)
        made: list[dict[str, Tensor]] = []
        sums = Sums()
        for start, stop in blocks:
            rows = None if start is None or stop is None else (start, stop)
            exact, before = self._exact(name, rows), self._of_shared(name, rows)
            vector = self.how.apply(exact if before is None else exact - before)
            kept = dense_block(vector).float()
            base = self.store.base
            own = base.read(name) if rows is None else base.read_rows(name, *rows)
            sums += Sums.of(exact, kept if before is None else kept + before, own)
            made.append(split(vector))
        if not all(map(_is_finite, astuple(sums))):
            raise InputError(f"{self.store.base_folder}: the task vector of '{name}' is too large for {self.how.form}")
        self.sums[name] = sums
        return made[0] if len(made) == 1 else {suffix: torch.cat([one[suffix] for one in made]) for suffix in made[0]}

    def _exact(self, name: str, rows: Rows) -> Tensor:
        start, stop = rows or (None, None)
        if self.number is not None:
            return self.store.task_vector(self.number, name, start, stop)
        total = self.store.task_vector(0, name, start, stop).clone()
        for number in range(1, len(self.store.experts)):
            total += self.store.task_vector(number, name, start, stop)
        return total / len(self.store.experts)

    def _of_shared(self, name: str, rows: Rows) -> Tensor | None:
        held = None if self.shared is None else self.shared.held(name, rows)
        return None if held is None else dense_block(held).float()


def _is_finite(value: float) -> bool:
    return value - value == 0


def _changed(store: TaskVectorStore, number: int, name: str) -> bool:
    """Whether an expert has changed a tensor; reads up to the first block that differs."""
    if name not in store.members[number].changed:
        return False
    return any(bool(store.task_vector(number, name, *block).any()) for block in store.row_blocks(name, _BLOCK_BYTES))


def _check_names(experts: Iterable[str], how: Compression) -> None:
    taken = {".", "..", "", ERRORS, *([SHARED] if how.shared_base else [])}
    for name in experts:
        if name in taken or Path(name).name != name or name.endswith(PARTIAL) or "\0" in name:
            raise InputError(f"--expert {name}: cannot be the name of a folder of the store; name it otherwise")


def _is_whole(folder: Path, key: str) -> bool:
    """Whether a folder has been written, every byte of it. Raises InputError when something else stands there."""
    if not folder.exists() and not folder.is_symlink():
        return False
    if folder.is_symlink() or not (folder / DESCRIPTION).is_file():
        raise InputError(f"{folder}: exists and holds no task vectors; move it or give another --out")
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("key") != key:
        raise InputError(f"{folder}: holds task vectors of other experts or settings; delete it or give another --out")
    try:
        return bool(StoredFolder(folder).digest)
    except InputError as error:
        say(f"{error}: writing it again")
        return False


def _read_back(store: TaskVectorStore, out: Path, shared: StoredFolder | None) -> Written:
    """The errors and bytes of all experts, from their folders."""
    errors: list[ModuleError] = []
    nbytes = shared.nbytes if shared else 0
    for name in store.experts:
        folder = StoredFolder(out / name)
        tensors = {}
        for tensor, each in folder.description["tensors"].items():
            parts = parts_of(each["form"], tuple(each["shape"]), folder.group_size, folder.description["rank"])
            size = sum(spec.nbytes for spec in parts.values())
            tensors[tensor] = Sums(**each["sums"]), size, 2 * store.base.specs[tensor].numel
        errors += by_module(name, tensors)
        nbytes += folder.nbytes
    return Written(errors, nbytes, sum(each.bfloat16_bytes for each in errors))


def _carry_modules(source: Path, target: Path) -> None:
    """What makes a folder one of sentence-transformers: pooling, normalization, prompts; no weights, no tokenizer."""
    if not (source / "modules.json").is_file():
        return
    modules = read_json(source / "modules.json")
    paths = [str(module.get("path", "")) for module in modules if isinstance(module, dict)]
    inside = [path for path in paths if path and Path(path).name == path and path not in (".", "..")]
    files = [Path(name) for name in _MODULE_FILES] + [Path(path) / "config.json" for path in inside]
    try:
        for file in files:
            if (source / file).is_file():
                (target / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / file, target / file)
    except OSError as error:
        raise explain_os_error(error, target) from None


def compress_folders(base: str | Path, experts: dict[str, Path], out: Path, how: Compression) -> Written:
    """What `scalemerge compress` does: open base and experts, write the store, return its errors and bytes."""
    return write_store(TaskVectorStore(base, experts, verify=False), out, how)
