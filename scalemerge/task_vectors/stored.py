"""A stored task vector: a folder with the task vectors of one expert, or of a shared base, in one format.

    task_vectors.json           what the numbers mean and what they were made from (this file describes it)
    task_vectors.safetensors    dense tensors under their own names; others as NAME/values and NAME/scales (int8, int4)
                                or NAME/a and NAME/b (low rank)

task_vectors.json:

    schema            1
    format            int8, int4, bfloat16 or svd; with group_size (of int8, int4) and rank (of svd)
    base              {"path", "revision"}: the base model and its model_revision
    expert            {"name", "revision"} of what was compressed; null in the folder of a shared base
    shared            null, or {"folder", "sha256"}: T = what lies there, in the folder beside this one, plus what lies
                      here
    sha256            of task_vectors.safetensors
    tensors           {name: {"shape", "form", "sums"}}: form is how this one lies here; sums: see measuring.py
    unchanged         names of the tensors whose task vectors are zero, and which are not stored
    key               what decided the content, so that an interrupted `scalemerge compress` can go on

Nothing is read from outside the folder and the shared one beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalemerge.checkpoints.atomic import read_json
from scalemerge.checkpoints.reader import DTYPES, TensorSpec
from scalemerge.errors import InputError
from scalemerge.kernels.formats import GROUP_SIZES, LowRank, Quantized, TaskVector

SCHEMA = 1
DESCRIPTION, WEIGHTS = "task_vectors.json", "task_vectors.safetensors"
SUMS = ("error", "exact", "stored", "product", "base")  # the fields of measuring.Sums
FORMS = ("int8", "int4", "low_rank", "bfloat16", "float32")
Rows = tuple[int, int] | None


def parts_of(form: str, shape: tuple[int, ...], group_size: int | None, rank: int | None) -> dict[str, TensorSpec]:
    """What a task vector is made of in a file: suffix -> shape and dtype."""
    if form == "float32" or form == "bfloat16":
        return {"": TensorSpec(shape, torch.float32 if form == "float32" else torch.bfloat16)}
    rows, columns = shape
    if form == "low_rank":
        least = min(rank or 0, rows, columns)
        return {
            "/a": TensorSpec((least, columns), torch.bfloat16),
            "/b": TensorSpec((rows, least), torch.bfloat16),
        }
    group = group_size or 0
    values = TensorSpec(shape, torch.int8) if form == "int8" else TensorSpec((rows, -(-columns // 2)), torch.uint8)
    return {"/values": values, "/scales": TensorSpec((rows, -(-columns // group)), torch.bfloat16)}


def split(vector: TaskVector) -> dict[str, Tensor]:
    """A task vector as the parts that `parts_of` announces."""
    if isinstance(vector, Quantized):
        return {"/values": vector.values, "/scales": vector.scales}
    if isinstance(vector, LowRank):
        return {"/a": vector.a, "/b": vector.b}
    return {"": vector}


class StoredFolder:
    """The folder of one stored task vector, its description and headers checked; numbers are read when asked for.

    Raises InputError for a description of another schema or with fields missing, a missing, truncated or corrupt file,
    and tensors that are not as described.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description: dict[str, Any] = _description(self.folder / DESCRIPTION)
        self.file = self.folder / WEIGHTS
        if not self.file.is_file():
            raise InputError(f"{self.file}: is missing; copy the store again or run 'scalemerge compress' again")
        try:
            self._handle = safe_open(str(self.file), framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{self.file}: truncated or corrupt safetensors ({error}); copy or write it again"
            ) from None
        self.forms: dict[str, str] = {name: each["form"] for name, each in self.description["tensors"].items()}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(each["shape"]) for name, each in self.description["tensors"].items()
        }
        self.group_size: int | None = self.description["group_size"]
        self._check_headers()

    def _check_headers(self) -> None:
        here = set(self._handle.keys())
        for name, form in self.forms.items():
            parts = parts_of(form, self.shapes[name], self.group_size, self.description["rank"])
            for suffix, spec in parts.items():
                if name + suffix not in here:
                    raise InputError(
                        f"{self.file}: lacks tensor '{name + suffix}' that {DESCRIPTION} names; copy it again"
                    )
                piece = self._handle.get_slice(name + suffix)
                found = TensorSpec(tuple(piece.get_shape()), DTYPES.get(piece.get_dtype(), torch.bool))
                if found != spec:
                    raise InputError(
                        f"{self.file}: tensor '{name + suffix}' is {found.dtype} {list(found.shape)}, not as "
                        f"{DESCRIPTION} says {spec.dtype} {list(spec.shape)}; copy both files again"
                    )

    @property
    def changed(self) -> list[str]:
        """Names of the tensors that are stored."""
        return list(self.forms)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, in memory as on disk."""
        parts = (parts_of(form, self.shapes[name], self.group_size, self.description["rank"]) for name, form in
                 self.forms.items())  # fmt: skip
        return sum(spec.nbytes for each in parts for spec in each.values())

    def held(self, name: str, rows: Rows = None) -> TaskVector | None:
        """A task vector as it is stored, or rows [start, stop) of it, of which alone is read; None where there is none.

        Raises InputError on NaN or infinity.
        """
        form = self.forms.get(name)
        if form is None:
            return None
        if form in ("float32", "bfloat16"):
            return self._finite(name, self._read(name, rows))
        if form == "low_rank":
            return LowRank(
                self._finite(name, self._read(f"{name}/a", None)), self._finite(name, self._read(f"{name}/b", rows))
            )
        values, scales = self._read(f"{name}/values", rows), self._read(f"{name}/scales", rows)
        shape = torch.Size((len(values), self.shapes[name][1]))
        return Quantized(values, self._finite(name, scales), self.group_size or 0, shape)

    def _read(self, stored: str, rows: Rows) -> Tensor:
        return self._handle.get_tensor(stored) if rows is None else self._handle.get_slice(stored)[rows[0] : rows[1]]

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise InputError(f"{self.file}: tensor '{name}' holds NaN or infinity; compress the expert again")
        return tensor

    @cached_property
    def digest(self) -> str:
        """The sha256 of the numbers, read once and compared with the description. Raises InputError if it differs."""
        found = file_digest(self.file)
        if found != self.description["sha256"]:
            raise InputError(
                f"{self.file}: is not the file that {DESCRIPTION} describes (its sha256 is {found[:12]}..., not "
                f"{self.description['sha256'][:12]}...); copy the store again or run 'scalemerge compress' again"
            )
        return found


class StoredExpert:
    """A stored task vector as an expert: its own part and, where it has one, the shared base that it adds to.

    base: shapes and dtypes of the base's tensors, by name. open_shared: gives the shared base's folder, opened once for
    all experts that use it.
    """

    def __init__(
        self, folder: Path, base: Mapping[str, TensorSpec], open_shared: Callable[[Path], StoredFolder]
    ) -> None:
        self.folder = folder
        self.own = StoredFolder(folder)
        description = self.own.description
        if description["expert"] is None:
            raise InputError(f"{folder}: is the shared base of a store; give the folders of its experts beside it")
        self.shared: StoredFolder | None = None
        if description["shared"] is not None:
            place = _beside(folder, description["shared"]["folder"])
            self.shared = open_shared(place)
            declared = self.shared.description
            if declared["sha256"] != description["shared"]["sha256"] or declared["expert"] is not None:
                raise InputError(
                    f"{folder}: was made with another shared base than {place}; run 'scalemerge compress' again"
                )
        for part in (self.own, *([self.shared] if self.shared else [])):
            _check_shapes(part, base)
        self.changed = frozenset(self.own.changed) | frozenset(self.shared.changed if self.shared else ())
        self.names = self.changed | frozenset(description["unchanged"])

    def held(self, name: str, rows: Rows = None) -> TaskVector | None:
        """The expert's own part, without the shared base."""
        return self.own.held(name, rows)

    def require_base(self, folder: Path, revision: Callable[[], str]) -> None:
        """Raise InputError unless the task vectors were made from this base, by hash."""
        made_from = self.own.description["base"]
        if made_from["revision"] != revision():
            raise InputError(
                f"{self.folder}: made from base {made_from['path']} (revision {made_from['revision'][:12]}), not from "
                f"{folder} (revision {revision()[:12]}); give that base, or compress the experts of this one"
            )

    @property
    def nbytes(self) -> int:
        return self.own.nbytes

    @cached_property
    def revision(self) -> str:
        """40 hex digits of all that is stored, the shared base included. Reads every byte."""
        content = [self.own.digest, self.own.description["base"]["revision"], self.shared.digest if self.shared else ""]
        content += [self.own.description["format"], str(self.own.group_size)]
        return hashlib.sha256("\0".join(content).encode()).hexdigest()[:40]


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _beside(folder: Path, name: str) -> Path:
    """The folder `name` beside another one. Raises InputError for a name or a link that leads elsewhere."""
    place = folder.resolve().parent / name
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name or place.resolve() != place:
        raise InputError(f"{folder / DESCRIPTION}: shared folder '{name}' is outside the store; copy the store again")
    if not (place / DESCRIPTION).is_file():
        raise InputError(f"{place}: the shared base of {folder} is missing; copy the whole store")
    return place


