"""The summary: two tables, distances from the full batch and costs, and footnotes with what follows from the numbers.

Terminal and HTML page show the same tables and footnotes. Numbers are written as people read them: 2.1e-16, 97.4 %,
12.3 ms; amounts of memory by `gradfold.memory.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from gradfold.compare.arms import ARMS, CONTROL, LOWER_PRECISIONS, REFERENCE, LowerPrecision
from gradfold.compare.results import Comparison, Measured, Row
from gradfold.memory.budget import written

MISSING = "–"  # noqa: RUF001 - a dash, on purpose

FLOAT64_ROUNDING = 1e-12
FLOAT32_ROUNDING = 2e-6
_NOTICEABLE = 1e-3
_PROCESS_NOISE_BYTES = 10 * 2**20  # how far high-water marks of equal runs were seen apart
_BUSY = 0.25
_NOISE = 0.1  # costs closer than this are called about the same
_NOISE_WHERE_BUSY = 0.5  # equal runs were seen 40 % apart while other programs ran


def share(value: float | None) -> str:
    """A relative size: a percentage where that can be read, a power of ten below; a dash where there is no number."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if value == 0.0:
        return "0"
    if value < 1e-4:
        return f"{value:.1e}"
    return f"{value:.3%}".replace("%", " %") if value < 0.01 else f"{value:.1%}".replace("%", " %")


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


def metric(name: str, value: float | None) -> str:
    """A metric of a workload: accuracies as percentages."""
    if value is None:
        return MISSING
    return share(value) if "accuracy" in name and 0.0 <= value <= 1.0 else number(value)


class Column(NamedTuple):
    """A column of figures, or of words with `justify="left"`; its heading may have several lines."""

    heading: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        """In characters."""
        return max(map(len, [*self.heading.splitlines(), *self.cells]))


Columns: TypeAlias = Sequence[Column]


def distance_table(comparison: Comparison) -> list[Columns]:
    """How far each arm is from the full batch, and where its training ended; a cell for each of the rows."""
    distances = {
        "gradient_float32": f"first\ngradient\n{comparison.first_gradients_in}",
        "gradient_float64": "first\ngradient\nfloat64",
        "last_window_float64": "last\nwindow\nfloat64",
        "weights": "final\nweights",
    }
    if not comparison.sizes.last_window:
        del distances["last_window_float64"]
    metrics = list(dict.fromkeys(name for row in comparison.rows if row.measured for name in row.measured.metrics))
    ends = ["training\nloss", *[f"held-out\n{name.replace('_', ' ')}" for name in metrics], "updates"]

    def cells(row: Row, measured: Measured) -> list[str]:
        far = [share(getattr(row.deviations, name).value) for name in distances]
        if row.is_reference:
            far = ["reference", *[""] * (len(distances) - 1)]
        scores = [metric(name, measured.metrics.get(name)) for name in metrics]
        return [*far, number(measured.final_loss), *scores, f"{measured.num_updates:,}"]

    return _table(comparison, [*distances.values()], ends, cells)


def cost_table(comparison: Comparison) -> list[Columns]:
    """What each arm costs in time and memory."""
    times = ["samples/s", "total", "forward", "backward", "update", "other"]
    memories = ["memory\nadded", "peak\nmemory", "peak of\ntensors"]

    def cells(row: Row, measured: Measured) -> list[str]:
        memory, tracked = measured.memory, measured.tracked
        return [
            number(measured.samples_per_s),
            *(seconds(getattr(measured.seconds, name)) for name in times[1:]),
            written(memory.rise_bytes),
            written(memory.peak_bytes),
            MISSING if tracked is None else written(tracked.peak_bytes),
        ]

    return _table(comparison, times, memories, cells)


def _table(
    comparison: Comparison, first: list[str], second: list[str], cells: Callable[[Row, Measured], list[str]]
) -> list[Columns]:
    """Columns in two groups, each of which stays together where a terminal is too narrow for all."""
    headings = first + second
    failed = ["failed", *[MISSING] * (len(headings) - 1)]
    rows = [failed if row.measured is None else cells(row, row.measured) for row in comparison.rows]
    columns = [Column(heading, of_column) for heading, *of_column in zip(headings, *rows, strict=True)]
    return [columns[: len(first)], columns[len(first) :]]


