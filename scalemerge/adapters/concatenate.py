"""A weighted sum of LoRA adapters as one LoRA adapter, exactly: sum_i c_i s_i B_i A_i = [c_1 s_1 B_1 ...] [A_1; ...].

s_i is alpha / r, or alpha / sqrt(r) with rsLoRA. The ranks add up (peft's combination_type "cat"); summing A and B
apart (its "linear") would add cross terms c_i c_j B_i A_j, which are no part of the sum. A module that only some
adapters have keeps their rank alone, so ranks differ from module to module (rank_pattern, alpha_pattern). Adapters with
coefficient 0 are left out. Cost: the bytes of the adapters, read once; peak: one module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
from scalemerge.checkpoints.atomic import RECORD, new_folder, write_json
from scalemerge.checkpoints.revision import content_key
from scalemerge.errors import InputError
from scalemerge.kernels.formats import LowRank
from scalemerge.progress import say
from scalemerge.task_vectors import TaskVectorStore
from scalemerge.task_vectors.adapters import AdapterExpert

SCHEMA = 1


@dataclass(frozen=True)
class Concatenation:
    """The adapter written. coefficients: by adapter. ranks: by module. nbytes: of its matrices."""

    folder: Path
    coefficients: dict[str, float]
    ranks: dict[str, int]
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "coefficients": self.coefficients,
            "ranks": self.ranks,
            "bytes": self.nbytes,
        }

    def lines(self) -> list[str]:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        terms = " + ".join(f"{value:g} {name}" for name, value in self.coefficients.items())
        return [f"{self.folder}: {terms}; {len(self.ranks)} modules of {ranks}, {self.nbytes / 1e6:.2f} MB"]


def concatenate_adapters(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    coefficients: Mapping[str, float],
    out: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Concatenation:
    """Write sum_i c_i T_i of adapters of one base as one adapter into the folder `out`; kept where it is there already.

    adapters: name -> folder; coefficients: a finite number for each of them. dtype: of the matrices; float32 keeps
    every digit of adapters in float32, bfloat16 or float16 but for one rounding of c s B. Raises InputError for a
    missing or bad coefficient, an expert that is no LoRA adapter of this base (DoRA, LoRA biases, modules_to_save and
    other peft types by name), and whatever stands in `out`.
    """
    stored = storage_dtype(dtype)
    if not adapters:
        raise InputError(f"{out}: no adapters given; name at least one with --expert NAME=FOLDER")
    for name in (*adapters, *coefficients):
        if name not in adapters or name not in coefficients:
            raise InputError(f"--expert {name}: give one coefficient for each adapter, and no others")
        if not math.isfinite(coefficients[name]):
            raise InputError(f"--expert {name}: coefficient {coefficients[name]} is no finite number")
    folder, out = model_folder(base), Path(out)
    store = TaskVectorStore(folder, adapters, verify=False)
    members: dict[str, AdapterExpert] = {}
    for name, member in zip(store.experts, store.members, strict=True):
        if not isinstance(member, AdapterExpert):
            raise InputError(f"{member.folder}: is no LoRA adapter; write one with 'scalemerge extract' first")
        if coefficients[name]:
            members[name] = member
    if not members:
        raise InputError(f"{out}: all coefficients are 0, the sum is the base; give one that is not")
    values = {name: float(coefficients[name]) for name in store.experts}
    key = content_key([SCHEMA, "concatenate", store.revisions, list(values.values()), dtype])
    record = new_place(out, key)
    if record is not None:
        say(f"concatenating {out.name}: is there already")
        return Concatenation(out, values, record["ranks"], record["bytes"])
    modules = Modules(folder, base, trust_remote_code=trust_remote_code)
    ranks: dict[str, int] = {}
    for name in store.base.names:
        each = [len(vector.a) for vector in _parts(members, values, name)]
        if each and not name.startswith(UNUSED):
            if name not in modules.kinds:
                raise InputError(f"{folder}: '{name}' is no linear layer or embedding, so peft cannot hold it as LoRA")
            ranks[name] = sum(each)
    if not ranks:
        raise InputError(f"{out}: the adapters change only a pooler, which no embedding reads; give other adapters")

    def make(name: str) -> LowRank:
        parts = _parts(members, values, name)
        vector = LowRank(torch.cat([each.a for each in parts]), torch.cat([each.b for each in parts], 1))
        if not all(bool(each.to(stored).isfinite().all()) for each in (vector.a, vector.b)):
            raise InputError(f"{out}: the matrices of '{name}' do not fit into {dtype}; use --dtype float32")
        return vector

    with new_folder(out) as temporary:
        shapes = {name: store.base.specs[name].shape for name in ranks}
        nbytes = write_adapter(temporary, base_name(base, folder), modules, ranks, make, shapes, stored)
        carry_description(store.folders, folder, temporary)
        by_module = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
        write_json(
            temporary / RECORD,
            {
                "key": key,
                "method": "concatenate",
                "base": base_name(base, folder),
                "experts": {name: str(place) for name, place in zip(store.experts, store.folders, strict=True)},
                "coefficients": values,
                "revisions": store.revisions,
                "dtype": dtype,
                "bytes": nbytes,
                "ranks": by_module,
            },
        )
    return Concatenation(out, values, by_module, nbytes)


def _parts(members: Mapping[str, AdapterExpert], values: Mapping[str, float], name: str) -> list[LowRank]:
    """c_i T_i of one tensor, of the adapters that have it: the scaling is in b already, the coefficient joins it."""
    parts = []
    for adapter, member in members.items():
        vector = member.held(name)
        if isinstance(vector, LowRank):
            parts.append(LowRank(vector.a, vector.b * values[adapter]))
    return parts
