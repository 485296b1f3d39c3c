"""Timing, peak memory and the two ceilings (copying, multiplying) of the device that a benchmark runs on.

time_in_turn   seconds of each way, one call of each in turn. On a GPU these are times between CUDA events with the
               queue kept full: the device sleeps while the host enqueues the call, so launching costs nothing.
               `eager_seconds` is the other view: calls back to back by the wall clock, launching included.
peak_bytes     a GPU: the allocator's peak above what was there before; a CPU: counted (measuring.LiveBytes)
ceilings       bytes a second of a large copy (read and written), FLOPs a second of a large product
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from measuring import LiveBytes, alternating_seconds

Call = Callable[[int], Any]  # a way, given the number of the input set to use
_CLOCK = 2e9  # cycles of torch.cuda._sleep in a second; at least: a slower clock only sleeps longer


@dataclass
class Timed:
    """Seconds of every sample by name; eager: wall-clock seconds a call (GPU only); failed: name -> why."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    bytes_a_second: float
    flops_a_second: float

    def floor(self, flops: float, size: float) -> float:
        """Seconds that so many FLOPs and bytes take at least."""
        return max(flops / self.flops_a_second, size / self.bytes_a_second)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, str]:
    """Columns that say where and with what a figure was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
    else:
        name, driver = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)", ""
    today = datetime.date.today().isoformat()
    return {"device": name, "driver": driver, "torch": torch.__version__, "triton": triton_version, "date": today}


def _driver() -> str:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return f"{driver.strip()}, CUDA {torch.version.cuda}"


def cache_bytes(device: torch.device) -> int:
    """The cache that input sets must exceed together; 0 on a CPU, where one set is used."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def time_in_turn(ways: Mapping[str, Call], sets: int, device: torch.device, budget: float) -> Timed:
    """Time all ways within about `budget` seconds; 3 to 40 samples of each, from `sets` input sets in rotation."""
    timed, once, host = Timed(), {}, {}
    for name, way in ways.items():
        try:
            for number in range(sets):
                way(number)  # compiles, fills buffers
            synchronize(device)
            began = time.perf_counter()
            way(0)
            host[name] = time.perf_counter() - began
            synchronize(device)
            once[name] = time.perf_counter() - began
        except Exception as error:  # out of memory, triton's errors: the other ways are worth measuring
            if "CUDA error" in str(error):
                raise  # nothing works in this process any more
            timed.failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    good = {name: ways[name] for name in once}
    if not good:
        return timed
    rounds = int(max(3, min(40, budget / sum(once[name] + 2 * host[name] for name in good))))
    if device.type != "cuda":
        timed.seconds = alternating_seconds({name: lambda way=way: way(0) for name, way in good.items()}, rounds)
        return timed
    timed.seconds = {name: [] for name in good}
    for number in range(rounds):
        for name in list(good) if number % 2 else list(reversed(good)):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(_CLOCK * min(0.02, 1.5 * host[name] + 1e-4)))
            before.record()
            good[name](number % sets)
            after.record()
            torch.cuda.synchronize(device)
            timed.seconds[name].append(before.elapsed_time(after) / 1e3)
    for name, way in good.items():
        calls = int(max(3, min(20, 0.02 / once[name])))
        began = time.perf_counter()
        for number in range(calls):
            way(number % sets)
        torch.cuda.synchronize(device)
        timed.eager[name] = (time.perf_counter() - began) / calls
    return timed


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that live at a time during the call beyond those that lived before; its result lives to the end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        result = call()
        del result
    return live.peak


def ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """Measured now, on random data: the fastest of many large copies and of many large products."""
    on_gpu = device.type == "cuda"
    count = 2**20 if quick else (2**29 if on_gpu else 2**25)
    source = torch.empty(count, dtype=torch.float16 if on_gpu else torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copied = _fastest(lambda _: target.copy_(source), device)
    side = 256 if quick else (8192 if on_gpu else 2048)
    left, right = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiplied = _fastest(lambda _: torch.mm(left, right, out=product), device)
    return Ceilings(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def _fastest(call: Call, device: torch.device) -> float:
    return min(time_in_turn({"one": call}, 1, device, 1.0).seconds["one"])
