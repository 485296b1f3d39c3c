"""A run, stage by stage:

    prepare    check everything that can be checked before the expensive part; split the data
    experts    train one expert a task
    joint      train the joint baselines, of equal total examples
    position   learn the merging coefficients on the probe set
    merges     write the merged models
    evaluate   score base, experts, baselines and merges with mteb
    report     tables in the terminal, report.html

Every stage writes whole pieces under their final names and skips those that are there, so a run that was killed at any
moment continues from the last finished piece (training and positioning from their last checkpoint).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalemerge.checkpoints.atomic import RECORD, read_json, require_writable, write_json, write_text
from scalemerge.errors import InputError
from scalemerge.progress import Progress, say
from scalemerge.recipe import DATA_VARIABLE, Evaluation, Merge, Recipe, dump_recipe
from scalemerge.report.cost import Cost

if TYPE_CHECKING:
    from scalemerge.data.probe import TaskData
    from scalemerge.evaluation.suites import Suite
    from scalemerge.merging.write import Storage

LEARNED = "self_positioning"


@dataclass
class Run:
    """A recipe, the folder it runs in, and its data."""

    recipe: Recipe
    out: Path
    data: dict[str, TaskData]
    experts: dict[str, Path] = field(default_factory=dict)
    suite: Suite | None = None

    def __post_init__(self) -> None:
        if not self.experts:
            self.experts = {name: self.out / "experts" / name for name in self.recipe.tasks}

    @property
    def position_folder(self) -> Path:
        return self.out / "position"

    def base_folder(self) -> Path:
        from scalemerge.encoder import local_folder

        return Path(local_folder(self.recipe.base.path))

    def save_recipe(self) -> None:
        if os.environ.get("RANK", "0") == "0":
            write_text(self.out / "recipe.yaml", dump_recipe(self.recipe))


# ---- prepare -----------------------------------------------------------------------------------------------------


def prepare(recipe: Recipe, out: Path, *, experts: dict[str, Path] | None = None, evaluation: bool = True) -> Run:
    """Check place, base, merges, data and suite, in order of cost. Raises InputError before anything is computed."""
    from scalemerge.checkpoints.reader import Checkpoint

    require_writable(out)
    for number, merge in enumerate(recipe.merges):
        check_merge(merge, f"merges.{number}")
    run = Run(recipe, out, {}, dict(experts or {}))
    Checkpoint(run.base_folder())
    suite = make_suite(recipe.evaluation, recipe.data) if evaluation else None
    from scalemerge.data.probe import load_tasks

    run.data, run.suite = load_tasks(recipe), suite
    run.save_recipe()
    for name, task in run.data.items():
        say(f"task {name}: {task.train.size}, {len(task.probe)} probe rows, {len(task.validation)} validation rows")
    return run


def check_merge(merge: Merge, where: str) -> dict[str, Any]:
    """The merge's parameters with defaults filled in. Raises InputError for an unknown method or parameter."""
    from scalemerge.merging import find_method

    if merge.method == LEARNED:
        if merge.parameters:
            raise InputError(f"{where}: method '{LEARNED}' takes no parameters; its settings are under positioning")
        return {}
    return find_method(merge.method, f"{where}.method").check(merge.parameters, f"{where}.parameters")


def make_suite(wanted: Evaluation, data: str | None) -> Suite:
    """The evaluation suite that a recipe or `eval` asks for, its files checked."""
    from scalemerge.evaluation import suites

    if wanted.suite == "docs":
        from scalemerge.data.docs_suite import build_docs_suite

        suite = suites.docs_suite(build_docs_suite())
    elif wanted.suite == "shared":
        if not data:
            raise InputError("evaluation.suite: 'shared' needs its folder; give --data DIR or set SCALEMERGE_DATA")
        suite = suites.shared_suite(data, wanted.tasks, wanted.fast)
    else:
        if not wanted.tasks:
            raise InputError("evaluation.tasks: suite 'hub' needs the names of mteb tasks")
        suite = suites.hub_suite(wanted.tasks)
    if wanted.suite == "docs" and wanted.tasks:
        names = {task.name for task in suite.tasks}
        for name in wanted.tasks:
            if name not in names:
                raise InputError(f"evaluation.tasks: '{name}' is not in suite docs; it has {', '.join(sorted(names))}")
        suite = suites.Suite(suite.name, tuple(task for task in suite.tasks if task.name in wanted.tasks))
    if wanted.limits:
        suite = suites.limit(suite, **wanted.limits)
    suites.check(suite)
    return suite


# ---- experts and joint baselines ---------------------------------------------------------------------------------


def train_experts(run: Run) -> dict[str, Cost]:
    from scalemerge.training import expert_job, train

    return {name: train(expert_job(run.recipe, run.data, name), run.experts[name]) for name in run.recipe.tasks}


def train_joint(run: Run) -> dict[str, Cost]:
    from scalemerge.training import joint_job, train

    return {name: train(joint_job(run.recipe, run.data, name), run.out / "joint" / name) for name in run.recipe.joint}


# ---- positioning -------------------------------------------------------------------------------------------------


