"""The mined suite on a small made-up installation, and once on the real one."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from scalemerge.data import docs_suite
from scalemerge.data.docs_mining import SearchRoots, mine_package, split_docstring
from scalemerge.data.docs_suite import DOCS_TASKS, TEST_PACKAGES, TRAIN_PACKAGES, VALIDATION_PACKAGES, Limits
from scalemerge.errors import InputError

SMALL = Limits(queries=6, corpus=10, rows_a_label=3, min_rows_a_label=2, min_rows=1)
NOUNS = ["matrix", "signal", "sentence", "river", "table", "window", "planet", "forest", "engine", "violin"]


def documented_function(name: str, summary: str, subject: str) -> str:
    return textwrap.dedent(f'''
        def {name}(first, second=None):
            """{summary}.

            Parameters
            ----------
            first : array_like
                The {subject} to begin with, which is left as it was found by {name}.

            Examples
            --------
            >>> {name}(1)
            """
            total = first + len("{subject}")
            if second is not None:
                total = total * second
            return total
    ''')


def module_of(package: str, verb: str) -> str:
    return "".join(
        documented_function(f"{noun}_{package}", f"{verb} the {noun} of every {package} row", f"{noun} of {package}")
        for noun in NOUNS
    )


@pytest.fixture
def roots(tmp_path: Path) -> SearchRoots:
    """numpy and torch to train on, networkx to validate, scipy and pandas to test; a standard library of one file."""
    site = tmp_path / "site-packages"
    sources = {
        "numpy/__init__.py": "raise RuntimeError('never import what is mined')\n" + module_of("numpy", "Reshape"),
        "numpy/sums.py": documented_function("cumsum", "Return the cumulative sum of the elements", "array"),
        "torch/__init__.py": module_of("torch", "Normalize")
        + documented_function("cumsum", "Cumulative sum along one dimension of a tensor", "tensor")
        + documented_function("copied", "Integrate the copied text of another package", "copied text"),
        "torch/tests/test_more.py": module_of("hidden", "Test"),
        "torch/broken.py": 'def broken(:\n    """Text."""\n',
        "networkx/__init__.py": module_of("networkx", "Traverse"),
        "scipy/__init__.py": "",
        "scipy/stats/__init__.py": module_of("stats", "Estimate")
        + documented_function("copied", "Integrate the copied text of another package", "copied text"),
        "scipy/signal/__init__.py": module_of("signal", "Filter")
        + documented_function("rolling_mean", "Compute a moving mean over a sliding window", "samples")
        + documented_function("peak_height", "Compute a moving threshold over a peak", "samples"),
        "pandas/__init__.py": documented_function("rolling_mean", "Provide the mean of a moving window", "frame")
        + documented_function("expanding_count", "Count the rows of a moving selection", "frame"),
    }
    for name, source in sources.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(source)
    (site / "numpy-9.1.dist-info").mkdir()
    (site / "numpy-9.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.1\n")
    library = tmp_path / "python"
    library.mkdir()
    (library / "calendar.py").write_text(module_of("calendar", "Print"))
    return SearchRoots((site,), library)


def build(cache: Path, roots: SearchRoots, **options: object) -> Path:
    return docs_suite.build_docs_suite(cache, roots=roots, limits=SMALL, **options)  # type: ignore[arg-type]


def rows(path: Path) -> list[dict[str, object]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_summary_is_the_first_sentence_and_the_body_is_free_of_markup() -> None:
    summary, body = split_docstring(
        """Compute the :func:`~numpy.sum` of ``values``. It is exact.

        .. versionadded:: 1.4
           Moved from elsewhere.

        Parameters
        ----------
        values : array_like
            Numbers [1]_ to add.

        >>> compute(1)
        2

        Examples
        --------
        Never read.
        """
    )
    assert summary == "Compute the numpy.sum of values"
    assert body == "It is exact. values : array_like Numbers to add."


def test_a_signature_is_not_taken_for_the_summary() -> None:
    docstring = "\n  add(x1, x2, /, out=None,\n      where=True)\n\n  Add arguments element-wise.\n\n  The rest."
    assert split_docstring(docstring) == ("Add arguments element-wise", "The rest.")
    assert split_docstring(".. deprecated:: 1.0\n   Use another.") == ("", "")


def test_mining_reads_methods_attached_docstrings_and_skips_dunders(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text(
        textwrap.dedent('''
            class Outer:
                """Hold the state of one outer thing."""

                @property
                def inner(self):
                    """Return the inner part."""
                    part = self.part

                    return part

                def __len__(self):
                    """Return the length."""
                    return 1

                def abstract(self):
                    """Nothing to see here."""
                    raise NotImplementedError

            add_newdoc("place", "attached", """attached(x)

            Describe a function in C.""")
            add_docstr(torch.other, r"""other(x) -> Tensor

            Describe another one.
            """ + r"""Args: {input}""".format(**common))
        ''')
    )
    found = {entry.qualified_name: entry for entry in mine_package(tmp_path, "package")[0]}
    assert set(found) == {"Outer", "Outer.inner", "Outer.abstract", "attached", "other"}
    assert found["Outer.inner"].code == "def inner(self):\n    part = self.part\n    return part"
    assert found["Outer"].code == found["Outer.abstract"].code == ""
    assert found["attached"].summary == "Describe a function in C"
    assert (found["other"].summary, found["other"].body) == ("Describe another one", "Args:")


def test_layout(tmp_path: Path, roots: SearchRoots) -> None:
    folder = build(tmp_path, roots)
    assert folder.parent == tmp_path / "docs-suite"
    manifest = json.loads((folder / "manifest.json").read_text())
    written = {str(path.relative_to(folder)) for path in folder.rglob("*.*") if path.is_file()}
    assert written == {*manifest["rows"], "manifest.json"}
    fields = {
        "train-docs-search/train.jsonl.gz": {"query", "positive"},
        "train-code-search/train.jsonl.gz": {"query", "positive"},
        "train-docs-paraphrase/train.jsonl.gz": {"query", "positive"},
        "docs-search/corpus.jsonl.gz": {"_id", "title", "text"},
        "docs-search/queries.test.jsonl.gz": {"_id", "text"},
        "docs-paraphrase/test.jsonl.gz": {"sentence1", "sentence2", "label"},
        "docs-topics/train.jsonl.gz": {"text", "label"},
        "docs-topics/test.jsonl.gz": {"text", "label"},
        "docs-modules/test.jsonl.gz": {"text", "label"},
    }
    for name, expected in fields.items():
        content = rows(folder / name)
        assert len(content) == manifest["rows"][name] > 0, name
        assert all(set(row) == expected for row in content), name
    assert all((folder / task).is_dir() for task, _ in DOCS_TASKS)
    assert manifest["packages"]["train"]["numpy"] == "9.1"
    assert manifest["unreadable_files"]["torch"] == 1
    assert "sympy" in manifest["missing_packages"]


@pytest.mark.parametrize("name", ["docs-search", "code-search"])
def test_judgements_refer_to_the_corpus_and_the_limits_hold(tmp_path: Path, roots: SearchRoots, name: str) -> None:
    folder = build(tmp_path, roots) / name
    corpus = {row["_id"]: row["text"] for row in rows(folder / "corpus.jsonl.gz")}
    queries = {row["_id"]: row["text"] for row in rows(folder / "queries.test.jsonl.gz")}
    header, *lines = (folder / "qrels.test.tsv").read_text().splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    judged = [line.split("\t") for line in lines]
    assert {query for query, _, _ in judged} == set(queries) and len(queries) == SMALL.queries
    assert {document for _, document, _ in judged} <= set(corpus) and len(corpus) == SMALL.corpus
    for query, document, score in judged:
        words = str(queries[query]).split()
        if words[1] == "the" and words[-1] == "row":  # "Filter the river of every signal row"
            assert f"{words[2]} of {words[-2]}" in str(corpus[document])
        assert score == "1"


def test_the_splits_share_no_package_and_no_text(tmp_path: Path, roots: SearchRoots) -> None:
    assert len({*TRAIN_PACKAGES, *VALIDATION_PACKAGES, *TEST_PACKAGES}) == len(
        [*TRAIN_PACKAGES, *VALIDATION_PACKAGES, *TEST_PACKAGES]
    )
    assert_no_shared_texts(build(tmp_path, roots))


def assert_no_shared_texts(folder: Path) -> None:
    """No text that is trained on occurs in an evaluation folder."""

    def texts(paths: list[Path]) -> set[str]:
        fields = ("query", "positive", "text", "sentence1", "sentence2")
        return {str(row[key]).lower() for path in paths for row in rows(path) for key in fields if key in row}

    files = list(folder.rglob("*.jsonl.gz"))
    train = [path for path in files if path.parent.name.startswith("train-")]
    assert len(train) == 3 and texts(train)
    assert not texts(train) & texts([path for path in files if path not in train])


def test_copied_docstrings_and_tests_are_not_trained_on(tmp_path: Path, roots: SearchRoots) -> None:
    queries = [str(row["query"]) for row in rows(build(tmp_path, roots) / "train-docs-search" / "train.jsonl.gz")]
    assert "Normalize the river of every torch row" in queries
    assert not [query for query in queries if "copied" in query or "hidden" in query]
    assert len(set(queries)) == len(queries)


def test_a_training_pair_is_a_summary_and_what_it_leaves_out(tmp_path: Path, roots: SearchRoots) -> None:
    folder = build(tmp_path, roots)
    search = {row["query"]: str(row["positive"]) for row in rows(folder / "train-docs-search" / "train.jsonl.gz")}
    code = {row["query"]: str(row["positive"]) for row in rows(folder / "train-code-search" / "train.jsonl.gz")}
    query = "Reshape the river of every numpy row"
    assert search[query].startswith("first : array_like The river of numpy") and ">>>" not in search[query]
    assert code[query].startswith("def river_numpy(first, second=None):\n    total") and '"""' not in code[query]


