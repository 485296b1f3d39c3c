"""Embeddings of many texts, in shards on disk, so that a killed run goes on where it stopped.

A shard's name is the hash of everything that decides its content (the model's weights and settings, the prompt, its
texts), so a shard left by another model or other data is never taken, and no list of shards is needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from scalemerge.checkpoints.atomic import PARTIAL, explain_os_error, remove_quietly
from scalemerge.checkpoints.revision import content_key
from scalemerge.errors import InputError
from scalemerge.progress import Progress


class TextEncoder(Protocol):
    """What is wanted of an encoder; scalemerge.encoder.Encoder is one."""

    prompts: dict[str, str]

    @property
    def device(self) -> torch.device: ...

    def encode(self, texts: Sequence[str], *, batch_size: int = 64, prompt: str = "") -> Tensor:
        """Embeddings [n, D], float32 on the CPU."""
        ...


def embed(
    texts: Sequence[str],
    encoder: TextEncoder,
    folder: Path,
    *,
    revision: str,
    what: str,
    prompt: str = "",
    batch_size: int = 64,
    shard_texts: int = 512,
) -> Tensor:
    """Unit embeddings [n, D] float32 on the CPU, from the shards in `folder` where they are there.

    Raises InputError when the model gives NaN, infinity or a zero vector.
    """
    parts = [texts[start : start + shard_texts] for start in range(0, len(texts), shard_texts)]
    files = [folder / f"{content_key([revision, prompt, list(part)])}.safetensors" for part in parts]
    stored = [_read(file, len(part)) for file, part in zip(files, parts, strict=True)]
    done = sum(len(tensor) for tensor in stored if tensor is not None)
    with Progress(f"embedding {what}", len(texts), done=done, unit="text") as progress:
        for number, (file, part) in enumerate(zip(files, parts, strict=True)):
            if stored[number] is not None:
                continue
            vectors = encoder.encode(part, batch_size=batch_size, prompt=prompt).float()
            _check(vectors, part, what)
            stored[number] = F.normalize(vectors, dim=1)
            _write(file, stored[number])
            progress.advance(len(part))
    return torch.cat([tensor for tensor in stored if tensor is not None])


def _check(vectors: Tensor, texts: Sequence[str], what: str) -> None:
    bad = ~torch.isfinite(vectors).all(1) | (vectors == 0).all(1)
    if bad.any():
        text = texts[int(bad.nonzero()[0])]
        raise InputError(
            f"embeddings of {what}: NaN, infinity or only zeros for '{text[:60]}' and {int(bad.sum()) - 1} more; the "
            "model's weights are broken, train or merge it again"
        )


def _read(file: Path, rows: int) -> Tensor | None:
    """A shard, or None where there is none that is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        vectors = load_file(file)["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if vectors.shape[0] == rows else None


def _write(file: Path, vectors: Tensor | None) -> None:
    from safetensors.torch import save_file

    assert vectors is not None
    temporary = file.with_name(f"{file.name}{PARTIAL}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": vectors.contiguous()}, temporary)
        os.replace(temporary, file)
    except OSError as error:
        remove_quietly(temporary)
        raise explain_os_error(error, file) from None


def remove_shards(folder: Path) -> None:
    """Remove the shards in a work folder and the folder itself, unless somebody put something else there."""
    for file in (*folder.glob("*.safetensors"), *folder.glob(f"*.safetensors{PARTIAL}")):
        remove_quietly(file)
    with contextlib.suppress(OSError):
        folder.rmdir()
