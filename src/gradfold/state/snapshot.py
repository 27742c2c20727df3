"""A snapshot: what a run may change, saved, so that it can be put back.

There is one, for windows as for probes: the runs that gradfold makes to find something out (self-check, verify). What
each of them puts back is a table in docs/design.md. A window can also begin again (`rewind`), or return to the
savepoint of the last micro-batch, if only the random state has moved since; or it leaves no gradient at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradfold.errors import WindowError
from gradfold.messages import join_names
from gradfold.state.attributes import Contents, ModuleAttributes, keep_contents
from gradfold.state.buffers import BufferKeeper, FrozenKeeper
from gradfold.state.external import RUNNING, ExternalState
from gradfold.state.gradients import GradientBuffer, SumDtype, non_finite_flags
from gradfold.state.rng import CPU, RandomState
from gradfold.torch_private import BLOCK_READERS, BLOCK_SETTINGS, CALL, THREAD_READERS, apply_settings

TRAINING, _BUFFERS, _IS_TRAINED = attrgetter("training"), attrgetter("_buffers"), attrgetter("requires_grad")


_innermost: ContextVar[Snapshot | None] = ContextVar("innermost", default=None)  # of those that are open


class Snapshot:
    """Saves on entry to a `with` block, and puts back on any exception; that of a probe always puts back.

    Args:
        modules, parameters: all of the model's, since a walk through it takes time.
        buffers: knows which buffers earlier windows have changed; None: a new one.
        frozen: likewise of the frozen parameters.
        sums: what gradients are summed in, as for `GradientBuffer`.
        probe: the user's functions that a probe runs; None: this is a window.

    Attributes:
        gradients: the `.grad` fields, with those found on entry set aside.
        undo: steps of a roll-back, for what a run has put on the model (hooks) or has started (threads); each may run
            when there is nothing left to do, and more than once.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        buffers: BufferKeeper | None = None,
        frozen: FrozenKeeper | None = None,
        sums: SumDtype | None = None,
        probe: Sequence[Any] | None = None,
    ) -> None:
        self._model = model
        self._modules = modules
        self._parameters = parameters
        self._buffers = BufferKeeper() if buffers is None else buffers
        self._has_buffers = any(map(_BUFFERS, modules))
        self._has_frozen = not all(map(_IS_TRAINED, parameters))
        self._frozen = FrozenKeeper(copies_all=probe is not None) if frozen is None else frozen
        self._probe = probe
        self._external: ExternalState | None = None
        self._is_open = self._is_discarded = False
        self._outer: Snapshot | None = None  # the one inside of which this one is open
        self.undo: list[Callable[[], object]] = []
        self._sums = sums
        self._savepoint: tuple[RandomState, list[tuple[Tensor | None, int]]] | None = None

    def __enter__(self) -> Snapshot:
        self._modes = list(map(TRAINING, self._modules))
        # A window reads no more than it has to; what else a strategy changes it adds to `undo`.
        self._settings = list(map(CALL, THREAD_READERS if self._probe is None else BLOCK_READERS))
        self._random_state = self._beginning = self._record()
        if self._probe is not None:
            self._external = ExternalState(*self._probe, *self._modules)
        if self._has_buffers:
            self._buffers.open(self._modules)
        if self._has_frozen:
            self._frozen.open(self._parameters)
        self.gradients = GradientBuffer(self._parameters, self._sums)
        outer = _innermost.get()
        self._outer = outer if outer is None or outer._is_open else outer._outer
        if self._outer is not None and self._probe is None:
            refuse_inner_window(self._parameters)
            self._keep_for_probe(self._outer)
        try:
            _innermost.set(self)
            self._is_open = True  # all that a roll-back needs is known, and nothing has changed
            self.gradients.open()
            return self
        except BaseException:
            self.roll_back()
            raise

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is not None or self._probe is not None:
                self.roll_back()
            elif not self._is_discarded:
                self.gradients.add_back()
            self._is_open = False
            _innermost.set(self._outer)
        except BaseException:
            self.roll_back()
            raise
        if self._has_buffers:
            self._buffers.close()
        if self._has_frozen:
            self._frozen.close()

    def roll_back(self) -> None:
        """Put everything back, unless the snapshot is closed; after an interrupt again, as every step may run twice.

        Python hears interrupts between any two lines, those of `__exit__` among them: a block around the `with` block
        has to call this, too. Probes that an interrupt has left open inside are put back before.
        """
        inner = _innermost.get()
        while self._is_open and inner is not None and inner is not self:
            inner.roll_back()
            inner = inner._outer
        if self._is_open and not self.gradients.is_added():
            restore_each(
                lambda: apply_settings(BLOCK_SETTINGS[: len(self._settings)], self._settings),
                *reversed(self.undo),
                self._restore_modes,
                lambda: self.gradients.put_back(self._model.parameters()),
                *([] if self._external is None else [self._external.restore]),
                self._random_state.restore,
                self._frozen.restore,  # last, since these may warn
                self._buffers.restore,
            )
        if self._is_open:
            self._is_open = False
            _innermost.set(self._outer)

    @property
    def is_open_probe(self) -> bool:
        """Whether it is open, and not that of a window."""
        return self._is_open and self._probe is not None

    def begin(self) -> None:
        """The batch is split and weighed, for which random numbers may have been drawn: a rewind goes back to here."""
        self._beginning = self._record()

    def settle(self) -> list[Tensor]:
        """The last micro-batch is done, and gradients get their final form; gives flags as `non_finite_flags`."""
        self.gradients.settle()
        if self._has_buffers:
            self._buffers.learn()
        if self._has_frozen:
            self._frozen.learn()
        return non_finite_flags(self._parameters)

    def rewind(self) -> None:
        """Set buffers, gradients and random states to where they were at the beginning: the runs begin again."""
        self.empty_gradients()
        if self._has_buffers:
            self._buffers.restore()
            self._buffers.open(self._modules)
        self._frozen.restore()
        if self._external is not None:
            self._external.attributes.restore()
            self._external.random_states.restore()
        self._beginning.restore()
        self._savepoint = None

    def empty_gradients(self) -> None:
        """Drop the new gradients."""
        self.gradients.empty(self._model.parameters())  # there may be more parameters by now

    def discard(self) -> None:
        """Leave no gradient, neither a new one nor those found, and buffers as they were; random state has moved on."""
        self.gradients.discard(self._model.parameters())
        self._buffers.restore()
        self._frozen.restore()
        self._is_discarded = True

    def has_drawn(self) -> bool:
        """Whether torch's random state has moved since the beginning."""
        return self._beginning.has_moved()

    def has_drawn_on_host(self) -> str | None:
        """The module whose global generator has moved since the beginning, if one has; of a probe."""
        return None if self._external is None else self._external.random_states.moved_on_host()

    def moved_parameters(self) -> list[str]:
        """The names of the frozen parameters that have moved since the last rewind."""
        moved = {id(one) for one, _ in self._frozen.moved()}
        return [name for name, parameter in self._model.named_parameters() if id(parameter) in moved]

    def changed_attributes(self) -> list[str]:
        """The names of the attributes of modules that differ from those on entry, after a probe's last rewind."""
        return [] if self._external is None else self._external.attributes.changed(self._model)

    def changed_buffers(self) -> list[str]:
        """The names of the buffers that differ from those on entry."""
        return self._buffers.changed(self._model)

    def set_savepoint(self) -> None:
        """A micro-batch begins."""
        # The gradients themselves: a new one may get the address, and so the id, of one that is gone.
        self._savepoint = self._record(), list(map(_mark, self._parameters))

    def return_to_savepoint(self) -> bool:
        """Undo the micro-batch that began last; False, and nothing is undone, where that is impossible.

        What cannot be undone alone: gradients that a backward pass has added to, and buffers that any forward
        pass of this window has changed, since only their values on entry are kept.
        """
        if self._savepoint is None:
            return False
        (random_state, marks), self._savepoint = self._savepoint, None
        now = map(_mark, self._parameters)
        is_touched = any(one[0] is not mark[0] or one[1] != mark[1] for one, mark in zip(now, marks, strict=True))
        is_touched |= any(tensor.grad is not None for tensor in self.gradients.outside)
        if is_touched or self._buffers.changes() or self._frozen.moved():
            return False
        random_state.restore()
        return True

    def _record(self) -> RandomState:
        if self._parameters and self._parameters[0].is_cpu:  # the usual case, faster
            return RandomState(((CPU, torch.get_rng_state()),))
        return RandomState.record(self._parameters)

    def _keep_for_probe(self, outer: Snapshot | None) -> None:
        """Have a probe that runs this window of another model inside take back what it leaves in `.grad`."""
        while outer is not None and outer._probe is None:
            outer = outer._outer
        if outer is not None:
            for parameter in self._parameters:
                outer.undo.append(partial(_put_back_gradient, parameter, parameter.grad, keep_contents(parameter.grad)))

    def _restore_modes(self) -> None:
        for module, mode in zip(self._modules, self._modes, strict=True):
            if module.training is not mode:
                module.training = mode