def _check_shapes(part: StoredFolder, base: Mapping[str, TensorSpec]) -> None:
    for name, shape in part.shapes.items():
        if name not in base or base[name].shape != shape:
            found = f"has shape {list(base[name].shape)}" if name in base else "is not"
            raise InputError(
                f"{part.folder}: the task vector of '{name}' has shape {list(shape)}, the tensor {found} in the base; "
                "give the base that the store was made from"
            )


def _description(path: Path) -> dict[str, Any]:
    """task_vectors.json, every field of the type that the code relies on."""
    content = read_json(path)
    remedy = "copy the store again or run 'scalemerge compress' again"
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise InputError(f"{path}: describes no task vectors; {remedy}")
    if content["schema"] != SCHEMA:
        raise InputError(f"{path}: schema {content['schema']} is not {SCHEMA}; read it with the scalemerge it is from")

    def require(good: bool, field: str) -> None:
        if not good:
            raise InputError(f"{path}: field '{field}' is missing or spoilt; {remedy}")

    def texts(value: Any, *fields: str) -> bool:
        return isinstance(value, dict) and all(isinstance(value.get(field), str) for field in fields)

    require(isinstance(content.get("format"), str), "format")
    for field in ("group_size", "rank"):
        value = content.setdefault(field, None)
        require(value is None or (type(value) is int and value > 0), field)
    require(content["group_size"] in (None, *GROUP_SIZES), "group_size")
    require(texts(content.get("base"), "path", "revision"), "base")
    require("expert" in content and (content["expert"] is None or texts(content["expert"], "revision")), "expert")
    require("shared" in content, "shared")
    require(content["shared"] is None or texts(content["shared"], "folder", "sha256"), "shared")
    require(isinstance(content.get("sha256"), str), "sha256")
    require(isinstance(content.get("key"), str), "key")
    unchanged, tensors = content.get("unchanged"), content.get("tensors")
    require(isinstance(unchanged, list) and all(isinstance(name, str) for name in unchanged), "unchanged")
    require(isinstance(tensors, dict), "tensors")
    assert isinstance(tensors, dict)
    for name, each in tensors.items():
        shape: Any = each.get("shape") if isinstance(each, dict) else None
        good = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        require(good and each.get("form") in FORMS, f"tensors.{name}")
        sums: Any = each.get("sums")
        good = isinstance(sums, dict) and all(isinstance(value, int | float) for value in sums.values())
        require(good and set(sums) == set(SUMS), f"tensors.{name}")
        if each["form"] not in ("float32", "bfloat16"):
            needed = "rank" if each["form"] == "low_rank" else "group_size"
            require(len(shape) == 2 and content[needed] is not None, f"tensors.{name}")
    return content
