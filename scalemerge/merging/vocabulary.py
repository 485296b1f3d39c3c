"""Vocabularies of base and experts, compared by content: which row of each embedding table belongs to which token.

The name of a tokenizer says nothing about its tokens, and equal row counts say nothing about their order. So the maps
token string -> id are read (tokenizer.json; vocab.txt; or what AutoTokenizer makes of a local folder) and compared.
Different ones are refused, unless the caller asks for one of two ways to bring them together, row by row:

    base     the output has the base's tokenizer and rows. A token that an expert lacks has task vector zero there; a
             token that only experts have is dropped.
    union    the base's ids stay; tokens that only experts have follow, in the experts' order, in the padding rows first
             and then in new ones (up to a multiple of 64 where the base's table is one).

A token that the base lacks has no W0 and hence no task vectors. Its W0 is the mean of the experts that have it and its
task vectors are zero, so every method and every coefficient gives that mean (`fill_rows`).

What `union` can add is a string that is matched whole: added tokens, and whole words of a WordPiece or WordLevel
vocabulary. The pieces of another BPE, Unigram or WordPiece ("##ing") would never be made by the base's tokenizer; an
expert that has such pieces has another tokenizer, not an extended one, and is refused.

Tables often have more rows than tokens (padded to a multiple of 64): those rows have no token, stay the base's, and
have task vectors zero.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import explain_os_error, read_json
from scalemerge.checkpoints.reader import Checkpoint
from scalemerge.errors import InputError

VocabularyMode = Literal["union", "base"]
VOCABULARY_MODES: tuple[VocabularyMode, ...] = get_args(VocabularyMode)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
_SOURCES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TOKEN_TABLES = (
    "word_embeddings.weight", "embed_tokens.weight", "tok_embeddings.weight", "wte.weight", "word_embedding.weight",
    "embed_in.weight", "shared.weight", "lm_head.weight", "lm_head.bias",
)  # fmt: skip
_PADDED = 64
_REMEDY = "give experts with the base's tokenizer, or --vocab union|base"


@dataclass(frozen=True)
class Added:
    """A token that a tokenizer matches whole, beside its model's own vocabulary."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """file: where it was read. model: WordPiece, WordLevel, BPE, Unigram or unknown. ids: every token string -> id,
    the added ones among them. added: those, by content, as far as the file says."""

    file: Path
    model: str
    ids: dict[str, int]
    added: dict[str, Added]

    @property
    def in_order(self) -> list[tuple[str, int]]:
        return sorted(self.ids.items(), key=lambda pair: pair[1])


@dataclass(frozen=True)
class VocabularyPlan:
    """What the output's tokens are and where each model has them.

    tokens: by output id, None for a row without a token. base_rows, and expert_rows by expert: int64 [rows], the row in
    that model's table, -1 where it has none. added: the tokens behind the base's, in the order of their ids, which are
    new_ids. tensors: the base's names of the tensors whose rows are tokens.
    """

    mode: VocabularyMode
    tokens: list[str | None]
    base_rows: Tensor
    expert_rows: dict[str, Tensor]
    added: list[Added]
    new_ids: list[int]
    tensors: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows of the output's table, padding included: the output's vocab_size."""
        return len(self.tokens)


# ---- reading -----------------------------------------------------------------------------------------------------


