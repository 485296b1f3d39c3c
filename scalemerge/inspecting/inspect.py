"""What is in a folder: a model, a store of task vectors, one stored task vector, a LoRA adapter, a run's experts.

Names, shapes and small files alone are read, but for norms and cosines of task vectors, which read every byte of base
and experts once (task_vectors/gram.py). Which kind a folder is shows in its files, as everywhere in scalemerge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from scalemerge.checkpoints.atomic import RECORD, read_json
from scalemerge.checkpoints.reader import DTYPES, INDEX, SINGLE, Checkpoint, TensorSpec
from scalemerge.encoder import local_folder, read_modules
from scalemerge.encoder.adapters import ADAPTER_WEIGHTS
from scalemerge.encoder.folders import ADAPTER_CONFIG
from scalemerge.errors import InputError
from scalemerge.merging.vocabulary import read_vocabulary, token_tensors
from scalemerge.task_vectors import TaskVectorStore, cosines, gram_matrices
from scalemerge.task_vectors.measuring import Sums
from scalemerge.task_vectors.stored import DESCRIPTION, StoredFolder

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
          "max_position_embeddings")  # fmt: skip
_UNUSUAL = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """Task vectors of experts of one base. norms: |T_i|; relative_norms: |T_i| / |W0|; cosines: [E][E]; 0 where a task
    vector is zero."""

    base: str
    names: list[str]
    norms: list[float]
    relative_norms: list[float]
    cosines: list[list[float]]
    kind: str = "experts"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Encoding:
    """What a folder says of the way from tokens to an embedding, as sentence-transformers reads it.

    modules: kinds, in order; empty where the folder is none of sentence-transformers. problem: what keeps scalemerge
    from reading it, in one line.
    """

    modules: list[str] = field(default_factory=list)
    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A whole model. parameters: numbers of the backbone's floating-point tensors; dtypes: of all its tensors. shards:
    file -> bytes. head: stored tensors that are no part of the backbone. tied: what config.json says of input and
    output embeddings. vocab_size: of config.json; table_rows: of the embedding table; tokens: of the tokenizer.
    recorded: scalemerge.json.
    """

    folder: str
    architecture: str | None
    model_type: str | None
    sizes: dict[str, int]
    parameters: int
    dtypes: dict[str, int]
    shards: dict[str, int]
    head: list[str]
    tied: bool | None
    vocab_size: int | None
    table_rows: int | None
    tokens: int | None
    encoding: Encoding
    licence: str | None
    recorded: dict[str, Any] | None
    vectors: Experts | None = None
    kind: str = "model"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StoredVectors:
    """One expert of a store, or its shared base (expert None). nbytes: as stored; bfloat16_bytes: the same tensors in
    bfloat16. Errors are those recorded when it was compressed."""

    folder: str
    expert: str | None
    form: str
    group_size: int | None
    rank: int | None
    nbytes: int
    bfloat16_bytes: int
    tensors: int
    unchanged: int
    base: str
    base_revision: str
    shared: str | None
    relative_error: float
    cosine: float
    weight_error: float
    vectors: Experts | None = None
    kind: str = "task vector"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Store:
    """A folder of stored task vectors. vectors: norms and cosines; note: why there are none."""

    folder: str
    base: str
    base_revision: str
    nbytes: int
    bfloat16_bytes: int
    experts: list[StoredVectors]
    shared: StoredVectors | None
    vectors: Experts | None
    note: str | None
    kind: str = "store"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA adapter. modules: how many carry matrices; ranks: rank -> modules of it. unusual: settings of its
    configuration that change the sum alpha / r B A."""

    folder: str
    peft_type: str
    base: str
    rank: int | None
    alpha: float | None
    rslora: bool
    targets: list[str] | str
    modules: int
    ranks: dict[int, int]
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    unusual: dict[str, Any]
    encoding: Encoding
    licence: str | None
    recorded: dict[str, Any] | None
    vectors: Experts | None = None
    kind: str = "adapter"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Inspected = ModelFolder | StoredVectors | Store | AdapterFolder | Experts


def inspect_folder(path: str | Path, base: str | Path | None = None, *, vectors: bool = True) -> Inspected:
    """What is in a folder, or behind a hub id.

    base: gives norms (and for several experts cosines) of the task vectors; a store names its own. vectors: without
    them, no weights are read. Raises InputError for a folder that is none of the kinds, or spoilt.
    """
    folder = Path(path) if Path(path).is_dir() else Path(local_folder(path))
    alone = {_name_of(folder): folder}
    measured = inspect_experts(base, alone) if base is not None and vectors and _is_one(folder) else None
    if (folder / DESCRIPTION).is_file():
        return _stored(folder, measured)
    if (folder / "config.json").is_file():
        return _model(folder, measured)
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder, measured)
    if any(folder.glob(f"*/{DESCRIPTION}")):
        return _store(folder, base, vectors)
    experts = {each.name: each for each in sorted((folder / "experts").glob("*")) if each.is_dir() and _is_one(each)}
    if not experts:
        raise InputError(f"{folder}: holds no model, store, adapter or experts; give a folder that does")
    if base is None:
        raise InputError(f"{folder}: holds experts ({', '.join(experts)}); give --base for their task vectors")
    return inspect_experts(base, experts)


def inspect_experts(base: str | Path, experts: Mapping[str, str | Path]) -> Experts:
    """Norms and cosines of the task vectors of experts of any kind; reads every byte of them. Raises InputError."""
    folder = Path(base) if Path(base).is_dir() else Path(local_folder(base))
    store = TaskVectorStore(folder, experts)
    gram = torch.stack([torch.zeros(len(experts), len(experts), dtype=torch.float64), *gram_matrices(store).values()])
    gram = gram.sum(0)
    square = 0.0
    for name in store.names:
        for start, stop in store.row_blocks(name, 8 * 2**20):
            rows = store.base.read(name) if start is None or stop is None else store.base.read_rows(name, start, stop)
            square += float(rows.double().square().sum())
    norms = gram.diagonal().sqrt()
    relative = norms / square**0.5 if square else torch.zeros_like(norms)
    return Experts(str(base), store.experts, norms.tolist(), relative.tolist(), cosines(gram).tolist())


def _is_one(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (DESCRIPTION, "config.json", ADAPTER_CONFIG))


def _name_of(folder: Path) -> str:
    return folder.resolve().name or "model"


# ---- models ------------------------------------------------------------------------------------------------------


def _model(folder: Path, vectors: Experts | None) -> ModelFolder:
    config = _object(folder / "config.json")
    text = config.get("text_config")
    inner = {**config, **(text if isinstance(text, dict) else {})}
    checkpoint = Checkpoint(folder)
    shards = _shards(folder)
    stored = {name for file in shards for name in _specs(folder / file)}
    vocab_size = inner.get("vocab_size") if type(inner.get("vocab_size")) is int else None
    tables = token_tensors(checkpoint, vocab_size)
    vocabulary = read_vocabulary(folder)
    architectures = config.get("architectures")
    kept = checkpoint.names
    prefix = _prefix(stored, kept)
    return ModelFolder(
        folder=str(folder),
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        model_type=config.get("model_type"),
        sizes={name: inner[name] for name in _SIZES if isinstance(inner.get(name), int)},
        parameters=sum(spec.numel for spec in checkpoint.specs.values() if spec.dtype.is_floating_point),
        dtypes=_by_dtype(checkpoint.specs),
        shards={file: (folder / file).stat().st_size for file in shards},
        head=sorted(stored - {prefix + name for name in kept}),
        tied=inner.get("tie_word_embeddings"),
        vocab_size=vocab_size,
        table_rows=checkpoint.specs[tables[0]].shape[0] if tables else None,
        tokens=len(vocabulary.ids) if vocabulary else None,
        encoding=_encoding(folder),
        licence=_licence(folder),
        recorded=_recorded(folder),
        vectors=vectors,
    )


def _prefix(stored: set[str], kept: list[str]) -> str:
    """What stands before the backbone's names in the files."""
    return next((name.removesuffix(kept[0]) for name in sorted(stored, key=len) if name.endswith(kept[0])
                 and all(name.removesuffix(kept[0]) + other in stored for other in kept)), "")  # fmt: skip


