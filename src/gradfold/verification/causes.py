"""The causes of a wrong gradient, found by experiment.

A hidden state: what a model keeps outside of its buffers, and changes whenever it runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

from torch import nn

from gradfold.batch.nesting import Batch, cut_rows
from gradfold.batch.rows import num_rows
from gradfold.batch.split import MicroBatch, cut_range
from gradfold.engine.backward import BackPropagation
from gradfold.errors import BatchError, NonFiniteLossError, NotDecomposableError, PaddingError
from gradfold.packing.padding_check import PaddingCheck
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.experiment import CannotKnowError, SplitCase, SplitExperiment, UndecidedError
from gradfold.self_check.trial import Trial
from gradfold.twophase.loss import TwoPhaseLoss, explain
from gradfold.verification.comparison import NoiseAllowance, SizeComparison, measure
from gradfold.verification.locate import find_first_coupled_layer
from gradfold.verification.reference import relative_error
from gradfold.verification.runs import Attempt, WholeRun, run_whole
from gradfold.verification.setup import Setup
from gradfold.verification.verdict import Cause, listed, number
from gradfold.weights import weigh

__all__: list[str] = []

_PLAIN = (bool, int, float, str, list, dict, tuple, set)


def find_hidden_state(specimen: Setup) -> str | None:
    """The attributes that one run of a copy changed, as " (module.name)", if its second run gives another gradient."""
    model = specimen.fresh_model()
    first, second = run_whole(specimen, model), run_whole(specimen, model)
    if relative_error(second.gradients, first.gradients) < 1e-9:
        return None
    names = _changed(specimen.fresh_model(), model)
    return f" ({listed(names)})" if names else ""


def _changed(before: nn.Module, after: nn.Module) -> list[str]:
    modules = dict(before.named_modules())
    return [
        f"{path}.{name}" if path else name
        for path, module in after.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and _differs(vars(modules[path]).get(name), value)
    ]


def _differs(one: object, other: object) -> bool:
    try:
        return bool(one != other)
    except Exception:  # tensors in a list
        return False


_UNKNOWN = (
    "the parts do not make up the whole, and no experiment tells why. Look for what depends on how many rows there "
    "are, or on the order in which parts are run."
)


def before_comparing(specimen: Setup, whole: WholeRun) -> Cause | None:
    """What makes any comparison pointless."""
    if not math.isfinite(whole.loss) or not all(bool(one.isfinite().all()) for one in whole.gradients.values()):
        what = "loss" if not math.isfinite(whole.loss) else "gradient"
        return Cause(
            "non_finite",
            f"the {what} of the whole batch is not finite, with no accumulation at all. Look for means over nothing, "
            "log(0), overflow, or a row of the data that is not finite.",
        )
    if specimen.reaches_users_model:
        return Cause(
            "other_model",
            "loss_fn uses a model of its own, not the one it is given: write loss_fn(model, batch) and use that model.",
        )
    if not whole.gradients:
        return Cause(
            "other_model",
            "the loss reaches no parameter of the model that loss_fn is given, though it has a gradient. Pass the "
            "module that loss_fn trains as the accumulator's model, and use it: loss_fn(model, batch).",
        )
    if whole.drew is not None:
        return Cause("random", _NOT_OF_ROWS[whole.drew])
    return None


_HOST = (
    "loss_fn draws from {}, whose numbers cannot be handed to rows, so it could not be proved. Draw with torch, or in "
    "the loader."
)
_NOT_OF_ROWS = {
    "collate": "collate draws random numbers, other ones for the whole batch than for its parts, so it could not be "
    "proved. Draw them in the data set, or verify with a collate that draws none.",
    "random": _HOST.format("random"),
    "numpy.random": _HOST.format("numpy.random"),
}


def after_comparing(specimen: Setup, comparison: SizeComparison, allowed: NoiseAllowance) -> Cause:
    """Why the comparison failed."""
    if not allowed.is_repeatable:
        return Cause(
            "random",
            f"two runs of the whole batch, from the same weights, buffers and random state, differ by "
            f"{number(comparison.repeat)}: loss_fn keeps state of its own (a counter, a list) or draws random numbers "
            "from elsewhere, so it could not be proved.",
        )
    if comparison.unknown is not None:
        return Cause(
            "random",
            f"the random numbers of {comparison.unknown} cannot be handed to rows, so it could not be proved. Draw "
            "them in the loader, one per row; or verify with a model that draws none (model.eval()).",
        )
    if not comparison.compared:
        return failing(comparison.attempts[-1])
    worst = comparison.compared[0]
    if allowed.may_be_noise(worst.error):
        return Cause(
            "rounding",
            f"a few rounding errors in every parameter move the gradient by {number(allowed.noise_floor)}, so it could "
            "not be proved. Verify in float64, or with other weights and data.",
        )
    return _examine(specimen, comparison, worst)


def batch_norm(layers: tuple[str, ...], is_accepted: bool) -> Cause:
    """BatchNorm modules that normalize by the statistics of a micro-batch."""
    noun = "1 layer normalizes" if len(layers) == 1 else f"{len(layers)} layers normalize"
    how = (
        'You accepted that with batch_norm="per_micro_batch", and the errors below show how far it goes.'
        if is_accepted
        else 'The errors below are what batch_norm="per_micro_batch" would accept.'
    )
    return Cause(
        "batch_norm",
        f"{noun} by the mean and variance of the micro-batch, not of the batch: {listed(list(map(repr, layers)))}. "
        f'{how} Write batch_norm="exact" to normalize by the whole batch, gradfold.convert_batch_norm(model) for '
        "GroupNorm, or layer.eval() to use the running statistics.",
        layers=layers,
    )


def failing(attempt: Attempt) -> Cause:
    """The user's own functions fail on micro-batches of this size."""
    failure = attempt.failure
    return Cause(
        "fails",
        f"loss_fn takes the whole batch, but not micro-batches of {' '.join(map(str, measure(attempt.size)))}: "
        f"{type(failure).__name__}: {failure}",
    )


