"""Write a merged model as a sentence-transformers folder, out of core.

Tensors go through in blocks of rows that fit a memory budget, whatever the model's size and the number of experts: the
next block is read while one is merged and the one before is written. Configuration, tokenizer and pooling are carried
over; only names that base and experts have are written (no position_ids of an old release, no spurious head); the
folder appears when it is whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import RECORD, new_folder, read_json, write_json, write_text
from scalemerge.checkpoints.reader import TensorSpec
from scalemerge.checkpoints.writer import SHARD_BYTES, write_shards
from scalemerge.encoder import read_modules
from scalemerge.encoder.folders import ADAPTER_CONFIG
from scalemerge.errors import InputError
from scalemerge.progress import Progress, say
from scalemerge.task_vectors import TaskVectorStore
from scalemerge.task_vectors.stored import DESCRIPTION, Rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CACHED = 4 * 2**20  # bytes of a block that stays in a CPU's cache between two passes over it
_BLOCK = 2**18  # elements that are compared at a time
_NOT_CARRIED = {"README.md", RECORD, "training.jsonl", ".gitattributes", ADAPTER_CONFIG, DESCRIPTION}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".index.json")


@dataclass(frozen=True)
class Storage:
    """Bytes of blocks that a merge holds at a time, about, and of one safetensors file that it writes, at most."""

    memory: int = 2**29
    shard_bytes: int = SHARD_BYTES

    @classmethod
    def parse(cls, memory: str, shard_size: str) -> Storage:
        """From "512MB", "2GB", "750000" ... as the command line has them. Raises InputError."""
        return cls(_bytes(memory, "--memory"), _bytes(shard_size, "--shard-size"))


def _bytes(text: str, option: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if found:
        unit = 1024 if found[3] else 1000
        size = int(float(found[1]) * unit ** " KMGT".index(found[2].upper() or " "))
    if size < 2**16:
        raise InputError(f"{option} {text}: give a size of 64KB or more, such as 512MB or 2GB")
    return size


def write_merged(
    store: TaskVectorStore,
    folder: Path,
    combine: Callable[[str, Tensor, list[Tensor]], Tensor],
    *,
    description: dict[str, Any],
    key: str,
    dtype: str | None = None,
    storage: Storage | None = None,
) -> float:
    """Write the model combine(name, W0, [T_1 .. T_E]) for every tensor that base and experts have.

    combine works entry by entry: it is called on blocks of rows, float32. description: what the model card says (title,
    method, parameters ...). dtype: of what is stored; the base's own by default.
    Returns the share of the delta that survived rounding to the stored dtype (1.0 = all).
    """
    storage = storage or Storage()
    specs = {
        name: TensorSpec(spec.shape, DTYPES[dtype] if dtype and spec.dtype.is_floating_point else spec.dtype)
        for name, spec in store.base.specs.items()
        if name in store.names or spec.dtype.is_floating_point
    }
    survival = _Survival()

    # float32 blocks at a time: base and experts, twice, as one is read ahead; merged, stored, written; the allocator's
    block_bytes = min(_CACHED, max(2**16, storage.memory // (2 * len(store.experts) + 14)))

    def make(name: str) -> Iterator[Tensor]:
        moved = name in store.names
        for base, task_vectors in _read_ahead(store, name, block_bytes, moved=moved):
            if not moved:
                yield base.to(specs[name].dtype)
                continue
            merged = combine(name, base, task_vectors)
            stored = merged.to(specs[name].dtype)
            if stored is not merged:
                survival.add(base, merged, stored)
            del base, task_vectors, merged
            yield stored

    total = sum(spec.nbytes for spec in specs.values())
    with (
        new_folder(folder) as temporary,
        Progress(f"writing {folder.name}", max(1, total // 2**20), unit="MiB") as progress,
    ):
        written = [0]

        def advance(count: int) -> None:
            before = written[0] // 2**20
            written[0] += count
            progress.advance(written[0] // 2**20 - before)

        write_shards(temporary, specs, make, shard_bytes=storage.shard_bytes, progress=advance)
        _carry_over(store, temporary, dtype)
        share = survival.share
        write_text(temporary / "README.md", model_card({**description, "delta survival": f"{100 * share:.2f} %"}))
        write_json(temporary / RECORD, {"key": key, "delta_survival": share, **description})
    if share < 0.99:
        say(
            f"warning: {folder.name}: only {100 * share:.1f} % of the merged delta survives {dtype or 'the base'} "
            "storage; write float32"
        )
    return share


def _read_ahead(
    store: TaskVectorStore, name: str, block_bytes: int, *, moved: bool
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Blocks of rows of W0 (float32, or as stored where no expert moved it) and of T_1 .. T_E; a thread reads ahead."""
    shape = store.base.specs[name].shape

    def read(rows: Rows) -> tuple[Tensor, list[Tensor]]:
        base = store.base.read(name) if rows is None else store.base.read_rows(name, *rows)
        if not moved:
            return base, []
        start, stop = rows or (None, None)
        base = base.to(torch.float32)
        return base, [store.task_vector(i, name, start, stop, base) for i in range(len(store.experts))]

    ranges: list[Rows] = [None]
    if shape:
        ranges = [(start or 0, stop or shape[0]) for start, stop in store.row_blocks(name, block_bytes)]
    if len(ranges) == 1:
        yield read(ranges[0])
        return
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(read, ranges[0])
        for following in range(1, len(ranges) + 1):
            block = ahead.result()
            if following < len(ranges):
                ahead = thread.submit(read, ranges[following])
            yield block
            del block