def footnotes(comparison: Comparison) -> list[str]:
    """What the numbers show: a line per arm, in the order of the rows, then what concerns several arms."""
    notes = [_note(row, comparison) for row in comparison.rows]
    notes += [_what_is_faster(comparison, precision) for precision in LOWER_PRECISIONS]
    notes += [_divergence(comparison), _contention(comparison), *_missing_references(comparison)]
    return [note for note in notes if note]


def _note(row: Row, comparison: Comparison) -> str:
    if row.measured is None:
        return f"{row.arm} failed: {row.failure}."
    text = "; ".join(filter(None, _facts(row, row.measured, comparison)))
    return f"{row.arm}: {text}." if text else ""


def _facts(row: Row, own: Measured, comparison: Comparison) -> Iterator[str]:
    """Gradient, updates, and costs against the full batch of the same model and what else an arm is to beat."""
    yield from (_gradient(row), _cause(row, comparison), _last_window(row, comparison))
    reference, arm, at_once = comparison.measured(row.reference), ARMS[row.arm], comparison.sizes.micro_batch_size
    if own.num_skipped:
        yield f"its loss scaler skipped {own.num_skipped:,} of {own.num_skipped + own.num_updates:,} updates"
    elif reference is not None and not arm.accumulates:
        yield f"{own.num_updates / reference.num_updates:.1f} times as many updates"
    if reference is not None and not row.is_reference:
        rise, full = own.memory.rise_bytes, reference.memory.rise_bytes
        noise = 0 if own.device == "cuda" else _PROCESS_NOISE_BYTES
        memory = "about the same memory" if abs(rise - full) <= max(_NOISE * full, noise) else "memory"
        ratio = own.samples_per_s / reference.samples_per_s
        speed = "about the same speed" if abs(ratio - 1) <= _NOISE else f"{ratio:.2f} times the speed"
        yield f"{memory} ({written(rise)}, {row.reference} {written(full)}), {speed}"
    if arm.requires == "token_budget":
        yield _speed(own, comparison, "gradfold", f"{at_once} samples at once")
    if own.choice is not None:
        source = "by an earlier start" if own.choice.is_cached else f"in {seconds(own.choice.elapsed_s)}"
        yield f"micro-batch {own.choice.micro_batch_size} tuned {source} ({own.choice.reason})"
        yield _speed(own, comparison, "plain-loop", f"micro-batches of {at_once}")


def _gradient(row: Row) -> str:
    """How far the first gradient is off; of an arm without accumulation it is of other samples, and nothing is said."""
    arm, far = ARMS[row.arm], row.deviations
    shown, precision, bound = far.gradient_float64, "float64", FLOAT64_ROUNDING
    if arm.precision or shown.value is None:
        shown, precision, bound = far.gradient_float32, arm.precision or "float32", FLOAT32_ROUNDING
    if row.is_reference or not arm.accumulates or shown.value is None:
        return ""
    if shown.value == 0.0:
        return f"first gradient identical to {row.reference} ({precision})"
    if shown.is_within(bound):
        return f"first gradient equal to {row.reference} to rounding ({share(shown.value)} in {precision})"
    return f"first gradient {share(shown.value)} off {row.reference} ({precision})"


def _cause(row: Row, comparison: Comparison) -> str:
    """Why the gradient of an arm that ought to be exact is off."""
    arm, far = ARMS[row.arm], row.deviations.gradient_float64
    if far.value is None or far.is_within(FLOAT64_ROUNDING) or not (arm.loop == "gradfold" or arm.precision):
        return ""
    if arm.precision:
        return f"not all of it is precision: {share(far.value)} off in float64"
    if comparison.workload.batch_norm == "per_micro_batch" and arm.batch_norm is None and not arm.has_group_norm:
        return 'BatchNorm normalizes by micro-batch, as the workload asks for (batch_norm="per_micro_batch")'
    return "more than rounding: dropout and other random layers draw differently in micro-batches"