def _examine(specimen: Setup, comparison: SizeComparison, worst: Attempt) -> Cause:
    """Cut the batch in two in several ways, until the gradients of whole and parts say what is wrong."""
    if isinstance(worst.size, TokenBudget):
        cause = _padding(specimen, worst.size)
        if cause is not None:
            return cause
    reason: Exception | None = None
    for first in _cuts(specimen.num_rows, worst):
        try:
            _run(specimen, first, recollate=True)
        except NotDecomposableError as error:
            return _found(specimen, first, error)
        except UndecidedError:
            continue
        except (CannotKnowError, BatchError) as error:
            reason = reason or error
    if isinstance(worst.failure, NonFiniteLossError):
        return Cause(
            "empty",
            f"with micro-batches of {measure(worst.size)[0]}, {worst.failure} The whole batch's loss is finite, so "
            "this is a mean over nothing: give weight= the number of things that it averages, and a part without any "
            "is left out.",
            term=worst.failure.term,
        )
    moved = find_hidden_state(specimen)
    if moved is not None:
        return Cause(
            "state",
            f"the model keeps state outside of its buffers that forward passes move{moved}, so that a part sees "
            "another state than the whole. Move it once per update, outside of the forward pass.",
        )
    return Cause("unknown", _UNKNOWN if reason is None else f"{_UNKNOWN} One experiment failed: {reason}.")


def _padding(specimen: Setup, budget: TokenBudget) -> Cause | None:
    """Whether rows have another gradient with the padding of the whole batch."""
    rows = specimen.padded_rows(budget)
    if rows is None:
        return None
    model, weight = specimen.fresh_model(), specimen.accumulator.weight
    device = next(model.parameters()).device
    try:
        with warnings.catch_warnings(), specimen.running():
            warnings.simplefilter("ignore")
            PaddingCheck(model, specimen.loss_fn, weight, BackPropagation(), rows, budget.padding_side, device).run()
    except PaddingError as error:
        return Cause("padding", str(error), layers=() if error.layer is None else (error.layer,))
    except BatchError as error:
        return Cause("padding", str(error))
    return None


def _cuts(num_rows: int, worst: Attempt) -> Iterator[int]:
    """Where to cut: unequal parts, which show weights that are wrong; then where micro-batches end, which do run."""
    yield max(1, round(0.3 * num_rows))
    ranges = cut_range(num_rows, num_rows // 2 if isinstance(worst.size, TokenBudget) else worst.size)
    yield ranges[0].stop
    yield ranges[-1].start


def _run(specimen: Setup, first: int, recollate: bool) -> None:
    model = specimen.fresh_model()
    with warnings.catch_warnings(), specimen.running():
        warnings.simplefilter("ignore")
        examined = _prepare(specimen, first, recollate)
        with Trial(model, specimen.examined_loss_fn, BackPropagation()) as trial:
            SplitExperiment(trial, model, examined).run()


def _prepare(specimen: Setup, first: int, recollate: bool) -> SplitCase:
    whole = specimen.whole_batch()
    rows = range(first), range(first, specimen.num_rows)
    recollated = specimen.collated(rows) if recollate else None
    try:
        num_rows(whole)
        parts = cut_rows(whole, [len(own) for own in rows])
    except (BatchError, RuntimeError):
        if recollated is None:
            raise
        parts = list(recollated)
    pair = weigh(specimen.accumulator.weight, [MicroBatch(part, own) for part, own in zip(parts, rows, strict=True)])
    total = weigh(specimen.accumulator.weight, [MicroBatch(whole, range(specimen.num_rows))])
    return SplitCase(
        whole=whole,
        parts=_two(parts),
        recollated=recollated,
        rows=rows,
        shares=lambda name: 1.0,
        part_shares=(lambda name: pair.of_term(name).parts[0], lambda name: pair.of_term(name).parts[1]),
        weights_of=lambda name: (total.of_term(name).total, pair.of_term(name).total),
        weight=specimen.accumulator.weight,
    )


def _two(parts: list[Batch]) -> tuple[Batch, Batch]:
    first, second = parts
    return first, second


def _found(specimen: Setup, first: int, error: NotDecomposableError) -> Cause:
    if isinstance(specimen.accumulator.loss_fn, TwoPhaseLoss):
        error = explain(specimen.accumulator.loss_fn, error)
    text = str(error).replace("of a micro-batch", "of the batch")  # the whole batch was examined as one
    layers: tuple[str, ...] = ()
    if error.cause in ("coupled", "batch_norm"):
        if specimen.accumulator.collate is not None and _fits(specimen, first):
            text = (
                f"the padding of the batch takes part in {_subject(error.term)}: cut after padding, the parts do make "
                "up the whole, but collate pads a micro-batch to another length than the batch. Mask the padding in "
                "the model and in the loss, or pad every sample to one length."
            )
        else:
            coupling = find_first_coupled_layer(specimen)
            if coupling is not None:
                text = f"{text.rstrip('.')}.\n{coupling.text}"
                layers = (coupling.layer,) if coupling.layer is not None else ()
    return Cause(error.cause, text, error.term, error.weight, layers)


def _fits(specimen: Setup, first: int) -> bool:
    """Whether parts that are cut from the padded batch make up the whole."""
    try:
        _run(specimen, first, recollate=False)
    except (NotDecomposableError, UndecidedError, CannotKnowError, BatchError):
        return False
    return True


def _subject(term: str) -> str:
    return "the loss" if term == "loss" else f"the loss term {term!r}"
