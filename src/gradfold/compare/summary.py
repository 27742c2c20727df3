"""The verdict: what the numbers of a comparison show, in plain words. Every word of it follows from the results.

Numbers as people read them: 2.1e-16, 97.4 %, 12.3 ms; amounts of memory are in `gradfold.memory.amount`.
"""

from __future__ import annotations

import math

from gradfold.compare.arms import (
    ARMS,
    BATCH_NORM,
    CONTROL,
    EXACT_BATCH_NORM,
    GROUP_NORM_REFERENCE,
    LOWER_PRECISIONS,
    REFERENCE,
    TOKEN_BUDGET,
    LowerPrecision,
)
from gradfold.compare.results import Comparison, Deviation, Row
from gradfold.memory.amount import written

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


FLOAT64_ROUNDING = 1e-12
FLOAT32_ROUNDING = 2e-6
_NOTICEABLE = 1e-3
_PROCESS_NOISE_BYTES = 10 * 2**20  # how far high-water marks of equal runs were seen apart
_BUSY = 0.25
_SAME = 0.1  # costs closer than this are called about the same
_SAME_WHERE_BUSY = 0.5  # equal runs were seen 40 % apart while other programs ran


def verdict(comparison: Comparison) -> list[str]:
    """One or two sentences for each arm, in the order of the rows."""
    sentences = []
    for row in comparison.rows:
        if row.measured is None:
            sentences.append(f"{row.arm} failed: {row.failure}.")
        elif row.arm != REFERENCE:
            sentences.append(_WORDS.get(row.arm, _gradient)(row, comparison))
    sentences += [_what_pays(comparison, precision) for precision in LOWER_PRECISIONS]
    sentences += [_growth(comparison), _contention(comparison)]
    sentences += _missing_references(comparison)
    return [sentence for sentence in sentences if sentence]


def _of_gradfold(row: Row, comparison: Comparison) -> str:
    words = [_explained_gradient(row, comparison), _cost(row, comparison), _choice(row, comparison)]
    return " ".join(filter(None, words))


def _choice(row: Row, comparison: Comparison) -> str:
    """The micro-batch that an arm chose itself, and what it made of it."""
    if row.measured is None or row.measured.choice is None:
        return ""
    choice = row.measured.choice
    source = "an earlier start had found" if choice.is_cached else f"it found in {seconds(choice.elapsed_s)}"
    words = f"It ran micro-batches of {choice.micro_batch_size}, which {source}: {choice.reason}."
    loop = comparison.measured("plain-loop")
    if loop is not None:
        pace = row.measured.samples_per_s / loop.samples_per_s
        words += f" That is {pace:.2f} times the speed of plain-loop with micro-batches of "
        words += f"{comparison.sizes.micro_batch_size}."
    return words


def _of_token_budget(row: Row, comparison: Comparison) -> str:
    """As gradfold, and how much faster than with a fixed number of samples at once."""
    words = [_explained_gradient(row, comparison), _cost(row, comparison)]
    fixed, own = comparison.measured("gradfold"), row.measured
    if fixed is not None and own is not None:
        at_once = comparison.sizes.micro_batch_size
        pace = own.samples_per_s / fixed.samples_per_s
        words.append(f"It ran at {pace:.2f} times the speed of gradfold with {at_once} samples at once.")
    return " ".join(filter(None, words))


def _of_group_norm(row: Row, comparison: Comparison) -> str:
    words = [_explained_gradient(row, comparison), _cost(row, comparison)]
    with_batch_norm = comparison.row(BATCH_NORM) or comparison.row("gradfold")
    is_exact = comparison.row(EXACT_BATCH_NORM) is not None  # which says more
    if with_batch_norm is not None and not is_exact and is_rounding(row.deviations.gradient_float64, FLOAT64_ROUNDING):
        far = with_batch_norm.deviations.gradient_float64
        if far.value is not None and not is_rounding(far, FLOAT64_ROUNDING):
            words.insert(1, "So accumulation is the large batch with GroupNorm, and is not with BatchNorm.")
    return " ".join(filter(None, words))


def _explained_gradient(row: Row, comparison: Comparison) -> str:
    """How close the first gradient of an arm that ought to be exact is, and why not, where it is not."""
    words = _gradient(row, comparison)
    if words and not is_rounding(row.deviations.gradient_float64, FLOAT64_ROUNDING):
        is_by_micro_batch = comparison.workload.batch_norm == "per_micro_batch" and row.arm != EXACT_BATCH_NORM
        if is_by_micro_batch and row.reference == REFERENCE:
            words += (
                ' BatchNorm normalizes by micro-batch here, as the workload asks for (batch_norm="per_micro_batch").'
            )
        elif row.deviations.gradient_float64.value is not None:
            words += " That is more than rounding: dropout and other random layers draw differently in micro-batches."
    return words


