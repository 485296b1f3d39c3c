"""A full model as a LoRA adapter: for each linear layer the product B A of rank r nearest to its task vector.

T = W - W0 = U S V' (Eckart and Young 1936: the first r singular triples are the nearest matrix of rank r in the
Frobenius norm). A = sqrt(S_r) V_r', rounded to the stored dtype; B is fitted to A as rounded, T pinv(A), so that only
one rounding counts. alpha = r, so peft multiplies by 1.

    smaller side <= 1024    exact: singular vectors of the smaller side from its float64 Gram matrix, min(N, K)^2
                            max(N, K) + min(N, K)^3 FLOPs; a tall T (an embedding table) goes through in blocks of rows
    larger                  torch.svd_lowrank (Halko et al. 2011): r + oversampling columns, 8 power iterations, seeded
                            by the tensor's name; about 36 N K (r + oversampling) FLOPs, T once in float32

LoRA holds matrices of linear layers, and embedding tables if asked. What is left out (norms, biases, tables) is listed
with its share of the whole task vector's square. peft could store norms and biases whole (bias, modules_to_save), but
then the adapter could neither be summed with others nor be read by servers that take LoRA alone; so it does not.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalemerge.adapters.folders import (
    UNUSED,
    Modules,
    base_name,
    carry_description,
    model_folder,
    new_place,
    storage_dtype,
    write_adapter,
)
from scalemerge.checkpoints.atomic import RECORD, new_folder, write_json, write_text
from scalemerge.checkpoints.revision import content_key
from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank
from scalemerge.progress import Progress, say
from scalemerge.task_vectors import TaskVectorStore
from scalemerge.task_vectors.measuring import ModuleError, Sums, by_module, errors_csv

SCHEMA = 1
EXACT_SIDE = 1024  # the smaller side of a matrix up to which its decomposition is exact
OVERSAMPLING, ITERATIONS = 16, 8
ERRORS = "errors.csv"
_TABLES = ("embeddings.weight", "embed_tokens.weight", "wte.weight")  # a left-out one is worth a word
_BLOCK_BYTES = 8 * 2**20
Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Extraction:
    """What an adapter holds of a model. rank: as asked (a smaller matrix has its own size). modules: the error of each.
    left_out: squared norm of the task vector of each tensor that is not held. nbytes: of the adapter's matrices."""

    folder: Path
    rank: int
    modules: list[ModuleError]
    left_out: dict[str, float]
    nbytes: int

    @property
    def held(self) -> Sums:
        """The sums over the modules that the adapter holds."""
        return sum((each.sums for each in self.modules), Sums())

    @property
    def square(self) -> float:
        """|T|^2 of the whole task vector."""
        return self.held.exact + sum(self.left_out.values())

    @property
    def relative_error(self) -> float:
        """|T - T'| / |T| of the whole task vector, T' being zero where it is left out."""
        return math.sqrt((self.held.error + sum(self.left_out.values())) / self.square) if self.square else 0.0

    @property
    def left_out_share(self) -> float:
        return sum(self.left_out.values()) / self.square if self.square else 0.0

    def as_dict(self) -> dict[str, Any]:
        square = self.square or 1.0
        return {
            "folder": str(self.folder),
            "rank": self.rank,
            "alpha": self.rank,
            "bytes": self.nbytes,
            "relative_error": self.relative_error,
            "relative_error_of_held": self.held.relative_error,
            "cosine_of_held": self.held.cosine,
            "left_out_share": self.left_out_share,
            "modules": {
                each.module: {"relative_error": each.sums.relative_error, "cosine": each.sums.cosine}
                for each in self.modules
            },
            "left_out": {name: value / square for name, value in self.left_out.items()},
        }

    def lines(self, worst: int = 5) -> list[str]:
        """The modules with the largest relative error, what is left out, the totals."""
        first = sorted(self.modules, key=lambda each: -each.sums.relative_error)[:worst]
        labels = [(each.module, each.sums) for each in first] + [("all modules held", self.held)]
        width = max(len(label) for label, _ in labels)
        lines = [f"{'module':{width}s}  relative error  cosine"]
        for label, sums in labels:
            lines.append(f"{label:{width}s}  {100 * sums.relative_error:12.3f} %  {sums.cosine:.5f}")
        names = sorted(self.left_out, key=lambda name: -self.left_out[name])
        if names:
            table = any(name.endswith(_TABLES) for name in names)
            tables = "; --embeddings holds tables, too" if table else ""
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(
                f"left out: {len(names)} tensors ({', '.join(names[:3])}{more}) with {100 * self.left_out_share:.3f} % "
                f"of the task vector's square{tables}"
            )
        lines.append(
            f"{self.folder}: rank {self.rank}, {len(self.modules)} modules, {self.nbytes / 1e6:.2f} MB; relative error "
            f"of the whole task vector {100 * self.relative_error:.3f} %"
        )
        return lines


