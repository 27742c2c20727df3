"""Windows over a loader of micro-batches: each the micro-batches of one update, the last one as short as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Generic, NoReturn, TypeVar, overload

from torch import nn

from gradfold.agreement import Alone, Together
from gradfold.backward import BackwardFn, probe
from gradfold.coupled.batch_norm import BatchNormOption, check_option
from gradfold.errors import OptionError, WindowError
from gradfold.gradients import check_trainable
from gradfold.hooks import parameters_with_hooks, refuse_post_accumulate_hooks, warn_of_hooks
from gradfold.loop_window import LoopWindow
from gradfold.sync import RanksOption, find_ranks, sharded_modules
from gradfold.sync import check_option as check_ranks
from gradfold.weight import Weight, weigh
from gradfold.weight import check_option as check_weight

__all__ = ["LoopWindow", "Window", "windows"]

T = TypeVar("T")


class Window(Generic[T]):
    """The micro-batches of one update, for `accumulator.backward(window)`."""

    def __init__(self, micro_batches: Sequence[T]) -> None:
        self._micro_batches = tuple(micro_batches)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[T]:
        return iter(self._micro_batches)

    def backward(self, loss: object) -> NoReturn:
        """Only windows that know the model have a backward of their own.

        Raises:
            WindowError: always; says how to get one.
        """
        raise WindowError(
            "this window does not know the model: write gradfold.windows(loader, n, model=model) for "
            "window.backward(loss), or give the window to accumulator.backward(window)."
        )

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Window[T]: ...
    def __getitem__(self, index: int | slice) -> T | Window[T]:
        return Window(self._micro_batches[index]) if isinstance(index, slice) else self._micro_batches[index]


@overload
def windows(loader: Iterable[T], num_micro_batches: int) -> Iterator[Window[T]]: ...
@overload
def windows(
    loader: Iterable[T],
    num_micro_batches: int,
    *,
    model: nn.Module,
    weight: Weight = "samples",
    batch_norm: BatchNormOption = None,
    backward: BackwardFn | None = None,
    ranks: RanksOption = None,
) -> Iterator[LoopWindow[T]]: ...
def windows(
    loader: Iterable[T],
    num_micro_batches: int,
    *,
    model: nn.Module | None = None,
    weight: Weight = "samples",
    batch_norm: BatchNormOption = None,
    backward: BackwardFn | None = None,
    ranks: RanksOption = None,
) -> Iterator[Window[T]] | Iterator[LoopWindow[T]]:
    """Group a loader of micro-batches into windows, one per update; the last may be shorter. No `len()` is needed.

    Without `model`, a window goes to `accumulator.backward(window)`. With it, the loop body stays as it was:

        for window in gradfold.windows(loader, 4, model=model):      # was: for i, (x, y) in enumerate(loader):
            for x, y in window:
                window.backward(criterion(model(x), y))              # was: (loss / 4).backward()
            optimizer.step()                                         # was: if (i + 1) % 4 == 0: ...
            optimizer.zero_grad()
            log(window.loss)

    Args:
        loader: gives micro-batches. Those of one window are held at once (on the host, if the loader gives them there).
        num_micro_batches: micro-batches per window.
        model: the model that the loop body runs.
        weight: with `model`: what the loss is a mean over, as for `Accumulator`.
        batch_norm: with `model`: None or "per_micro_batch", as for `Accumulator`.
        backward: with `model`: as for `Accumulator`.
        ranks: with `model`: as for `Accumulator`.

    Raises:
        OptionError: an argument cannot work.
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
        if weight != "samples" or batch_norm is not None or backward is not None or ranks is not None:
            raise OptionError(
                "weight=, batch_norm=, backward= and ranks= belong to windows(..., model=model), whose windows have "
                "their own backward; without model=, give them to the Accumulator."
            )
        return _plain_windows(loader, num_micro_batches)
    check_weight(weight)
    if isinstance(weight, Mapping):
        raise OptionError("windows(..., model=) takes one weight; loss terms with their own need an Accumulator.")
    check_option(batch_norm)
    if batch_norm == "exact":
        raise OptionError(
            'batch_norm="exact" runs micro-batches in lock-step, which a loop over them cannot. Give the windows to an '
            'accumulator: Accumulator(model, loss_fn, batch_norm="exact").backward(window).'
        )
    check_ranks(ranks)
    return _loop_windows(loader, num_micro_batches, model, weight, batch_norm, backward, ranks)


def _plain_windows(loader: Iterable[T], num_micro_batches: int) -> Iterator[Window[T]]:
    micro_batches = iter(loader)
    while group := list(islice(micro_batches, num_micro_batches)):
        yield Window(group)


def _loop_windows(
    loader: Iterable[T],
    num_micro_batches: int,
    model: nn.Module,
    weight: Weight,
    batch_norm: BatchNormOption,
    backward: BackwardFn | None,
    option: RanksOption,
) -> Iterator[LoopWindow[T]]:

    parameters = list(model.parameters())
    check_trainable(model, parameters)
    if backward is not None:
        probe(backward, parameters[0].device)
    warned_of: set[str] = set()
    modules = list(model.modules())
    ranks = find_ranks(modules, parameters[0].device, option)
    if sharded_modules(modules):
        raise OptionError("windows(..., model=) does not go with fully_shard; give the windows to an Accumulator.")
    for group in _plain_windows(loader, num_micro_batches):
        own_weights = partial(weigh, weight)
        agreement = Alone(own_weights) if ranks is None else Together(ranks, own_weights, num_totals=2)
        with ExitStack() as stack:
            stack.push(agreement)  # tells the others what fails here
            if len(group) > 1:
                refuse_post_accumulate_hooks(model, parameters)
                warn_of_hooks(parameters_with_hooks(model, parameters), warned_of)
            window = LoopWindow(model, list(group), weight, batch_norm, backward, agreement)
            stack.pop_all()
        yield window
        if window.is_unfinished:
            raise WindowError(
                "the loop over a window was left before its end, so .grad holds a part of the batch's gradient. Finish "
                "the loop over each window, or stop the outer loop too and zero the gradients."
            )