def _of_group_norm_reference(row: Row, comparison: Comparison) -> str:
    words = f"{row.arm} is another model, with GroupNorm in place of BatchNorm, which group-norm is measured against."
    return " ".join(filter(None, [words, _held_out(row, comparison)]))


def _of_lower_precision(row: Row, comparison: Comparison) -> str:
    """What the lower precision does to the first gradient, to the weights and to what is held out."""
    precision, far = ARMS[row.arm].precision, row.deviations
    words = []
    if far.gradient_float32.value is not None:
        words.append(f"{row.arm}: the first gradient, in {precision}, is {share(far.gradient_float32.value)} off")
        words[0] += f" {_whose(row)} in float32; {_weights(row, 'the')}".rstrip("; ") + "."
    elif far.weights.value is not None:
        words.append(f"{row.arm}: {_weights(row, 'the')}.")
    if not is_rounding(far.gradient_float64, FLOAT64_ROUNDING) and far.gradient_float64.value is not None:
        words.append(f"Not all of it is precision: in float64 it is {share(far.gradient_float64.value)} off.")
    if row.measured is not None and row.measured.num_skipped:
        num = row.measured.num_skipped + row.measured.num_updates
        words.append(f"Its loss scaler skipped {row.measured.num_skipped:,} of {num:,} updates.")
    return " ".join(filter(None, [*words, _held_out(row, comparison)]))


def _what_pays(comparison: Comparison, precision: LowerPrecision) -> str:
    """Which of accumulation, a lower precision and both is faster than the full batch on this machine."""
    reference = comparison.measured(REFERENCE)
    lower = comparison.measured(f"{REFERENCE}-{precision}")
    if reference is None or lower is None:
        return ""
    ways = {
        "accumulation": comparison.measured("gradfold") or comparison.measured(BATCH_NORM),
        precision: lower,
        "both": comparison.measured(f"gradfold-{precision}"),
    }
    # Times as long as the full batch, whole and backward alone.
    longer = {
        way: (reference.samples_per_s / own.samples_per_s, own.seconds.backward / reference.seconds.backward)
        for way, own in ways.items()
        if own is not None
    }
    (first, (whole, backward)), *others = longer.items()
    words = (
        f"On this machine {first} takes {whole:.2f} times as long as {REFERENCE} (its backward {backward:.2f} times)"
    )
    words += "".join(f", {way} {whole:.2f} ({backward:.2f})" for way, (whole, backward) in others)
    noise = _SAME_WHERE_BUSY if _contention(comparison) else _SAME
    best = min(whole for whole, _ in longer.values())
    if best >= 1 - noise:
        return f"{words}: none is faster by more than noise ({100 * noise:.0f} %)."
    alike = [way for way, (whole, _) in longer.items() if whole <= best / (1 - noise)]
    return f"{words}: what pays is {' or '.join(alike)}."


def _held_out(row: Row, comparison: Comparison) -> str:
    """The metrics of an arm beside those of the full batch."""
    own, other = row.measured, comparison.measured(REFERENCE)
    if own is None or other is None:
        return ""
    scores = [
        f"{name} {metric(name, value)} where {REFERENCE} has {metric(name, other.metrics[name])}"
        for name, value in own.metrics.items()
        if name in other.metrics
    ]
    return f"Held out: {', '.join(scores)}." if scores else ""


