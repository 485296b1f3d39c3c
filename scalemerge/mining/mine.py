"""Hard-negative mining: embed, search exactly, choose by the rules, write rows that train as kind `triplets`.

All the expensive work is resumable: embeddings are kept in shards beside the output until it is whole (search is cheap
beside them and starts again). The output appears under its name only when it is complete.
"""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from scalemerge.checkpoints.atomic import PARTIAL, new_file, require_writable
from scalemerge.checkpoints.revision import model_revision
from scalemerge.errors import InputError
from scalemerge.mining.embeddings import TextEncoder, embed, remove_shards
from scalemerge.mining.rules import Rules, choose
from scalemerge.mining.search import pair_scores, top_k
from scalemerge.mining.texts import KINDS, MiningTexts, number_texts, read_rows
from scalemerge.progress import Progress
from scalemerge.recipe import Source


@dataclass
class Summary:
    """What a run did.

    removed: candidates by rule. `positives` and `itself` are the known positives and the query's own text that would
    have ranked among the first rank_max; `rank_min` those passed over; the margins those that each refuses by itself.
    Scores are cosines; means are over written rows and their negatives (NaN where there are none).
    """

    rows: int = 0
    written: int = 0
    short: int = 0
    empty: int = 0
    queries: int = 0
    corpus: int = 0
    repeated: int = 0
    negatives: int = 0
    removed: Counter = field(default_factory=Counter)
    positive_score: float = float("nan")
    negative_score: float = float("nan")
    embedding_seconds: float = 0.0
    search_seconds: float = 0.0

    def lines(self, rules: Rules) -> list[str]:
        """The summary as a person reads it."""
        left = self.removed
        margins = [
            f"{left[name]:,} refused by --{name.replace('_', '-')} {value:g}"
            for name, value in (("margin_absolute", rules.margin_absolute), ("margin_relative", rules.margin_relative))
            if value is not None
        ]
        a_row = self.negatives / self.written if self.written else 0.0
        return [
            f"rows        {self.rows:,} read, {self.written:,} written, {self.rows - self.written:,} dropped "
            f"(fewer than {rules.min_negatives} negatives)",
            f"negatives   {a_row:.2f} a row; {self.short:,} written rows have fewer than {rules.negatives}, "
            f"{self.empty:,} none",
            f"searched    {self.queries:,} queries in {self.corpus:,} texts ({self.repeated:,} repeated ones left out)",
            f"kept out    {left['positives']:,} known positives and {left['itself']:,} times the query itself among "
            f"the first {rules.rank_max}",
            f"candidates  {left['candidates']:,}: "
            + ", ".join([f"{left['rank_min']:,} before --rank-min {rules.rank_min}", *margins]),
            f"mean score  positives {self.positive_score:.3f}, negatives {self.negative_score:.3f}",
            f"seconds     {self.embedding_seconds:.1f} embedding, {self.search_seconds:.1f} searching and choosing",
        ]


def mine(
    encoder: TextEncoder,
    rows: Sequence[tuple[str, str]],
    corpus: Sequence[str],
    out: Path,
    rules: Rules,
    *,
    revision: str,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    batch_size: int = 64,
    query_chunk: int = 1024,
    corpus_block: int = 16384,
    shard_texts: int = 512,
) -> Summary:
    """Mine negatives for rows of (query, positive) in a corpus of texts and write them to `out` (.jsonl or .jsonl.gz).

    Each line: {"query", "positive", "negatives": [...], "positive_score", "scores": [...]}, in the order of the rows,
    negatives best first. Similarity is the cosine on the encoder's device. Prompts of None are the encoder's own.
    revision: what identifies the model, for the shards kept in `<out>.partial-embeddings`. Memory: 4 (Q + N) D bytes of
    embeddings and query_chunk x corpus_block scores; neither chunk size changes the result. Raises InputError.
    """
    rules.check()
    _check_out(out)
    texts = number_texts(rows, corpus)
    if not rows:
        raise InputError("no rows to mine for; give a source that is not empty")
    if texts.searched <= rules.rank_min:
        raise InputError(
            f"--rank-min {rules.rank_min}: passes over the whole corpus of {texts.searched} different texts; lower it "
            "or give a larger --corpus"
        )
    work = out.with_name(f"{out.name}{PARTIAL}-embeddings")
    began = time.monotonic()
    options: dict[str, Any] = {"revision": revision, "batch_size": batch_size, "shard_texts": shard_texts}
    prompts = {"query": query_prompt, "document": document_prompt}
    asked = {role: encoder.prompts.get(role, "") if given is None else given for role, given in prompts.items()}
    queries = embed(texts.queries, encoder, work, what="queries", prompt=asked["query"], **options)
    documents = embed(texts.documents, encoder, work, what="documents", prompt=asked["document"], **options)
    searching = time.monotonic()
    found = _Found(texts, rules)
    documents = _held(documents, encoder.device)
    by_query = found.rows_by_query()
    with Progress("searching for queries", len(queries), unit="text") as progress:
        for start in range(0, len(queries), query_chunk):
            part = queries[start : start + query_chunk].to(encoder.device)
            found.take(start, part, documents, [by_query[start + index] for index in range(len(part))], corpus_block)
            progress.advance(len(part))
    summary = found.write(rows, out)
    remove_shards(work)
    summary.embedding_seconds, summary.search_seconds = searching - began, time.monotonic() - searching
    return summary


def _held(documents: Tensor, device: torch.device) -> Tensor:
    """On the device when that takes at most half of what is free there; otherwise blocks come over as they are used."""
    if device.type == "cuda" and documents.nbytes <= torch.cuda.mem_get_info(device)[0] // 2:
        return documents.to(device)
    return documents