def read_vocabulary(folder: str | Path) -> Vocabulary | None:
    """The vocabulary of a model folder; None where it has no tokenizer. Raises InputError for spoilt files."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        found = _of_json(folder / "tokenizer.json", read_json(folder / "tokenizer.json"))
    elif (folder / "vocab.txt").is_file():
        found = _of_text(folder / "vocab.txt")
    elif any((folder / name).is_file() for name in _SOURCES):
        return _of_transformers(folder)
    else:
        return None
    _add_others(folder, found)
    return found


def _of_json(path: Path, content: Any) -> Vocabulary:
    spoilt = InputError(f"{path}: holds no tokenizer (model.vocab and added_tokens); copy the file again")
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise spoilt
    vocab = model.get("vocab")
    try:
        if isinstance(vocab, list):  # Unigram: [token, score], in order
            ids = {str(token): number for number, (token, _) in enumerate(vocab)}
        else:
            ids = dict(vocab or {})
        added = {}
        for each in content.get("added_tokens") or []:
            token = _added(each)
            added[token.content] = token
            ids[token.content] = each["id"]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise spoilt from None
    if not all(type(number) is int and number >= 0 for number in ids.values()) or not ids:
        raise spoilt
    kind = model.get("type") or ("Unigram" if isinstance(vocab, list) else "BPE" if "merges" in model else "unknown")
    return Vocabulary(path, str(kind), ids, added)


def _of_text(path: Path) -> Vocabulary:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would split at tokens such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy the file again") from None
    ids = {line: number for number, line in enumerate(lines) if line}
    if not ids:
        raise InputError(f"{path}: holds no tokens; copy the file again")
    return Vocabulary(path, "WordPiece", ids, {})


def _of_transformers(folder: Path) -> Vocabulary:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        ids = {str(token): int(number) for token, number in tokenizer.get_vocab().items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return _of_json(folder / "tokenizer.json", json.loads(backend.to_str()))
    except InputError:
        raise
    except Exception as error:  # transformers raises many types for one cause: no usable tokenizer
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: cannot load its tokenizer ({first}); save it with a tokenizer.json") from None
    decoder = getattr(tokenizer, "added_tokens_decoder", {})
    added = {token.content: Added(token.content, bool(token.special)) for token in decoder.values()}
    return Vocabulary(folder / "tokenizer_config.json", "unknown", ids, added)


def _add_others(folder: Path, found: Vocabulary) -> None:
    """Tokens that stand beside tokenizer.json or vocab.txt only."""
    path = folder / "added_tokens.json"
    if path.is_file():
        content = read_json(path)
        if not isinstance(content, dict) or not all(type(number) is int and number >= 0 for number in content.values()):
            raise InputError(f"{path}: is no mapping of tokens to ids; copy the file again")
        for token, number in content.items():
            if found.ids.setdefault(token, number) == number:
                found.added.setdefault(token, Added(token))
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        decoder = config.get("added_tokens_decoder") if isinstance(config, dict) else None
        for number, each in decoder.items() if isinstance(decoder, dict) else ():
            try:
                token, own = _added(each), abs(int(number))
                if found.ids.setdefault(token.content, own) == own:
                    found.added[token.content] = token
            except (TypeError, ValueError, KeyError, AttributeError):
                raise InputError(f"{path}: added_tokens_decoder is spoilt at '{number}'; copy the file again") from None


def _added(each: Mapping[str, Any]) -> Added:
    special = bool(each.get("special", False))
    flags = {name: bool(each.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return Added(str(each["content"]), special, normalized=bool(each.get("normalized", not special)), **flags)


def token_tensors(checkpoint: Checkpoint, vocab_size: int | None = None) -> tuple[str, ...]:
    """Names of the tensors whose first dimension is tokens: the input embeddings, and a head where there is one.

    By their usual names; where none has one, embeddings of vocab_size rows.
    """
    named = [name for name in checkpoint.names if f".{name}".endswith(tuple(f".{table}" for table in _TOKEN_TABLES))]
    if not named and vocab_size:
        named = [
            name for name, spec in checkpoint.specs.items()
            if len(spec.shape) == 2 and spec.shape[0] == vocab_size and "emb" in name and "position" not in name
        ]  # fmt: skip
    return tuple(named)


class _Model:
    """The tokens and table rows of one model. A store's or an adapter's task vectors have the base's rows: None."""

    def __init__(self, folder: Path, vocabulary: Vocabulary | None) -> None:
        self.folder, self.vocabulary = folder, vocabulary
        self.tensors: tuple[str, ...] = ()
        self.rows: int | None = None
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            size = config.get("vocab_size") if isinstance(config, dict) else None
            checkpoint = Checkpoint(folder)
            self.tensors = token_tensors(checkpoint, size if type(size) is int else None)
            counts = {name: checkpoint.specs[name].shape[0] for name in self.tensors}
            if len(set(counts.values())) > 1:
                raise InputError(f"{folder}: token tables of different sizes ({_listed(counts)}); give another model")
            self.rows = next(iter(counts.values()), None)

    def row(self, token: str) -> int:
        """Where it has a token; -1 where not, or where the table ends before it."""
        number = self.vocabulary.ids.get(token, -1) if self.vocabulary else -1
        return number if self.rows is None or number < self.rows else -1


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


# ---- comparing and planning --------------------------------------------------------------------------------------


def first_difference(base: Vocabulary, other: Vocabulary) -> str | None:
    """In words, the first token (by id) that two vocabularies do not both have at the same id; None for equal ones."""
    if base.ids == other.ids:
        return None
    for token, number in base.in_order:
        found = other.ids.get(token)
        if found is None:
            return f"lacks token {token!r}, id {number} of the base's {base.file}"
        if found != number:
            return f"token {token!r} has id {found}, in the base's {base.file} id {number}"
    token, number = next(pair for pair in other.in_order if pair[0] not in base.ids)
    return f"has token {token!r} (id {number}) that the base's {base.file} lacks"


