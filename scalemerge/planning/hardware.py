"""GPUs and networks, from hardware.toml and from a file of the user's."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalemerge.errors import InputError

TABLE = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Hardware:
    """memory: bytes; flops: of bfloat16 products a second; bandwidth, link, network: bytes a second."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    gpus_per_node: int


def load_hardware(gpu: str, network: str, gpus_per_node: int, extra: Path | None = None) -> Hardware:
    """A GPU and the network between machines. extra: tables that go before ours. Raises InputError."""
    tables = _read(TABLE)
    for kind, entries in (_read(extra) if extra else {}).items():
        if kind not in ("gpu", "network") or not isinstance(entries, dict):
            raise InputError(f"{extra}: has a table '{kind}'; write [gpu.NAME] and [network.NAME]")
        tables[kind] = {**tables[kind], **entries}
    chosen, between = _entry(tables, "gpu", gpu), _entry(tables, "network", network)
    try:
        return Hardware(
            gpu,
            float(chosen["memory"]) * 1e9,
            float(chosen["flops"]) * 1e12,
            float(chosen["bandwidth"]) * 1e9,
            float(chosen["link"]) * 1e9,
            float(between["bandwidth"]) * 1e9,
            gpus_per_node,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{extra or TABLE}: gpu.{gpu} or network.{network} lacks {error}, or it is no number"
        ) from None


def _entry(tables: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    if name not in tables[kind]:
        raise InputError(f"--{kind} {name}: is not one of {', '.join(tables[kind])}; add it through --hardware FILE")
    return dict(tables[kind][name])


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a TOML file ({error}); see scalemerge/planning/hardware.toml") from None
