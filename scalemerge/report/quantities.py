"""Numbers as people read them: points, differences, durations, counts, bytes.

One place, so that terminal, Markdown and HTML never disagree about a digit.
"""

from __future__ import annotations

ABSENT = "–"
MINUS = "−"
TIE_POINTS = 0.05
"""Differences below this print as 0.0, so they count as level: a verdict must not claim what its digits do not show."""


def points(value: float | None) -> str:
    """A score, 0 to 100, with one decimal."""
    return ABSENT if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A difference in points with its sign; zero has none."""
    if value is None:
        return ABSENT
    if abs(value) < TIE_POINTS:
        return "0.0"
    return f"{'+' if value > 0 else MINUS}{abs(value):.1f}"


def coefficient(value: float | None) -> str:
    """A merging coefficient, a norm or a loss: three decimals, with a typographic minus."""
    return ABSENT if value is None else f"{value:.3f}".replace("-", MINUS)


def seconds(value: float | None) -> str:
    """Plain seconds, for columns whose header gives the unit."""
    if value is None:
        return ABSENT
    return f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}"


def duration(value: float | None) -> str:
    """A duration in the two units that matter: 4.2 s, 3 min 20 s, 5 h 07 min."""
    if value is None:
        return ABSENT
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    whole_minutes = round(value / 60)
    return f"{whole_minutes // 60:,} h {whole_minutes % 60:02d} min"


def ratio(value: float | None) -> str:
    """A cost relative to another: 1.31×."""
    if value is None:
        return ABSENT
    return f"{value:.2f}×" if value < 10 else f"{value:,.0f}×"


def count(value: float | None) -> str:
    """A count with an SI prefix: 950, 12.5 k, 3.2 M, 1.4 P."""
    if value is None:
        return ABSENT
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:g}"


def memory(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return ABSENT
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"
