"""The diagnosis: why the parts of a micro-batch do not make up the whole, as the error that says what to write."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, leaves_by_path
from gradfold.batch.rows import name_rows
from gradfold.errors import LossError, NotDecomposableError
from gradfold.messages import join_names
from gradfold.self_check.comparison import NOISE, PROOF, GradientComparison, Gradients
from gradfold.self_check.denominators import fitting_denominators
from gradfold.self_check.experiment import CannotKnowError, SplitExperiment, SplitResult, UndecidedError
from gradfold.self_check.probe_run import ProbeResult

_IGNORED = (-100, -1, 0, 255)  # labels that are commonly ignored; -100 is torch's own
_LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
_CLOSE = 2e-3  # of shares

_FACTORS = (0.3, 0.7)  # of grad_outputs, which a gradient follows where the backward pass is linear in them


def refuse_empty_part(experiment: SplitExperiment, result: SplitResult) -> None:
    """Raise NotDecomposableError where a part is a mean over nothing, though the whole is finite."""
    for index, part in enumerate(result.parts):
        for term, loss in part.losses.items():
            if not experiment.shares_in_window(index)(term) or math.isfinite(float(loss)):
                continue
            weight = _weight_for(experiment, float(index))
            raise NotDecomposableError(
                f"{name_term(term)} of {name_rows(experiment.rows[index])} of a micro-batch is {float(loss)}, though "
                "that of the whole is finite: a mean over nothing. Pass as weight= the number of things that it "
                f"averages; then a part without any is left out: weight={weight or '...'}.",
                *("empty", term, weight),
            )


def diagnose(experiment: SplitExperiment, result: SplitResult) -> NotDecomposableError:
    """Why parts differ from the whole by more than `PROOF` tolerances, once nothing but the loss explains that.

    Raises:
        UndecidedError: rounding may explain it.
        CannotKnowError: randomness, hidden state or the weights explain it.
    """
    comparison = result.comparison
    suspicious = comparison.errors > PROOF * comparison.tolerance
    again = comparison.differences(experiment.record_whole().gradients)
    if bool((again > comparison.errors / 4)[suspicious].any()):
        raise CannotKnowError(
            "two runs over the same rows gave different gradients: loss_fn keeps state outside of buffers, or has "
            "random numbers of its own"
        )
    runs: list[Gradients] = [experiment.record_whole(random_seed=random_seed).gradients for random_seed in range(4)]
    noise = torch.stack(list(map(comparison.differences, runs))).amax(0)  # what rounding the parameters moves
    scaled = {factor: experiment.record_whole(factor=factor).gradients for factor in _FACTORS}
    unscaled = comparison.unscaled(scaled, NOISE * noise)
    if unscaled is not None:
        return _ignores_grad_output(experiment.seen_or_first(result.whole.losses), unscaled)
    for factor, gradients in scaled.items():  # and what rounding the grad_outputs moves, which small types lose
        rescaled = [None if gradient is None else gradient / factor for gradient in gradients]
        noise = torch.maximum(noise, comparison.differences(rescaled))
    if not bool((comparison.errors > NOISE * noise)[suspicious].any()):
        raise UndecidedError(f"the parts were {comparison.error:.1e} off, which rounding may explain")
    if experiment.recorded.values:
        shared = experiment.run_with_shared_randomness()
        if not shared.error > PROOF * shared.tolerance:
            raise CannotKnowError("random numbers are drawn for rows in another order than they came")
    _check_weights(experiment, result.whole)
    terms = list(result.whole.losses)
    for term in terms if len(terms) > 1 else ():
        try:
            whole = experiment.record_whole(only=term)
            of_term = experiment.compare(whole, experiment.run_parts(whole, only=term), term)
        except (LossError, UndecidedError):  # a term without a gradient
            continue
        if of_term.is_proof:
            return _find_cause(experiment, of_term, term)
    return _find_cause(experiment, comparison, experiment.seen_or_first(terms))


def refuse_left_state(experiment: SplitExperiment, result: SplitResult) -> None:
    """Raise NotDecomposableError where a pass depends on what the one before it has left on the model."""
    names = experiment.probe.snapshot.changed_attributes()
    if not names:
        return
    first, second = experiment.run_in_turn(1, 1)
    comparison = result.comparison
    if bool((comparison.differences(second.gradients, first.gradients) > PROOF * comparison.tolerance).any()):
        text = _TEXTS["state"].format(off="one after the other", state=join_names(names, 3))
        term = experiment.seen_or_first(result.whole.losses)
        raise NotDecomposableError(f"{name_term(term)} {text}", "state", term)


def _ignores_grad_output(term: str, unscaled: float) -> NotDecomposableError:
    part = "" if 0.99 < unscaled < 1.01 else f" in a part of the gradient ({unscaled:.1%} of it)"
    return NotDecomposableError(
        f"{name_term(term)} has a backward pass that ignores its incoming gradient (grad_output){part}, which carries "
        "the weight of the micro-batch. Multiply by grad_output in its backward(). An auxiliary loss that is attached "
        'to a tensor, or back-propagated inside loss_fn, belongs in a term of its own: return {"loss": loss, "aux": '
        "aux}.",
        *("grad_output", term),
    )


def _check_weights(experiment: SplitExperiment, whole: ProbeResult) -> None:
    """Raise CannotKnowError where the weights of the parts do not sum to that of the whole."""
    for name in whole.losses:
        declared, parts = experiment.whole_weights.of_term(name).total, experiment.part_weights.of_term(name).total
        if not math.isclose(declared, parts, rel_tol=1e-6):
            raise CannotKnowError(
                f"weight= returns {declared:g} for a micro-batch and {parts:g} for its two parts together, so it does "
                "not count what the loss is a mean over"
            )


def _find_cause(experiment: SplitExperiment, comparison: GradientComparison, term: str) -> NotDecomposableError:
    cause, fitting = comparison.explain()
    if cause != "sum" and (fitting is None or _weight_for(experiment, fitting) is None):
        denominators = fitting_denominators(experiment, term)
        if denominators:
            return _several_means(term, denominators)
    if fitting is not None:
        refuse = _mean_that_adds_up if cause == "mean" else _other_weights
        return refuse(experiment, term, comparison.share, fitting)
    state: list[str] = []
    if cause == "coupled":
        if experiment.recorded.uses_batch_norm:
            cause = "batch_norm"
        elif state := _state_that_explains(experiment, comparison, term):
            cause = "state"
        elif experiment.fits_when_padded_alike(term):
            return NotDecomposableError(f"{name_term(term)} {PADDING_TEXT}", cause, term)
    text = _TEXTS[cause].format(off=f"{comparison.error:.1%} off", state=join_names(state, 3) if state else "")
    return NotDecomposableError(f"{name_term(term)} {text}", cause, term)


def _state_that_explains(experiment: SplitExperiment, comparison: GradientComparison, term: str) -> list[str]:
    """The buffers, attributes and frozen parameters that forward passes change, if the loss depends on them.

    It does where the parts fit if both begin with the same values, or where the whole has another gradient after a
    run of its first part.
    """
    whole, snapshot = experiment.record_whole(), experiment.probe.snapshot
    state = [*snapshot.changed_buffers(), *snapshot.changed_attributes(), *snapshot.moved_parameters()]
    if not state:
        return []
    if experiment.compare(whole, experiment.run_parts(whole, rewind_between=True), term).fits:
        return state
    _, after_part = experiment.run_in_turn(0, 2)
    after = comparison.differences(after_part.gradients)
    return state if bool((after > PROOF * comparison.tolerance).any()) else []


SUM_TEXT = (
    'is a sum over the rows, not a mean, so its size depends on how the batch is split. Write weight="sum", with which '
    "the losses of micro-batches add up; or return the mean: reduction='mean', or divide by the number of things "
    "summed and pass that number as weight=."
)
_MEAN_TEXT = (
    'is a mean over the rows of a micro-batch, and with weight="sum" the losses of micro-batches add up, so its size '
    "depends on how the batch is split. Write weight={weight}; or return what the rows add to the loss of the whole "
    "batch: a sum, also divided by a count of the whole batch (num_items_in_batch)."
)
PADDING_TEXT = (
    "depends on the padding of the batch: padded alike, the parts make up the whole, but collate pads a micro-batch to "
    "another length than the batch. Mask the padding in the model and in the loss, or pad every sample to one length."
)

# What is wrong, how far it is off, and what to write; after "the loss" or "the loss term 'name'".
_TEXTS = {
    "sum": SUM_TEXT,
    "batch_norm": "normalizes by the statistics of the batch (functional batch_norm with training=True), and a "
    'micro-batch has other ones ({off}). Write batch_norm="exact" to normalize by the whole batch, or use group_norm '
    "or training=False.",
    "state": "depends on what forward passes change ({state}), so a part sees other values than the whole ({off}). "
    "Freeze it while gradients accumulate, or change it once per update.",
    "coupled": "makes the samples of a batch depend on each other (in-batch negatives, statistics over the batch, rows "
    "that are mixed): no weighting of two parts gives the gradient of the whole ({off}). Write the loss in two "
    "functions, what each row gives and what is made of all rows: loss_fn = gradfold.TwoPhaseLoss(statistic, loss), "
    "with statistic(model, micro_batch) -> tensors and loss(model, tensors of the whole batch); or run the batch whole "
    "(micro_batch_size=None).",
}


def _other_weights(experiment: SplitExperiment, term: str, declared: float, fitting: float) -> NotDecomposableError:
    """The first part makes up `fitting` of the gradient, where its weight says `declared`."""
    weight = _weight_for(experiment, fitting)
    fix = (
        "Pass as weight= the denominator of the mean, as a function of the micro-batch: mask.sum(), "
        "class_weights[labels].sum(), or the like. If the loss compares rows (a maximum, logsumexp, a scale that it "
        "computes), no weight helps: write it as gradfold.TwoPhaseLoss(statistic, loss), or run the batch whole "
        "(micro_batch_size=None)."
    )
    if weight is not None:
        named = f"{{..., {term!r}: {weight}}}" if isinstance(experiment.weight, Mapping) else weight
        fix = f"Write weight={named}."
    return NotDecomposableError(
        f"{name_term(term)} is a mean over something else than weight= says: {name_rows(experiment.rows[0])} of a "
        f"micro-batch of {experiment.num_rows} make up {fitting:.2%} of its gradient, and {declared:.2%} by their "
        f"weight. {fix}",
        *("weights", term, weight),
    )


def _several_means(term: str, denominators: Sequence[float]) -> NotDecomposableError:
    """A sum of means over things of different numbers."""
    numbers = [f"{one:g}" for one in denominators]
    return NotDecomposableError(
        f"{name_term(term)} is a sum of {len(numbers)} means, each with a denominator of its own "
        f"({join_names(numbers, 4)}), so no one weight fits. Return a dict of terms instead of their sum, and give "
        'each its weight: loss_fn returns {"a": ..., "b": ...}, and weight={"a": ..., "b": ...}.',
        *("weights", term),
    )


def _mean_that_adds_up(experiment: SplitExperiment, term: str, _: float, fitting: float) -> NotDecomposableError:
    """The first part makes up `fitting` of the gradient, where both should add up to it."""
    weight = _weight_for(experiment, fitting)
    named = weight or "the denominator of the mean, as a function of the micro-batch"
    if isinstance(experiment.weight, Mapping):
        named = f"{{..., {term!r}: {named}}}"
    return NotDecomposableError(f"{name_term(term)} {mean_text(named)}", "mean", term, weight)


def mean_text(weight: str) -> str:
    """What is wrong with a mean whose weight is "sum", after "the loss"; `weight`: the one that fits, as Python."""
    return _MEAN_TEXT.format(weight=weight)


def _weight_for(experiment: SplitExperiment, share: float) -> str | None:
    first, second = experiment.rows
    return find_weight(experiment.parts[0], experiment.parts[1], (len(first), len(second)), share)


def name_term(term: str) -> str:
    """A loss term, for a message."""
    return "the loss" if term == "loss" else f"the loss term {term!r}"


def find_weight(first: Batch, second: Batch, rows: tuple[int, int], share: float) -> str | None:
    """The `weight=` under which `first` makes up `share` of both parts together, as Python; None if nothing fits."""
    found = [(rows[0] / sum(rows), '"samples"')]
    others = dict(_candidates(second))
    for text, count in _candidates(first):
        total = float(count()) + float(others[text]()) if text in others else 0.0
        if total:
            found.append((float(count()) / total, text))
    # The first of those that are equally close: samples are close to tokens where rows are nearly of one length.
    own, text = min(found, key=lambda one: round(abs(one[0] - share), 4))
    return text if abs(own - share) < _CLOSE else None


def _candidates(batch: Batch) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The likeliest first: labels, then masks and other numbers per row."""
    leaves = [
        (path, leaf)
        for path, leaf in leaves_by_path(batch)
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.layout is torch.strided and not leaf.is_complex()
    ]
    labels = [(path, leaf) for path, leaf in leaves if leaf.dtype in _LABEL_TYPES]
    shifted = [(path, leaf[..., 1:]) for path, leaf in labels if leaf.dim() > 1]
    for ignored in _IGNORED:
        of_index = "" if ignored == -100 else f", ignore_index={ignored}"
        for shift, counted in (("", labels), (", shift=True", shifted)):
            for path, leaf in counted:
                yield f"gradfold.token_count({_where(path)}{of_index}{shift})", leaf.ne(ignored).sum
    for path, leaf in leaves:
        yield f"lambda batch: batch{path}.sum()", leaf.sum
        yield f"lambda batch: (batch{path} > 0).sum()", leaf.gt(0).sum


def _where(path: str) -> str:
    """A key or index as the user would write it, where the path is no more than that."""
    try:
        key = ast.literal_eval(path[1:-1]) if path.startswith("[") and path.endswith("]") else None
    except (ValueError, SyntaxError):
        key = None
    if isinstance(key, str):
        return repr(key) if '"' in key or "\\" in key else f'"{key}"'
    return str(key) if isinstance(key, int) else f"lambda batch: batch{path}"
