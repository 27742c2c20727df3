"""The verdict: what the numbers of a comparison show, in plain words. Every word of it follows from the results."""

from __future__ import annotations

from gradfold.compare.arms import CONTROL, REFERENCE
from gradfold.compare.readable import share, size
from gradfold.compare.results import Comparison, Deviation, Row

__all__: list[str] = []

FLOAT64_ROUNDING = 1e-12
FLOAT32_ROUNDING = 2e-6
_NOTICEABLE = 1e-3
_PROCESS_NOISE_BYTES = 10 * 2**20  # how far high-water marks of equal runs were seen apart
_BUSY = 0.25
_SAME = 0.1  # costs closer than this are called about the same


def verdict(comparison: Comparison) -> list[str]:
    """One or two sentences for each arm, in the order of the rows."""
    sentences = []
    for row in comparison.rows:
        if row.measured is None:
            sentences.append(f"{row.arm} failed: {row.failure}.")
        elif row.arm != REFERENCE:
            sentences.append(_WORDS.get(row.arm, _gradient)(row, comparison))
    sentences += [_growth(comparison), _contention(comparison)]
    if comparison.measured(REFERENCE) is None:
        sentences.append(f"Without {REFERENCE} there is no reference: gradients and weights are not compared.")
    return [sentence for sentence in sentences if sentence]


def _of_gradfold(row: Row, comparison: Comparison) -> str:
    words = _gradient(row, comparison)
    if words and not is_rounding(row.deviations.gradient_float64, FLOAT64_ROUNDING):
        if comparison.workload.batch_norm == "per_micro_batch":
            words += (
                ' BatchNorm normalises by micro-batch here, as the workload asks for (batch_norm="per_micro_batch").'
            )
        elif row.deviations.gradient_float64.value is not None:
            words += " That is more than rounding: dropout and other random layers draw differently in micro-batches."
    return " ".join(filter(None, [words, _cost(row, comparison)]))


def _of_plain_loop(row: Row, comparison: Comparison) -> str:
    last = row.deviations.last_window_float64
    sizes = comparison.sizes
    words = _gradient(row, comparison)
    if last.value is not None and not is_rounding(last, FLOAT64_ROUNDING):
        n = sizes.global_batch_size // sizes.micro_batch_size
        left = -(-sizes.last_window // sizes.micro_batch_size)
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
        words = f"{row.arm}: the first gradient is the full batch's exactly (in {precision})"
    elif is_rounding(error, bound):
        words = f"{row.arm}: the first gradient is the full batch's to rounding ({share(error.value)} in {precision})"
    else:
        words = f"{row.arm}: the first gradient is {share(error.value)} off the full batch's ({precision})"
    return f"{words}; {_weights(row, 'the')}".rstrip("; ") + "."


def _weights(row: Row, article: str) -> str:
    weights = row.deviations.weights.value
    if weights is None:
        return ""
    if weights == 0.0:
        return f"{article} final weights are the full batch's exactly"
    return f"{article} final weights end {share(weights)} away from the full batch's"


def _cost(row: Row, comparison: Comparison) -> str:
    """Memory and time against the full batch."""
    own, reference = row.measured, comparison.measured(REFERENCE)
    if own is None or reference is None:
        return ""
    rise, full = own.memory.rise_bytes, reference.memory.rise_bytes
    noise = 0 if own.device == "cuda" else _PROCESS_NOISE_BYTES
    if abs(rise - full) <= max(_SAME * full, noise):
        memory = f"about the same memory as the full batch ({size(rise)} against {size(full)})"
    else:
        memory = f"{size(rise)} of memory where the full batch took {size(full)}"
    pace = own.samples_per_s / reference.samples_per_s
    speed = "at about the same speed" if abs(pace - 1) <= _SAME else f"at {pace:.2f} times its speed"
    return f"Training took {memory}, {speed}."


def _growth(comparison: Comparison) -> str:
    """What to make of weights that differ although gradients agree to rounding."""
    control, row = comparison.row(CONTROL), comparison.row("gradfold")
    if control is not None and control.deviations.weights.value is not None:
        return (
            f"Rounding alone ({CONTROL}) carries the weights {share(control.deviations.weights.value)} away: what is "
            "not farther away is the same training."
        )
    if row is None or (row.deviations.weights.value or 0.0) < _NOTICEABLE:
        return ""
    if not is_rounding(row.deviations.gradient_float64, FLOAT64_ROUNDING):
        return ""
    return (
        "Weights may part although gradients agree: rounding grows from update to update. "
        f"--arms {REFERENCE},gradfold,{CONTROL} shows how far it goes by itself."
    )


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
    "gradfold": _of_gradfold,
    "plain-loop": _of_plain_loop,
    "small-batch": _of_small_batch,
}
