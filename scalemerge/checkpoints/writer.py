"""Streamed writing of safetensors: the header first, then one tensor after another.

The safetensors library writes a whole dictionary at once, so its peak is one model; a merge needs a peak of one tensor.
The format (https://github.com/huggingface/safetensors) is a little-endian uint64 length, a JSON header with dtype,
shape and byte range of every tensor, and the bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import PARTIAL, explain_os_error, remove_quietly
from scalemerge.checkpoints.reader import DTYPES, TensorSpec

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    make: Callable[[str], Tensor],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the tensors that `make(name)` gives, in the order of `specs`, holding one at a time.

    progress is called with the bytes of each tensor written. Raises ValueError when `make` gives another shape or
    dtype than announced, InputError when the disk refuses.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    temporary = path.with_name(f"{path.name}{PARTIAL}")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(head)))
            file.write(head)
            for name, spec in specs.items():
                tensor = make(name)
                if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                    raise ValueError(f"tensor '{name}': {tensor.dtype} {tuple(tensor.shape)} instead of {spec}")
                if spec.numel:
                    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                del tensor  # before the next one is made
                if progress:
                    progress(spec.nbytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, path) from None
    finally:
        remove_quietly(temporary)
