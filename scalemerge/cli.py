"""The command line: one verb a stage. Imports are lazy, so that `--help` answers at once.

Exit codes: 0 done, 1 failed, 2 bad usage or bad input. Errors are one line on stderr; `--debug` shows the traceback.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scalemerge.errors import InputError, RankLost

if TYPE_CHECKING:
    from scalemerge.recipe import Recipe

app = typer.Typer(
    name="scalemerge",
    help="Train text-embedding experts once, then learn the best single model among their task vectors.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run. Default: runs/<recipe name>.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder that {data} stands for. Default: $SCALEMERGE_DATA.")]
Experts = Annotated[
    list[str] | None, typer.Option("--expert", help="NAME=FOLDER of an expert trained elsewhere; repeat for each.")
]


def _recipe(path: Path, data: Path | None, out: Path | None) -> tuple[Recipe, Path]:
    from scalemerge.recipe import load_recipe

    recipe = load_recipe(path, data=data)
    return recipe, out or Path("runs") / recipe.name


def _expert_folders(given: list[str] | None) -> dict[str, Path]:
    folders = {}
    for text in given or []:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder:
            raise InputError(f"--expert {text}: write it as NAME=FOLDER")
        folders[name] = Path(folder)
    return folders


def _experts_of(recipe: Recipe, folder: Path, given: list[str] | None) -> dict[str, Path]:
    """The experts of a run, with those that --expert names in their places or after them."""
    elsewhere = _expert_folders(given)
    return {name: elsewhere.get(name, folder / "experts" / name) for name in recipe.tasks} | elsewhere


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from scalemerge import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog="Example: scalemerge run recipes/docs.yaml --out runs/demo")
def run(recipe: RecipePath, out: Out = None, data: Data = None) -> None:
    """All stages: train experts and baselines, position, merge, evaluate, report. Resumes where it stopped."""
    from scalemerge.pipeline import run_all

    run_all(*_recipe(recipe, data, out))


@app.command(
    epilog="Example: accelerate launch --config_file accelerate_configs/ddp.yaml -m scalemerge train "
    "recipes/shared-suite.yaml --task sts --out runs/shared"
)
def train(
    recipe: RecipePath,
    task: Annotated[str | None, typer.Option("--task", help="Train the expert of this task.")] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Train a joint baseline instead.")] = False,
    alpha: Annotated[float, typer.Option("--alpha", min=0, help="With --joint: p_i ~ n_i^alpha.")] = 1.0,
    out: Out = None,
    data: Data = None,
) -> None:
    """Train one expert, or a joint baseline. Under `accelerate launch` on many devices."""
    if joint == (task is not None):
        raise typer.BadParameter("give either --task NAME or --joint")
    from scalemerge.pipeline import prepare
    from scalemerge.training import expert_job, joint_job
    from scalemerge.training import train as train_job

    loaded, folder = _recipe(recipe, data, out)
    if task is not None and task not in loaded.tasks:
        raise InputError(f"--task {task}: the recipe {recipe} has {', '.join(loaded.tasks)}")
    name = f"alpha-{alpha:g}"
    if joint:
        from scalemerge.recipe import Joint

        name = next((key for key, value in loaded.joint.items() if value == Joint(alpha=alpha)), name)
        loaded.joint.setdefault(name, Joint(alpha=alpha))
    prepared = prepare(loaded, folder, evaluation=False)
    if task is not None:
        train_job(expert_job(loaded, prepared.data, task), folder / "experts" / task)
    else:
        train_job(joint_job(loaded, prepared.data, name), folder / "joint" / name)


@app.command(epilog="Example: scalemerge position recipes/docs.yaml --out runs/demo")
def position(recipe: RecipePath, out: Out = None, data: Data = None, expert: Experts = None) -> None:
    """Learn the merging coefficients from experts on disk, into OUT/position."""
    from scalemerge.pipeline import position as learn
    from scalemerge.pipeline import prepare

    loaded, folder = _recipe(recipe, data, out)
    experts = _experts_of(loaded, folder, expert)
    if loaded.positioning.order is not None and sorted(loaded.positioning.order) != sorted(experts):
        raise InputError(f"positioning.order: must name each expert once: {', '.join(experts)}")
    learn(prepare(loaded, folder, experts=experts, evaluation=False))


@app.command(
    epilog="Example: scalemerge merge --base BASE --expert sts=runs/demo/experts/sts --expert docs=other/docs "
    "--method task_arithmetic --set lambda=0.3 --out merged"
)
def merge(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe whose merges to write.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option("--base", help="Folder of the base model.")] = None,
    expert: Experts = None,
    method: Annotated[str, typer.Option("--method", help="average, task_arithmetic ...")] = "average",
    coefficients: Annotated[Path | None, typer.Option("--coefficients", help="A coefficients.json to apply.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a method's parameter.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = None,
    memory: Annotated[str, typer.Option("--memory", help="For blocks of tensors.")] = "512MB",
    shard_size: Annotated[str, typer.Option("--shard-size", help="Of a file written, at most.")] = "5GB",
    out: Out = None,
    data: Data = None,
) -> None:
    """Write merged models: those of a recipe, or one from folders by a static method or learned coefficients."""
    from scalemerge.merging.write import Storage

    storage = Storage.parse(memory, shard_size)
    if recipe is not None:
        from scalemerge.pipeline import prepare, write_merges

        loaded, folder = _recipe(recipe, data, out)
        write_merges(prepare(loaded, folder, experts=_experts_of(loaded, folder, expert), evaluation=False), storage)
        return
    if base is None or not expert or out is None:
        raise typer.BadParameter("give a RECIPE, or --base, --expert (one or more) and --out")
    from scalemerge.merging.folders import merge_folders

    merge_folders(base, _expert_folders(expert), out, method, _parameters(set_), coefficients, dtype, storage)


@app.command(epilog="Example: scalemerge diff BASE runs/demo/experts/docs-search --granularity layer")
def diff(
    a: Annotated[Path, typer.Argument(help="A model folder.")],
    b: Annotated[Path, typer.Argument(help="Another of the same architecture.")],
    granularity: Annotated[str, typer.Option("--granularity", help="module, layer or global.")] = "layer",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Norms, cosines and what storage keeps of the difference of two models, by module."""
    from scalemerge.inspecting import diff_folders
    from scalemerge.inspecting.tables import print_differences

    found = diff_folders(a, b, granularity=granularity)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_differences(found)