def open_store(run: Run, form: Any = "float32") -> Any:
    """The experts' task vectors, held in `form`. Raises InputError for experts that do not fit the base."""
    from scalemerge.task_vectors import TaskVectorStore

    for name, folder in run.experts.items():
        if not folder.is_dir():
            raise InputError(f"{folder}: no expert for task '{name}'; run 'scalemerge train' first")
    # verified by its revisions, which are part of every key: by one rank, not by each
    return TaskVectorStore(run.base_folder(), run.experts, form, verify=False)


def position_key(run: Run, store: Any) -> str:
    """A hash of all that decides the coefficients: base, experts, probe rows, losses and settings."""
    from scalemerge.checkpoints.revision import content_key
    from scalemerge.data.probe import manifest

    described = {
        "weights": store.revisions,
        "experts": store.experts,
        "probe": manifest(run.data, run.recipe.probe),
        "texts": {
            name: [content_key(list(data.probe.texts)), content_key(list(data.validation.texts))]
            for name, data in run.data.items()
        },
        "tasks": {
            name: task.model_dump(include={"kind", "loss", "prompts"}) for name, task in run.recipe.tasks.items()
        },
        "settings": run.recipe.positioning.model_dump(exclude={"checkpoint_every", "sharding", "shard_ranks"}),
        "seed": run.recipe.seed,
        "base": run.recipe.base.model_dump(),
    }
    return content_key(described)


def position(run: Run) -> Cost:
    """Learn the coefficients into DIR/position. Returns the cost of positioning alone. Collective under a launcher."""
    from scalemerge.distributed.group import Group
    from scalemerge.distributed.watching import Heartbeats, StopRequest

    group = Group.launched()
    with StopRequest() as stop, Heartbeats(group.rank, group.world, stop):
        cost = _position(run, group, stop)
    group.close()
    return cost


def _position(run: Run, group: Any, stop: Any) -> Cost:
    from scalemerge.checkpoints.revision import content_key
    from scalemerge.data.probe import manifest
    from scalemerge.merging import read_coefficients
    from scalemerge.positioning import Search, build
    from scalemerge.positioning.sharding import choose_sharding
    from scalemerge.training import load_encoder

    settings, folder = run.recipe.positioning, run.position_folder
    described = content_key(run.recipe.model_dump(mode="json", exclude={"data"}))
    group.agree("recipe", described, "start every rank with the same recipe and options")
    store = open_store(run, settings.task_vectors)
    key = group.from_first(lambda: position_key(run, store))

    def learned_before() -> dict[str, Any] | None:
        if not (folder / "coefficients.json").is_file():
            require_writable(folder)
            write_json(folder / "probe.json", manifest(run.data, run.recipe.probe))
            return None
        if read_coefficients(folder / "coefficients.json").get("key") != key:
            raise InputError(
                f"{folder / 'coefficients.json'}: was learned from other experts, probe rows or settings; delete "
                f"{folder} or give another --out"
            )
        return dict(read_json(folder / "cost.json"))

    cost = group.from_first(learned_before)
    if cost is not None:
        return Cost.from_dict(cost)
    sharding = choose_sharding(settings, store, group)
    if group.world > 1:
        say(f"positioning: {sharding} over {group.world} ranks")
    encoder = load_encoder(run.recipe.base, empty=sharding == "sharded")
    if sharding != "sharded":
        encoder = encoder.to(group.device)
    search = Search(
        build(encoder, store, settings, group, sharded=sharding == "sharded"),
        run.recipe.tasks,
        {name: data.probe for name, data in run.data.items()},
        {name: data.validation for name, data in run.data.items()},
        settings,
        seed=run.recipe.seed,
        folder=folder,
        key=key,
        stop=stop,
    )
    learned = search.run()
    say(
        f"positioning: validation objective {learned['validation']['start']:.4f} at the start, "
        f"{learned['validation']['best']:.4f} at step {learned['best_step']}; the reverse order of experts would move "
        f"the merged task vector by {100 * learned['order_effect']:.0f} % of its length"
    )
    return search.cost


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- merges ------------------------------------------------------------------------------------------------------


def write_merges(run: Run, storage: Storage | None = None) -> dict[str, Cost]:
    """Write every merge of the recipe into DIR/merged. Returns the cost of each, without the experts."""
    store = open_store(run)
    return {merge.key: write_merge(run, store, merge, storage) for merge in run.recipe.merges}


