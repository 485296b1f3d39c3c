"""Adapter folders: adapter_config.json and adapter_model.safetensors as peft writes them, and the small files that make
the folder one of sentence-transformers (pooling, prompts, tokenizer).

A task vector T = b a lies in peft's file by what kind of module it belongs to:

    linear      weight [outputs, inputs]    lora_A = a, lora_B = b
    conv1d      weight [inputs, outputs]    lora_A = b', lora_B = a'     (GPT-2; fan_in_fan_out)
    embedding   weight [tokens, width]      lora_embedding_A = b', lora_embedding_B = a'

alpha is the rank everywhere, so that peft multiplies by 1.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import RECORD, explain_os_error, read_json, require_writable, write_json
from scalemerge.checkpoints.reader import TensorSpec
from scalemerge.checkpoints.writer import write_safetensors
from scalemerge.encoder import local_folder
from scalemerge.encoder.adapters import ADAPTER_WEIGHTS
from scalemerge.encoder.folders import ADAPTER_CONFIG
from scalemerge.encoder.loading import empty_backbone
from scalemerge.encoder.modules import read_modules
from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank
from scalemerge.merging.vocabulary import TOKENIZER_FILES
from scalemerge.merging.write import DTYPES

Kind = Literal["linear", "conv1d", "embedding"]
UNUSED = "pooler."  # poolings read token states, so what stands there is no part of an expert
_PREFIX = "base_model.model."
_MODULE_FILES = ("modules.json", "sentence_bert_config.json", "sentence_transformer_config.json",
                 "config_sentence_transformers.json")  # fmt: skip


def base_name(base: str | Path, folder: str | Path) -> str:
    """What an adapter calls its base: a hub id as it was given, else the whole path, which peft can follow."""
    is_id = not Path(base).is_dir() and not str(base).startswith("package:")
    return str(base) if is_id else str(Path(folder).resolve())


def model_folder(path: str | Path) -> Path:
    """The folder of a base or an expert: any local one as it is, else what `local_folder` finds."""
    return Path(path) if Path(path).is_dir() else Path(local_folder(path))


def storage_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


class Modules:
    """The modules of a base that LoRA can hold, from its architecture alone: no weight is read.

    kinds: name of the weight, as Checkpoint has it -> what its module is. Raises InputError for a folder that describes
    no model.
    """

    def __init__(self, folder: str | Path, base: str | Path, *, trust_remote_code: bool = False) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        backbone = empty_backbone(str(folder), base, trust_remote_code=trust_remote_code)
        self.names = [name for name, _ in backbone.named_modules() if name]
        self.kinds: dict[str, Kind] = {}
        for name, module in backbone.named_modules():
            for kind, classes in (("linear", nn.Linear), ("conv1d", Conv1D), ("embedding", nn.Embedding)):
                if isinstance(module, classes):
                    self.kinds[f"{name}.weight"] = kind  # type: ignore[assignment]

    def targets(self, chosen: Iterable[str]) -> list[str]:
        """The shortest ends of names that mean these modules and no other, as peft reads target_modules."""
        wanted = set(chosen)
        depth = 1 + max(name.count(".") for name in wanted)
        for length in range(1, depth + 1):
            ends = {".".join(name.split(".")[-length:]) for name in wanted}
            if {name for name in self.names if ".".join(name.split(".")[-length:]) in ends} == wanted:
                return sorted(ends)
        return sorted(wanted)


def new_place(out: Path, key: str) -> dict[str, Any] | None:
    """What a whole folder written before with the same key has recorded; None where nothing is there.

    Raises InputError for anything else in its place, and for a place that cannot be written.
    """
    require_writable(out.parent)
    if not out.exists() and not out.is_symlink():
        return None
    if out.is_dir() and not any(out.iterdir()):
        return None
    record = read_json(out / RECORD) if (out / RECORD).is_file() else None
    whole = (out / ADAPTER_CONFIG).is_file() and (out / ADAPTER_WEIGHTS).is_file()
    if whole and isinstance(record, dict) and record.get("key") == key:
        return record
    raise InputError(f"{out}: exists and is not this adapter; move it or give another --out")


def write_adapter(
    folder: Path,
    base: str,
    modules: Modules,
    ranks: Mapping[str, int],
    make: Callable[[str], LowRank],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> int:
    """Write both files into `folder` (a temporary one); returns the bytes of the matrices.

    base: as base_name gives it. ranks: by the name of the weight; the tensors are made in this order, one at a time, by
    make(name), which gives a [rank, K] and b [N, rank] of shapes[name] = (N, K).
    """
    kinds = {name: modules.kinds[name] for name in ranks}
    if "conv1d" in kinds.values() and "linear" in kinds.values():
        first = next(name for name, kind in kinds.items() if kind == "linear")
        raise InputError(
            f"{base}: '{first}' is a linear layer among Conv1D ones, and one adapter's fan_in_fan_out holds for all; "
            "keep the full checkpoint"
        )
    specs: dict[str, TensorSpec] = {}
    place: dict[str, tuple[str, str]] = {}
    for name, rank in ranks.items():
        rows, columns = shapes[name]
        transposed = kinds[name] != "linear"
        inner, outer = (rows, columns) if transposed else (columns, rows)
        first, second = _keys(name, kinds[name])
        specs[first], specs[second] = TensorSpec((rank, inner), dtype), TensorSpec((outer, rank), dtype)
        place[first], place[second] = (name, "A"), (name, "B")
    held: dict[str, Tensor] = {}

    def part(key: str) -> Tensor:
        name, side = place[key]
        if side == "A":
            vector = make(name)
            pair = (vector.b.T, vector.a.T) if kinds[name] != "linear" else (vector.a, vector.b)
            held.update(zip("AB", (each.to(dtype).contiguous() for each in pair), strict=True))
        return held.pop(side)

    write_safetensors(folder / ADAPTER_WEIGHTS, specs, part)
    write_json(folder / ADAPTER_CONFIG, _config(base, modules, ranks, kinds))
    return sum(spec.nbytes for spec in specs.values())


def _keys(name: str, kind: Kind) -> tuple[str, str]:
    module = _PREFIX + name.removesuffix(".weight")
    if kind == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _config(base: str, modules: Modules, ranks: Mapping[str, int], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    by_module = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    counts = Counter(by_module.values())
    rank = max(counts, key=lambda each: (counts[each], each))
    others = {module: each for module, each in by_module.items() if each != rank}
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": modules.targets(by_module),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "fan_in_fan_out": "conv1d" in kinds.values(),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def carry_description(sources: Sequence[Path], base: Path, target: Path) -> None:
    """Pooling, normalization, prompts and tokenizer: from the first source that has them, else from the base.

    Prompts stay where all sources that have any agree; a default prompt goes when its prompt does. Raises InputError
    for sources that pool differently.
    """
    described = {source: read_modules(source) for source in sources}
    whole = [source for source in sources if described[source]]
    for source in whole[1:]:
        for field in ("pooling", "normalize"):
            if described[source].get(field) != described[whole[0]].get(field):
                raise InputError(
                    f"{source}: {field} is {described[source].get(field)!r}, {whole[0]} has "
                    f"{described[whole[0]].get(field)!r}; give adapters that pool alike"
                )
    if not whole:
        read_modules(base)
    try:
        _copy_modules([*whole, base][0], target)
        tokenizers = [place for place in (*sources, base) if (place / "tokenizer_config.json").is_file()]
        for name in TOKENIZER_FILES:
            if tokenizers and (tokenizers[0] / name).is_file():
                shutil.copyfile(tokenizers[0] / name, target / name)
    except OSError as error:
        raise explain_os_error(error, target) from None
    path = target / "config_sentence_transformers.json"
    if not path.is_file():
        return
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; copy the source's file again")
    prompts = content.get("prompts") or {}
    told = [described[source].get("prompts") or {} for source in whole]
    content["prompts"] = {
        kind: prompt if all(each.get(kind, "") == prompt for each in told) else "" for kind, prompt in prompts.items()
    }
    if not content["prompts"].get(content.get("default_prompt_name")):
        content["default_prompt_name"] = None
    if any(described[source].get("bidirectional") or _sees_later(source) for source in sources):
        content["scalemerge"] = {"bidirectional": True}  # an adapter's folder has no config.json to say it
    write_json(path, content)


def _copy_modules(source: Path, target: Path) -> None:
    if not (source / "modules.json").is_file():
        return
    for name in _MODULE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for module in read_json(source / "modules.json"):
        inside = str(module.get("path", "")) if isinstance(module, dict) else ""
        own = bool(inside) and Path(inside).name == inside and inside not in (".", "..")
        if own and (source / inside).is_dir() and not (source / inside).is_symlink():
            shutil.copytree(source / inside, target / inside)


def _sees_later(folder: Path) -> bool:
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    return isinstance(config, dict) and config.get("is_causal") is False
