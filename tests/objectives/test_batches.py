"""One batch, one loss: however many ranks share it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from scalemerge.errors import InputError
from scalemerge.objectives import batches as batches_module
from scalemerge.objectives import check_parameters
from scalemerge.objectives.batches import TextBatch, batch_losses, token_count


def features(count: int, start: int = 0) -> list[dict[str, list[int]]]:
    """Texts of different lengths; the first token says which one."""
    return [{"input_ids": [start + number] + [1] * (number % 3)} for number in range(count)]


def make_batch(loss: str, rows: int, counts: tuple[int, ...] | None = None) -> TextBatch:
    if loss == "cosent":
        roles = {"sentence1": features(rows), "sentence2": features(rows, 100)}
        return TextBatch("t", loss, {}, roles, {"score": torch.arange(rows) % 3 * 1.0})
    if loss == "supcon":
        return TextBatch("t", loss, {"temperature": 0.2}, {"text": features(rows)}, {"label": torch.arange(rows) % 2})
    roles = {"query": features(rows), "positive": features(rows, 100)}
    if counts is not None:
        roles["negatives"] = features(sum(counts), 200)
    return TextBatch("t", loss, {"temperature": 0.2, "symmetric": True}, roles, {}, counts)


class Table(torch.nn.Module):
    """The smallest encoder: a weight that all texts share, so that every rank has a gradient for it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(300, 8, dtype=torch.float64, generator=generator))
        self.mix = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.float64, generator=generator))

    def forward(self, texts: list[dict[str, list[int]]]) -> torch.Tensor:
        ids = torch.tensor([text["input_ids"][0] for text in texts], dtype=torch.long)
        lengths = torch.tensor([len(text["input_ids"]) for text in texts], dtype=torch.float64).unsqueeze(1)
        return F.normalize(self.table[ids] @ self.mix * lengths + 1, dim=-1)


class Ranks:
    """`world` threads that play ranks: gather_rows hands detached rows over, as a collective does."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier, self.slots = world, threading.Barrier(world, timeout=20), [None] * world

    def gather(self, local: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
        assert len(local) == counts[rank]
        self.slots[rank] = local.detach()
        self.barrier.wait()
        parts = list(self.slots)
        parts[rank] = local
        self.barrier.wait()
        return torch.cat(parts)

    def run(self, work: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def whole(batches: list[TextBatch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = Table()
    losses = torch.stack(batch_losses(batches, model))
    losses.sum().backward()
    return losses.detach(), [model.table.grad, model.mix.grad]


def split(batches: list[TextBatch], world: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The losses each rank sees, and the gradients averaged over ranks as data parallelism does it."""
    ranks, models = Ranks(world), [Table() for _ in range(world)]
    seen: list[torch.Tensor] = [torch.empty(0)] * world

    def work(rank: int) -> None:
        losses = torch.stack(batch_losses([batch.share(rank, world) for batch in batches], models[rank], rank=rank))
        (losses.sum() * world).backward()
        seen[rank] = losses.detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "gather_rows", ranks.gather)
        ranks.run(work)
    gradients = [torch.stack([getattr(model, name).grad for model in models]).mean(0) for name in ("table", "mix")]
    return seen, gradients


@given(
    loss=st.sampled_from(["infonce", "cosent", "supcon"]),
    rows=st.integers(3, 9),
    world=st.integers(2, 3),
    counts=st.none() | st.lists(st.integers(0, 3), min_size=9, max_size=9),
)
def test_any_number_of_ranks_gives_one_loss_and_one_gradient(loss, rows, world, counts) -> None:
    """Uneven rows, any number of hard negatives a row (none at all on some ranks), two batches in one call."""
    negative_counts = tuple(counts[:rows]) if counts and loss == "infonce" else None
    batches = [make_batch(loss, rows, negative_counts), make_batch("infonce", 4)]
    expected_losses, expected_gradients = whole(batches)
    seen, gradients = split(batches, world)
    for losses in seen:
        torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@given(
    rows=st.integers(1, 20),
    world=st.integers(1, 6),
    counts=st.lists(st.integers(0, 4), min_size=20, max_size=20),
)
def test_bounds_cut_rows_whole_and_negatives_with_their_rows(rows, world, counts) -> None:
    batch = make_batch("infonce", rows, tuple(counts[:rows]))
    shares = [batch.share(rank, world) for rank in range(world)]
    for role, texts in batch.roles.items():
        assert [text for share in shares for text in share.roles[role]] == texts
        assert all(share.counts[role] == tuple(len(other.roles[role]) for other in shares) for share in shares)
    taken = 0
    for share in shares:
        own = len(share.roles["query"])
        assert len(share.roles["negatives"]) == sum(counts[taken : taken + own]), "negatives stay with their rows"
        taken += own
    numbers = [len(share.roles["query"]) for share in shares]
    assert max(numbers) - min(numbers) <= 1


def test_tokens_are_counted_over_all_roles() -> None:
    assert token_count([make_batch("infonce", 3, (1, 0, 2))]) == 3 * (1 + 2 + 3)


def gloo_batches() -> list[TextBatch]:
    return [make_batch("infonce", 5, (0, 3, 1, 0, 2)), make_batch("cosent", 3), make_batch("supcon", 7)]


def gloo_rank(rank: int, folder: Path) -> None:
    """One of two processes: its losses and the averaged gradients, into a file."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = Table()
    losses = torch.stack(batch_losses([batch.share(rank, 2) for batch in gloo_batches()], model, rank=rank))
    (losses.sum() * 2).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    torch.save([losses.detach(), model.table.grad, model.mix.grad], folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_real_processes_give_the_same(tmp_path: Path) -> None:
    """gather_rows over gloo: uneven rows are padded for the collective and cut again."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    expected_losses, expected_gradients = whole(gloo_batches())
    for rank in range(2):
        losses, *gradients = torch.load(tmp_path / f"rank-{rank}.pt")
        torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
        for ours, expected in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("infonce", {"temprature": 0.1}, "no parameter 'temprature'; it has temperature, symmetric, margin"),
        ("cosent", {"temperature": 0.1}, "no parameter 'temperature'; it has scale"),
        ("supcon", {"temperature": 0}, "'temperature' must be a positive number, not 0"),
        ("infonce", {"temperature": "low"}, "'temperature' must be a positive number, not 'low'"),
        ("infonce", {"temperature": float("nan")}, "'temperature' must be a positive number, not nan"),
        ("infonce", {"temperature": True}, "'temperature' must be a positive number, not True"),
        ("infonce", {"margin": "wide"}, "'margin' must be a number or null, not 'wide'"),
        ("infonce", {"symmetric": "yes"}, "'symmetric' must be true or false, not 'yes'"),
        ("infonce", {"query": 1}, "no parameter 'query'"),
    ],
)
def test_bad_parameters_name_field_and_remedy(name: str, parameters: dict, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        check_parameters(name, parameters, "tasks.a.loss.parameters")
    assert str(caught.value).startswith("tasks.a.loss.parameters: ")
    assert expected in str(caught.value)


def test_good_parameters_pass() -> None:
    check_parameters("infonce", {"temperature": 1, "symmetric": True, "margin": 0.1}, "x")
    check_parameters("infonce", {"margin": None}, "x")
    check_parameters("cosent", {"scale": 20}, "x")


if __name__ == "__main__":
    gloo_rank(int(sys.argv[1]), Path(sys.argv[2]))