def _of_plain_loop(row: Row, comparison: Comparison) -> str:
    last = row.deviations.last_window_float64
    sizes = comparison.sizes
    words = _gradient(row, comparison)
    if last.value is not None and not is_rounding(last, FLOAT64_ROUNDING):
        n = sizes.num_micro_batches
        left = -(-sizes.last_window // (sizes.micro_batch_size * sizes.num_ranks))
        if left == n:
            fault = "its micro-batches count the same though one is smaller"
        else:
            fault = f"it divides by {n} though only {left} micro-batch{'es are' if left > 1 else ' is'} left"
        words += f" In the last window of an epoch ({sizes.last_window} samples) {fault}: that gradient is "
        words += f"{share(last.value)} off."
    return words.strip()


def _of_small_batch(row: Row, comparison: Comparison) -> str:
    reference = comparison.measured(REFERENCE)
    if reference is None or row.measured is None:
        return ""
    times = row.measured.num_updates / reference.num_updates
    return f"{row.arm} makes {times:.1f} times as many updates; {_weights(row, 'its')}".rstrip("; ") + "."


def _gradient(row: Row, comparison: Comparison) -> str:
    """How close the first gradient and the final weights are."""
    in_float64 = row.deviations.gradient_float64
    in_float32 = row.deviations.gradient_float32
    error, precision, bound = (
        (in_float32, "float32", FLOAT32_ROUNDING)
        if in_float64.value is None
        else (in_float64, "float64", FLOAT64_ROUNDING)
    )
    if error.value is None:
        return ""
    if error.value == 0.0:
        words = f"{row.arm}: the first gradient is {_whose(row)} exactly (in {precision})"
    elif is_rounding(error, bound):
        words = f"{row.arm}: the first gradient is {_whose(row)} to rounding ({share(error.value)} in {precision})"
    else:
        words = f"{row.arm}: the first gradient is {share(error.value)} off {_whose(row)} ({precision})"
    return f"{words}; {_weights(row, 'the')}".rstrip("; ") + "."


def _weights(row: Row, article: str) -> str:
    weights = row.deviations.weights.value
    if weights is None:
        return ""
    if weights == 0.0:
        return f"{article} final weights are {_whose(row)} exactly"
    return f"{article} final weights end {share(weights)} away from {_whose(row)}"


def _full_batch(row: Row) -> str:
    """What the arm is measured against, in words."""
    return "the full batch" if row.reference == REFERENCE else row.reference


def _whose(row: Row) -> str:
    return f"{_full_batch(row)}'s"


def _cost(row: Row, comparison: Comparison) -> str:
    """Memory and time against the full batch of the same model."""
    own, reference = row.measured, comparison.measured(row.reference)
    if own is None or reference is None:
        return ""
    rise, full = own.memory.rise_bytes, reference.memory.rise_bytes
    noise = 0 if own.device == "cuda" else _PROCESS_NOISE_BYTES
    if abs(rise - full) <= max(_SAME * full, noise):
        memory = f"about the same memory as {_full_batch(row)} ({written(rise)} against {written(full)})"
    else:
        memory = f"{written(rise)} of memory where {_full_batch(row)} took {written(full)}"
    pace = own.samples_per_s / reference.samples_per_s
    speed = "at about the same speed" if abs(pace - 1) <= _SAME else f"at {pace:.2f} times its speed"
    return f"Training took {memory}, {speed}."


def _growth(comparison: Comparison) -> str:
    """What to make of weights that differ although gradients agree to rounding."""
    control = comparison.row(CONTROL)
    if control is not None and control.deviations.weights.value is not None:
        return (
            f"Rounding alone ({CONTROL}) carries the weights {share(control.deviations.weights.value)} away: what is "
            "not farther away is the same training."
        )
    parted = [
        row.arm
        for row in comparison.rows
        if row.arm in ("gradfold", "group-norm", EXACT_BATCH_NORM)
        and (row.deviations.weights.value or 0.0) >= _NOTICEABLE
        and is_rounding(row.deviations.gradient_float64, FLOAT64_ROUNDING)
    ]
    if not parted:
        return ""
    words = "Weights may part although gradients agree: rounding grows from update to update."
    if "gradfold" in parted:
        words += f" --arms {REFERENCE},gradfold,{CONTROL} shows how far it goes by itself."
    return words


def _missing_references(comparison: Comparison) -> list[str]:
    """What could not be compared since the full batch of its model is not there."""
    compared: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.measured is not None and not row.is_reference and comparison.measured(row.reference) is None:
            compared.setdefault(row.reference, []).append(row.arm)
    return [
        f"Without {reference} there is no reference: gradients and weights of {', '.join(arms)} are not compared."
        for reference, arms in compared.items()
    ]


def _contention(comparison: Comparison) -> str:
    """A warning where the arms had to share their cores."""
    others, cores = comparison.machine.get("cores_busy_with_other_programs"), comparison.machine.get("cores")
    threads = max((row.measured.num_threads for row in comparison.rows if row.measured is not None), default=0)
    if not others or not cores or others < _BUSY or others + threads < cores + _BUSY:
        return ""
    return (
        f"Do not trust the times: other programs kept up to {others:.1f} of {cores} cores busy, and each arm ran "
        f"{threads} thread{'s' * (threads > 1)}."
    )


def is_rounding(deviation: Deviation, bound: float) -> bool:
    """Whether a deviation is there and no more than rounding."""
    return deviation.value is not None and deviation.value <= bound


_WORDS = {
    CONTROL: lambda row, comparison: "",
    GROUP_NORM_REFERENCE: _of_group_norm_reference,
    "gradfold": _of_gradfold,
    TOKEN_BUDGET: _of_token_budget,
    BATCH_NORM: _of_gradfold,
    EXACT_BATCH_NORM: _of_gradfold,
    "group-norm": _of_group_norm,
    **{name: _of_lower_precision for name, arm in ARMS.items() if arm.precision is not None},
    "plain-loop": _of_plain_loop,
    "small-batch": _of_small_batch,
}
