"""A window: the micro-batches of one update. It leaves the gradient of the whole batch, or everything unchanged.

For a loss that is a mean over something (samples, tokens), of which the batch holds W and micro-batch k holds w[k]:

    loss_fn(model, batch).backward()        ==        for k, micro_batch in enumerate(micro_batches):
                                                          loss_fn(model, micro_batch).backward(gradient=w[k] / W)

The weight enters as `grad_output` of the backward pass, so no operation is added to the graph:

    [1] save       .grad is set aside; buffers and the random state are kept          state/snapshot.py
    [2] split      into micro-batches, collated and weighed: w[0] ... w[K-1], W       batch/split.py, weights.py
    [3] run        forward 0, backward 0, forward 1, backward 1, ...                  strategy.py (or another order)
    [4] recover    out of memory, not finite: undo one micro-batch or all, run again  recovery.py
    [5] commit     loss and metrics of the window; what [1] set aside is added        state/snapshot.py
    [6] roll back  on any other exception: all that [1] saved is put back             state/snapshot.py

docs/design.md has the drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, methodcaller
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Marks, in_own_containers
from gradfold.batch.rows import Rows
from gradfold.batch.split import ROWS, MicroBatch
from gradfold.engine.backward import BackPropagation, Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.loss_terms import LossFn, LossTerms, read_pair
from gradfold.engine.outside import OutsideLeaves
from gradfold.engine.prefetch import prefetch
from gradfold.engine.result import Recovery, WindowResult
from gradfold.errors import BatchError, GradfoldError, ModelError
from gradfold.state.gradients import GradientBuffer, parameters_of
from gradfold.state.snapshot import TRAINING
from gradfold.weights import WeightOption, sample_weights, weigh


class Context:
    """What a window runs in: the model as flat lists, its device, and the other processes.

    A walk through a model costs about 0.7 us per module. A check that nothing has changed since the last walk costs a
    fifth of that: children, types and parameters are the same objects in the same places.

    Attributes:
        modules: all modules, each once.
        modes: their `training` flags.
        parameters: all parameters, each once.
        coordinator: of the processes that train together.
        outside: what is known of tensors outside the model that windows back-propagate to.
        version: another number whenever modules, modes or parameters have changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.coordinator = Coordinator()
        self.modes: list[bool] = []
        self.version = 0
        self.outside = OutsideLeaves()
        self._walk()

    @property
    def device(self) -> torch.device:
        """That of the first parameter, which may move and stay the same object (`model.to("cuda")`)."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def update(self) -> None:
        """A new window begins: look at the model again."""
        now = _parts_of(self.modules)
        if len(now) != len(self._parts) or not all(map(is_, now, self._parts)):
            self._walk()
        modes = list(map(TRAINING, self.modules))
        if modes != self.modes:
            self.modes = modes
            self.version += 1

    def check_trainable(self) -> None:
        """Raise ModelError if no parameter requires a gradient."""
        for parameter in self.parameters:
            if parameter.requires_grad:
                return
        raise ModelError(
            f"{type(self.model).__name__} has no trainable parameters ({len(self.parameters)} parameters, none with "
            "requires_grad): there is no gradient to accumulate. Unfreeze some with parameter.requires_grad_(), or "
            "pass the module that holds them."
        )

    def has_hooks(self) -> bool:
        """Whether a hook sees the gradient of some parameter."""
        return any(map(_HOOKS, self.parameters)) or any(map(_POST_ACCUMULATE_HOOKS, self.parameters))

    def _walk(self) -> None:
        self.modules = list(self.model.modules())
        self._parts = _parts_of(self.modules)
        self.parameters = parameters_of(self.modules)
        self.modes = list(map(TRAINING, self.modules))
        self.version += 1


# Where a window looks at every module, C code does the walk.
_CHILDREN, _PARAMETERS, _VALUES = attrgetter("_modules"), attrgetter("_parameters"), methodcaller("values")

_HOOKS, _POST_ACCUMULATE_HOOKS = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


def _parts_of(modules: list[nn.Module]) -> list[Any]:
    """The children, types and parameters of modules."""
    dicts = chain(map(_CHILDREN, modules), map(_PARAMETERS, modules))
    return [*map(type, modules), *chain.from_iterable(map(_VALUES, dicts))]


NO_WEIGHT = (
    "weight= is 0 for every micro-batch of this window, so it leaves no gradient, and its loss is NaN. Look for labels "
    "that are all ignored (ignore_index=, shift=, a truncated prompt), or a mask that is empty. TrainStep skips such "
    "updates. Later windows without weight are not warned of."
)

GraphForm: TypeAlias = tuple[str, ...]
"""The names of the last operators of a graph, which tell one loss from another, whatever the sizes."""


def _form_of(weighed: Weighed) -> GraphForm:
    """The form of the graph behind the terms of a loss: of each the last operator, and those before it."""
    names = []
    for term, _ in weighed:
        if term.grad_fn is not None:
            names.append(type(term.grad_fn).__name__)
            for before, _ in term.grad_fn.next_functions:
                names.append(type(before).__name__)
    return tuple(names)


class PassListener:
    """Notified of each forward pass and its rows, for what depends on them (counter-based dropout)."""

    def begin(self, rows: Rows) -> None:
        """A forward pass of these rows of this rank's batch begins."""

    def end(self) -> None:
        """The forward pass has ended, or failed."""


