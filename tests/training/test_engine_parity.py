"""Every engine against plain autograd in one process: gradients, clipping, updates, states written and resumed.

One launch for each engine and number of ranks (engine_parity.py) makes all comparisons; the tests judge its numbers.
Run with -s to see them as a table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scalemerge.objectives import compute_loss
from scalemerge.objectives.batches import batch_losses
from scalemerge.objectives.gradient_cache import GradientCache

_spec = importlib.util.spec_from_file_location("engine_parity", Path(__file__).with_name("engine_parity.py"))
assert _spec and _spec.loader
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)

CORE = [("ddp", 2), ("zero2", 2), ("zero3", 2)]
REQUIRED = 1e-5  # relative error of each parameter's gradient, and of weights after 20 updates
Ranks = list[dict[str, Any]]


class Launches:
    """Launches what is asked for, each once and after the plain engine, which writes the reference."""

    def __init__(self, folder: Path, core: bool) -> None:
        self.folder, self.core = folder, core
        self.done: dict[str, Ranks] = {}
        self.failed: dict[str, str] = {}

    def __call__(self, engine: str, world: int) -> Ranks:
        name = f"{engine}-{world}"
        if engine != "plain":
            self("plain", 1)
        if name in self.failed:
            pytest.fail(self.failed[name], pytrace=False)
        if name not in self.done:
            other = next(reversed(self.done), None)
            try:
                self.done[name] = parity.launch(engine, world, self.folder, core=self.core, other=other)
            except RuntimeError as error:
                self.failed[name] = str(error)
                pytest.fail(str(error), pytrace=False)
        return self.done[name]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Launches]]:
    made = {core: Launches(tmp_path_factory.mktemp("parity"), core) for core in (True, False)}
    yield made
    for each in made.values():
        if each.done:
            print("\n" + parity.table(each.done))


CHOICES = [pytest.param((True, *choice), id="{}-{}".format(*choice)) for choice in [("plain", 1), *CORE]]
CHOICES += [
    pytest.param((False, *choice), id="{}-{}-all".format(*choice), marks=pytest.mark.slow) for choice in parity.LAUNCHES
]


@pytest.fixture(scope="module", params=CHOICES)
def ranks(request: pytest.FixtureRequest, launches: dict[bool, Launches]) -> Ranks:
    core, engine, world = request.param
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    results = launches[core](engine, world)
    assert len(results) == world
    for of_kind in kinds(results).values():
        assert (of_kind["engine"], of_kind["world"]) == (engine, world), "another engine ran"
        expected = {f"{loss}/{path}" for kind, loss, path in parity.seen_in(core) if kind == parity.KINDS[0]}
        assert core or expected <= of_kind["gradients"].keys()
    return results


def kinds(ranks: Ranks) -> dict[str, dict[str, Any]]:
    return {f"{kind}, rank {rank}": one for rank, each in enumerate(ranks) for kind, one in each["kinds"].items()}


def gradients(ranks: Ranks) -> dict[str, dict[str, Any]]:
    return {f"{who}, {case}": each for who, one in kinds(ranks).items() for case, each in one["gradients"].items()}


def test_the_gradient_of_every_parameter(ranks: Ranks) -> None:
    """Of every loss on the plain path and through the gradient cache, and of three batches accumulated."""
    found = gradients(ranks)
    assert any("accumulated/37 tokens" in case for case in found) and any("accumulated/plain" in case for case in found)
    wrong = {case: (each["gradient"], each["at"]) for case, each in found.items() if not each["gradient"] < REQUIRED}
    assert not wrong
    assert not {case for case, each in found.items() if not each["key_bias"] < REQUIRED}
    assert not {case: each["loss"] for case, each in found.items() if not each["loss"] < REQUIRED}


def test_the_norm_of_the_gradient(ranks: Ranks) -> None:
    """Before clipping, on every rank."""
    assert not {case: each["norm"] for case, each in gradients(ranks).items() if not each["norm"] < REQUIRED}


def test_weights_after_twenty_clipped_updates(ranks: Ranks) -> None:
    """The moments tell clipped gradients from others, which AdamW's weights do not."""
    for who, one in kinds(ranks).items():
        for path, errors in one["steps"].items():
            assert errors["names"] and errors["weight"] < REQUIRED, (who, path, errors)
            assert max(errors["exp_avg"], errors["exp_avg_sq"], errors["norm"]) < 1e-4, (who, path, errors)
    assert 0 < ranks[0]["kinds"]["bert"]["clipped"] < parity.STEPS, "some updates are clipped and some are not"


def test_states_move_between_engines(ranks: Ranks) -> None:
    """What one engine wrote is read by another to the bit, and the next update is the same."""
    for who, one in kinds(ranks).items():
        # DeepSpeed's Adam for the CPU has 1 - beta2 in float32, 1.3e-5 too large, and rounds the weight decay otherwise
        # than torch's, by an ulp of a weight each update
        allowed = 2e-6 if one["engine"] == "zero3_offload" else 1e-6
        for what, errors in one["states"].items():
            assert errors["names"] and errors["weight"] < allowed, (who, what, errors)
            assert max(errors["exp_avg"], errors["exp_avg_sq"]) < 10 * allowed, (who, what, errors)
            assert errors["same bits"] or not what.startswith("read"), (who, what, errors)
        required = {"read and written", "resumed from plain"}
        if one["engine"] != "plain":
            required |= {"read from the other", "resumed from the other"}
        assert required <= one["states"].keys()


# ---- in this process ---------------------------------------------------------------------------------------------


def test_the_margin_leaves_out_documents_of_other_ranks() -> None:
    """Or the masking across ranks would not be tested above."""
    for kind in parity.KINDS:
        batch = parity.make_batch("infonce, margin", 7)
        encoder = parity.make_encoder(kind)
        embedded = {role: encoder([encoder.pad(texts)]).detach() for role, texts in batch.roles.items()}
        similarity = embedded["query"] @ torch.cat([embedded["positive"], embedded["negatives"]]).T
        masked = similarity > similarity.diagonal().unsqueeze(1)
        assert masked[:2, 2:].any() and masked[2:, :2].any() and not masked.all(1).any()
        gap = (similarity - similarity.diagonal().unsqueeze(1))[~torch.eye(5, 8, dtype=torch.bool)]
        assert gap.abs().min() > 1e-5, "no document is so near the threshold that rounding decides"
        assert compute_loss("infonce", embedded, {}, {}) > compute_loss("infonce", embedded, {}, {"margin": 0.0})


@pytest.mark.parametrize("kind", parity.KINDS)
@pytest.mark.parametrize("chunk_tokens", [1, 37])
def test_a_scaled_backward_unscales_to_the_same_gradient(kind: str, chunk_tokens: int) -> None:
    """As torch.amp.GradScaler does it for half precision; powers of two change no bit."""
    found = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        encoder = parity.make_encoder(kind)
        optimizer = parity.plain_optimizer(encoder)
        cache = GradientCache(lambda features, encoder=encoder: encoder([encoder.pad(features)]), chunk_tokens)
        (loss,) = batch_losses([parity.make_batch("infonce, symmetric, hard negatives", 7)], cache.encode)
        loss.backward()
        cache.backward(lambda surrogate, last, scaler=scaler: scaler.scale(surrogate()).backward())
        scaled = [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]
        scaler.unscale_(optimizer)
        found.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(torch.equal(one * 2**10, two) for one, two in zip(found[0], scaled, strict=True)), "it was scaled"