def check_vocabularies(base: str | Path, experts: Mapping[str, str | Path]) -> None:
    """Raise InputError unless all experts that bring a tokenizer have the base's tokens at the base's ids, and all
    whole models tables of as many rows. Reads tokenizer files and safetensors headers alone."""
    ours = _Model(Path(base), read_vocabulary(base))
    for folder in experts.values():
        theirs = _Model(Path(folder), read_vocabulary(folder))
        if ours.vocabulary is not None and theirs.vocabulary is not None:
            difference = first_difference(ours.vocabulary, theirs.vocabulary)
            if difference is not None:
                raise InputError(f"{theirs.vocabulary.file}: {difference}; {_REMEDY}")
        if None not in (ours.rows, theirs.rows) and ours.rows != theirs.rows:
            raise InputError(
                f"{folder}: tensor '{theirs.tensors[0]}' has {theirs.rows} rows, the base's {ours.rows} ({base}); "
                "give experts with as many, or --vocab base"
            )


def vocabulary_plan(base: str | Path, experts: Mapping[str, str | Path], mode: VocabularyMode) -> VocabularyPlan:
    """The output's tokens and each model's rows of them. An expert without a tokenizer, and task vectors that are no
    whole model (a store's, an adapter's), have the base's rows.

    Raises InputError for an unknown mode, a base without tokenizer or table, and for `union` an expert whose tokens
    beyond the base's cannot be added.
    """
    if mode not in VOCABULARY_MODES:
        raise InputError(f"--vocab {mode}: choose one of {', '.join(VOCABULARY_MODES)}")
    folder = Path(base)
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        raise InputError(f"{folder}: no tokenizer.json or vocab.txt; give a base with its tokenizer for --vocab {mode}")
    ours = _Model(folder, vocabulary)
    if ours.rows is None:
        raise InputError(f"{folder}: no table of token embeddings was found; --vocab {mode} cannot be used")
    models = {name: _Model(Path(each), read_vocabulary(each)) for name, each in experts.items()}
    added = _new_tokens(vocabulary, models) if mode == "union" else []
    tokens: dict[int, str] = {}
    for token, number in vocabulary.in_order:
        if mode == "union" or number < ours.rows:
            tokens.setdefault(number, token)
    first = 1 + max(vocabulary.ids.values())
    new_ids = [first + number for number in range(len(added))]
    tokens.update({number: token.content for number, token in zip(new_ids, added, strict=True)})
    rows = ours.rows
    if 1 + max(tokens) > rows:
        rows = 1 + max(tokens)
        if ours.rows % _PADDED == 0:
            rows = -(-rows // _PADDED) * _PADDED
    base_rows = torch.full((rows,), -1, dtype=torch.int64)
    base_rows[: ours.rows] = torch.arange(ours.rows)
    base_rows[new_ids] = -1
    places = torch.tensor(list(tokens), dtype=torch.int64)
    expert_rows = {}
    for name, model in models.items():
        if model.rows is None or model.vocabulary is None:
            expert_rows[name] = _as_base(base_rows, model.rows)
            continue
        expert_rows[name] = torch.full((rows,), -1, dtype=torch.int64)
        expert_rows[name][places] = torch.tensor([model.row(token) for token in tokens.values()], dtype=torch.int64)
    listed = [tokens.get(number) for number in range(rows)]
    return VocabularyPlan(mode, listed, base_rows, expert_rows, added, new_ids, ours.tensors)


def _as_base(base_rows: Tensor, rows: int | None) -> Tensor:
    return base_rows.clone() if rows is None else torch.where(base_rows < rows, base_rows, -1)


def _new_tokens(base: Vocabulary, models: Mapping[str, _Model]) -> list[Added]:
    """What experts have and the base lacks, expert by expert in the order of ids. Raises InputError for pieces."""
    new: dict[str, Added] = {}
    for model in models.values():
        if model.vocabulary is None or model.rows is None:
            continue
        for token, number in model.vocabulary.in_order:
            if token in base.ids or model.row(token) < 0:
                continue
            added = model.vocabulary.added.get(token)
            if added is None:
                whole = model.vocabulary.model in ("WordPiece", "WordLevel") and not token.startswith("##")
                if not whole:
                    raise InputError(
                        f"{model.vocabulary.file}: token {token!r} (id {number}) is a piece of another "
                        f"{model.vocabulary.model} vocabulary, not an added token, so the base's tokenizer would never "
                        "make it; use --vocab base, or experts with the base's tokenizer"
                    )
                added = Added(token, single_word=True)
            known = new.get(token)
            new[token] = added if known is None or (added.special and not known.special) else known
    return list(new.values())


# ---- rows --------------------------------------------------------------------------------------------------------


def read_rows_at(checkpoint: Checkpoint, name: str, rows: Tensor) -> Tensor:
    """Rows of a tensor, float32 [n, ...]: rows is int64 [n], of any order; zeros where it is -1.

    Neighbouring rows are read together. Raises InputError on NaN or infinity.
    """
    spec = checkpoint.specs[name]
    if len(rows) and int(rows[0]) >= 0 and torch.equal(rows, torch.arange(len(rows)) + rows[0]):
        block = checkpoint.read_rows(name, int(rows[0]), int(rows[-1]) + 1)
        return checkpoint.require_finite(name, block).float()
    out = torch.zeros(len(rows), *spec.shape[1:])
    wanted = sorted({row for row in rows.tolist() if row >= 0})
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows.tolist()):
        if row >= 0:
            places.setdefault(row, []).append(place)
    for _, run in groupby(enumerate(wanted), key=lambda pair: pair[1] - pair[0]):
        numbers = [row for _, row in run]
        block = checkpoint.require_finite(name, checkpoint.read_rows(name, numbers[0], numbers[-1] + 1)).float()
        source = [index for index, row in enumerate(numbers) for _ in places[row]]
        out[[place for row in numbers for place in places[row]]] = block[source]
    return out


