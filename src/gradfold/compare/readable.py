"""Numbers as people read them: 2.1e-16, 97.4 %, 12.3 ms; amounts of memory are in `gradfold.memory.amount`."""

from __future__ import annotations

import math

from gradfold.compare.results import Deviation

__all__: list[str] = []

MISSING = "–"  # noqa: RUF001 - a dash, on purpose


def share(value: float) -> str:
    """A relative size: a percentage where that can be read, a power of ten below."""
    if math.isnan(value):
        return "NaN"
    if value == 0.0:
        return "0"
    if value < 1e-4:
        return f"{value:.1e}"
    return f"{value:.3%}".replace("%", " %") if value < 0.01 else f"{value:.1%}".replace("%", " %")


def deviation(value: Deviation) -> str:
    """A deviation, or a dash where there is none."""
    return MISSING if value.value is None else share(value.value)


def seconds(value: float) -> str:
    """A duration with about three digits."""
    if value < 0.1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def number(value: float) -> str:
    """A number with four significant digits."""
    if math.isnan(value):
        return "NaN"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def metric(name: str, value: float) -> str:
    """A metric of a workload: shares of one as percentages."""
    return share(value) if "accuracy" in name and 0.0 <= value <= 1.0 else number(value)