def _shards(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return sorted(set(read_json(folder / INDEX)["weight_map"].values())) or [SINGLE]
    return [SINGLE]


def _specs(file: Path) -> dict[str, TensorSpec]:
    """Shapes and dtypes of a safetensors file, from its header."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            pieces = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: TensorSpec(tuple(piece.get_shape()), DTYPES.get(piece.get_dtype(), torch.uint8))
                for name, piece in pieces.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: truncated or corrupt safetensors ({error}); copy or write it again") from None


def _by_dtype(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for spec in specs.values():
        dtype = str(spec.dtype).removeprefix("torch.")
        counts[dtype] = counts.get(dtype, 0) + spec.numel
    return counts


def _encoding(folder: Path) -> Encoding:
    if not (folder / "modules.json").is_file():
        return Encoding()
    content = read_json(folder / "modules.json")
    content = content if isinstance(content, list) else []
    modules = [str(each.get("type", "?")).rsplit(".", 1)[-1] for each in content if isinstance(each, dict)]
    try:
        told = read_modules(folder)
    except InputError as error:
        return Encoding(modules, problem=str(error))
    return Encoding(
        modules,
        told.get("pooling"),
        told.get("normalize"),
        told.get("max_length"),
        told.get("prompts") or {},
        told.get("default_prompt_name"),
    )


def _licence(folder: Path) -> str | None:
    """`license:` of the model card's front matter."""
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return None
    front = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S[^\n]*?)[ \t]*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("'\"") if found else None


