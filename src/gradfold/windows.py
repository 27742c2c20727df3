"""Windows over a loader of micro-batches, for an accumulator (`LoadedWindow`) or for a loop body (`LoopWindow`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar, cast, final, overload

from torch import Tensor, nn

from gradfold.batch.loaded_window import LoadedWindow, MicroBatchWindow
from gradfold.batch.nesting import contents_of
from gradfold.batch.rows import rows_of_whole
from gradfold.batch.split import MicroBatch, join_batches
from gradfold.batchnorm.per_micro_batch import WindowStatistics
from gradfold.batchnorm.policy import (
    BatchNormOption,
    batch_statistics_layers,
    check_batch_norm,
    refuse_batch_statistics,
)
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.ddp import DistributedOption, check_distributed, find_process_group, without_reductions
from gradfold.distributed.fsdp import sharded_modules
from gradfold.distributed.settings import RankSettings
from gradfold.engine.backward import BackPropagation, BackwardFn, probe
from gradfold.engine.loss_terms import LossTerms
from gradfold.engine.model_checks import check_hooks
from gradfold.engine.window import Context
from gradfold.engine.window_lock import WindowLock
from gradfold.errors import BatchError, LossError, OptionError, WeightError, WindowError
from gradfold.self_check.loop_check import LoopCheck
from gradfold.state.gradients import GradientBuffer
from gradfold.state.snapshot import refuse_inner_window
from gradfold.weights import UNNAMED, Weight, is_sum, sum_weights, weigh
from gradfold.weights import check_option as check_weight

__all__ = ["LoadedWindow", "LoopWindow", "windows"]

T = TypeVar("T")
W = TypeVar("W", bound=MicroBatchWindow[Any])

_FIRST_WINDOWS = 4  # in which a loader's micro-batches are looked at again


@final
class LoopWindow(MicroBatchWindow[T]):
    """The micro-batches of one update, for a loop body that calls `window.backward(loss)`.

    Iterate over it once. The weights of all micro-batches are known before the first, so every gradient has its exact
    weight. If the loop body fails, nothing is rolled back.

    What is checked: `zero_grad`, clipping and `step` inside the loop are errors, and so is a loss whose graph shows
    that it is a sum, or a mean over something else than `weight` counts. Losses that compare the rows of a batch, and
    state that a forward pass keeps, are not seen here; an `Accumulator` runs the loss by itself and sees them.
    """

    def __init__(
        self,
        context: Context,
        micro_batches: Sequence[T],
        weight: Weight,
        batch_norm: BatchNormOption,
        backward: BackwardFn | None,
        check: LoopCheck,
    ) -> None:
        refuse_inner_window(context.parameters)
        rows = [_count_rows(part, weight) for part in micro_batches]
        parts = zip(micro_batches, map(range, rows), strict=True)
        self._parts = join_batches([MicroBatch(*part)] for part in parts)
        self._context = context
        self._coordinator = context.coordinator
        own = sum_weights((1,) * len(rows)) if is_sum(weight) else weigh(weight, self._parts)  # rows may be unknown
        self._weights = self._coordinator.over_all_ranks(own)
        self.losses = LossTerms(self._parts, self._weights, context.device)
        self._back_propagate = BackPropagation(backward)
        is_divided = len(micro_batches) > 1 or self._coordinator.num_ranks > 1
        layers = batch_statistics_layers(context.model) if is_divided else {}
        if batch_norm is None and layers:
            refuse_batch_statistics(layers, max(rows), self._coordinator.count_rows(sum(rows)))
        self._statistics = WindowStatistics(layers)
        self._current: int | None = None
        self._done: set[int] = set()
        self._loss: Tensor | None = None
        self._is_started = False
        self._lock = WindowLock(context.model, context.parameters)
        self._check = check if check.begin() else None

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[T]:
        """The micro-batches, as the loader gave them.

        Raises:
            WindowError: the window was iterated before, or a micro-batch ended without `window.backward(loss)`.
        """
        if self._is_started:
            raise WindowError("this window was iterated before; one pass over a window is one update.")
        self._is_started = True
        try:
            with self._statistics:
                with self._as_one(), self._lock:
                    for index, part in enumerate(self._parts):
                        self._current = index
                        self._statistics.listen()
                        yield part.data
                        self._check_backward(index)
                        self._lock.check_parameters()
                    self._lock.check_gradients()
                if not self.losses.settle():
                    self.losses.refuse_non_finite()
                loss, _ = self.losses.close()
                self._statistics.commit()
        finally:
            self._current = None
        self._loss = loss

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the loss of the current micro-batch with its weight in the window; was `(loss/n).backward()`.

        Args:
            loss: 0-d, the mean over the micro-batch (with weight "sum": its share of the batch's loss). Several losses
                of one micro-batch: sum them first.

        Raises:
            WindowError: there is no current micro-batch, it had its backward already, or something has changed
                gradients since the last one.
            LossError: the loss is not 0-d, or does not require grad; NotDecomposableError where its graph shows a sum,
                or a mean over something else than the weight counts, or with weight "sum" a mean.
        """
        if self._current is None:
            raise WindowError(
                "window.backward(loss) belongs inside the loop over the window: for micro_batch in window: ..."
            )
        if self._current in self._done:
            raise WindowError(
                f"micro-batch {self._current} had its window.backward(loss) already; sum its losses first."
            )
        if not isinstance(loss, Tensor):
            raise LossError(f"window.backward takes the loss, one 0-d tensor; got a {type(loss).__name__}.")
        self._lock.check_gradients()
        weighed = self.losses.add(self._current, loss)
        if self._check is not None:
            self._check.check(self._parts[self._current], loss, self._weights.of_term(UNNAMED).values[self._current])
        self._done.add(self._current)
        self._statistics.pause()
        self._back_propagate(weighed)
        self._lock.close()

    @property
    def loss(self) -> Tensor:
        """The weighted mean of the losses (with weight "sum" their sum), 0-d, detached; NaN in a window of weight 0.

        Raises:
            WindowError: the loop over the window is not finished.
        """
        if self._loss is None:
            raise WindowError("window.loss is known after the loop over the window, not inside it.")
        return self._loss

    @property
    def weight(self) -> float:
        """The denominator: the sum of the weights of the micro-batches; 1 with weight "sum"."""
        return self._weights.of_term(UNNAMED).total

    @property
    def is_unfinished(self) -> bool:
        """Whether a loop over the window began and did not reach its end."""
        return self._is_started and self._loss is None

    @contextmanager
    def _as_one(self) -> Iterator[None]:
        """Each process accumulates by itself, and gradients are summed at the end."""
        if self._coordinator.num_ranks == 1:
            yield
            return
        gradients = GradientBuffer(self._context.parameters)
        try:
            gradients.open()
            with self._coordinator, without_reductions(self._context.modules):
                yield
                self._coordinator.end(self.losses, gradients)
                gradients.settle()
                self._coordinator.commit()
        except BaseException:
            gradients.put_back(self._context.model.parameters())
            raise
        gradients.add_back()

    def _check_backward(self, index: int) -> None:
        if index not in self._done and self._weights.of_term(UNNAMED).normalized[index] > 0:
            raise WindowError(
                f"micro-batch {index} of {len(self._parts)} ended without window.backward(loss), but its weight is in "
                "the denominator. To leave a micro-batch out, filter the loader or give it weight 0."
            )


