"""Positioning cases that one process or several run alike; started by test_sharded.py:

    python -m torch.distributed.run --nproc-per-node 3 ranks.py JOB.json OUT.pt

A case is a dictionary: model, settings (of Positioning), kinds (what each expert's task vectors are held as; empty:
as they lie on disk), sharded, do ("gradient" or "search"). Rank 0 writes what each case gave; every rank checks that it
read its own rows alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from scalemerge.data.tasks import TaskRows, fingerprint
from scalemerge.distributed.group import Group
from scalemerge.encoder import Encoder
from scalemerge.kernels.formats import LowRank, TaskVector, quantize
from scalemerge.layers.sharded import ShardedEmbedding, ShardedLayer, ShardedLinear
from scalemerge.positioning import Search, build
from scalemerge.positioning.objective import ProbeObjective
from scalemerge.recipe import Positioning, Source, Task
from scalemerge.task_vectors import TaskVectorStore

RANK_OF_LOW_RANK = 3


class MixedStore(TaskVectorStore):
    """Task vectors of each expert held as `kinds` says; the differences themselves are those on disk."""

    kinds: list[str]

    def held(self, name: str, rows: tuple[int, int] | None = None) -> list[TaskVector]:
        return [self._as(kind, self.task_vector(i, name), rows) for i, kind in enumerate(self.kinds)]

    @staticmethod
    def _as(kind: str, whole: torch.Tensor, rows: tuple[int, int] | None) -> TaskVector:
        start, stop = rows or (0, len(whole))
        if kind == "low_rank" and whole.dim() == 2:
            u, s, v = torch.linalg.svd(whole, full_matrices=False)
            b = (u * s)[:, :RANK_OF_LOW_RANK]
            return LowRank(v[:RANK_OF_LOW_RANK].contiguous(), b[start:stop].contiguous())
        if kind in ("int8", "int4") and whole.dim() == 2:
            return quantize(whole[start:stop], 8 if kind == "int8" else 4, 32)
        return whole[start:stop].to(torch.bfloat16) if kind == "bfloat16" else whole[start:stop]


def rows_of(columns: dict[str, dict[str, list[str]]]) -> dict[str, TaskRows]:
    from datasets import Dataset

    found = {}
    for task, texts in columns.items():
        prints = [tuple(map(fingerprint, pair)) for pair in zip(texts["query"], texts["positive"], strict=True)]
        ids = [f"s0:{i}" for i in range(len(prints))]
        found[task] = TaskRows(task, "pairs", Dataset.from_dict(texts), ids, prints)
    return found


def run_case(job: dict[str, Any], case: dict[str, Any], group: Group, work: Path) -> dict[str, Any]:
    settings = Positioning(**case["settings"])
    model = job["models"][case["model"]]
    store: TaskVectorStore = TaskVectorStore(model["base"], model["experts"])
    if case["kinds"]:
        store = MixedStore(model["base"], model["experts"])
        store.kinds = case["kinds"]
    sharded = case["sharded"] and group.world > 1
    encoder = Encoder.load(model["base"], empty=sharded)
    built = build(encoder, store, settings, group, sharded=sharded, least_embedding=64)
    if sharded:
        check_shares(built, group, settings.shard_ranks or group.world)
    tasks = {name: Task(kind="pairs", sources=[Source(path="unused")]) for name in job["probe"]}
    probe, validation = rows_of(job["probe"]), rows_of(job["validation"])
    if case["do"] == "search":
        search = Search(built, tasks, probe, validation, settings, seed=0, folder=work / case["name"], key="k")
        return search.run()
    objective = ProbeObjective(built, tasks, probe, validation, settings, 0)
    scales = dict.fromkeys(probe, 1.0)
    point = objective.differentiate([next(objective.batches())], scales)
    learned = torch.cat([parameter.grad.flatten() for parameter in built.position.parameters()])
    return {"gradient": point.gradient, "learned": learned, "value": point.value,
            "validation": objective.validation_losses()}  # fmt: skip


def check_shares(built: Any, group: Group, ranks: int) -> None:
    """Every linear layer and the vocabulary are sharded, and a rank holds its share of the rows, no more."""
    layers = [module for module in built.encoder.backbone.modules() if isinstance(module, ShardedLayer)]
    assert {type(layer) for layer in layers} == {ShardedLinear, ShardedEmbedding}
    for layer in layers:
        rows = layer.sharded.rows
        share = -(-rows // ranks)
        mine = group.rank % ranks
        assert len(layer.weight) == max(0, min(rows, (mine + 1) * share) - mine * share), layer.name
        assert all(len(value) == len(layer.weight) for value in layer.sharded.packed.values)
        assert next(layer.original.parameters()).numel() in (0, layer.sharded.rows)  # the weight is gone


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(1)
    group = Group.launched()
    found = {case["name"]: run_case(job, case, group, Path(out).parent) for case in job["cases"]}
    if group.first:
        torch.save(found, out)
    group.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
