"""Buffers that every merge reuses: the only memory a merge layer takes beside weights, task vectors and activations.

Freshly allocated chunks by the thousand fragment the allocator (measured: resident memory grew 1.5 times as much). A
slot is a flat tensor of bytes that grows to the largest use and is viewed in whatever dtype is wanted. On a CPU there
is one set a thread; on a GPU one a stream, since work on one stream runs in order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_slots: dict[tuple[torch.device, int, int], Tensor] = {}


def workspace(slot: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized contiguous tensor in a reused buffer. What the slot held before is lost."""
    owner = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident()
    size = math.prod(shape) * dtype.itemsize
    key = (device, owner, slot)
    buffer = _slots.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = None
        _slots.pop(key, None)  # given back first, so that the old one and the new one are never there together
        with torch.inference_mode(False):  # else the buffer could not be written outside that mode
            buffer = _slots[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(*shape)


def release_workspace() -> None:
    """Give the buffers back to the allocator."""
    _slots.clear()
