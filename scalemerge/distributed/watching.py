"""What may end a run from outside: a request to stop, and the death of another rank.

A cluster that takes its nodes back sends SIGTERM some time before it kills: the run saves at the next step and exits 0.
A rank that dies leaves the others waiting in a collective, for ever on some backends: each rank beats once a second in
the store that the process group was made with, and a rank whose beat stops is named.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from scalemerge.errors import RankLost

BEAT, SILENT, STALLED = 1.0, 6.0, 45.0


class Preempted(SystemExit):
    """The run was asked to stop, has saved, and ends with exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class StopRequest:
    """`with StopRequest() as stop: ... if stop.asked: save and leave`: SIGTERM noted instead of obeyed at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class Heartbeats:
    """`with Heartbeats(rank, world): train`: a thread beats for this rank and listens to the others.

    When a collective fails inside the block, the error raised is a RankLost that names the rank that fell silent.
    When a rank has been silent for 45 s while this one still waits, this process prints that error and ends with
    code 1: nothing else gets out of a collective that hangs. After SIGTERM 12 s are enough: a launcher sends it when a
    rank has died, and 30 s later SIGKILL. So it does, after 18 s, when the launcher that holds the
    store is gone: nobody would end this process later, and one started in its place would write the same files.
    """

    def __init__(self, rank: int, world: int, stop: StopRequest | None = None) -> None:
        self.rank, self.world, self._request = rank, world, stop
        self._seen: dict[int, tuple[int, float]] = {}
        self._names: dict[int, str] = {}
        self._finished: set[int] = set()
        self._store: Any = None
        self._stop = threading.Event()

    def __enter__(self) -> Heartbeats:
        if self.world > 1:
            self._store = self._connect()
            self._store.set(f"name/{self.rank}", f"{socket.gethostname()}, process {os.getpid()}")
            self._thread = threading.Thread(target=self._listen, daemon=True, name="scalemerge-heartbeats")
            self._thread.start()
        return self

    def _connect(self) -> Any:
        """A connection of our own to the launcher's store, as one that is shared would wait behind collectives."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STALLED))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"scalemerge/{attempt}/{_session()}", store)

    def _listen(self) -> None:
        try:
            while not self._stop.wait(BEAT):
                self._store.add(f"beat/{self.rank}", 1)
                self._look()
                asked = self._request is not None and self._request.asked
                if lost := self._silent(2 * SILENT if asked else STALLED):
                    self._die(self._say(lost))
        except Exception:  # the store is gone with the process that held it: the launcher of the first machine
            self._store = None
            if not self._stop.wait(3 * SILENT):  # a failing collective says it better, where one fails
                self._die(self._say_store())

    def _die(self, message: str) -> None:
        if not self._stop.is_set():
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(1)

    def _look(self) -> None:
        now = time.monotonic()
        for other in range(self.world):
            if other == self.rank or other in self._finished:
                continue
            beats = self._store.add(f"beat/{other}", 0)
            if beats < 0:
                self._finished.add(other)
            elif other not in self._seen or self._seen[other][0] != beats:
                self._seen[other] = (beats, now)
                if other not in self._names and self._store.check([f"name/{other}"]):
                    self._names[other] = self._store.get(f"name/{other}").decode()

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return sorted(
            other for other, (_, when) in self._seen.items() if now - when > seconds and other not in self._finished
        )

    def _say(self, lost: list[int]) -> str:
        named = ", ".join(f"rank {rank} ({self._names.get(rank, 'never heard of')})" for rank in lost)
        return (
            f"{named} died or lost its connection; look at its log, then start the same command again: it continues "
            "from the last checkpoint"
        )

    def _say_store(self) -> str:
        where = f", the machine of rank 0 ({self._names[0]})" if 0 in self._names else ""
        return (
            f"the launcher on the first machine{where} died or cannot be reached; look at its log, then start the same "
            "command again: it continues from the last checkpoint"
        )

    def _find_lost(self) -> RankLost:
        """Called when a collective has failed: who is silent, after waiting long enough to tell."""
        deadline = time.monotonic() + 2 * SILENT
        while time.monotonic() < deadline:
            if self._store is None:
                return RankLost(self._say_store())
            if lost := self._silent(SILENT):
                return RankLost(self._say(lost))
            time.sleep(0.2)
        return RankLost("another rank left the run; look at the first error of all ranks")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world == 1:
            return
        if isinstance(error, RuntimeError | ConnectionError):
            found = self._find_lost()
            self._end()
            raise found from error
        self._end()

    def _end(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * BEAT)
        try:
            if self._store is not None:
                self._store.add(f"beat/{self.rank}", -(2**40))
        except Exception:
            self._store = None


_sessions = 0


def _session() -> int:
    """How many times this process has watched: a run trains several models, each with beats of its own."""
    global _sessions
    _sessions += 1
    return _sessions
