"""Streamed writing of safetensors: the header first, then one tensor after another.

The safetensors library writes a whole dictionary at once, so its peak is one model; a merge needs a peak of one tensor.
The format (https://github.com/huggingface/safetensors) is a little-endian uint64 length, a JSON header with dtype,
shape and byte range of every tensor, and the bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import PARTIAL, explain_os_error, remove_quietly, write_json
from scalemerge.checkpoints.reader import DTYPES, INDEX, SINGLE, TensorSpec

SHARD_BYTES = 5 * 10**9
_SYNC = 64 * 2**20  # bytes of blocks between two times that they are pushed to the disk
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    make: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the tensors that `make(name)` gives, in the order of `specs`, holding one at a time.

    `make` may give a tensor in blocks of rows: the next block is made while one is written, by a thread of its own.
    progress is called with the bytes of each tensor, or block, written. Raises ValueError when `make` gives another
    shape or dtype than announced, InputError when the disk refuses.
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
            with ThreadPoolExecutor(1) as thread:
                for name, spec in specs.items():
                    made = make(name)
                    if isinstance(made, Tensor):
                        _require(name, spec, made, spec.shape)
                        _write(file, made, progress)
                    else:
                        _write_blocks(file, name, spec, made, thread, progress)
                    del made  # before the next one is made
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, path) from None
    finally:
        remove_quietly(temporary)


def _require(name: str, spec: TensorSpec, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != spec.dtype:
        raise ValueError(f"tensor '{name}': {tensor.dtype} {tuple(tensor.shape)} instead of {spec}")


def _write(file: BinaryIO, tensor: Tensor, progress: Callable[[int], None] | None) -> None:
    if tensor.numel():
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if progress:
        progress(tensor.numel() * tensor.element_size())


def _write_blocks(
    file: BinaryIO,
    name: str,
    spec: TensorSpec,
    blocks: Iterable[Tensor],
    thread: ThreadPoolExecutor,
    progress: Callable[[int], None] | None,
) -> None:
    """Blocks of rows, in order: the next one is made while this one is written."""
    rows, pending, unsynced = 0, None, 0

    def write(block: Tensor, sync: bool) -> None:
        _write(file, block, progress)
        if sync:  # so that the disk works all along, and not at the end alone
            file.flush()
            os.fdatasync(file.fileno())

    for block in blocks:
        _require(name, spec, block, (block.shape[0], *spec.shape[1:]))
        rows += block.shape[0]
        if pending is not None:
            pending.result()
        unsynced += block.numel() * block.element_size()
        pending = thread.submit(write, block, unsynced >= _SYNC)
        unsynced %= _SYNC
        del block
    if pending is not None:
        pending.result()
    if rows != spec.shape[0]:
        raise ValueError(f"tensor '{name}': {rows} rows instead of {spec}")


def write_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    make: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """As write_safetensors, into model.safetensors or, where that would be more than shard_bytes, into files of at most
    so much (a tensor is never divided) and an index, under the names that transformers gives them.

    folder: a temporary one (see atomic.new_folder), as its files appear one by one.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + spec.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = spec
        held += spec.nbytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, specs, make, progress=progress)
        return
    places: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, part, make, progress=progress)
        places |= dict.fromkeys(part, file)
    total = sum(spec.nbytes for spec in specs.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
