"""The causes of a wrong gradient, found by experiment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from gradfold.batch.split import cut_range
from gradfold.batchnorm.policy import batch_statistics_layers
from gradfold.engine.backward import BackPropagation
from gradfold.engine.window import Context, PassListener, Window
from gradfold.errors import BatchError, BatchNormError, NonFiniteLossError, NotDecomposableError, PaddingError
from gradfold.messages import join_names
from gradfold.packing.token_batcher import TokenBatcher
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.comparison import NOISE
from gradfold.self_check.diagnosis import PADDING_TEXT
from gradfold.self_check.experiment import CannotKnowError, SplitExperiment, UndecidedError
from gradfold.self_check.look import check_split
from gradfold.self_check.probe_run import ProbeRun
from gradfold.self_check.self_check import without_warnings
from gradfold.state.attributes import ModuleAttributes
from gradfold.verification.comparison import SizeComparison, compare
from gradfold.verification.locate import find_first_coupled_layer
from gradfold.verification.reference import relative_error
from gradfold.verification.runs import Attempt, WholeRun, run_whole
from gradfold.verification.setup import Setup, Size
from gradfold.verification.verdict import Cause, number


def before_comparing(setup: Setup, whole: WholeRun) -> Cause | None:
    """What makes any comparison pointless."""
    is_finite = all(bool(one.isfinite().all()) for one in whole.gradients.values())
    if not math.isfinite(whole.loss) or not is_finite:
        return Cause(
            "non_finite",
            f"the {'gradient' if math.isfinite(whole.loss) else 'loss'} of the whole batch is not finite, with no "
            "accumulation at all. Look for means over nothing, log(0), overflow, or a row of the data that is not "
            "finite.",
        )
    users = set(map(id, setup.probe.parameters))
    if any(id(leaf) in users for leaf in whole.leaves):
        return Cause(
            "other_model",
            "loss_fn uses another model than the one passed to it: write loss_fn(model, batch) and use that model.",
        )
    if not whole.gradients:
        return Cause(
            "other_model",
            "the loss reaches no parameter of the model that is passed to loss_fn, though it has a gradient. Pass the "
            "module that loss_fn trains as the accumulator's model, and use it: loss_fn(model, batch).",
        )
    if whole.drew == "collate":
        return _inconclusive(
            "collate draws random numbers, other ones for the whole batch than for its parts",
            "Draw them in the data set, or verify with a collate that draws none.",
        )
    if whole.drew is not None:
        found = f"loss_fn draws from {whole.drew}, whose numbers cannot be handed to rows"
        return _inconclusive(found, "Draw with torch, or in the loader.")
    return None


def _inconclusive(found: str, advice: str, name: str = "random") -> Cause:
    return Cause(name, f"{found}, so the result is inconclusive. {advice}")


def find_causes(comparison: SizeComparison, needed: Sequence[Size | None], notes: list[str]) -> list[Cause]:
    """Why the law does not hold, if it does not; sizes that are not needed may fail."""
    if not comparison.holds:
        return [after_comparing(comparison)]
    failed = [attempt for attempt in comparison.attempts if math.isnan(attempt.row.error)]
    for attempt in failed:
        if attempt.size in needed:
            return [failing(attempt)]
    if failed:
        sizes = join_names([str(attempt.row.size) for attempt in failed])
        notes.append(f"micro-batches of {sizes} do not run; the others say nothing about them.")
    return []


def after_comparing(comparison: SizeComparison) -> Cause:
    """Why the comparison failed."""
    noise = comparison.noise
    if math.isnan(noise.error):
        return Cause(
            "random",
            "two runs of the whole batch, from the same weights, buffers and random state, differ by "
            f"{number(comparison.repeat)}: loss_fn keeps state (a counter, a list) or draws random numbers from "
            "elsewhere, so the result is inconclusive.",
        )
    if comparison.unknown is not None:
        return _inconclusive(
            f"the random numbers of {comparison.unknown} cannot be handed to rows",
            "Draw them in the loader, one per row; or verify with a model that draws none (model.eval()).",
        )
    if not comparison.compared:
        return failing(comparison.attempts[-1])
    worst = comparison.compared[0]
    if worst.row.error <= NOISE * noise.error:
        found = f"a few rounding errors in every parameter move the gradient by {number(noise.error)}"
        return _inconclusive(found, "Verify in float64, or with other weights and data.", "rounding")
    return _split_in_two(comparison.setup, worst)


def batch_norm_layers(comparison: SizeComparison) -> dict[str, nn.Module]:
    """The layers that see micro-batches instead of the batch, refused or accepted."""
    is_refused = any(isinstance(attempt.failure, BatchNormError) for attempt in comparison.attempts)
    if not is_refused and comparison.setup.batch_norm != "per_micro_batch":
        return {}
    return dict(batch_statistics_layers(comparison.setup.fresh_model()))


def batch_norm(
    layers: dict[str, nn.Module], is_accepted: bool, setup: Setup, sizes: Sequence[Size], notes: list[str]
) -> list[Cause]:
    """BatchNorm modules that see micro-batches, and what else is wrong when they use their running statistics."""
    how = (
        'You accepted that with batch_norm="per_micro_batch", and the errors below show how far it goes.'
        if is_accepted
        else 'The errors below are what batch_norm="per_micro_batch" would accept.'
    )
    found = Cause(
        "batch_norm",
        f"{'1 layer normalizes' if len(layers) == 1 else f'{len(layers)} layers normalize'} by the mean and variance "
        f"of the micro-batch, not of the batch: {join_names(list(map(repr, layers)))}. {how} Write "
        'batch_norm="exact" to normalize by the whole batch, gradfold.convert_batch_norm(model) for GroupNorm, or '
        "layer.eval() to use the running statistics.",
        layers=tuple(layers),
    )
    if any(getattr(layer, "running_mean", None) is None for layer in layers.values()):
        return [found]
    # Of the sizes those with the fewest micro-batches: this is but a note.
    comparison = compare(replace(setup, frozen=setup.frozen | layers.keys()), sizes[-2:])
    if not comparison.holds:
        return [found, after_comparing(comparison)]
    notes.append("with those layers in evaluation mode the law holds, so nothing else is wrong.")
    return [found]


def failing(attempt: Attempt) -> Cause:
    """The user's own functions fail on micro-batches of this size."""
    failure = f"{type(attempt.failure).__name__}: {attempt.failure}"
    size = f"{attempt.row.size} {attempt.row.unit}"
    return Cause("fails", f"loss_fn takes the whole batch, but not micro-batches of {size}: {failure}")