class _Survival:
    """<stored delta, exact delta> / |exact delta|^2 over all tensors that storage rounds."""

    def __init__(self) -> None:
        self.along = self.square = 0.0

    def add(self, base: Tensor, merged: Tensor, stored: Tensor) -> None:
        blocks = (tensor.reshape(-1).split(_BLOCK) for tensor in (base, merged, stored))
        for w0, exact, rounded in zip(*blocks, strict=True):
            delta = exact.double() - w0.double()
            kept = rounded.double() - w0.to(rounded.dtype).double()
            self.along += float(torch.dot(kept, delta))
            self.square += float(torch.dot(delta, delta))

    @property
    def share(self) -> float:
        return min(1.0, self.along / self.square) if self.square > 0 else 1.0


def _carry_over(store: TaskVectorStore, folder: Path, dtype: str | None) -> None:
    """Everything but weights: from an expert when it is a sentence-transformers folder, else from the base.

    Adapters and stored task vectors are no whole models: what they have replaces files of the base.
    """
    described = [read_modules(expert) for expert in store.folders]
    first = store.folders[0]
    whole = first if described[0] and (first / "config.json").is_file() else store.base_folder
    for origin in [whole, first] if described[0] else [whole]:
        for path in sorted(origin.rglob("*")):
            relative = path.relative_to(origin)
            if path.is_dir():
                (folder / relative).mkdir(parents=True, exist_ok=True)
            elif path.name not in _NOT_CARRIED and not path.name.endswith(_WEIGHTS):
                (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / relative)
    config = read_json(folder / "config.json")
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        write_json(folder / "config.json", config)
    names = folder / "config_sentence_transformers.json"
    if names.is_file():
        content = read_json(names)
        prompts = [each.get("prompts", {}) for each in described]
        content["prompts"] = {
            kind: prompts[0][kind] if all(p.get(kind) == prompts[0].get(kind) for p in prompts) and prompts[0].get(kind)
            else "" for kind in ("query", "document")
        }  # fmt: skip
        write_json(names, content)


def model_card(description: dict[str, Any]) -> str:
    """The folder's README.md: how the model was made, with the metadata that hubs read."""
    experts: dict[str, str] = description.get("experts", {})
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "base_model_relation: merge",
        "tags: [scalemerge, merge, sentence-transformers]",
        "---",
        "",
        f"# {description.get('title', 'Merged embedding model')}",
        "",
        f"Merged from {len(experts)} experts of `{description.get('base')}` by **{description.get('method')}** "
        "with [scalemerge]: W = W0 + sum of c_i T_i over task vectors T_i = W_i - W0.",
        "",
        "| expert | folder |",
        "|---|---|",
        *[f"| {name} | `{path}` |" for name, path in experts.items()],
        "",
    ]
    for name, value in description.items():
        if name not in ("title", "base", "method", "experts"):
            shown = value if isinstance(value, str) else f"`{json.dumps(value)}`"
            lines.append(f"- **{name}**: {shown}")
    lines += [
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("path/to/this/folder")',
        'embeddings = model.encode(["a text", "another text"])',
        "```",
        "",
    ]
    return "\n".join(lines)
