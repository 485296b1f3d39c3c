"""Vocabularies compared and brought together by token string, with small tokenizers of several kinds."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scalemerge.checkpoints.reader import Checkpoint
from scalemerge.errors import InputError
from scalemerge.merging.vocabulary import (
    aligned_rows,
    check_vocabularies,
    fill_rows,
    read_rows_at,
    read_vocabulary,
    vocabulary_plan,
    write_tokenizer,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["rain", "salt", "snow", "##s", "##y", "storm"]
TABLE = "embeddings.word_embeddings.weight"


@pytest.fixture
def bert(tmp_path):
    """`bert(name, words, rows=None, added=(), seed=0, special=())`: a folder with a BERT tokenizer and a table."""

    def make(name, words, rows=None, added=(), seed=0, special=()):
        from transformers import BertTokenizerFast

        folder = tmp_path / name
        folder.mkdir()
        vocab = {token: number for number, token in enumerate([*SPECIAL, *words])}
        tokenizer = BertTokenizerFast(vocab=vocab)
        tokenizer.add_tokens(list(added))
        tokenizer.add_tokens(list(special), special_tokens=True)
        tokenizer.save_pretrained(folder)
        return with_table(folder, rows or len(tokenizer), seed)

    return make


def with_table(folder, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {TABLE: torch.randn(rows, 4, generator=generator), "encoder.layer.0.dense.weight": torch.randn(4, 4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": rows, "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reload(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ---- reading and comparing ---------------------------------------------------------------------------------------


def test_reads_every_kind_of_file(bert, tmp_path) -> None:
    """tokenizer.json, vocab.txt and transformers itself tell the same tokens."""
    folder = bert("a", WORDS, added=["covid"], special=["[DOC]"])
    found = read_vocabulary(folder)
    assert found.ids == reload(folder).get_vocab() and found.model == "WordPiece"
    assert found.added["[DOC]"].special and not found.added["covid"].special
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n", encoding="utf-8")
    (plain / "added_tokens.json").write_text(json.dumps({"covid": 11, "[DOC]": 12}))
    assert read_vocabulary(plain).ids == found.ids
    assert read_vocabulary(tmp_path) is None


def test_reads_what_only_transformers_can(tmp_path) -> None:
    """vocab.json and merges.txt, without a tokenizer.json."""
    pieces = {token: number for number, token in enumerate(["<|endoftext|>", "a", "b", "ab", "Ġ", "Ġab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2Model"]}))
    found = read_vocabulary(tmp_path)
    assert found.ids == pieces and found.model == "BPE"


def test_a_unigram_list_and_a_line_separator(tmp_path) -> None:
    vocab = [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.0]]
    content = {"model": {"type": "Unigram", "vocab": vocab}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(tmp_path).ids == {"<unk>": 0, "▁a": 1, "b": 2}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("[PAD]\n\u2028\nb\n", encoding="utf-8")
    assert read_vocabulary(tmp_path).ids == {"[PAD]": 0, "\u2028": 1, "b": 2}


def test_equal_content_passes_whatever_the_name(bert, tiny_folders, tmp_path) -> None:
    base = bert("base", WORDS)
    check_vocabularies(base, {"same": bert("other-name", WORDS, seed=1)})
    (tmp_path / "bare").mkdir()
    check_vocabularies(base, {"no tokenizer": with_table(tmp_path / "bare", 11)})
    check_vocabularies(tiny_folders("bert"), {"bpe": tiny_folders("qwen3")})  # the same bytes as tokens


@pytest.mark.parametrize(
    ("words", "rows", "message"),
    [
        (["salt", "rain", *WORDS[2:]], None, r"token 'rain' has id 6, in the base's \S+ id 5"),
        (WORDS[:-1], 11, r"lacks token 'storm', id 10 of the base's"),
        ([*WORDS, "fog"], None, r"has token 'fog' \(id 11\) that the base's \S+ lacks"),
    ],
)
def test_the_first_difference_is_named(bert, words, rows, message) -> None:
    base, other = bert("base", WORDS), bert("other", words, rows)
    with pytest.raises(InputError, match=message) as caught:
        check_vocabularies(base, {"same": base, "other": other})
    text = str(caught.value)
    assert text.startswith(f"{other / 'tokenizer.json'}: ") and text.endswith("--vocab union|base") and "\n" not in text


def test_other_row_counts_are_refused(bert) -> None:
    base, other = bert("base", WORDS), bert("other", WORDS, rows=64)
    with pytest.raises(InputError, match="has 64 rows, the base's 11") as caught:
        check_vocabularies(base, {"other": other})
    assert "--vocab base" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": [1]}}', '{"model": {"vocab": {}}}',
     '{"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 3}]}', '{"model": {"vocab": {"a": -1}}}', "{"],
)  # fmt: skip
def test_spoilt_tokenizers(tmp_path, content) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer.json"):
        read_vocabulary(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "model": JSON | st.fixed_dictionaries({}, optional={"vocab": JSON, "type": JSON, "merges": JSON}),
            "added_tokens": JSON
            | st.lists(st.fixed_dictionaries({}, optional={"content": JSON, "id": JSON, "special": JSON})),
        },
    ),
    JSON,
    st.dictionaries(st.sampled_from(["added_tokens_decoder"]), JSON | st.dictionaries(st.text(max_size=2), JSON)),
)
@settings(max_examples=300)
def test_any_json_gives_one_line_or_a_vocabulary(tokenizer, others, configuration) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (
            ("tokenizer.json", tokenizer),
            ("added_tokens.json", others),
            ("tokenizer_config.json", configuration),
        ):
            (Path(folder) / name).write_text(json.dumps(content))
        try:
            found = read_vocabulary(folder)
        except InputError as error:
            assert folder in str(error) and "\n" not in str(error)
        else:
            assert found.ids and all(type(number) is int and number >= 0 for number in found.ids.values())


# ---- plans -------------------------------------------------------------------------------------------------------


def expected(plan, base, experts):
    """W0 and T row by row, token string by token string, as the docstring has it."""
    tables = {name: load_file(folder / "model.safetensors")[TABLE] for name, folder in experts.items()}
    own, w0 = load_file(base / "model.safetensors")[TABLE], torch.zeros(plan.rows, 4)
    vocabularies = {name: read_vocabulary(folder).ids for name, folder in experts.items()}
    ids = read_vocabulary(base).ids
    vectors = {name: torch.zeros(plan.rows, 4) for name in experts}
    for row, token in enumerate(plan.tokens):
        have = {name: tables[name][known[token]] for name, known in vocabularies.items() if token in known}
        if token is None:
            w0[row] = own[row] if row < len(own) else 0
        elif token in ids:
            w0[row] = own[ids[token]]
            for name, value in have.items():
                vectors[name][row] = value - w0[row]
        else:
            w0[row] = torch.stack(list(have.values())).mean(0)
    return w0, list(vectors.values())


@pytest.fixture
def different(bert):
    """A base, an expert of permuted words and more padding, one with added tokens, one that lacks words."""
    base = bert("base", WORDS, rows=16)
    experts = {
        "permuted": bert("permuted", WORDS[::-1], rows=64, seed=1),
        "added": bert("added", WORDS, added=["covid"], special=["[DOC]"], seed=2),
        "fewer": bert("fewer", [*WORDS[:4], "fog"], added=["covid"], seed=3),
    }
    return base, experts


@pytest.mark.parametrize("mode", ["base", "union"])
def test_rows_go_by_token(different, mode) -> None:
    base, experts = different
    plan = vocabulary_plan(base, experts, mode)
    new = ["covid", "[DOC]", "fog"] if mode == "union" else []
    assert [token.content for token in plan.added] == new and plan.tensors == (TABLE,)
    assert plan.rows == 16 and plan.tokens[:11] == [*SPECIAL, *WORDS]  # the new ones fit into the padding
    assert plan.tokens[11:] == new + [None] * (5 - len(new))
    assert {tuple(rows.shape) for rows in plan.expert_rows.values()} == {(16,)} and plan.base_rows.dtype == torch.int64
    assert plan.base_rows.tolist() == [-1 if 11 <= row < 11 + len(new) else row for row in range(16)]
    opened = {name: Checkpoint(folder) for name, folder in experts.items()}
    wanted, vectors = expected(plan, base, experts)
    for start, stop in ((0, 16), (0, 5), (5, 13), (13, 16)):
        w0, found = aligned_rows(plan, TABLE, Checkpoint(base), opened, start, stop)
        torch.testing.assert_close(w0, wanted[start:stop], rtol=0, atol=1e-6)
        for one, other in zip(found, vectors, strict=True):
            torch.testing.assert_close(one, other[start:stop], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "after"), [(None, 13), (64, 128)])
def test_a_table_grows(bert, rows, after) -> None:
    """By what is needed; a padded one to the next multiple of 64."""
    words = [f"word{number}" for number in range(59)] if rows else WORDS
    base = bert("base", words, rows=rows)
    plan = vocabulary_plan(base, {"a": bert("a", words, added=["covid", "flu"], seed=1)}, "union")
    assert plan.rows == after and plan.new_ids == [len(words) + 5, len(words) + 6]
    w0, (vector,) = aligned_rows(
        plan, TABLE, Checkpoint(base), {"a": Checkpoint(base.parent / "a")}, plan.new_ids[0], plan.rows
    )
    table = load_file(base.parent / "a" / "model.safetensors")[TABLE]
    torch.testing.assert_close(w0[:2], table[plan.new_ids], rtol=0, atol=0)
    assert not w0[2:].any() and not vector.any()


def test_task_vectors_have_the_bases_rows(bert, tmp_path) -> None:
    """A store's or an adapter's folder has no table of its own, whatever tokenizer lies in it."""
    base = bert("base", WORDS)
    grown = bert("grown", WORDS, added=["covid"])
    shutil.copytree(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").unlink()
    plan = vocabulary_plan(base, {"grown": grown, "adapter": tmp_path / "adapter"}, "union")
    assert plan.expert_rows["adapter"].tolist() == [*range(11), -1]
    assert plan.expert_rows["grown"].tolist() == list(range(12))


def test_a_token_without_a_row(bert) -> None:
    """Tokenizers may know more tokens than the table has rows: that model lacks them."""
    base = bert("base", WORDS, added=["covid"], rows=11)
    expert = bert("expert", WORDS, added=["covid"], seed=1)
    plan = vocabulary_plan(base, {"e": expert}, "union")
    assert plan.rows == 12 and plan.base_rows[11] == -1 and plan.expert_rows["e"][11] == 11
    plan = vocabulary_plan(base, {"e": expert}, "base")
    assert plan.rows == 11 and None not in plan.tokens


def test_pieces_of_another_tokenizer_are_refused(bert, tmp_path) -> None:
    base = bert("base", WORDS)
    other = bert("other", [*WORDS, "##ing"])
    with pytest.raises(InputError, match=r"token '##ing' \(id 11\) is a piece of another WordPiece vocabulary"):
        vocabulary_plan(base, {"other": other}, "union")
    assert vocabulary_plan(base, {"other": other}, "base").rows == 11
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["type"] = "BPE"
    path.write_text(json.dumps(content).replace("##ing", "ing"))
    with pytest.raises(InputError, match="is a piece of another BPE vocabulary"):
        vocabulary_plan(base, {"other": other}, "union")


def test_bad_plans(bert, tmp_path) -> None:
    base = bert("base", WORDS)
    with pytest.raises(InputError, match="--vocab both: choose one of union, base"):
        vocabulary_plan(base, {}, "both")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"no tokenizer.json or vocab.txt"):
        vocabulary_plan(with_table(tmp_path / "bare", 11), {"base": base}, "union")
    (base / "config.json").unlink()
    with pytest.raises(InputError, match="no table of token embeddings"):
        vocabulary_plan(base, {}, "base")


# ---- rows --------------------------------------------------------------------------------------------------------


def test_rows_in_any_order(bert) -> None:
    folder = bert("a", WORDS, rows=40)
    table, opened = load_file(folder / "model.safetensors")[TABLE], Checkpoint(folder)
    for rows in ([3, 2, -1, 3, 17, 18, 19, 0, 39], [], [-1, -1], list(range(40))):
        at = torch.tensor(rows, dtype=torch.int64)
        found = read_rows_at(opened, TABLE, at)
        wanted = torch.where((at >= 0).unsqueeze(1), table[at.clamp(min=0)], torch.zeros(len(rows), 4))
        assert torch.equal(found, wanted) and found.dtype == torch.float32


def test_nan_is_refused(bert) -> None:
    folder = bert("a", WORDS)
    tensors = load_file(folder / "model.safetensors")
    tensors[TABLE][4, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"tensor '{TABLE}' holds NaN"):
        read_rows_at(Checkpoint(folder), TABLE, torch.tensor([3, 4]))


def test_filled_rows_hide_what_is_not_there() -> None:
    """What stands where a model has no row never comes through, were it NaN; vectors (a head's bias) work, too."""
    base, nan = torch.tensor([1.0, 2.0, float("nan"), float("nan")]), float("nan")
    experts = [torch.tensor([1.5, nan, 4.0, nan]), torch.tensor([nan, 5.0, 6.0, nan])]
    have = [torch.tensor([True, False, True, False]), torch.tensor([False, True, True, False])]
    w0, vectors = fill_rows(base, torch.tensor([True, True, False, False]), experts, have)
    assert w0.tolist() == [1.0, 2.0, 5.0, 0.0]
    assert [vector.tolist() for vector in vectors] == [[0.5, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]


# ---- the output's tokenizer --------------------------------------------------------------------------------------


def test_tokenizer_of_the_union(different, tmp_path) -> None:
    base, experts = different
    plan = vocabulary_plan(base, experts, "union")
    write_tokenizer(plan, base, tmp_path / "out")
    tokenizer = reload(tmp_path / "out")
    assert {number: token for token, number in tokenizer.get_vocab().items()} == {
        number: token for number, token in enumerate(plan.tokens) if token is not None
    }
    assert tokenizer.added_tokens_decoder[12].special and not tokenizer.added_tokens_decoder[11].special
    ids = tokenizer("rain covid [DOC] fog foggy", add_special_tokens=False)["input_ids"]
    assert ids == [5, 11, 12, 13, 1]  # a whole word does not match inside another one
    assert tokenizer.decode(ids, skip_special_tokens=True).split()[:3] == ["rain", "covid", "fog"]
    check_vocabularies(tmp_path / "out", {"itself": tmp_path / "out"})


def test_tokenizer_of_the_base_is_copied(different, tmp_path) -> None:
    base, experts = different
    write_tokenizer(vocabulary_plan(base, experts, "base"), base, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_byte_level_tokenizers(tiny_folders, tmp_path) -> None:
    """A BPE tokenizer with added tokens: matched whole, the rest as before."""
    base = tiny_folders("qwen3")
    shutil.copytree(base, tmp_path / "expert")
    tokenizer = reload(base)
    tokenizer.add_tokens(["<query>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "expert")
    weights = load_file(base / "model.safetensors")
    table = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([table, torch.ones(1, table.shape[1])])
    save_file(weights, tmp_path / "expert" / "model.safetensors", metadata={"format": "pt"})
    plan = vocabulary_plan(base, {"e": tmp_path / "expert"}, "union")
    assert plan.tensors == ("embed_tokens.weight",) and plan.rows == 262 and plan.tokens[261] == "<query>"
    write_tokenizer(plan, base, tmp_path / "out")
    written = reload(tmp_path / "out")
    assert written("ab<query>")["input_ids"] == tokenizer("ab<query>")["input_ids"]
    assert 261 in written("ab<query>")["input_ids"] and written("ab")["input_ids"] == reload(base)("ab")["input_ids"]