def extract_adapter(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    rank: int = 16,
    *,
    embeddings: bool = False,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Extraction:
    """Write an expert (a full model, or any other kind) as a LoRA adapter of rank `rank` into the folder `out`, with
    errors.csv and scalemerge.json beside it. A folder that is there already from the same input is kept.

    embeddings: embedding tables, too. dtype: of the matrices, float32, bfloat16 or float16. Raises InputError for a bad
    rank or dtype, an expert of another base, one without changed linear layers, and whatever stands in `out`.
    """
    if rank < 1:
        raise InputError(f"--rank {rank}: give 1 or more")
    stored = storage_dtype(dtype)
    folder, source, out = model_folder(base), model_folder(expert), Path(out)
    store = TaskVectorStore(folder, {source.name: source}, verify=False)
    key = content_key([SCHEMA, "extract", *store.revisions, rank, embeddings, dtype])
    record = new_place(out, key)
    if record is not None:
        say(f"extracting {out.name}: is there already")
        return _from_record(out, record)
    modules = Modules(folder, base, trust_remote_code=trust_remote_code)
    wanted = {"linear", "conv1d", "embedding"} if embeddings else {"linear", "conv1d"}
    changed = [name for name in store.names if not name.startswith(UNUSED) and _changed(store, name)]
    chosen = [name for name in changed if modules.kinds.get(name) in wanted]
    if not chosen:
        raise InputError(f"{source}: no linear layer differs from the base ({folder}); give a trained expert")
    shapes = {name: store.base.specs[name].shape for name in chosen}
    ranks = {name: min(rank, *shapes[name]) for name in chosen}
    sums: dict[str, Sums] = {}
    left_out: dict[str, float] = {}
    total = sum(store.base.specs[name].numel for name in changed)
    with new_folder(out) as temporary, Progress(f"extracting {out.name}", total // 2**20, unit="M number") as progress:
        done = 0

        def advance(name: str) -> None:
            nonlocal done
            before, done = done, done + store.base.specs[name].numel
            progress.advance(done // 2**20 - before // 2**20)

        def make(name: str) -> LowRank:
            vector, sums[name] = _nearest(store, name, ranks[name], stored)
            if not all(map(math.isfinite, astuple(sums[name]))):
                raise InputError(
                    f"{source}: the task vector of '{name}' does not fit into {dtype}; use --dtype float32"
                )
            advance(name)
            return vector

        nbytes = write_adapter(temporary, base_name(base, folder), modules, ranks, make, shapes, stored)
        for name in changed:
            if name not in ranks:
                left_out[name] = sum(float(block.double().square().sum()) for block in _blocks(store, name))
                advance(name)
        carry_description([source], folder, temporary)
        record = {
            "key": key,
            "method": "extract",
            "base": base_name(base, folder),
            "expert": str(source),
            "revisions": store.revisions,
            "rank": rank,
            "dtype": dtype,
            "bytes": nbytes,
            "tensors": {
                name: {
                    "rank": ranks[name],
                    "bytes": stored.itemsize * ranks[name] * sum(shapes[name]),
                    "bfloat16_bytes": 2 * store.base.specs[name].numel,
                    "sums": asdict(sums[name]),
                }
                for name in chosen
            },
            "left_out": left_out,
        }
        made = _from_record(out, record)
        write_json(temporary / RECORD, {**record, "relative_error": made.relative_error})
        write_text(temporary / ERRORS, errors_csv(made.modules))
    return made


def _from_record(out: Path, record: dict[str, Any]) -> Extraction:
    try:
        tensors = {
            name: (Sums(**each["sums"]), int(each["bytes"]), int(each["bfloat16_bytes"]))
            for name, each in record["tensors"].items()
        }
        modules = by_module(Path(record["expert"]).name, tensors)
        return Extraction(out, int(record["rank"]), modules, dict(record["left_out"]), int(record["bytes"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{out / RECORD}: is spoilt; delete {out} and extract again") from None


def _blocks(store: TaskVectorStore, name: str) -> Iterator[Tensor]:
    for start, stop in store.row_blocks(name, _BLOCK_BYTES):
        yield store.task_vector(0, name, start, stop)


def _changed(store: TaskVectorStore, name: str) -> bool:
    """Whether the expert changed a tensor; reads up to the first block that differs."""
    return name in store.members[0].changed and any(bool(block.any()) for block in _blocks(store, name))


def _nearest(store: TaskVectorStore, name: str, rank: int, dtype: torch.dtype) -> tuple[LowRank, Sums]:
    """The factors of a tensor's task vector in the dtype that is stored, and their sums."""
    a = right_factor(
        lambda rows: store.task_vector(0, name, *(rows or (None, None))),
        store.base.specs[name].shape,
        [None if start is None or stop is None else (start, stop)
         for start, stop in store.row_blocks(name, _BLOCK_BYTES)],
        rank,
        seed=zlib.crc32(name.encode()),
    ).to(dtype)  # fmt: skip
    inverse = torch.linalg.pinv(a.double())
    parts, sums = [], Sums()
    for start, stop in store.row_blocks(name, _BLOCK_BYTES):
        exact = store.task_vector(0, name, start, stop)
        b = (exact.double() @ inverse).to(dtype)
        base = store.base.read(name) if start is None or stop is None else store.base.read_rows(name, start, stop)
        sums += Sums.of(exact, b.float() @ a.float(), base)
        parts.append(b)
    return LowRank(a, torch.cat(parts)), sums


def right_factor(
    read: Callable[[Rows], Tensor],
    shape: tuple[int, ...],
    blocks: Sequence[Rows],
    rank: int,
    *,
    seed: int = 0,
    exact_side: int = EXACT_SIDE,
) -> Tensor:
    """sqrt(S) V' [rank, K] of a matrix T [N, K], float64, rank <= min(N, K): rows of zeros where singular values are.

    read(rows): float32 rows of T, all of them for None; blocks: row ranges that together are T. The sign of a row is
    arbitrary. Deterministic; torch's generator is left as it was.
    """
    rows, columns = shape
    if min(rows, columns) > exact_side:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = min(rank + max(OVERSAMPLING, rank), rows, columns)
            _, values, right = torch.svd_lowrank(read(None), q=width, niter=ITERATIONS)
        return (right[:, :rank] * values[:rank].sqrt()).T.double()
    if rows >= columns:
        gram = torch.zeros(columns, columns, dtype=torch.float64)
        for block in blocks:
            part = read(block).double()
            gram += part.T @ part
        squares, right = torch.linalg.eigh(gram)
        values = squares[-rank:].flip(0).clamp(min=0).sqrt()
        return right[:, -rank:].flip(1).T * values.sqrt().unsqueeze(1)
    whole = read(None).double()
    squares, left = torch.linalg.eigh(whole @ whole.T)
    values = squares[-rank:].flip(0).clamp(min=0).sqrt()
    scale = torch.where(values > 0, values.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    return (left[:, -rank:].flip(1).T @ whole) * scale.unsqueeze(1)
