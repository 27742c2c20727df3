"""The accumulator: the front door. A global batch goes in, and its gradient stands in `.grad` afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gradfold import split
from gradfold.backward import BackPropagation, BackwardFn, probe
from gradfold.batch import Batch
from gradfold.buffers import BufferKeeper
from gradfold.coupled import batch_norm as batch_normalisation
from gradfold.coupled.batch_norm import BatchNormOption
from gradfold.errors import BatchError, OptionError, WindowError
from gradfold.gradients import (
    check_trainable,
    parameters_of,
    parameters_with_hooks,
    refuse_post_accumulate_hooks,
    warn_of_hooks,
)
from gradfold.loader import LoopWindow, Window
from gradfold.loss import LossFn
from gradfold.self_check import SelfCheck
from gradfold.split import Collate, MicroBatch
from gradfold.sync import refuse_several_ranks
from gradfold.weight import WeightOption, check_option, counts_samples, weigh
from gradfold.window import OpenWindow, Schedule, Transaction, WindowResult, one_after_another

__all__ = ["Accumulator"]


class Accumulator:
    """Puts the gradient of a whole batch into `.grad`, running as many rows at once as fit.

    After `accumulator.backward(batch)`, `.grad` is, to rounding, what this would have left there:

        loss_fn(model, batch).backward()

    Args:
        model: the module whose parameters get gradients and whose buffers are kept safe. Where a step uses several
            modules, pass an `nn.ModuleList` of all of them.
        loss_fn: `(model, micro_batch) -> loss` or `-> (loss, metrics)`; it may be called again for the same rows.
            `loss` is a 0-d tensor, the mean over the micro-batch (a sum has lost its denominator), or a dict of such
            terms, whose plain sum is the loss. `metrics` is a dict; 0-d values are combined as weighted means, values
            with one entry per row are concatenated in the batch's own order.
        micro_batch_size: rows to run at once, at most; the batch is cut into nearly equal parts. None: as it is given.
        weight: what the mean is over: "samples", `token_count(...)`, or a callable that takes a micro-batch (still on
            the host, collated) and gives a number; or a dict of these by the name of the loss term or metric (a bare
            loss is called "loss"). A metric without a weight of its own takes that of a bare loss, else samples.
        collate: given, a batch is a list of samples, and each micro-batch is `collate(samples)`.
        batch_norm: None refuses windows of several micro-batches where BatchNorm layers normalise by batch
            statistics; "per_micro_batch" normalises by micro-batch and advances running statistics once per window.
        backward: what to call instead of `loss.backward(gradient=...)`: `accelerator.backward`, `fabric.backward`,
            a LightningModule's `self.manual_backward`.
        self_check: whether the first window with several micro-batches is tried out for a gradient that is not the
            mean of its parts'. It raises on proof, warns once where it cannot know, costs two micro-steps, once, and
            leaves no trace.

    Raises:
        OptionError: an argument cannot work.
        WeightError: `weight` is not a weight.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(10, 1)
    >>> def loss_fn(model, batch):
    ...     inputs, targets = batch
    ...     return torch.nn.functional.mse_loss(model(inputs), targets)
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8)
    >>> result = accumulator.backward((torch.randn(33, 10), torch.randn(33, 1)))
    >>> result.num_micro_batches, result.num_samples, tuple(model.weight.grad.shape)
    (5, 33, (1, 10))
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        micro_batch_size: int | None = None,
        weight: WeightOption = "samples",
        collate: Collate | None = None,
        batch_norm: BatchNormOption = None,
        backward: BackwardFn | None = None,
        self_check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
        for name, function in (("loss_fn", loss_fn), ("collate", collate), ("backward", backward)):
            if not callable(function) and (function is not None or name == "loss_fn"):
                raise OptionError(f"{name} is a {type(function).__name__}; expected a callable.")
        split.check_size(micro_batch_size)
        check_option(weight)
        batch_normalisation.check_option(batch_norm)
        self.model = model
        self.micro_batch_size = micro_batch_size
        self.num_windows = 0
        self.loss_fn = loss_fn
        self.weight = weight
        self.collate = collate
        self.batch_norm = batch_norm
        self._backward = backward
        self._backward_is_probed = False
        self._hooks_warned_of: set[str] = set()
        self._back_propagate = BackPropagation(backward)
        self._buffers = BufferKeeper()
        self._self_check = SelfCheck(model, loss_fn, weight, self._back_propagate) if self_check else None

    def backward(self, batch: Batch) -> WindowResult:
        """Add the gradient of the loss of the whole batch to `.grad`.

        Gradients found in `.grad` are kept and added to, as by `loss.backward()`. If anything fails, the user's own
        functions and an interrupt included, `.grad`, the buffers that forward passes change and torch's random state
        are as they were.

        Args:
            batch: tensors that agree in dim 0 (rows), in any nesting of tuples, lists, dicts, dataclasses and named
                tuples, where 0-d tensors, numbers and text are the same for every micro-batch; or a list of samples,
                with `collate`; or a window from `gradfold.windows(loader, n)`, each of whose micro-batches is a batch.
                Rows go to the device of the model's first parameter.

        Returns:
            The loss, metrics and counts of the whole batch; the device is read once, to see that the losses are finite.

        Raises:
            BatchError: the batch cannot be cut by rows.
            ModelError: nothing to train, BatchNorm, hooks, or several processes: the message names the cause.
            LossError: `loss_fn` returned no loss, or one that is NaN or infinite.
            WeightError: a weight is negative, not finite or not a number, or fits no loss term.
        """
        refuse_several_ranks()
        modules = list(self.model.modules())
        parameters = parameters_of(modules)
        check_trainable(self.model, parameters)
        device = parameters[0].device
        self._probe_backward(device)
        with Transaction(self.model, modules, parameters, self._buffers):
            micro_batches = self._cut(batch)
            schedule = self._schedule(micro_batches, modules, parameters)
            weights = weigh(self.weight, micro_batches)
            window = OpenWindow(self.model, self.loss_fn, micro_batches, weights, self._back_propagate, device)
            if (
                self._self_check is not None
                and len(micro_batches) > 1
                and self._self_check.is_due(micro_batches, modules)
            ):
                self._look(self._self_check, batch, window)
            result = window.run(schedule)
        if self._self_check is not None and len(micro_batches) > 1:
            self._self_check.note_terms(window.losses.names)
        self.num_windows += 1
        return result

    def twin(self, model: nn.Module, loss_fn: LossFn, micro_batch_size: int | None) -> Accumulator:
        """An accumulator for another model, with the same weights, collation and BatchNorm; without a self-check."""
        return Accumulator(
            model,
            loss_fn,
            micro_batch_size=micro_batch_size,
            weight=self.weight,
            collate=self.collate,
            batch_norm=self.batch_norm,
            self_check=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would have: the count of windows so far."""
        return {"num_windows": self.num_windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if "num_windows" not in state:
            raise OptionError(f"this is no state of an Accumulator: it has {sorted(state)}, expected 'num_windows'.")
        self.num_windows = int(state["num_windows"])

    def _cut(self, batch: Batch) -> list[MicroBatch]:
        if isinstance(batch, LoopWindow):
            raise WindowError(
                "this window has a backward of its own; for accumulator.backward(window) leave model= out: "
                "gradfold.windows(loader, n)."
            )
        if isinstance(batch, Window):
            if not batch:
                raise BatchError("the window holds no micro-batches. Skip empty windows.")
            return split.join_batches(self._cut(part) for part in batch)
        if self.collate is not None:
            micro_batches = split.split_samples(batch, self.micro_batch_size, self.collate)
            if counts_samples(self.weight):
                split.check_collated(micro_batches)
            return micro_batches
        return split.split_rows(batch, self.micro_batch_size)

    def _look(self, self_check: SelfCheck, batch: Batch, window: OpenWindow) -> None:
        layers: Mapping[str, nn.Module] = {}
        if self.batch_norm is not None:  # what is known not to fit, and was accepted
            layers = batch_normalisation.batch_statistics_layers(self.model)
            if any(getattr(layer, "running_mean", None) is None for layer in layers.values()):
                return
        collate_rows = None if self.collate is None else partial(self._collate_rows, batch)
        self_check.look(window.micro_batches, window.weights, window.device, collate_rows, layers.values())

    def _collate_rows(self, batch: Batch, rows: range) -> Batch:
        assert self.collate is not None
        samples = [sample for part in batch for sample in part] if isinstance(batch, Window) else batch
        return self.collate(list(samples[rows.start : rows.stop]))

    def _schedule(
        self, micro_batches: list[MicroBatch], modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]
    ) -> Schedule:
        if len(micro_batches) == 1:
            return one_after_another
        self._check_hooks(parameters)
        num_rows = micro_batches[-1].rows.stop
        return batch_normalisation.schedule_for(self.model, modules, self.batch_norm, len(micro_batches), num_rows)

    def _probe_backward(self, device: torch.device) -> None:
        if self._backward is not None and not self._backward_is_probed:
            probe(self._backward, device)
            self._backward_is_probed = True

    def _check_hooks(self, parameters: Sequence[nn.Parameter]) -> None:
        refuse_post_accumulate_hooks(self.model, parameters)
        named = parameters_with_hooks(self.model, parameters)
        if named:
            warn_of_hooks(named, self._hooks_warned_of)