def _last_window(row: Row, comparison: Comparison) -> str:
    """The fault of the plain loop at the end of an epoch."""
    last, sizes = row.deviations.last_window_float64, comparison.sizes
    if row.arm != "plain-loop" or last.value is None or last.is_within(FLOAT64_ROUNDING):
        return ""
    n = sizes.num_micro_batches
    left = -(-sizes.last_window // (sizes.micro_batch_size * sizes.num_ranks))
    fault = f"is divided by {n} with {left} micro-batch{'es' * (left > 1)} left"
    if left == n:
        fault = "counts its micro-batches the same though one is smaller"
    return f"the last window of an epoch ({sizes.last_window} samples) {fault}: {share(last.value)} off"


def _speed(own: Measured, comparison: Comparison, arm: str, how: str) -> str:
    other = comparison.measured(arm)
    return f"{own.samples_per_s / other.samples_per_s:.2f} times the speed of {arm} with {how}" if other else ""


def _what_is_faster(comparison: Comparison, precision: LowerPrecision) -> str:
    """Which of accumulation, a lower precision and both is faster than the full batch on this machine."""
    reference = comparison.measured(REFERENCE)
    ways = {
        "accumulation": comparison.measured("gradfold") or comparison.measured("batch-norm-per-micro"),
        precision: comparison.measured(f"{REFERENCE}-{precision}"),
        "both": comparison.measured(f"gradfold-{precision}"),
    }
    if reference is None or ways[precision] is None:
        return ""
    # Time relative to the full batch: of the whole training, and of its backward passes.
    times = {
        way: (reference.samples_per_s / own.samples_per_s, own.seconds.backward / reference.seconds.backward)
        for way, own in ways.items()
        if own is not None
    }
    listed = ", ".join(f"{way} {whole:.2f} ({backward:.2f})" for way, (whole, backward) in times.items())
    noise = _NOISE_WHERE_BUSY if _contention(comparison) else _NOISE
    best = min(whole for whole, _ in times.values())
    fastest = [way for way, (whole, _) in times.items() if whole <= best / (1 - noise)]
    found = f"faster: {' or '.join(fastest)}" if best < 1 - noise else f"not faster beyond noise ({100 * noise:.0f} %)"
    return f"Time relative to {REFERENCE} (its backward passes): {listed}; {found}."


def _divergence(comparison: Comparison) -> str:
    """Why weights may differ although gradients agree to rounding."""
    control = comparison.row(CONTROL)
    if control is not None and control.deviations.weights.value is not None:
        far = share(control.deviations.weights.value)
        return f"Rounding alone ({CONTROL}) moves the final weights by {far}; an arm no farther away trained the same."
    diverged = [
        row.arm
        for row in comparison.rows
        if ARMS[row.arm].loop == "gradfold"
        and (row.deviations.weights.value or 0.0) >= _NOTICEABLE
        and row.deviations.gradient_float64.is_within(FLOAT64_ROUNDING)
        and ARMS[row.arm].precision is None
    ]
    if not diverged:
        return ""
    text = "Weights diverge although gradients agree: rounding errors grow from update to update."
    arms = f"{REFERENCE},gradfold,{CONTROL}"
    return f"{text} --arms {arms} shows how far rounding alone goes." if "gradfold" in diverged else text


def _contention(comparison: Comparison) -> str:
    """A warning where the arms had to share their cores."""
    others, cores = comparison.machine.get("cores_busy_with_other_programs"), comparison.machine.get("cores")
    threads = max((row.measured.num_threads for row in comparison.rows if row.measured is not None), default=0)
    if not others or not cores or others < _BUSY or others + threads < cores + _BUSY:
        return ""
    return (
        f"Times are not reliable: other programs kept up to {others:.1f} of {cores} cores busy, and each arm ran "
        f"{threads} thread{'s' * (threads > 1)}."
    )


def _missing_references(comparison: Comparison) -> list[str]:
    """What could not be compared, since the full batch of its model did not run to its end."""
    missing: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.measured is not None and not row.is_reference and comparison.measured(row.reference) is None:
            missing.setdefault(row.reference, []).append(row.arm)
    return [
        f"Without {reference} there is no reference: gradients and weights of {', '.join(arms)} are not compared."
        for reference, arms in missing.items()
    ]
