"""The score table for the terminal and for Markdown: models in groups, task types, mean, and what each model cost.

The summary has one column per task type; with `detail`, one more table per type has a column per task, so that a suite
of thirty tasks still fits a terminal. The best value of a column is bold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scalemerge.report import quantities
from scalemerge.report.results import KINDS, ModelResult, Results, readable
from scalemerge.report.verdict import Verdict, verdict

GROUP_TITLES = {
    "base": "Base",
    "expert": "Experts",
    "joint": "Joint training",
    "merge": "Merges",
    "other": "Other",
}
_SHORT = {
    "classification": "class.",
    "clustering": "clust.",
    "retrieval": "retr.",
    "reranking": "rerank.",
    "summarization": "summ.",
}
_OUTCOME_STYLES = {"wins": "bold green", "loses": "bold red", "mixed": "bold yellow", "ties": "bold yellow"}

Column = tuple[str, Callable[[ModelResult], float | None]]


def print_scores(results: Results, *, detail: bool = False, console: Console | None = None) -> None:
    """Print the summary table (with `detail` also one table per task type) and the verdict line."""
    console = console or Console()
    summary = score_table(results)
    if console.measure(summary, options=console.options.update(width=1000)).maximum > console.width:
        summary = score_table(results, short=True)
    for table in (summary, *(detail_tables(results) if detail else ())):
        console.print(table)
        console.print()
    console.print(verdict_text(verdict(results)))


def score_table(results: Results, *, short: bool = False) -> Table:
    """Rows: models in groups. Columns: mean per task type, overall mean, seconds, seconds relative to joint training.

    `short` abbreviates the task types as the MTEB paper does, which brings five of them into 80 columns.
    """
    joint = verdict(results).joint
    reference = joint.rival.cost.seconds if joint else None
    suite = f" on {readable(results.suite)}" if results.suite else ""
    types = [_shortened(name) for name in results.types] if short else results.types
    table = _table(f"Scores{suite}, points", [*types, "Mean", "Sec." if short else "Seconds", "× joint"])
    columns = type_columns(results)
    peaks = best_values(results.models, columns)
    for kind in KINDS:
        models = results.of_kind(kind)
        if models:
            table.add_section()
            table.add_row(Text(GROUP_TITLES[kind], style="dim"))
        for model in models:
            cells = [_cell(get(model), peaks[name]) for name, get in columns]
            spent = model.cost.seconds
            table.add_row(
                _name(model, results),
                *cells,
                quantities.seconds(spent),
                quantities.ratio(spent / reference if spent is not None and reference else None),
            )
    return table


def detail_tables(results: Results) -> list[Table]:
    """One table per task type, a column per task."""
    tables = []
    for kind_of_task in results.types:
        columns = task_columns(results, kind_of_task)
        if not columns:
            continue
        table = _table(f"{readable(kind_of_task)}, points", [name for name, _ in columns])
        peaks = best_values(results.models, columns)
        for model in results.models:
            table.add_row(_name(model, results, full=True), *(_cell(get(model), peaks[name]) for name, get in columns))
        tables.append(table)
    return tables


def verdict_text(outcome: Verdict) -> Text:
    """The verdict line, coloured by outcome; the text alone says it all."""
    return Text(outcome.line, style=_OUTCOME_STYLES.get(outcome.outcome, "bold"))


def markdown_table(results: Results, *, detail: bool = False) -> str:
    """The same table as GitHub Markdown, for a README or a model card; with `detail` a column per task."""
    columns = [column for name in results.types for column in task_columns(results, name)] if detail else []
    columns = [*columns, ("Mean", results.mean)] if detail else type_columns(results)
    joint = verdict(results).joint
    reference = joint.rival.cost.seconds if joint else None
    header = ["Model", *(_escape(readable(name)) for name, _ in columns), "Seconds", "× joint"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    peaks = best_values(results.models, columns)
    for model in results.models:
        spent = model.cost.seconds
        cells = [_escape(model.full_label)]
        for name, get in columns:
            shown = quantities.points(get(model))
            cells.append(f"**{shown}**" if is_best(get(model), peaks[name]) else shown)
        cells.append(quantities.seconds(spent))
        cells.append(quantities.ratio(spent / reference if spent is not None and reference else None))
        lines.append(cells)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{_escape(verdict(results).line)}\n"


def best_values(models: Iterable[ModelResult], columns: Iterable[Column]) -> dict[str, float | None]:
    """The highest value of each column, rounded as printed, so that values that read the same are bold together."""
    listed = list(models)
    peaks: dict[str, float | None] = {}
    for name, get in columns:
        values = [value for model in listed if (value := get(model)) is not None]
        peaks[name] = round(max(values), 1) if values else None
    return peaks


def type_column(results: Results, name: str) -> Column:
    """The means of one task type."""
    return name, lambda model: results.type_mean(model, name)


def type_columns(results: Results) -> list[Column]:
    """A column per task type, then the overall mean."""
    return [*(type_column(results, name) for name in results.types), ("Mean", results.mean)]


def task_columns(results: Results, kind_of_task: str) -> list[Column]:
    """A column per task of one type."""

    def of_task(name: str) -> Column:
        return name, lambda model: model.scores.get(name)

    return [of_task(task.name) for task in results.tasks if task.type == kind_of_task]


def _shortened(name: str) -> str:
    words = [_SHORT.get(word.lower(), word) for word in readable(name).split()]
    joined = " ".join(words)
    return joined[:1].upper() + joined[1:]


def _table(title: str, headers: list[str]) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 0, 0, 2),
        header_style="dim",
    )
    table.add_column("Model", no_wrap=True)
    for header in headers:
        table.add_column(Text(readable(header)), justify="right", min_width=5)
    return table


def _cell(value: float | None, peak: float | None) -> Text:
    return Text(quantities.points(value), style="bold" if is_best(value, peak) else "")


def is_best(value: float | None, peak: float | None) -> bool:
    """Whether `value` prints like the highest of its column."""
    return value is not None and peak is not None and round(value, 1) >= peak


def _name(model: ModelResult, results: Results, *, full: bool = False) -> Text:
    label = model.full_label if full else f"  {model.label}"
    partial = "" if results.complete(model) else " (partial)"
    return Text(label + partial, style="bold" if model.learned else "")


def _escape(words: str) -> str:
    for letter in "\\|`*_[]<>":
        words = words.replace(letter, f"\\{letter}" if letter not in "<>" else {"<": "&lt;", ">": "&gt;"}[letter])
    return words