def test_paraphrases_cross_libraries_and_are_balanced(tmp_path: Path, roots: SearchRoots) -> None:
    folder = build(tmp_path, roots)
    (pair,) = rows(folder / "train-docs-paraphrase" / "train.jsonl.gz")
    assert set(pair.values()) == {
        "Return the cumulative sum of the elements",
        "Cumulative sum along one dimension of a tensor",
    }
    test = rows(folder / "docs-paraphrase" / "test.jsonl.gz")
    assert sorted(str(row["label"]) for row in test) == ["0", "1"]
    assert {row["sentence1"] for row in test} == {"Provide the mean of a moving window"}


def test_two_builds_are_byte_identical(tmp_path: Path, roots: SearchRoots) -> None:
    first, second = build(tmp_path / "a", roots), build(tmp_path / "b", roots)
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*"))
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*"))
    for name in names:
        if (first / name).is_file():
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_cache_is_used_until_a_package_changes(tmp_path: Path, roots: SearchRoots) -> None:
    seen: list[tuple[str, int, int]] = []

    def progress(package: str, done: int, total: int) -> None:
        seen.append((package, done, total))

    folder = build(tmp_path, roots, progress=progress)
    assert seen[0] == ("torch", 0, 6) and seen[-1] == ("", 6, 6)
    seen.clear()
    assert build(tmp_path, roots, progress=progress) == folder and not seen
    (roots.site_packages[0] / "pandas" / "more.py").write_text("x = 1\n")
    assert build(tmp_path, roots) != folder