def _split_in_two(setup: Setup, worst: Attempt) -> Cause:
    """Split the batch in two in several ways, until the gradients of whole and parts say what is wrong."""
    if isinstance(worst.size, TokenBudget):
        cause = _padding(setup, worst.size)
        if cause is not None:
            return cause
    reason: Exception | None = None
    for first in _split_points(setup.num_rows, worst):
        try:
            _check_split_at(setup, first)
        except NotDecomposableError as error:
            return _cause_of(setup, error)
        except UndecidedError:
            continue
        except (CannotKnowError, BatchError) as error:
            reason = reason or error
    failure = worst.failure
    if isinstance(failure, NonFiniteLossError):
        return Cause(
            "empty",
            f"with micro-batches of {worst.row.size}, {failure} The whole batch's loss is finite, so this is a "
            "mean over nothing: pass as weight= the number of things that it averages; then a part without any is left "
            "out.",
            failure.term,
        )
    moved = _find_hidden_state(setup)
    if moved is not None:
        return Cause(
            "state",
            f"the model keeps state outside of its buffers that forward passes change{moved}, so a part sees another "
            "state than the whole. Change it once per update, outside of the forward pass.",
        )
    return Cause(
        "unknown",
        "the parts do not make up the whole, and no experiment tells why. Look for what depends on how many rows there "
        "are, or on the order in which parts are run." + (f" One experiment failed: {reason}." if reason else ""),
    )


def _padding(setup: Setup, budget: TokenBudget) -> Cause | None:
    """Whether rows have another gradient with the padding of the whole batch."""
    batcher, context = TokenBatcher(budget, setup.collate), Context(setup.fresh_model())
    weight, back_propagate = setup.accumulator.weight, BackPropagation()
    try:
        with without_warnings(), setup.running():
            parts = batcher.split(setup.batch())
            window = Window(context, setup.loss_fn, parts, weight, back_propagate, PassListener())
            batcher.check_padding(window, setup.loss_fn, can_check=True)
    except (PaddingError, BatchError) as error:
        layer = getattr(error, "layer", None)
        return Cause("padding", str(error), layers=() if layer is None else (layer,))
    return None


def _split_points(num_rows: int, worst: Attempt) -> Iterator[int]:
    """Where to split: unequal parts, which show weights that are wrong; then where micro-batches end, which do run."""
    yield max(1, round(0.3 * num_rows))
    ranges = cut_range(num_rows, num_rows // 2 if isinstance(worst.size, TokenBudget) else worst.size)
    yield ranges[0].stop
    yield ranges[-1].start


def _check_split_at(setup: Setup, first: int) -> None:
    model = setup.fresh_model()
    rows = range(first), range(first, setup.num_rows)
    with without_warnings(), setup.running():
        whole = setup.whole_batch()
        recollated = list(map(setup.collated, rows)) if setup.collate else None
        with ProbeRun(model, setup.strategy.probe_loss, BackPropagation()) as probe:
            check_split(SplitExperiment(probe, whole, rows, setup.accumulator.weight, recollated))


def _cause_of(setup: Setup, error: NotDecomposableError) -> Cause:
    if PADDING_TEXT not in str(error):  # which says more
        error = setup.strategy.explain(error)
    text = str(error).replace("of a micro-batch", "of the batch")  # the whole batch was checked as one
    layer: str | None = None
    if error.cause in ("coupled", "batch_norm") and PADDING_TEXT not in text:
        where, layer = find_first_coupled_layer(setup)
        text = f"{text.rstrip('.')}.\n{where}" if where else text
    return Cause(error.cause, text, error.term, error.weight, layers=() if layer is None else (layer,))


def _find_hidden_state(setup: Setup) -> str | None:
    """The attributes that a run changes, as " (module.name)", if a second run of the same copy has another gradient."""
    model = setup.fresh_model()
    attributes = ModuleAttributes(model.modules())
    first, second = run_whole(setup, model), run_whole(setup, model)
    if relative_error(second.gradients, first.gradients) < 1e-9:
        return None
    names = attributes.changed(model)
    return f" ({join_names(names)})" if names else ""