def is_probing() -> bool:
    """Whether gradfold runs the user's functions to find something out, and not to train.

    The self-check does in some windows, and so do `verify`, `plan` and "auto". Their runs change nothing in the model,
    nor in what functions reach in closures and globals of the user's own modules. What else a `loss_fn` does (a file, a
    metrics server, an object of an installed package) it can leave out.

    Example:
        >>> import torch, gradfold
        >>> calls = []
        >>> def loss_fn(model, batch):
        ...     calls.append("probe" if gradfold.is_probing() else "window")  # a list is put back
        ...     return model(batch).square().mean()
        >>> accumulator = gradfold.Accumulator(torch.nn.Linear(3, 1), loss_fn, micro_batch_size=2)
        >>> result = accumulator.backward(torch.randn(4, 3))
        >>> calls, gradfold.is_probing()
        (['window', 'window'], False)
    """
    one = _innermost.get()
    while one is not None and not one.is_open_probe:
        one = one._outer
    return one is not None or bool(RUNNING)


def restore_each(step: Callable[[], object], *others: Callable[[], object]) -> None:
    """Run every step, whatever happens in the others: each is in a separate `finally`."""
    try:
        step()
    finally:
        if others:
            restore_each(*others)


def refuse_inner_window(parameters: Sequence[nn.Parameter]) -> None:
    """Raise WindowError inside of a window over some of these parameters, whose gradients this one would lose."""
    outer = _innermost.get()
    trained = set() if outer is None else {id(one) for one in parameters if one.requires_grad}
    while outer is not None:
        shared = [name for name, one in outer._model.named_parameters() if id(one) in trained]
        if shared and outer._probe is None and _is_running(outer):
            raise WindowError(
                f"{join_names(shared, 3)}: a window inside loss_fn of another window over the same parameters, where "
                ".grad holds a part of the batch's gradient. Run them one after another, since gradients add up in "
                ".grad; or return the sum of both losses from one loss_fn."
            )
        outer = outer._outer