def _recorded(folder: Path) -> dict[str, Any] | None:
    return _object(folder / RECORD) if (folder / RECORD).is_file() else None


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; copy it again")
    return content


# ---- task vectors and adapters -----------------------------------------------------------------------------------


def _stored(folder: Path, vectors: Experts | None = None) -> StoredVectors:
    opened = StoredFolder(folder)
    told = opened.description
    sums = sum((Sums(**each["sums"]) for each in told["tensors"].values()), Sums())
    numbers = sum(TensorSpec(shape, torch.bfloat16).nbytes for shape in opened.shapes.values())
    return StoredVectors(
        folder=str(folder),
        expert=None if told["expert"] is None else str(told["expert"].get("name", folder.name)),
        form=told["format"],
        group_size=told["group_size"],
        rank=told["rank"],
        nbytes=opened.nbytes,
        bfloat16_bytes=numbers,
        tensors=len(opened.forms),
        unchanged=len(told["unchanged"]),
        base=told["base"]["path"],
        base_revision=told["base"]["revision"],
        shared=None if told["shared"] is None else told["shared"]["folder"],
        relative_error=sums.relative_error,
        cosine=sums.cosine,
        weight_error=sums.weight_error,
        vectors=vectors,
    )


def _store(folder: Path, base: str | Path | None, vectors: bool) -> Store:
    parts = [_stored(path.parent) for path in sorted(folder.glob(f"*/{DESCRIPTION}"))]
    experts = [part for part in parts if part.expert is not None]
    shared = next((part for part in parts if part.expert is None), None)
    first = (experts or parts)[0]
    measured, note = None, None
    if vectors and experts:
        place = base if base is not None else first.base
        try:
            measured = inspect_experts(place, {Path(each.folder).name: Path(each.folder) for each in experts})
        except InputError as error:
            if base is not None:
                raise
            note = f"no norms and cosines: {error}; give the base (--base)"
    return Store(
        folder=str(folder),
        base=first.base,
        base_revision=first.base_revision,
        nbytes=sum(part.nbytes for part in parts),
        bfloat16_bytes=sum(part.bfloat16_bytes for part in experts),
        experts=experts,
        shared=shared,
        vectors=measured,
        note=note,
    )


def _adapter(folder: Path, vectors: Experts | None) -> AdapterFolder:
    path = folder / ADAPTER_CONFIG
    config = _object(path)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{folder}: no {ADAPTER_WEIGHTS}; give a complete adapter folder")
    specs = _specs(folder / ADAPTER_WEIGHTS)
    ranks: dict[int, int] = {}
    for name, spec in specs.items():
        if re.search(r"\.lora_(embedding_)?A(\.|$)", name) and len(spec.shape) == 2:
            ranks[spec.shape[0]] = ranks.get(spec.shape[0], 0) + 1
    targets = config.get("target_modules") or []
    unusual = {name: config[name] for name in _UNUSUAL if config.get(name)}
    if config.get("bias", "none") != "none":
        unusual["bias"] = config["bias"]
    if config.get("init_lora_weights", True) is not True:
        unusual["init_lora_weights"] = config["init_lora_weights"]
    return AdapterFolder(
        folder=str(folder),
        peft_type=str(config.get("peft_type")),
        base=str(config.get("base_model_name_or_path")),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        rslora=bool(config.get("use_rslora")),
        targets=sorted(map(str, targets)) if isinstance(targets, list) else str(targets),
        modules=sum(ranks.values()),
        ranks=dict(sorted(ranks.items())),
        parameters=sum(spec.numel for spec in specs.values()),
        nbytes=sum(spec.nbytes for spec in specs.values()),
        dtypes=_by_dtype(specs),
        unusual=unusual,
        encoding=_encoding(folder),
        licence=_licence(folder),
        recorded=_recorded(folder),
        vectors=vectors,
    )
