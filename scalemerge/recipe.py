"""The recipe: one YAML file that describes a run, as typed models.

This is the only module that knows YAML. Every key has a type, every default is written out into the run's folder
(`dump_recipe`), and an unknown key is refused with the nearest known one, because a silently ignored `learning_rat:`
costs a day of training.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scalemerge.errors import InputError

DATA_VARIABLE = "SCALEMERGE_DATA"

TaskKind = Literal["pairs", "triplets", "scored_pairs", "labelled_texts", "retrieval"]


class _Section(BaseModel):
    """A part of the recipe: unknown keys are refused, with the nearest known key as the remedy."""

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()} | set(cls.model_fields)
            for key in values:
                if key not in known:
                    nearest = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.5)
                    remedy = f"did you mean '{nearest[0]}'?" if nearest else f"known keys: {', '.join(sorted(known))}"
                    raise ValueError(f"unknown key '{key}'; {remedy}")
        return values


class Base(_Section):
    """The base model that all experts start from.

    path: a folder in sentence-transformers or transformers format, a hub id, or `package:<import name>/<folder>`
    for a model that an installed Python package carries. bidirectional: let the tokens of a decoder see later ones.
    pool_prompt: whether mean pooling counts the tokens of a prompt (None: as the folder says, else yes).
    """

    path: str
    pooling: Literal["cls", "mean", "last"] | None = None
    normalize: bool = True
    max_length: int | None = Field(None, ge=2)
    bidirectional: bool = False
    pool_prompt: bool | None = None
    attention: str | None = None
    trust_remote_code: bool = False


class Source(_Section):
    """Where rows come from: a local JSONL(.gz)/Parquet/CSV file or folder, or a hub id. `{data}` and `{docs}` stand
    for the folder of shared data and the built-in docs suite.

    streaming: read without downloading or holding the whole; with a `limit`, its first rows as a table. Without one,
    training reads the stream in windows of so many rows, shuffled each, again and again until training.max_steps.
    """

    path: str
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] = {}
    where: dict[str, list[Any]] = {}
    limit: int | None = Field(None, ge=1)
    streaming: bool = False
    window: int = Field(50_000, ge=2)

    @property
    def streamed(self) -> bool:
        """Whether training reads it window by window, instead of a table of all rows."""
        return self.streaming and self.limit is None


class Prompts(_Section):
    query: str = ""
    document: str = ""


class Loss(_Section):
    """`name` is an entry of scalemerge.objectives; `parameters` are the keyword arguments of that function.

    matryoshka: dimensions at which the loss is taken as well, of embeddings cut to that many; their weighted mean is
    trained. Weights default to 1 each; name the full dimension too, or it is not trained.
    """

    name: Literal["infonce", "cosent", "supcon"]
    parameters: dict[str, Any] = {}
    matryoshka: list[int] | None = Field(None, min_length=1)
    matryoshka_weights: list[float] | None = None

    @model_validator(mode="after")
    def _matryoshka_fits(self) -> Loss:
        dimensions, weights = self.matryoshka, self.matryoshka_weights
        if dimensions is not None and (min(dimensions) < 1 or len(set(dimensions)) < len(dimensions)):
            raise ValueError(f"matryoshka: {dimensions} must be different positive dimensions")
        if weights is not None and (len(weights) != len(dimensions or []) or min(weights) <= 0):
            raise ValueError("matryoshka_weights: give one positive weight for each dimension of 'matryoshka'")
        return self


class Lora(_Section):
    """Train low-rank adapters instead of all weights, through peft. quantize: how the frozen base is held (nf4 and int8
    need bitsandbytes and a GPU). save: the adapter alone, or the whole model with the adapter merged into it."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | None = None  # module names; None: all linear layers of the blocks
    quantize: Literal["none", "int8", "nf4"] = "none"
    save: Literal["adapter", "merged"] = "adapter"