def fill_rows(
    base: Tensor, has_base: Tensor, experts: Sequence[Tensor], have: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """W0 and T_1 .. T_E of some output rows from each model's own rows of the same tokens.

    base, experts: float32 [n, ...]; has_base, have: bool [n], False where the numbers mean nothing. A row that the base
    lacks is the mean of the experts that have it (zero where none has), with task vectors zero; a row that an expert
    lacks has task vector zero.
    """

    def shaped(mask: Tensor) -> Tensor:
        return mask.view(-1, *[1] * (base.dim() - 1))

    w0 = torch.where(shaped(has_base), base, torch.zeros_like(base))
    missing = ~has_base
    if bool(missing.any()) and experts:
        total, count = torch.zeros_like(base), torch.zeros(len(base))
        for rows, mask in zip(experts, have, strict=True):
            total += torch.where(shaped(mask), rows, torch.zeros_like(rows))
            count += mask
        w0 = torch.where(shaped(missing), total / shaped(count.clamp(min=1)), w0)
    task_vectors = [
        torch.where(shaped(mask & has_base), rows - w0, torch.zeros_like(w0))
        for rows, mask in zip(experts, have, strict=True)
    ]
    return w0, task_vectors


def aligned_rows(
    plan: VocabularyPlan, name: str, base: Checkpoint, experts: Mapping[str, Checkpoint], start: int, stop: int
) -> tuple[Tensor, list[Tensor]]:
    """W0 and T_1 .. T_E, float32, of rows [start, stop) of the output's token tensor `name`, from whole models.

    experts: those of the plan, in the order that the task vectors come in; one that lacks the tensor has zeros.
    """
    at = plan.base_rows[start:stop]
    tables, have = [], []
    for expert, checkpoint in experts.items():
        rows = plan.expert_rows[expert][start:stop]
        if name not in checkpoint.specs:
            rows = torch.full_like(rows, -1)
            tables.append(torch.zeros(len(rows), *base.specs[name].shape[1:]))
        else:
            tables.append(read_rows_at(checkpoint, name, rows))
        have.append(rows >= 0)
    return fill_rows(read_rows_at(base, name, at), at >= 0, tables, have)


# ---- the output's tokenizer --------------------------------------------------------------------------------------


def write_tokenizer(plan: VocabularyPlan, base: str | Path, out: Path) -> None:
    """Write the output's tokenizer files into the folder `out`: copies of the base's, or the base's with the plan's
    tokens added by transformers, special ones as special.

    Raises InputError when the disk refuses or transformers gives a token another id than planned.
    """
    folder = Path(base)
    if not plan.added:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name in TOKENIZER_FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, out / name)
        except OSError as error:
            raise explain_os_error(error, out) from None
        return
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        for special, group in groupby(plan.added, key=lambda token: token.special):
            tokens = [
                AddedToken(
                    each.content, special=special, lstrip=each.lstrip, rstrip=each.rstrip,
                    single_word=each.single_word, normalized=each.normalized,
                )
                for each in group
            ]  # fmt: skip
            tokenizer.add_tokens(tokens, special_tokens=special)
    except Exception as error:  # transformers raises many types for one cause: no usable tokenizer
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{folder}: its tokenizer cannot be extended ({first}); use --vocab base") from None
    for token, number in zip(plan.added, plan.new_ids, strict=True):
        found = tokenizer.convert_tokens_to_ids(token.content)
        if found != number:
            raise InputError(
                f"{folder}: its tokenizer gives the new token {token.content!r} id {found}, not {number}; use "
                "--vocab base"
            )
    try:
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise explain_os_error(error, out) from None
