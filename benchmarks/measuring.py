"""What the benchmarks and the memory tests measure with: live tensor bytes, resident memory, repeated timings.

Peak memory is counted, not sampled: `LiveBytes` sees every operation through a TorchDispatchMode and adds up the
storages that operations made and that still live. It is exact and the same from run to run, but blind to scratch space
inside an operation; the growth of resident memory, which sees that and the allocator's slack too, stands beside it.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside the `with` block: live now, at the peak, and of the largest one.

    Storages that existed before (weights, task vectors, inputs) do not count, nor do views. What scalemerge's own
    operations make inside counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, counts=False)
        if func.namespace == "scalemerge":  # the mode is off in here, so that an operation's inside would not be seen
            device = next(leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
            with self:
                return func.redispatch(key, *args, **kwargs)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf, counts=True)
        return result

    def _meet(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts and tensor.device.type != "meta" else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)


def hide_this_folder() -> None:
    """Take benchmarks/ off sys.path, once all of a script's own modules are imported.

    transformers imports whatever is called `kernels`: it must not find the benchmark of that name.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class ResidentGrowth:
    """Growth of this process's peak resident memory over a `with` block, in `bytes`; 0 where there is no /proc."""

    bytes = 0

    def __enter__(self) -> ResidentGrowth:
        self.usable = Path("/proc/self/clear_refs").exists()
        if self.usable:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
            self.before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.usable:
            self.bytes = max(0, _resident("VmHWM") - self.before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many torch threads; 0 leaves the number as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternating_seconds(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each variant in turn, so that a slow spell of the machine meets all of them.

    The first round warms up and is not counted; every second round runs in reverse order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats + 1):
        order = list(variants) if number % 2 else list(reversed(variants))
        for name in order:
            began = time.perf_counter()
            variants[name]()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20 % quantile, the median and the 80 % quantile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def write_figures(
    folder: Path, name: str, figures: list[dict[str, Any]], settings: dict[str, Any], *, with_figures: bool = True
) -> None:
    """NAME.csv, one row a figure in one long schema, and NAME.json with the settings; each replaced whole.

    with_figures: whether the JSON repeats them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{name}.unfinished"
    with open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(figures[0]))
        writer.writeheader()
        writer.writerows(figures)
    unfinished.replace(folder / f"{name}.csv")
    unfinished.write_text(
        json.dumps({"settings": settings, **({"figures": figures} if with_figures else {})}, indent=2) + "\n"
    )
    unfinished.replace(folder / f"{name}.json")