class Training(_Section):
    """How a model is trained.

    chunk_tokens: a gradient cache in chunks of so many tokens ("auto": found on the first step; null: no cache).
    accumulate: batches whose gradients make one optimizer step; each has negatives of its own only. length_groups:
    padded groups in a forward pass. length_buckets: batches are cut from so many batches' rows sorted by length.
    prefetch: batches tokenized ahead. evaluate_every: steps between evaluations on `evaluation_rows` rows held out of
    training (null: none); keep: the last weights, or the best of those evaluations. save_dtype: of the model written.
    trackers: what Accelerate logs to besides training.jsonl, e.g. [tensorboard].
    """

    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(5e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    accumulate: int = Field(1, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    length_groups: int = Field(4, ge=1)
    length_buckets: int = Field(1, ge=1)
    samples_per_label: int = Field(4, ge=2)
    checkpoint_every: int = Field(100, ge=1)
    engine: Literal["auto", "plain", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"] = "auto"
    prefetch: int = Field(2, ge=0)
    evaluate_every: int | None = Field(None, ge=1)
    evaluation_rows: int = Field(256, ge=2)
    keep: Literal["last", "best"] = "last"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    trackers: list[str] = []
    lora: Lora | None = None

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> Training:
        if self.keep == "best" and self.evaluate_every is None:
            raise ValueError("keep: 'best' needs 'evaluate_every'")
        return self


class Task(_Section):
    kind: TaskKind
    sources: list[Source] = Field(min_length=1)
    probe_sources: list[Source] = []
    prompts: Prompts = Prompts()
    loss: Loss | None = None
    weight: float | None = Field(None, gt=0)
    cap: int | None = Field(None, ge=1)
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _default_loss(self) -> Task:
        expected = {"scored_pairs": "cosent", "labelled_texts": "supcon"}.get(self.kind, "infonce")
        if self.loss is None:
            self.loss = Loss(name=expected)  # type: ignore[arg-type]
        elif self.loss.name != expected:
            raise ValueError(f"loss '{self.loss.name}' does not fit kind '{self.kind}'; use '{expected}'")
        return self


class Joint(_Section):
    """A joint baseline: tasks mixed with p_i proportional to n_i^alpha (1 proportional, 0 uniform) or given weights."""

    alpha: float = Field(1.0, ge=0)
    cap: int | None = Field(None, ge=1)
    weights: dict[str, float] | None = None
    training: dict[str, Any] = {}


class Probe(_Section):
    """Held-out rows that positioning learns from (`rows_per_task`) and stops by (`validation_rows_per_task`)."""

    rows_per_task: int = Field(512, ge=2)
    validation_rows_per_task: int = Field(256, ge=2)
    seed: int = 0


class Positioning(_Section):
    """How the coefficients are learned. precision and the four after it: activations' precision; how W0 and the delta
    are summed ("split" keeps small deltas in bf16); what task vectors are held in; one in how many token rows the
    coefficients' gradients are estimated from (1: exact); what of the activations is computed again in backward to save
    memory.

    optimizer: adam takes a probe batch a step; lbfgs the whole probe set, so that it is deterministic and `steps` are
    its iterations (learning_rate and patience are Adam's). chunk_tokens: a gradient cache in chunks of so many tokens.
    sharding: on many ranks, whether each holds all task vectors or its share of their rows (auto: replicated where that
    fits). shard_ranks: ranks that share one copy, others hold the next one (None: all). length_groups: padded groups in
    a forward pass (None: 4, or 1 of a sharded model, as each group gathers the weights again)."""

    position: Literal["slerp", "multislerp", "linear"] = "slerp"
    granularity: Literal["global", "layer", "module"] = "global"
    order: list[str] | None = None
    start: list[float] | None = None
    mu: float = Field(0.0, ge=0)
    normalize_losses: Literal["start", "expert", "none"] = "start"
    steps: int = Field(200, ge=1)
    rows_per_step: int = Field(32, ge=2)
    learning_rate: float = Field(0.05, gt=0)
    validate_every: int = Field(10, ge=1)
    patience: int = Field(5, ge=1)
    checkpoint_every: int = Field(10, ge=1)
    length_groups: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    sums: Literal["merge", "split"] = "merge"
    task_vectors: Literal["float32", "bfloat16", "int8", "int4"] = "float32"
    sample_rows: int = Field(1, ge=1)
    recompute: Literal["none", "cheap", "all"] = "none"
    optimizer: Literal["adam", "lbfgs"] = "adam"
    chunk_tokens: int | None = Field(None, ge=1)
    sharding: Literal["auto", "replicated", "sharded"] = "auto"
    shard_ranks: int | None = Field(None, ge=1)


class Merge(_Section):
    """A merged model to write. `method` is an entry of scalemerge.merging; `parameters` are its keyword arguments."""

    method: str
    name: str | None = None
    parameters: dict[str, Any] = {}
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def key(self) -> str:
        return self.name or self.method


class Evaluation(_Section):
    """What to score. `limits` caps every task (max_rows, max_queries, max_corpus ...), chosen by a fixed seed."""

    suite: Literal["docs", "shared", "hub"] = "docs"
    tasks: list[str] | None = None
    fast: bool = False
    limits: dict[str, int] = {}
    batch_size: int = Field(64, ge=1)


class Recipe(_Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = 0
    data: str | None = None
    base: Base
    tasks: dict[str, Task] = Field(min_length=1)
    training: Training = Training()
    joint: dict[str, Joint] = {}
    probe: Probe = Probe()
    positioning: Positioning = Positioning()
    merges: list[Merge] = [
        Merge(method="average"),
        Merge(method="task_arithmetic"),
        Merge(method="self_positioning"),
    ]
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        merges = [merge.key for merge in self.merges]
        for kind, names in (("tasks", list(self.tasks)), ("joint", list(self.joint)), ("merges", merges)):
            for name in names:
                if not name or any(c in name for c in "/\\:") or name.startswith(".") or not name.isprintable():
                    raise ValueError(f"{kind}: '{name}' must be usable as a folder name")
        if self.positioning.order is not None and sorted(self.positioning.order) != sorted(self.tasks):
            raise ValueError(f"positioning.order must name each task once: {', '.join(self.tasks)}")
        if self.positioning.start is not None and len(self.positioning.start) != len(self.tasks):
            raise ValueError(f"positioning.start needs one coefficient per task, {len(self.tasks)} in all")
        for name, task in self.tasks.items():
            self._merged_training(task.training, f"tasks.{name}.training")
        for name, joint in self.joint.items():
            self._merged_training(joint.training, f"joint.{name}.training")
            for weighted in joint.weights or {}:
                if weighted not in self.tasks:
                    raise ValueError(f"joint.{name}.weights names '{weighted}', which is no task")
        for key in merges:
            if merges.count(key) > 1:
                raise ValueError(f"merges: '{key}' appears twice; give each a 'name'")
        return self

    def _merged_training(self, overrides: dict[str, Any], where: str) -> Training:
        try:
            return Training(**{**self.training.model_dump(), **overrides})
        except ValidationError as error:
            raise ValueError(f"{where}: {_first_problem(error)}") from None

    def training_of(self, task: str) -> Training:
        """The training settings of one expert: the common ones with the task's own on top."""
        return self._merged_training(self.tasks[task].training, task)

    def joint_training_of(self, name: str) -> Training:
        return self._merged_training(self.joint[name].training, name)


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read the recipe ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: the recipe is not UTF-8 text; give the path of a YAML file") from None
    try:
        return yaml.safe_load(text)
    except Exception as error:  # besides YAMLError, odd tags raise KeyError, IndexError, AttributeError ...
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise InputError(
            f"{path}: not valid YAML{where} ({getattr(error, 'problem', None) or error}); mend the file"
        ) from None


def load_recipe(path: str | Path, *, data: str | Path | None = None) -> Recipe:
    """Read and check a recipe.

    data: the folder that `{data}` stands for; before the environment variable SCALEMERGE_DATA, before the recipe's own.
    Raises InputError with file, field and remedy.
    """
    path = Path(path)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys; see recipes/docs.yaml for an example")
    try:
        recipe = Recipe(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}") from None
    chosen = data or os.environ.get(DATA_VARIABLE) or recipe.data
    recipe.data = str(chosen) if chosen else None
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