class Window:
    """The micro-batches of one update, and the losses and metrics of those that are done.

    Args:
        loss_fn: the user's, under autocast with `precision=`.
        runs_zero_weight: whether micro-batches of weight 0 run like the others, which depend on their rows.

    Attributes:
        num_samples: rows of the batch of this rank.
        losses: what `loss_fn` returned so far, with the metrics.
        weights: of the micro-batches, normalized by the denominators of all ranks.
        zero_weight: the micro-batches of weight 0.
        current: the micro-batch whose forward pass began last.
        done: the micro-batches that were kept from before an out-of-memory error.
        recoveries: the faults so far.
        failed_sizes: what did not fit, in rows or padded tokens.
        is_skipped: whether the window leaves no gradient.
        is_undivided: whether one micro-batch of one rank is the whole batch, so nothing depends on a split.
        is_complete: whether all micro-batches have run, and loss and gradient are as they will be handed over.
        form: of the graph of the first loss.
    """

    def __init__(
        self,
        context: Context,
        loss_fn: LossFn,
        micro_batches: Sequence[MicroBatch],
        weight: WeightOption,
        back_propagate: BackPropagation,
        listener: PassListener,
        runs_zero_weight: bool = False,
    ) -> None:
        self.context = context
        self.model = context.model
        self.device = device = context.device
        self.loss_fn = loss_fn
        self.micro_batches = micro_batches
        self.weight = weight
        self.back_propagate = back_propagate
        self.runs_zero_weight = runs_zero_weight
        sizes = list(map(len, map(ROWS, micro_batches)))
        own = sample_weights(tuple(sizes)) if weight == "samples" else weigh(weight, micro_batches)
        self.weights = context.coordinator.over_all_ranks(own)
        self.zero_weight = own.zero_weight
        self.losses = LossTerms(micro_batches, self.weights, device, context.coordinator.runs_all_terms)
        self._take = None if device.type == "cpu" else prefetch(micro_batches, device)
        self.num_samples = sum(sizes)
        self.done: frozenset[int] = frozenset()
        self.current = 0
        self.listener = listener
        self.recoveries: list[Recovery] = []
        self.failed_sizes: list[int] = []
        self.is_skipped = False
        self.is_undivided = len(micro_batches) == 1 and context.coordinator.num_ranks == 1
        self.is_complete = False
        self.form: GraphForm = ()
        self._watched: tuple[GradientBuffer, bool] | None = None
        self._marks: dict[int, Marks] = {}
        for index, part in enumerate(micro_batches):
            if not part.is_cut:
                self._marks[index] = Marks(part.data)

    def again(self, micro_batches: Sequence[MicroBatch], done: Mapping[int, int] = MappingProxyType({})) -> Window:
        """The window with other micro-batches; `done`: those that are kept, from their indices here to those there."""
        window = Window(
            *(self.context, self.loss_fn, micro_batches, self.weight, self.back_propagate, self.listener),
            self.runs_zero_weight,
        )
        window.num_samples = self.num_samples
        window.recoveries = self.recoveries
        window.failed_sizes = self.failed_sizes
        window.done = frozenset(done.values())
        window._marks |= {done[index]: marks for index, marks in self._marks.items() if index in done}
        window.losses.carry_over(self.losses, done)
        window._watched = self._watched
        return window

    def pending(self) -> list[int]:
        """The micro-batches to run, in order; those of weight 0 last, when the names of the metrics are known."""
        if not self.done and not self.zero_weight:
            return list(range(len(self.micro_batches)))
        busy = [index for index in range(len(self.micro_batches)) if index not in self.zero_weight]
        return [index for index in (*busy, *sorted(self.zero_weight)) if index not in self.done]

    def forward(self, index: int, loss_fn: LossFn | None = None) -> Weighed:
        """Run the forward pass of a micro-batch, of the user's loss or another one; returns its weighed loss terms."""
        if index in self.zero_weight and not self.runs_zero_weight:
            return self._forward_zero_weight(index)
        output = self.call(index, loss_fn)
        if isinstance(output, tuple):
            output, metrics = read_pair(output)
            self.losses.metrics.add(index, metrics)
        weighed = self.losses.add(index, output)
        if not self.form:
            self.form = _form_of(weighed)
        return weighed

    def backward(self, weighed: Weighed, factor: float | None = None) -> None:
        """Back-propagate what a forward pass gave, times a factor; None: what the sum over ranks asks for."""
        if self._watched is not None:
            self.context.outside.set_aside(weighed, *self._watched)
        self.back_propagate(weighed, self.context.coordinator.grad_factor if factor is None else factor)

    def watch(self, gradients: GradientBuffer, is_late: bool) -> None:
        """From here on set aside gradients outside the model before passes add to them: see `OutsideLeaves`."""
        self._watched = self._watched or (gradients, is_late)

    def call(self, index: int, loss_fn: LossFn | None = None) -> Any:
        """What `loss_fn`, or the function that replaces it, returns for a micro-batch."""
        self.current = index
        self.listener.begin(self.micro_batches[index].rows)
        try:
            return (loss_fn or self.loss_fn)(self.model, self.on_device(index))
        except Exception as error:
            self.note(error, index)
            raise
        finally:
            self.listener.end()

    def note(self, error: Exception, index: int) -> None:
        """Attach to an error of the user's functions, once, which rows ran."""
        text = f"in micro-batch {index} of {len(self.micro_batches)}{self.micro_batches[index].where}"
        if not isinstance(error, GradfoldError) and text not in getattr(error, "__notes__", ()):
            getattr(error, "add_note", lambda text: None)(text)  # Python 3.11

    def on_device(self, index: int) -> Any:
        """The data of a micro-batch on the device, in new containers."""
        data = self.micro_batches[index].data if self._take is None else self._take(index)
        if type(data) is tuple and set(map(type, data)) == {Tensor}:
            return data  # the usual case, faster
        return in_own_containers(data)

    def resume(self, index: int) -> None:
        """The forward pass of this micro-batch continues, after others ran in between."""
        self.current = index

    def check_unchanged(self, index: int) -> None:
        """Raise BatchError where `loss_fn` has written to a micro-batch, which then cannot run again.

        Where rows are copied to a device it writes to the copy.
        """
        part = self.micro_batches[index]
        path = (self._marks.get(index) or Marks(part.data, is_new=True)).changed()
        if path is not None:
            raise BatchError(
                f"loss_fn has changed micro-batch {index}{part.where} in place{f', batch{path}' if path else ''}, so "
                "it cannot run again on the same rows. Write to a copy, or to a variable: inputs = inputs.clone()."
            )

    def completed(self) -> Window:
        """All micro-batches have run, and loss and gradient are as they will be handed over."""
        if self._watched is not None:
            self.context.outside.learn(self._watched[0], self.context.version)
        self.is_complete = True
        return self

    @property
    def is_empty(self) -> bool:
        """Whether no loss term weighs anything, on any rank, though no fault has left anything out."""
        total = self.weights.total(self.losses.all_names)
        return not any(total.values() if isinstance(total, dict) else [total]) and not self.recoveries

    def result(self) -> WindowResult:
        """Loss, metrics and counts of a complete window."""
        loss, metrics = self.losses.close()
        num_run = len(self.micro_batches) - (0 if self.runs_zero_weight else len(self.zero_weight))
        unnamed = self.weights.unnamed
        weight = unnamed.total if unnamed is not None else self.weights.total(self.losses.all_names)
        return WindowResult(loss, metrics, num_run, self.num_samples, weight, tuple(self.recoveries), self.is_skipped)

    def _forward_zero_weight(self, index: int) -> Weighed:
        """Run a micro-batch of weight 0, if it may have metrics."""
        self.current = index
        is_alone = len(self.zero_weight) == len(self.micro_batches)
        if self.losses.metrics.all_names or (is_alone and self.weights.are_busy()):
            with torch.no_grad():
                output = self.call(index)
            if isinstance(output, tuple):
                self.losses.metrics.add(index, read_pair(output)[1])
        return []