def write_merge(run: Run, store: Any, merge: Merge, storage: Storage | None = None) -> Cost:
    from scalemerge.checkpoints.revision import content_key
    from scalemerge.merging import combine_learned, find_method, read_coefficients, write_merged

    folder = run.out / "merged" / merge.key
    parameters = check_merge(merge, f"merges.{merge.key}")
    description: dict[str, Any] = {
        "title": f"{run.recipe.name}: {merge.key}",
        "base": run.recipe.base.path,
        "method": merge.method,
        "experts": {name: str(path.name) for name, path in zip(store.experts, store.folders, strict=True)},
        "parameters": parameters,
    }
    if merge.method == LEARNED:
        path = run.position_folder / "coefficients.json"
        if not path.is_file():
            raise InputError(f"{path}: missing; run 'scalemerge position' first")
        learned = read_coefficients(path)
        if learned["experts"] != store.experts:
            raise InputError(f"{path}: learned for experts {learned['experts']}, not {store.experts}")
        for name in ("position", "granularity", "lambda", "a", "c", "steps", "seed"):
            description[name] = learned.get(name)
        combine = combine_learned(learned)
    else:
        method = find_method(merge.method, "merges")
        description["source"] = method.source

        def combine(name: str, base: Any, task_vectors: Any) -> Any:
            return method(base, task_vectors, parameters)

    key = content_key([store.revisions, description, merge.dtype])
    record = folder / RECORD
    if record.is_file():
        found = read_json(record)
        if found.get("key") == key and "cost" in found:  # without it, the writer was killed before its last line
            return Cost.from_dict(found["cost"])
    elif folder.exists():
        raise InputError(f"{folder}: exists but was not written by scalemerge; move it or give another --out")
    began = time.monotonic()
    write_merged(store, folder, combine, description=description, key=key, dtype=merge.dtype, storage=storage)
    cost = Cost(seconds=time.monotonic() - began)
    write_json(record, {**read_json(record), "cost": cost.as_dict()})
    return cost


# ---- evaluation and report ---------------------------------------------------------------------------------------


def models(run: Run) -> dict[str, tuple[Path, Cost]]:
    """Everything to score, with what it cost to make: an expert counts once in every merge that uses it."""

    def trained(folder: Path) -> Cost:
        return Cost.from_dict(read_json(folder / RECORD)["cost"]) if (folder / RECORD).is_file() else Cost()

    found = {"base": (run.base_folder(), Cost())}
    experts = {f"expert:{name}": trained(folder) for name, folder in run.experts.items()}
    for name, folder in run.experts.items():
        found[f"expert:{name}"] = (folder, experts[f"expert:{name}"])
    for name in run.recipe.joint:
        folder = run.out / "joint" / name
        found[f"joint:{name}"] = (folder, trained(folder))
    for merge in run.recipe.merges:
        folder = run.out / "merged" / merge.key
        if not (folder / RECORD).is_file():
            raise InputError(f"{folder}: the merged model is missing; run 'scalemerge merge' first")
        own = Cost.from_dict(read_json(folder / RECORD)["cost"])
        if merge.method == LEARNED:
            own = own.plus(Cost.from_dict(read_json(run.position_folder / "cost.json")))
        found[f"merge:{merge.key}"] = (folder, own.including(experts))
    return found


def evaluate(run: Run) -> None:
    """Score all models into DIR/results.json; what is scored already is not scored again."""
    assert run.suite is not None
    for key, (path, cost) in models(run).items():
        name = f"{run.recipe.name}-{key.replace(':', '-')}"
        score(path, run.suite, key, name, run.out, run.recipe.evaluation.batch_size, cost)


def score(
    path: str | Path, suite: Suite, key: str, name: str, out: Path, batch_size: int, cost: Cost | None = None
) -> dict[str, Any]:
    """Score one model under `name` (mteb's) and record it under `key` in OUT/results.json. Returns the scores."""
    from scalemerge.evaluation.results import record_model
    from scalemerge.evaluation.scorer import evaluate as run_mteb

    with Progress(f"scoring {key}", len(suite.tasks), unit="task") as progress:
        scores = run_mteb(
            path,
            suite,
            model_name=name,
            output_dir=out,
            batch_size=batch_size,
            progress=lambda done, total, task: progress.advance(done - progress.count),
            device=_device(),
        )
    record_model(out / "results.json", suite, key, path, scores, cost.as_dict() if cost else None, device=_device())
    return scores


def report(out: Path, *, detail: bool = False) -> Path:
    """The table in the terminal and DIR/report.html."""
    from scalemerge.report.html import write_report
    from scalemerge.report.reading import read_run
    from scalemerge.report.tables import print_scores

    print_scores(read_run(out).results, detail=detail)
    page = write_report(out)
    say(f"report: {page}")
    return page


def score_folder(
    model: str, wanted: Evaluation, out: Path, *, name: str | None = None, data: Path | None = None
) -> None:
    """`scalemerge eval`: score one model folder into OUT/results.json and print the table."""
    require_writable(out)
    folder = data or os.environ.get(DATA_VARIABLE)
    suite = make_suite(wanted, str(folder) if folder else None)
    name = name or Path(model).name
    scores = score(model, suite, f"model:{name}", name, out, wanted.batch_size)
    for task, points in scores["scores"].items():
        print(f"{task:24s} {points:6.2f}")
    print(f"{'mean over types':24s} {scores['mean']:6.2f}")


STAGES: dict[str, Callable[[Run], Any]] = {
    "experts": train_experts,
    "joint": train_joint,
    "position": position,
    "merges": write_merges,
    "evaluate": evaluate,
}


def run_all(recipe: Recipe, out: Path) -> Path:
    """All stages in order, then the report. Returns the report's path."""
    run = prepare(recipe, out)
    for stage in STAGES.values():
        stage(run)
    return report(out)
