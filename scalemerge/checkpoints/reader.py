"""Lazy reading of a model folder's safetensors: names, shapes and dtypes first, one tensor (or some rows) at a time.

Files are memory-mapped by the safetensors library; opening a 16 GB model reads a few kilobytes. Truncated and corrupt
files are refused when they are opened, before anything is computed from them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scalemerge.checkpoints.atomic import read_json
from scalemerge.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """The tensors of a model folder.

    Names are those of the backbone alone: the prefix that a model with a head puts before them ("bert.", "model.") is
    taken off and the head's own tensors are left out, so that a base saved with a head and experts saved without one
    compare.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._stored: dict[str, tuple[Path, str]] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._handles: dict[Path, safe_open] = {}
        self._offsets: dict[Path, dict[str, int]] = {}
        self._promised: dict[str, str] = {}
        found: dict[str, Path] = {}
        for file in self._files():
            for stored in self._open(file).keys():  # noqa: SIM118
                found[stored] = file
        for stored, name in self._promised.items():
            if stored not in found:
                raise InputError(f"{self.folder / name}: lacks tensor '{stored}' that {INDEX} names; copy it again")
        if not found:
            raise InputError(f"{self.folder}: the safetensors files hold no tensors; give a complete model folder")
        prefix = self._prefix(found)
        for stored, file in sorted(found.items()):
            if prefix and not stored.startswith(prefix):
                continue
            name = stored[len(prefix) :]
            self._stored[name] = (file, stored)
            piece = self._handles[file].get_slice(stored)
            dtype = DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise InputError(f"{file}: tensor '{stored}' has dtype {piece.get_dtype()}, which is not supported")
            self.specs[name] = TensorSpec(tuple(piece.get_shape()), dtype)

    def _files(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            index = read_json(self.folder / INDEX)
            shards = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise InputError(f"{self.folder / INDEX}: has no weight_map of tensor names to files; copy it again")
            names = sorted(set(shards.values()))
            self._promised = dict(shards)
            for name in names:
                if Path(name).name != name or "\0" in name:
                    raise InputError(f"{self.folder / INDEX}: shard '{name}' is outside the folder; mend the index")
                if not (self.folder / name).is_file():
                    raise InputError(f"{self.folder / name}: shard named in {INDEX} is missing; copy it again")
            if names:
                return [self.folder / name for name in names]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        raise InputError(f"{self.folder}: no {SINGLE} (safetensors only, no pickle); save the model with safetensors")

    def _open(self, file: Path) -> safe_open:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(
                    f"{file}: truncated or corrupt safetensors ({error}); copy or write the file again"
                ) from None
        return self._handles[file]

    def _prefix(self, found: dict[str, Path]) -> str:
        if not (self.folder / "config.json").is_file():
            return ""
        config = read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            raise InputError(f"{self.folder / 'config.json'}: holds no JSON object; copy it again")
        architectures = config.get("architectures") or []
        if not isinstance(architectures, list) or not architectures or str(architectures[0]).endswith("Model"):
            return ""
        for prefix in ("model.", f"{config.get('model_type', '')}.".replace("-", "_"), "roberta.", "bert."):
            if any(name.startswith(prefix) for name in found):
                return prefix
        return ""

    @property
    def names(self) -> list[str]:
        return list(self.specs)

    def read(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype, on the CPU. Raises KeyError for a name that is not there."""
        file, stored = self._stored[name]
        return self._handles[file].get_tensor(stored)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor of at least one dimension, copied from the file: unlike pages of a mapping,
        they count as memory only as long as they are held."""
        file, stored = self._stored[name]
        spec = self.specs[name]
        row = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        start, stop = max(0, start), max(start, min(stop, spec.shape[0]))
        buffer = torch.empty((stop - start) * row, dtype=torch.uint8)
        _fill(file, self._offset(file, stored) + start * row, buffer)
        return buffer.view(spec.dtype).reshape(stop - start, *spec.shape[1:])

    def _offset(self, file: Path, stored: str) -> int:
        """Where a tensor's bytes begin. The header was checked by the safetensors library when the file was opened."""
        if file not in self._offsets:
            with open(file, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            self._offsets[file] = {
                name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
            }
        return self._offsets[file][stored]

    def require_finite(self, name: str, tensor: Tensor) -> Tensor:
        if not torch.isfinite(tensor).all():
            file, stored = self._stored[name]
            raise InputError(f"{file}: tensor '{stored}' holds NaN or infinity; train or copy this model again")
        return tensor


def _fill(file: Path, offset: int, buffer: Tensor) -> None:
    """Read bytes of a file into a buffer, uint8. Raises InputError for a file that ends before."""
    view = buffer.numpy().data
    with open(file, "rb", buffering=0) as opened:
        opened.seek(offset)
        while len(view):
            count = opened.readinto(view)
            if not count:
                raise InputError(f"{file}: ended while it was read; copy it again")
            view = view[count:]