@app.command(epilog="Example: scalemerge inspect runs/demo/store --base BASE")
def inspect(
    path: Annotated[Path, typer.Argument(help="A model, an adapter, a store of task vectors, or a run.")],
    base: Annotated[Path | None, typer.Option("--base", help="For norms and cosines of task vectors.")] = None,
    vectors: Annotated[bool, typer.Option(help="Read the weights for norms and cosines.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is in a folder; of several experts the cosines of their task vectors."""
    from scalemerge.inspecting import inspect_folder
    from scalemerge.inspecting.tables import print_inspected

    found = inspect_folder(path, base, vectors=vectors)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_inspected(found)


@app.command(epilog="Example: scalemerge extract BASE runs/demo/experts/docs-search --rank 16 --out adapter")
def extract(
    base: Annotated[str, typer.Argument(help="Folder of the base model.")],
    expert: Annotated[Path, typer.Argument(help="A model trained from it, or stored task vectors.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the adapter.")],
    rank: Annotated[int, typer.Option("--rank", min=1)] = 16,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Embedding tables, too.")] = False,
) -> None:
    """Write a LoRA adapter of a full model, by singular values, with its error."""
    from scalemerge.adapters import extract_adapter
    from scalemerge.encoder import local_folder

    for line in extract_adapter(local_folder(base), expert, out, rank, embeddings=embeddings).lines():
        typer.echo(line)


@app.command(
    epilog="Example: scalemerge compress recipes/docs.yaml --run runs/demo --format int4 --out runs/demo/store"
)
def compress(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe whose experts to compress.", show_default=False)] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of its run. Default: runs/<recipe name>.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Without a recipe: folder of the base model.")] = None,
    expert: Experts = None,
    form: Annotated[str, typer.Option("--format", help="int8, int4, bfloat16 or svd.")] = "int4",
    group_size: Annotated[int, typer.Option("--group-size", help="int8, int4: 32, 64, 128 or 256 columns.")] = 64,
    rank: Annotated[int, typer.Option("--rank", help="svd: rank of each matrix.")] = 16,
    shared_base: Annotated[
        bool, typer.Option("--shared-base", help="Store the mean once, and of each expert what differs.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The store to write: a folder an expert.")] = None,
    data: Data = None,
) -> None:
    """Write experts as compressed task vectors, for position and merge (--expert NAME=STORE/NAME). Resumable."""
    if out is None or (recipe is None and (base is None or not expert)):
        raise typer.BadParameter("give --out, and a RECIPE or --base with one --expert or more")
    from scalemerge.encoder import local_folder
    from scalemerge.task_vectors.compression import Compression, compress_folders

    how = Compression(form, group_size, rank, shared_base)  # type: ignore[arg-type]
    if recipe is None:
        assert base is not None
        experts = _expert_folders(expert)
    else:
        loaded, folder = _recipe(recipe, data, run)
        base, experts = base or loaded.base.path, _experts_of(loaded, folder, expert)
    typer.echo("\n".join(compress_folders(local_folder(base), experts, out, how).lines()))


def _parameters(given: list[str] | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    for text in given or []:
        name, _, value = text.partition("=")
        try:
            parameters[name] = float(value)
        except ValueError:
            raise InputError(f"--set {text}: write it as NAME=NUMBER") from None
    return parameters


@app.command(
    name="eval", epilog="Example: scalemerge eval runs/demo/merged/self_positioning --suite shared --data data --fast"
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, or package:<name>/<folder>.", show_default=False)],
    suite: Annotated[str, typer.Option("--suite", help="docs, shared, or hub (mteb names through --task).")] = "docs",
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task; repeat for more.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="The small subset of suite shared.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="The model's name in the results.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64,
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json and mteb's own files.")] = Path(
        "runs/eval"
    ),
    data: Data = None,
) -> None:
    """MTEB scores of any model folder."""
    from scalemerge.pipeline import score_folder
    from scalemerge.recipe import Evaluation

    if suite not in ("docs", "shared", "hub"):
        raise typer.BadParameter(f"'{suite}': choose docs, shared or hub", param_hint="--suite")
    wanted = Evaluation(suite=suite, tasks=task, fast=fast, batch_size=batch_size)  # type: ignore[arg-type]
    score_folder(model, wanted, out, name=name, data=data)


@app.command(
    epilog="Example: scalemerge mine runs/demo/experts/search --source pairs.jsonl.gz --out negatives.jsonl.gz "
    "--negatives 7 --margin-relative 0.95"
)
def mine(
    model: Annotated[str, typer.Argument(help="Model folder, hub id, or package:<name>/<folder>.", show_default=False)],
    source: Annotated[str, typer.Option("--source", help="Rows: a file, folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="The .jsonl or .jsonl.gz to write: rows of kind triplets.")],
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="File of texts to take negatives from. Default: the source's own.")
    ] = None,
    kind: Annotated[str, typer.Option("--kind", help="pairs, triplets or retrieval.")] = "pairs",
    split: Annotated[str, typer.Option("--split", help="Split of a folder or hub id.")] = "train",
    name: Annotated[str | None, typer.Option("--name", help="Configuration of a hub id.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="ROLE=NAME of a column, as query=question; repeat for more.")
    ] = None,
    negatives: Annotated[int, typer.Option("--negatives", help="How many a row.")] = 7,
    rank_min: Annotated[int, typer.Option("--rank-min", help="Pass over so many of the nearest texts.")] = 10,
    rank_max: Annotated[int, typer.Option("--rank-max", help="Take none that ranks after this.")] = 100,
    margin_absolute: Annotated[
        float | None, typer.Option("--margin-absolute", help="Negatives score below the positive's score minus this.")
    ] = None,
    margin_relative: Annotated[
        float, typer.Option("--margin-relative", help="Negatives score below this times the positive's score.")
    ] = 0.95,
    no_margin: Annotated[bool, typer.Option("--no-margin", help="Do not apply --margin-relative.")] = False,
    sampling: Annotated[str, typer.Option("--sampling", help="top or random, of those that pass.")] = "top",
    seed: Annotated[int, typer.Option("--seed", help="Of --sampling random.")] = 0,
    min_negatives: Annotated[int, typer.Option("--min-negatives", help="Drop rows with fewer.")] = 0,
    query_prompt: Annotated[str | None, typer.Option("--query-prompt", help="Default: the model's own.")] = None,
    document_prompt: Annotated[str | None, typer.Option("--document-prompt", help="Default: the model's own.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64,
    device: Annotated[str | None, typer.Option("--device", help="Default: cuda where there is one.")] = None,
    data: Data = None,
) -> None:
    """Mine hard negatives with a trained model. Resumes where it stopped."""
    from scalemerge.mining import Rules, mine_files
    from scalemerge.recipe import DATA_VARIABLE, Source

    rules = Rules(
        negatives,
        rank_min,
        rank_max,
        margin_absolute,
        None if no_margin else margin_relative,
        sampling,
        seed,
        min_negatives,
    )
    folder = data or os.environ.get(DATA_VARIABLE)
    summary = mine_files(
        model,
        Source(path=source, name=name, split=split, columns=_columns(column)),
        out,
        rules,
        kind=kind,
        corpus=corpus,
        device=device,
        data=str(folder) if folder else None,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        batch_size=batch_size,
    )
    typer.echo("\n".join(summary.lines(rules)))


def _columns(given: list[str] | None) -> dict[str, str]:
    columns = {}
    for text in given or []:
        role, equals, name = text.partition("=")
        if not equals or not role or not name:
            raise InputError(f"--column {text}: write it as ROLE=NAME")
        columns[role] = name
    return columns


@app.command(epilog="Example: scalemerge plan recipes/qwen3-8b.yaml --devices 64 --gpu h100 --network ndr400")
def plan(
    recipe: RecipePath,
    devices: Annotated[int, typer.Option("--devices", min=1, help="GPUs in all.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h200, b200, a100 ... see --hardware.")] = "h100",
    network: Annotated[str, typer.Option("--network", help="Between machines: ndr400, hdr200 ...")] = "ndr400",
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1)] = 8,
    config: Annotated[
        Path | None, typer.Option("--config", help="The base's config.json, where it is not here.")
    ] = None,
    hardware: Annotated[Path | None, typer.Option("--hardware", help="TOML file of further GPUs and networks.")] = None,
    examples: Annotated[int, typer.Option("--examples-per-task", min=1, help="Where the recipe has none.")] = 100_000,
    tokens: Annotated[int, typer.Option("--tokens-per-text", min=1)] = 128,
    runs: Annotated[int, typer.Option("--sweep-runs", min=1, help="Joint runs to compare with.")] = 8,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    data: Data = None,
) -> None:
    """Memory, traffic and least time of every stage, and the study's cost, before anything is launched."""
    from scalemerge.planning.hardware import load_hardware
    from scalemerge.planning.plan import Assumptions, make_plan
    from scalemerge.planning.shapes import backbone, read_config
    from scalemerge.planning.tables import print_plan
    from scalemerge.recipe import load_recipe

    loaded = load_recipe(recipe, data=data)
    shape = backbone(read_config(loaded.base.path, config))
    made = make_plan(
        loaded,
        shape,
        load_hardware(gpu, network, gpus_per_node, hardware),
        devices,
        Assumptions(examples, tokens, runs),
    )
    print_plan(made)
    if json_ is not None:
        from scalemerge.checkpoints.atomic import write_json

        write_json(json_, made.as_dict())


@app.command(epilog="Example: scalemerge report runs/demo")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    detail: Annotated[bool, typer.Option("--detail", help="Every task, not only the means by type.")] = False,
) -> None:
    """Tables in the terminal and report.html from what a run left behind."""
    from scalemerge.pipeline import report as show

    show(folder, detail=detail)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a verb, turns errors into one line and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not Path("/dev/nvidiactl").exists() else "cuda")
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    code = 0
    try:
        _quiet()
        result = app([argument for argument in given if argument != "--debug"], standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except InputError as error:
        code = _fail(str(error), 2, debug)
    except RankLost as error:
        code = _fail(str(error), 1, debug)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted; run the same command again to continue", 130, debug)
    except OSError as error:
        code = _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1, debug)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's usage errors, whichever click they come from
        if callable(usage):
            context = getattr(error, "ctx", None)
            where = f" (see '{context.command_path} --help')" if context else ""
            sys.exit(_fail(f"{usage()}{where}", 2, debug))
        code = _fail(f"{type(error).__name__}: {error} (a bug; --debug shows where)", 1, debug)
    sys.stdout.flush()
    sys.exit(code)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _quiet() -> None:
    """Progress bars and warnings of libraries would bury ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