def _is_running(one: Snapshot) -> bool:
    """Whether some thread is in its window, by the name that it has there: interrupts may have ended it unnoticed."""
    frames = list(sys._current_frames().values())
    while frames:
        frame = frames.pop()
        if frame.f_locals.get("snapshot") is one:
            return True
        frames += [] if frame.f_back is None else [frame.f_back]
    return False


def _put_back_gradient(parameter: nn.Parameter, gradient: Tensor | None, contents: Contents | None) -> None:
    parameter.grad = gradient
    if contents is not None:
        contents.restore()


def _mark(parameter: nn.Parameter) -> tuple[Tensor | None, int]:
    """The gradient, and how often it was written to."""
    gradient = parameter.grad
    return gradient, 0 if gradient is None else gradient._version


@contextmanager
def restored_modules(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Put back what forward passes change in buffers and attributes; random states and gradients move on.

    The block gets a function that names those that have changed so far.
    """
    modules = list(model.modules())
    # A layer that does not know its shape yet learns it here, and for good.
    attributes = None if any(map(is_lazy, model.parameters())) else ModuleAttributes(modules)
    buffers = BufferKeeper()  # a new one keeps them all
    buffers.open(modules)
    restore = partial(restore_each, *([] if attributes is None else [attributes.restore]), buffers.restore)
    try:
        yield lambda: [*([] if attributes is None else attributes.changed(model)), *buffers.changed(model)]
    finally:
        try:
            restore()
        except BaseException:  # memory, or an interrupt: what has to be put back must not depend on who catches it
            restore()
            raise
