"""Progress on stderr: a bar with an ETA on a terminal, plain log lines elsewhere, nothing on ranks other than 0."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

_SECONDS_BETWEEN_LINES = 15.0


def say(message: str) -> None:
    """One log line on stderr, from rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"[scalemerge] {message}", file=sys.stderr, flush=True)


class Progress:
    """`with Progress("training docs", 100) as p: p.advance(1, loss=0.3)`; `done` counts what was done before."""

    def __init__(self, description: str, total: int, *, done: int = 0, unit: str = "step") -> None:
        self.description, self.total, self.count, self.unit = description, total, done, unit
        self.started_at_count = done
        self.quiet = os.environ.get("RANK", "0") != "0"
        self.terminal = sys.stderr.isatty() and not self.quiet
        self.note = ""

    def __enter__(self) -> Progress:
        self.start = self.last_line = time.monotonic()
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.handle = self.bar.add_task(self.description, total=self.total, completed=self.count, note="")
        return self

    def advance(self, by: int = 1, **values: float) -> None:
        self.count += by
        if values:
            self.note = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.terminal:
            self.bar.update(self.handle, completed=self.count, note=self.note)
        elif not self.quiet and time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        elapsed = time.monotonic() - self.start
        done = self.count - self.started_at_count
        left = elapsed / done * (self.total - self.count) if done else float("nan")
        times = f"{elapsed:.0f} s, ETA {left:.0f} s"
        say(f"{self.description}: {self.count}/{self.total} {self.unit}s, {times}  {self.note}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal:
            self.bar.stop()
        if kind is None and not self.quiet:
            say(f"{self.description}: {self.count} {self.unit}s in {time.monotonic() - self.start:.1f} s  {self.note}")