@final
class Windows(Iterator[W], Generic[W]):
    """The windows of one pass over a loader; they have a `len()` where the loader has one."""

    def __init__(self, loader: Iterable[Any], num_micro_batches: int, found: Iterator[W]) -> None:
        self._loader = loader
        self._num_micro_batches = num_micro_batches
        self._found = found

    def __len__(self) -> int:
        """How many windows a whole pass has.

        Raises:
            TypeError: the loader has no `len()`.
        """
        try:
            return -(-len(cast(Sized, self._loader)) // self._num_micro_batches)
        except NotImplementedError as error:  # of a loader that knows it has none; list() asks, and takes a TypeError
            raise TypeError(f"{type(self._loader).__name__} has no len()") from error

    def __iter__(self) -> Iterator[W]:
        return self._found  # itself, so that a loop calls nothing in between

    def __next__(self) -> W:
        return next(self._found)


def _count_rows(micro_batch: object, weight: Weight) -> int:
    """The rows, where something depends on their number; else 0."""
    rows = rows_of_whole(micro_batch) if weight in ("samples", "sum") else 0
    if is_sum(weight):
        return rows or 0
    if rows is None:
        of = "batch[0]" if isinstance(micro_batch, tuple | list) else 'batch["labels"]'
        raise WeightError(
            f"the rows of a {type(micro_batch).__name__} cannot be counted. Pass weight= to windows(), "
            f"for example weight=lambda batch: len({of})."
        )
    return rows


@overload
def windows(loader: Iterable[T], num_micro_batches: int) -> Windows[LoadedWindow[T]]: ...
@overload
def windows(
    loader: Iterable[T],
    num_micro_batches: int,
    *,
    model: nn.Module,
    weight: Weight = "samples",
    batch_norm: BatchNormOption = None,
    backward: BackwardFn | None = None,
    distributed: DistributedOption = None,
) -> Windows[LoopWindow[T]]: ...
def windows(
    loader: Iterable[T],
    num_micro_batches: int,
    *,
    model: nn.Module | None = None,
    weight: Weight = "samples",
    batch_norm: BatchNormOption = None,
    backward: BackwardFn | None = None,
    distributed: DistributedOption = None,
) -> Windows[LoadedWindow[T]] | Windows[LoopWindow[T]]:
    """Group a loader of micro-batches into windows, one per update; the last may be shorter.

    The loader needs no `len()`; where it has one, so have the windows, for schedules and progress bars.

    Without `model`, a window goes to `accumulator.backward(window)`. With it, only one line of the loop body changes:

        for window in gradfold.windows(loader, 4, model=model):      # was: for i, (x, y) in enumerate(loader):
            for x, y in window:
                window.backward(criterion(model(x), y))              # was: (loss / 4).backward()
            optimizer.step()                                         # was: if (i + 1) % 4 == 0: ...
            optimizer.zero_grad()
            log(window.loss)

    Args:
        loader: yields micro-batches. Those of one window are held at once (on the host, if they are there).
        num_micro_batches: micro-batches per window.
        model: the model that the loop body runs.
        weight: with `model`: what the loss is a mean over, as for `Accumulator`; with "sum" losses add up.
        batch_norm: with `model`: None or "per_micro_batch", as for `Accumulator`.
        backward: with `model`: as for `Accumulator`.
        distributed: with `model`: as for `Accumulator`.

    Raises:
        OptionError: an argument cannot work.
        BatchError: while iterating: the loader fills the same memory again.
        WindowError: while iterating: the loop over a window was left before its end.

    >>> import gradfold
    >>> [list(window) for window in gradfold.windows(iter("abcdefg"), 3)]
    [['a', 'b', 'c'], ['d', 'e', 'f'], ['g']]
    """
    if isinstance(num_micro_batches, bool) or not isinstance(num_micro_batches, int) or num_micro_batches < 1:
        given = repr(num_micro_batches) if isinstance(num_micro_batches, int) else type(num_micro_batches).__name__
        raise OptionError(f"num_micro_batches is {given}; expected an int of at least 1: windows(loader, 4).")
    if not isinstance(loader, Iterable):
        raise OptionError(f"loader is {type(loader).__name__}; expected an iterable of micro-batches.")
    if model is None:
        if weight != "samples" or batch_norm is not None or backward is not None or distributed is not None:
            raise OptionError(
                "weight=, batch_norm=, backward= and distributed= belong to windows(..., model=model), whose windows "
                "have their own backward; without model=, pass them to the Accumulator."
            )
        return Windows(loader, num_micro_batches, _plain_windows(loader, num_micro_batches))
    check_weight(weight)
    if isinstance(weight, Mapping):
        raise OptionError("windows(..., model=) takes one weight; several loss terms with weights need an Accumulator.")
    check_batch_norm(batch_norm)
    if batch_norm == "exact":
        raise OptionError(
            'batch_norm="exact" runs micro-batches in turns, which a loop over them cannot. Pass the windows to an '
            'accumulator: Accumulator(model, loss_fn, batch_norm="exact").backward(window).'
        )
    check_distributed(distributed)
    found = _loop_windows(loader, num_micro_batches, model, weight, batch_norm, backward, distributed)
    return Windows(loader, num_micro_batches, found)


def _plain_windows(loader: Iterable[T], num_micro_batches: int) -> Iterator[LoadedWindow[T]]:
    micro_batches = iter(loader)
    num_windows = 0
    finish: Callable[[], None] | None = None
    while True:
        looks = num_windows < _FIRST_WINDOWS  # a loader that fills its memory again does so from the start
        group = [(part, contents_of(part) if looks else []) for part in islice(micro_batches, num_micro_batches)]
        if not group:
            if finish is not None:
                finish()
            return
        num_windows += 1
        for index, (part, contents) in enumerate(group):
            if looks and contents_of(part) != contents:
                raise BatchError(
                    f"the loader has written to micro-batch {index} of a window after it gave it out: it fills the "
                    "same memory again, and a window holds several at once. Let it give out copies: tensor.clone()."
                )
        window = LoadedWindow([part for part, _ in group])
        yield window
        finish = window.finish
        del window, group  # which hold rows, while the next ones are loaded


def _loop_windows(
    loader: Iterable[T],
    num_micro_batches: int,
    model: nn.Module,
    weight: Weight,
    batch_norm: BatchNormOption,
    backward: BackwardFn | None,
    option: DistributedOption,
) -> Iterator[LoopWindow[T]]:
    context = Context(model)
    context.check_trainable()
    if backward is not None:
        probe(backward, context.device)
    warned_of: set[str] = set()
    seen_version = checked_version = -1  # of the context: in the last window, and when parameters had no hooks
    settings = RankSettings({}, ())
    check = LoopCheck(warns=weight == "samples", adds_up=is_sum(weight))
    group = find_process_group(context.modules, context.device, option)
    if sharded_modules(context.modules):
        raise OptionError("windows(..., model=) is not supported with fully_shard; pass the windows to an Accumulator.")
    for micro_batches in _plain_windows(loader, num_micro_batches):
        context.update()
        is_known, seen_version = context.version == seen_version, context.version
        if group is not None:
            settings = settings if is_known else RankSettings.of(model, weight, batch_norm=batch_norm)
            context.coordinator = DataParallelCoordinator(group, settings)
            micro_batches.finish = context.coordinator.finish
        with ExitStack() as stack:
            stack.push(context.coordinator)  # tells the others what fails here
            is_divided = len(micro_batches) > 1 or context.coordinator.num_ranks > 1
            if is_divided and (context.version != checked_version or context.has_hooks()):
                check_hooks(model, context.parameters, warned_of)
                checked_version = context.version
            window = LoopWindow(context, micro_batches.pieces(), weight, batch_norm, backward, check)
            stack.pop_all()
        yield window
        if window.is_unfinished:
            raise WindowError(
                "the loop over a window was left before its end, so .grad holds a part of the batch's gradient. Finish "
                "the loop over each window, or stop the outer loop too and zero the gradients."
            )