def test_a_damaged_suite_is_built_again(tmp_path: Path, roots: SearchRoots) -> None:
    folder = build(tmp_path, roots)
    lost = folder / "docs-topics" / "test.jsonl.gz"
    content = lost.read_bytes()
    lost.unlink()
    assert build(tmp_path, roots) == folder and lost.read_bytes() == content
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_build_leaves_nothing(
    tmp_path: Path, roots: SearchRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(name: str, _: object) -> bytes:
        if name.startswith("docs-paraphrase"):
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(docs_suite, "_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, roots)
    assert not list((tmp_path / "docs-suite").iterdir())


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path: Path, roots: SearchRoots) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from scalemerge.data import docs_suite
        from scalemerge.data.docs_mining import SearchRoots

        def killed(name, rows, encoded=docs_suite._encoded):
            if name.startswith("docs-modules"):
                os.kill(os.getpid(), signal.SIGKILL)
            return encoded(name, rows)

        docs_suite._encoded = killed
        cache, site, library = map(Path, sys.argv[1:])
        docs_suite.build_docs_suite(cache, roots=SearchRoots((site,), library), limits=docs_suite.Limits(min_rows=0))
    """
    arguments = [str(tmp_path), str(roots.site_packages[0]), str(roots.standard_library)]
    repository = Path(docs_suite.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = (tmp_path / "docs-suite").iterdir()
    assert left.name.startswith(".building-") and not (left / "manifest.json").exists()

    os.utime(left, (0, 0))  # two days later, as it were
    folder = build(tmp_path, roots)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_slower_of_two_builders_takes_the_other_ones_suite(
    tmp_path: Path, roots: SearchRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = docs_suite._encoded
    others: list[Path] = []

    def overtaken(name: str, content: list[dict[str, object]]) -> bytes:
        if not others:
            others.append(tmp_path)  # so that the other one is not overtaken too
            others[0] = build(tmp_path, roots)
        return encoded(name, content)

    monkeypatch.setattr(docs_suite, "_encoded", overtaken)
    folder = build(tmp_path, roots)
    assert others == [folder] and docs_suite._is_complete(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_too_few_packages_name_the_remedy(tmp_path: Path, roots: SearchRoots) -> None:
    shutil.rmtree(roots.site_packages[0] / "scipy")
    with pytest.raises(InputError, match=r"docs-topics/test\.jsonl\.gz 0.*not found: .*scipy.*pip install"):
        build(tmp_path, roots)
    assert not (tmp_path / "docs-suite").exists()


def test_the_cache_folder_comes_from_the_environment(
    tmp_path: Path, roots: SearchRoots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALEMERGE_CACHE", str(tmp_path / "elsewhere"))
    assert docs_suite.build_docs_suite(roots=roots, limits=SMALL).parent == tmp_path / "elsewhere" / "docs-suite"


@pytest.mark.slow
def test_the_real_installation_is_rich_enough(tmp_path: Path) -> None:
    for package in ("scipy", "pandas", "sklearn", "sympy", "polars"):
        pytest.importorskip(package, reason="the demo extra is not installed")
    start = time.process_time()
    folder = docs_suite.build_docs_suite(tmp_path)
    assert time.process_time() - start < 120
    counts = json.loads((folder / "manifest.json").read_text())["rows"]
    assert counts["train-docs-search/train.jsonl.gz"] >= 10_000
    assert counts["train-code-search/train.jsonl.gz"] >= 8_000
    assert counts["train-docs-paraphrase/train.jsonl.gz"] >= 800
    assert counts["docs-paraphrase/test.jsonl.gz"] >= 400
    assert counts["docs-search/queries.test.jsonl.gz"] == counts["code-search/queries.test.jsonl.gz"] == 500
    assert 10 <= len({row["label"] for row in rows(folder / "docs-topics" / "test.jsonl.gz")}) <= 20
    assert_no_shared_texts(folder)
