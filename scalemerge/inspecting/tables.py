"""What inspect and diff found, as tables in the terminal, or as lines of text where there is none."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scalemerge.inspecting.diff import STORED, Difference, Differences
from scalemerge.inspecting.inspect import (
    AdapterFolder,
    Encoding,
    Experts,
    Inspected,
    ModelFolder,
    Store,
    StoredVectors,
)

_SHOWN = 10  # of a list of names


def print_differences(found: Differences) -> None:
    """A line a module, the total last, then what was not compared."""
    console = _console()
    console.print(f"A: {escape(str(found.a))}\nB: {escape(str(found.b))}")
    columns = (found.granularity, "|A|", "|B - A|", "relative", "cosine", *(f"kept in {dtype}" for dtype in STORED))
    table = _table("B - A", columns)
    for name, each in found.modules.items():
        table.add_row(escape(name), *_figures(each))
    table.add_section()
    table.add_row("total", *_figures(found.total))
    console.print(table)
    for title, names in (("only in A", found.only_a), ("only in B", found.only_b), ("integers differ", found.integers)):
        if names:
            console.print(f"{title}: {escape(_names(names))}")
    for name, (first, second) in found.shapes.items():
        console.print(f"not compared: {escape(name)} has shape {list(first)} in A, {list(second)} in B", markup=False)


def _figures(each: Difference) -> list[str]:
    norms = [f"{value**0.5:.4g}" for value in (each.a, each.square)]
    kept = [f"{100 * each.survival(dtype):.2f} %" for dtype in STORED]
    return [*norms, f"{100 * each.relative_norm:.3f} %", f"{each.cosine:.6f}", *kept]


def print_inspected(found: Inspected) -> None:
    """A table of what a folder holds, and one of task vectors where they were measured."""
    console = _console()
    if isinstance(found, Experts):
        _print_experts(console, found)
        return
    if isinstance(found, Store):
        _print_store(console, found)
    else:
        rows = {ModelFolder: _model_rows, StoredVectors: _stored_rows, AdapterFolder: _adapter_rows}[type(found)](found)
        table = Table(title=f"{found.kind}: {escape(found.folder)}", title_justify="left", box=None, show_header=False,
                      padding=(0, 2))  # fmt: skip
        for name, value in rows:
            if value not in (None, "", [], {}):
                table.add_row(name, escape(str(value)))
        console.print(table)
    if found.vectors is not None:
        _print_experts(console, found.vectors)


def _model_rows(found: Any) -> list[tuple[str, Any]]:
    return [
        ("architecture", f"{found.architecture or 'not named'} ({found.model_type})"),
        ("sizes", ", ".join(f"{name} {value}" for name, value in found.sizes.items())),
        ("parameters", f"{found.parameters:,}"),
        ("dtypes", _counts(found.dtypes)),
        ("files", f"{len(found.shards)}, {sum(found.shards.values()) / 1e6:.1f} MB"),
        ("beside the backbone", _names(found.head)),
        ("tied embeddings", found.tied),
        ("vocabulary", f"{_shown(found.tokens)} tokens, {_shown(found.table_rows)} rows, config.json says "
                       f"{_shown(found.vocab_size)}"),
        *_encoding_rows(found.encoding),
        ("licence", found.licence),
        ("scalemerge.json", _recorded(found.recorded)),
    ]  # fmt: skip


def _stored_rows(found: Any) -> list[tuple[str, Any]]:
    how = {"group size": found.group_size, "rank": found.rank}
    return [
        ("expert", found.expert or "the shared base of a store"),
        ("format", ", ".join([found.form, *(f"{name} {value}" for name, value in how.items() if value)])),
        ("bytes", f"{found.nbytes / 1e6:.2f} MB of {found.bfloat16_bytes / 1e6:.2f} MB in bfloat16"),
        ("tensors", f"{found.tensors}, and {found.unchanged} unchanged"),
        ("base", f"{found.base} (revision {found.base_revision[:12]})"),
        ("shared base", found.shared),
        ("relative error", f"{100 * found.relative_error:.3f} %, cosine {found.cosine:.5f}"),
        ("weight error at c = 1", f"{100 * found.weight_error:.4f} %"),
    ]


def _adapter_rows(found: Any) -> list[tuple[str, Any]]:
    return [
        ("type", found.peft_type + (", rsLoRA" if found.rslora else "")),
        ("base", found.base),
        ("rank, alpha", f"{found.rank}, {found.alpha}"),
        ("targets", found.targets if isinstance(found.targets, str) else _names(found.targets)),
        ("modules", f"{found.modules}; rank " + ", ".join(f"{r}: {n} modules" for r, n in found.ranks.items())),
        ("parameters", f"{found.parameters:,} ({found.nbytes / 1e6:.2f} MB)"),
        ("dtypes", _counts(found.dtypes)),
        ("more than LoRA", json.dumps(found.unusual) if found.unusual else None),
        *_encoding_rows(found.encoding),
        ("licence", found.licence),
        ("scalemerge.json", _recorded(found.recorded)),
    ]


def _encoding_rows(found: Encoding) -> list[tuple[str, Any]]:
    if not found.modules:
        return [("sentence-transformers", "no modules.json")]
    prompts = json.dumps(found.prompts, ensure_ascii=False) if found.prompts else None
    return [
        ("sentence-transformers", ", ".join(found.modules)),
        ("pooling", found.pooling),
        ("longest text", f"{found.max_length} tokens" if found.max_length else None),
        ("prompts", prompts),
        ("default prompt", found.default_prompt),
        ("not readable", found.problem),
    ]


def _print_store(console: Console, found: Store) -> None:
    share = found.nbytes / found.bfloat16_bytes if found.bfloat16_bytes else 0.0
    console.print(f"store: {escape(found.folder)}, {found.nbytes / 1e6:.2f} MB, {share:.3f}x of bfloat16 task vectors")
    console.print(f"base: {escape(found.base)} (revision {found.base_revision[:12]})")
    table = _table("experts", ("expert", "format", "MB", "relative error", "cosine", "weight error"))
    for each in [*found.experts, *([found.shared] if found.shared else [])]:
        errors = [f"{100 * each.relative_error:.3f} %", f"{each.cosine:.5f}", f"{100 * each.weight_error:.4f} %"]
        table.add_row(escape(each.expert or "(shared base)"), each.form, f"{each.nbytes / 1e6:.2f}", *errors)
    console.print(table)
    if found.note:
        console.print(escape(found.note))


def _print_experts(console: Console, found: Experts) -> None:
    table = _table(f"task vectors from {escape(found.base)}", ("expert", "|T|", "of |W0|", *map(escape, found.names)))
    for number, name in enumerate(found.names):
        figures = [f"{found.norms[number]:.4g}", f"{100 * found.relative_norms[number]:.3f} %"]
        table.add_row(escape(name), *figures, *(f"{value:.3f}" for value in found.cosines[number]))
    console.print(table)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{dtype} {count:,}" for dtype, count in counts.items())


def _shown(value: int | None) -> str:
    return "no" if value is None else f"{value:,}"


def _recorded(record: dict[str, Any] | None) -> str | None:
    if record is None:
        return None
    short = {name: value for name, value in record.items() if not isinstance(value, dict) or len(value) <= _SHOWN}
    text = json.dumps(short, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]} ..."
