"""Our wrapper against mteb's own around SentenceTransformer(path): the same prompts, the same scores."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("mteb", reason="mteb is not installed")
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

import mteb
import sentence_transformers

from scalemerge.encoder import Encoder
from scalemerge.evaluation.model import ScoredEncoder
from scalemerge.evaluation.scorer import evaluate
from scalemerge.evaluation.suites import METRICS, Options, layout_suite

CAPPED = {
    "stsbenchmark": ("sts", Options(max_rows=300)),
    "qqp": ("pair_classification", Options(max_rows=300)),
    "trecqa": ("reranking", Options(max_queries=10)),
    "tweet-emotion": ("classification", Options(max_rows=200, experiments=2)),
    "searchsnippets": ("clustering", Options(max_rows=300, experiments=2)),
    "xquad-en": ("retrieval", Options(max_queries=60, max_corpus=100)),
}


def reference(folder):
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    return SentenceTransformerEncoderWrapper(sentence_transformers.SentenceTransformer(str(folder), device="cpu"))


@pytest.mark.slow
def test_scores_equal_those_of_mtebs_own_wrapper(minilm, shared_data, tmp_path):
    from scalemerge.evaluation.tasks import build

    pairs = [(name, kind) for name, (kind, _) in CAPPED.items()]
    suite = layout_suite("parity", shared_data, pairs, options={name: o for name, (_, o) in CAPPED.items()})
    ours = evaluate(minilm, suite, model_name="base", output_dir=tmp_path)
    theirs = reference(minilm)
    for task in suite:
        result = mteb.evaluate(
            theirs,
            build(task),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": 64},
        )
        expected = 100.0 * result.task_results[0].get_score()
        # Equal up to the order of floating point sums (batches are made differently), which can swap near ties.
        assert ours["scores"][task.name] == pytest.approx(expected, abs=0.01), task.name
    assert set(ours["by_type"]) == set(METRICS)


PROMPTS = {"query": "question: ", "document": "passage: ", "Clustering": "topic of: ", "STS-query": "left: "}


@pytest.mark.parametrize("stated", [
    {"prompts": {}},
    {"prompts": PROMPTS},
    {"prompts": PROMPTS, "default_prompt_name": "query"},
    {"prompts": {"passage": "old name: ", "tiny-sts": "task: "}},
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_prompts_are_chosen_as_mteb_chooses_them(minilm, tiny_data, tiny_tasks, tmp_path, stated):
    from mteb.types import PromptType

    from scalemerge.evaluation.tasks import build

    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps(stated))
    ours = ScoredEncoder(Encoder.load(folder), name="x", revision="1", folder=folder)
    theirs = reference(folder)
    batches = [{"text": ["a small dog", "the weather of tomorrow"]}]

    class Loader(list):
        dataset = type("Data", (), {"features": ["text"]})()

    for task in layout_suite("tiny", tiny_data, tiny_tasks):
        for prompt_type in (None, PromptType.query, PromptType.document):
            arguments = {
                "task_metadata": build(task).metadata, "hf_split": "test", "hf_subset": "default",
                "prompt_type": prompt_type, "batch_size": 2, "show_progress_bar": False,
            }  # fmt: skip
            got, expected = ours.encode(Loader(batches), **arguments), theirs.encode(Loader(batches), **arguments)
            assert abs(got - expected).max() < 1e-5, (task.type, prompt_type)


@pytest.mark.slow
def test_fast_suite_scores_a_real_model_sanely(minilm, shared_data, tmp_path):
    from scalemerge.evaluation.suites import limit, shared_suite

    suite = limit(shared_suite(shared_data, ["stsbenchmark", "banking77"], fast=True), max_rows=300, experiments=2)
    scores = evaluate(minilm, suite, model_name="base", output_dir=tmp_path)["scores"]
    assert scores["stsbenchmark"] > 70.0 and scores["banking77"] > 60.0