class _Found:
    """The negatives of each row as they are found: document numbers and scores, a few a row."""

    def __init__(self, texts: MiningTexts, rules: Rules) -> None:
        self.texts, self.rules = texts, rules
        self.negatives: list[list[int]] = [[] for _ in texts.rows]
        self.scores: list[list[float]] = [[] for _ in texts.rows]
        self.positive_scores = [0.0] * len(texts.rows)
        self.removed: Counter = Counter()

    def rows_by_query(self) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in self.texts.queries]
        for number, (query, _) in enumerate(self.texts.rows):
            rows[query].append(number)
        return rows

    def take(self, start: int, queries: Tensor, documents: Tensor, rows: list[list[int]], block: int) -> None:
        """Search for the queries from `start` on and choose for their rows."""
        searched = documents[: self.texts.searched]
        pairs = self._excluded(start, len(queries))
        excluded = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        scores, places = top_k(queries, searched, self.rules.rank_max, excluded, block=block)
        self._count_excluded(start, queries, documents, excluded, scores[:, -1])
        numbers = [number for group in rows for number in group]
        owner = torch.tensor([index for index, group in enumerate(rows) for _ in group], device=queries.device)
        own = torch.tensor([[self.texts.rows[number][1]] for number in numbers], device=queries.device)
        positive = pair_scores(queries[owner], documents, own)[:, 0].cpu()
        owner, scores, places = owner.cpu(), scores.cpu(), places.cpu()
        chosen, counts = choose(scores[owner], positive, self.rules, numbers)
        self.removed += counts
        for number, query, ranks, score in zip(numbers, owner.tolist(), chosen, positive.tolist(), strict=True):
            self.negatives[number] = places[query, ranks].tolist()
            self.scores[number] = scores[query, ranks].tolist()
            self.positive_scores[number] = score

    def _excluded(self, start: int, count: int) -> list[tuple[int, int]]:
        pairs = []
        for index in range(count):
            out = self.texts.positives[start + index] | {self.texts.itself[start + index]}
            pairs += [(index, place) for place in sorted(out) if 0 <= place < self.texts.searched]
        return pairs

    def _count_excluded(self, start: int, queries: Tensor, documents: Tensor, excluded: Tensor, last: Tensor) -> None:
        """How many of those kept out would have ranked: those that score no less than the last text found."""
        if not len(excluded):
            return
        query, place = excluded.to(queries.device).T
        ranked = pair_scores(queries[query], documents, place[:, None])[:, 0] >= last[query]
        for index, text in excluded[ranked.cpu()].tolist():
            known = text in self.texts.positives[start + index]
            self.removed["positives" if known else "itself"] += 1

    def write(self, rows: Sequence[tuple[str, str]], out: Path) -> Summary:
        """Write the rows with enough negatives. Raises InputError when there are none."""
        rules, texts = self.rules, self.texts
        kept = [number for number, found in enumerate(self.negatives) if len(found) >= rules.min_negatives]
        counts = [len(self.negatives[number]) for number in kept]
        if not sum(counts):
            raise InputError(
                f"no row has {max(1, rules.min_negatives)} negatives; loosen --margin-relative or --margin-absolute, "
                "lower --rank-min or --min-negatives, or give a larger --corpus (the embeddings are kept for it)"
            )
        with _whole_file(out) as file:
            for number in kept:
                row = {
                    "query": rows[number][0],
                    "positive": rows[number][1],
                    "negatives": [texts.documents[place] for place in self.negatives[number]],
                    "positive_score": round(self.positive_scores[number], 6),
                    "scores": [round(score, 6) for score in self.scores[number]],
                }
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        return Summary(
            rows=len(rows),
            written=len(kept),
            short=sum(count < rules.negatives for count in counts),
            empty=counts.count(0),
            queries=len(texts.queries),
            corpus=texts.searched,
            repeated=texts.repeated,
            negatives=sum(counts),
            removed=self.removed,
            positive_score=sum(self.positive_scores[number] for number in kept) / len(kept),
            negative_score=sum(sum(self.scores[number]) for number in kept) / sum(counts),
        )


def _check_out(out: Path) -> None:
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"--out {out}: name a .jsonl or .jsonl.gz file")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file")


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file, gzip'd where its name ends so, that appears under its name when the block ends without an error."""
    with new_file(path) as plain:
        if path.suffix == ".gz":
            with gzip.GzipFile("", "wb", fileobj=plain, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        else:
            yield plain


def mine_files(
    model: str,
    source: Source,
    out: Path,
    rules: Rules,
    *,
    kind: str = "pairs",
    corpus: str | None = None,
    device: str | None = None,
    data: str | None = None,
    **options: Any,
) -> Summary:
    """`scalemerge mine`: mine for the rows of a source with a model folder, `package:` reference or hub id.

    Everything that can be refused is refused before the model is loaded. options: those of `mine`. Raises InputError.
    """
    from scalemerge.encoder import Encoder, local_folder

    rules.check()
    if kind not in KINDS:
        raise InputError(f"--kind {kind}: choose {', '.join(KINDS)}")
    _check_out(out)
    for name, path in (("--source", source.path), ("--corpus", corpus)):
        if path is not None and Path(path).exists() and out.exists() and out.samefile(path):
            raise InputError(f"--out {out}: is the file given as {name}; write elsewhere")
    where = _device(device)
    folder = Path(local_folder(model))
    revision = model_revision(folder)
    rows, texts = read_rows(source, kind, corpus, data)
    require_writable(out.parent)
    encoder = Encoder.load(folder, device=where)
    return mine(encoder, rows, texts, out, rules, revision=revision, **options)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise InputError(
            f"--device {name}: {str(error).splitlines()[0]}; give cpu, or cuda where there is one"
        ) from None
    return device
