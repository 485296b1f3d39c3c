"""What a step is recorded with: loss, gradient norm, tokens a second, MFU, memory, waiting; and the trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from scalemerge.checkpoints.atomic import open_log
from scalemerge.errors import InputError
from scalemerge.recipe import Training
from scalemerge.report.cost import Cost, peak_bytes
from scalemerge.report.hardware import peak_flops
from scalemerge.training.engine import Engine
from scalemerge.training.feeding import Feeder


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that Accelerate does not know or whose package is missing: it would leave them out silently."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    missing = {str(kind) for kind in LoggerType} - {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"training.trackers: '{name}' is not one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name in missing:
            raise InputError(f"training.trackers: '{name}' is not installed; pip install {name.replace('_', '-')}")


class StepLog:
    """`with StepLog(path, keep, main) as log: log.write(record)`: a JSONL file that rank 0 alone (`main`) writes.

    keep: the lines, of a file that is there, that a resumed run stands by. Without a record there is no file.
    """

    def __init__(self, path: Path, keep: int, main: bool) -> None:
        self._path, self._keep, self._main = path, keep, main
        self._file: TextIO | None = None

    def __enter__(self) -> StepLog:
        if self._main and self._path.is_file():
            self._file = open_log(self._path, self._keep)
        return self

    def write(self, record: dict[str, Any]) -> None:
        if not self._main:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_log(self._path, self._keep)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class Meter:
    """Measures steps. `with meter.step(feeder): ...`, then `meter.record(...)` gives the line for the log.

    mfu: floating-point operations of the model itself (three forward passes; what a gradient cache or checkpointing
    computes again does not count) a second, over the device's peak; absent where the peak is not known.
    """

    def __init__(self, engine: Engine, settings: Training, cost: Cost, name: str) -> None:
        self._engine, self._cost = engine, cost
        self._repeated = 0.0
        device = torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu"
        self._peak = peak_flops(device, settings.precision)
        self._trackers = bool(settings.trackers)
        if self._trackers:
            given = settings.model_dump().items()
            config = {key: value for key, value in given if isinstance(value, int | float | str)}
            engine.accelerator.init_trackers(name, config=config)

    @contextmanager
    def step(self, feeder: Feeder[Any]) -> Iterator[None]:
        began, waited, flops = time.monotonic(), feeder.waited, self._cost.flops
        yield
        self._seconds = time.monotonic() - began
        self._waited = feeder.waited - waited
        self._flops = self._cost.flops - flops
        self._cost.seconds += self._seconds

    def record(self, step: int, measured: dict[str, Any], tokens: int, repeated: float = 0.0) -> dict[str, Any]:
        """The line of a step, which also goes to the trackers.

        tokens: of all ranks, without padding. repeated: FLOPs so far that were computed a second time.
        """
        self._cost.tokens += tokens
        useful, self._repeated = self._flops - (repeated - self._repeated), repeated
        record = {
            "step": step,
            **measured,
            "tokens": self._cost.tokens,
            "seconds": round(self._cost.seconds, 3),
            "step_seconds": round(self._seconds, 4),
            "waited_seconds": round(self._waited, 4),
            "tokens_per_second": round(tokens / max(self._seconds, 1e-9), 1),
            "peak_bytes": peak_bytes(self._cost.device),
        }
        if self._peak:
            record["mfu"] = round(useful / max(self._seconds, 1e-9) / self._peak, 4)
        values = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._send({**values, **{f"loss/{task}": value for task, value in record.get("losses", {}).items()}}, step)
        return record

    def send_evaluation(self, record: dict[str, Any]) -> None:
        """The figures of Validation.run to the trackers, as evaluation/score, evaluation/TASK/loss ..."""
        values = {"evaluation/score": record["score"]}
        for task, figures in record["tasks"].items():
            values |= {f"evaluation/{task}/{name}": value for name, value in figures.items() if name != "rows"}
        self._send(values, record["step"])

    def _send(self, values: dict[str, Any], step: int) -> None:
        if self._trackers:
            self._engine.accelerator.log(values, step=step)

    def close(self) -> None:
        if self._trackers:
            self._engine.accelerator.end_training()
