"""The reused buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from scalemerge.kernels import workspace as module
from scalemerge.kernels.workspace import release_workspace, workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_slots", {})
    yield


def test_smaller_uses_share_the_buffer_in_any_dtype() -> None:
    first = workspace(0, (8, 16), torch.float32, CPU)
    assert first.shape == (8, 16) and first.is_contiguous()
    for shape, dtype in (
        ((8, 16), torch.float32),
        ((3, 5), torch.float64),
        ((7,), torch.bfloat16),
        ((0, 4), torch.int8),
    ):
        again = workspace(0, shape, dtype, CPU)
        assert again.shape == shape and again.dtype == dtype and again.is_contiguous()
        assert again.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_grows_to_the_largest_use_and_stays_there() -> None:
    workspace(0, (4,), torch.float32, CPU)
    large = workspace(0, (1000,), torch.float32, CPU)
    assert large.untyped_storage().nbytes() == 4000
    assert workspace(0, (4,), torch.float32, CPU).data_ptr() == large.data_ptr()


def test_slots_do_not_overlap() -> None:
    first, second = workspace(0, (64,), torch.float32, CPU).fill_(1), workspace(1, (64,), torch.float32, CPU).fill_(2)
    assert (first == 1).all() and (second == 2).all()


def test_threads_do_not_share() -> None:
    mine = workspace(0, (64,), torch.float32, CPU).fill_(1)
    other: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: other.append(workspace(0, (64,), torch.float32, CPU).fill_(2)))
    thread.start()
    thread.join()
    assert (other[0] == 2).all() and (mine == 1).all()


def test_usable_after_inference_mode() -> None:
    """A tensor made in inference mode could not be written, nor saved for backward, outside of it."""
    with torch.inference_mode():
        workspace(0, (4,), torch.float32, CPU).fill_(1)
    buffer = workspace(0, (4,), torch.float32, CPU)
    assert not buffer.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (buffer.fill_(3) * weight).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0] * 4


def test_release_gives_the_buffers_back() -> None:
    workspace(0, (4,), torch.float32, CPU)
    workspace(1, (4,), torch.float32, CPU)
    release_workspace()
    assert not module._slots
    assert workspace(0, (2,), torch.float32, CPU).untyped_storage().nbytes() == 8
