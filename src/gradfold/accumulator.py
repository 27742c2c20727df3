"""The accumulator: the front door. A global batch goes in, and its gradient stands in `.grad` afterwards.

A coupling: whether and how the samples of a batch depend on each other, and so how a window of them runs.

An opening: what is looked at once a window is cut and before it runs, and the schedule that follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from gradfold.batch.nesting import Batch
from gradfold.batch.split import Collate
from gradfold.batchnorm import checks as uncoupled
from gradfold.batchnorm import exact as exact_batch_norm
from gradfold.batchnorm import per_micro_batch as batch_normalization
from gradfold.batchnorm.checks import InputDependence
from gradfold.batchnorm.coordinator import SynchronizedCoordinator
from gradfold.batchnorm.per_micro_batch import BatchNormOption, batch_statistics_layers
from gradfold.distributed import ddp as sync
from gradfold.distributed.coordinators import DataParallelCoordinator, FsdpCoordinator
from gradfold.distributed.ddp import DistributedOption, find_process_group, on_its_own, without_reductions
from gradfold.distributed.fsdp import divide_factor, reshard, set_reducing, sharded_modules
from gradfold.distributed.process_group import LocalGroup, ProcessGroup, SynchronizedGroup
from gradfold.dropout import layer as keyed_dropout
from gradfold.engine.backward import BackPropagation, BackwardFn, probe
from gradfold.engine.coordinator import Coordinator, Weigh
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.micro_batcher import MicroBatcher
from gradfold.engine.model_checks import parameters_with_hooks, refuse_post_accumulate_hooks, warn_of_hooks
from gradfold.engine.recovery import Cautious, FindCulprit, OnNonFinite, Replay, check_on_non_finite
from gradfold.engine.window import Schedule, Window, WindowResult, one_after_another
from gradfold.errors import NotDecomposableError, OptionError
from gradfold.memory.auto import MicroBatchChoice, MicroBatchSize
from gradfold.memory.probe_batch import ProbeBatch, Work
from gradfold.packing.padding_check import check_once
from gradfold.packing.token_budget import TokenBudget
from gradfold.precision import PrecisionOption, read_option
from gradfold.self_check.self_check import SelfCheck
from gradfold.state.buffers import BufferKeeper
from gradfold.state.gradients import GradientBuffer, check_trainable, parameters_of
from gradfold.state.snapshot import Snapshot
from gradfold.twophase.checks import NonDifferentiableStatistics
from gradfold.twophase.loss import TwoPhaseLoss, explain, probe_of, wrap_loss
from gradfold.twophase.strategy import Phases, check_options, dtypes_of
from gradfold.weights import WeightOption, check_option, counts_samples, weigh

__all__ = ["Accumulator"]


class Coupling:
    """Samples that do not depend on each other; or only within micro-batches, by BatchNorm, where that is accepted.

    Args:
        model: that is trained.
        loss_fn: as it is run.
        batch_norm: None or "per_micro_batch".

    Attributes:
        tried: what the self-check tries out on parts of a micro-batch.
        tries_loss: whether that is the loss itself, with its terms.
        find_culprit: where one micro-batch that is not finite spoils all: finds it.
    """

    tries_loss = True
    find_culprit: FindCulprit | None = None

    def __init__(self, model: nn.Module, loss_fn: LossFn, batch_norm: BatchNormOption) -> None:
        self.model = model
        self.tried = loss_fn
        self._batch_norm = batch_norm

    def normalizes_parts(self) -> bool:
        """Whether layers normalize by micro-batch, so that a halved one has other statistics."""
        return self._batch_norm == "per_micro_batch" and bool(batch_statistics_layers(self.model))

    def agreement(self, ranks: ProcessGroup, weigh: Weigh, num_totals: int) -> DataParallelCoordinator:
        """What a window has to agree on with processes that hold the whole model each."""
        return DataParallelCoordinator(ranks, weigh, num_totals)

    def refuse_shards(self) -> None:
        """Raise OptionError where processes cannot hold a part of the model each."""
        if self._batch_norm is not None:
            raise OptionError(
                "fully_shard does not go with batch_norm=, whose statistics the blank turns of a rank would move."
            )

    def is_whole(self, window: Window, agreement: Coordinator) -> bool:
        """Whether all that depends on each other is in one micro-batch, which then runs as in plain torch."""
        return len(window.micro_batches) == 1

    def schedule(self, window: Window, transaction: Snapshot, agreement: Coordinator, plain: Schedule) -> Schedule:
        """How to run a window of several micro-batches.

        Args:
            window: this one.
            transaction: in which it runs.
            agreement: with other ranks.
            plain: how to run it if nothing in it were coupled.

        Raises:
            BatchNormError: layers would see a micro-batch instead of the batch, and nobody said that this is meant.
        """
        return batch_normalization.schedule_for(
            self.model,
            transaction.modules,
            self._batch_norm,
            len(window.micro_batches),
            window.num_samples,
            plain,
        )

    def accepted(self) -> Mapping[str, nn.Module] | None:
        """Layers that are known to depend on the split, by name, which a trial holds fixed; None: they cannot be."""
        if self._batch_norm is None:
            return {}
        layers = batch_statistics_layers(self.model)
        can_be_fixed = all(getattr(layer, "running_mean", None) is not None for layer in layers.values())
        return layers if can_be_fixed else None

    def judge(self, is_content: bool) -> None:
        """Look at what was seen of the self-check's runs besides gradients.

        Args:
            is_content: whether the self-check has found that parts fit the whole.

        Raises:
            GradfoldError: it will not go together in a window.
        """

    def explain(self, error: NotDecomposableError) -> NotDecomposableError:
        """What the self-check has found, in the user's words."""
        return error


class ExactCoupling(Coupling):
    """Samples that share the statistics of BatchNorm over the whole window, of all ranks."""

    find_culprit = staticmethod(uncoupled.find_offender)

    def __init__(self, model: nn.Module, loss_fn: LossFn, is_collated: bool) -> None:
        super().__init__(model, loss_fn, "exact")
        self._normalized = InputDependence(is_collated)
        self.tried = uncoupled.watched(loss_fn, self._normalized)

    def agreement(self, ranks: ProcessGroup, weigh: Weigh, num_totals: int) -> DataParallelCoordinator:
        """They also meet at every BatchNorm."""
        return (SynchronizedCoordinator if ranks.size > 1 else DataParallelCoordinator)(ranks, weigh, num_totals)

    def is_whole(self, window: Window, agreement: Coordinator) -> bool:
        """Not so where other ranks have rows in the same statistics."""
        return len(window.micro_batches) == 1 and not isinstance(agreement, SynchronizedCoordinator)

    def schedule(self, window: Window, transaction: Snapshot, agreement: Coordinator, plain: Schedule) -> Schedule:
        """In lock-step."""
        return exact_batch_norm.schedule_for(window, agreement, self._normalized)

    def accepted(self) -> Mapping[str, nn.Module]:
        """Layers with running statistics; the others are fixed in what is tried."""
        layers = batch_statistics_layers(self.model)
        fixed = {name: layer for name, layer in layers.items() if getattr(layer, "running_mean", None) is not None}
        self._normalized.names.clear()
        self._normalized.names.update({id(layer.running_mean): name for name, layer in fixed.items()})
        return fixed

    def judge(self, is_content: bool) -> None:
        """Whether every BatchNorm normalizes rows."""
        self._normalized.judge(is_content)


class TwoPhaseCoupling(Coupling):
    """Samples that are compared with each other by a `TwoPhaseLoss`."""

    tries_loss = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: TwoPhaseLoss,
        batch_norm: BatchNormOption,
        compute: torch.dtype | None,
        raises: bool,
    ) -> None:
        self._riders = NonDifferentiableStatistics(loss_fn.combine)
        super().__init__(model, probe_of(loss_fn, self._riders.note), batch_norm)
        self._loss_fn = loss_fn
        self._phases = Phases(loss_fn, compute)
        self._raises = raises

    def refuse_shards(self) -> None:
        """Raise OptionError: sweeps would have to be in step."""
        raise OptionError(
            "fully_shard does not go with a TwoPhaseLoss, whose sweeps would have to gather parameters in step on all "
            "ranks. Use DistributedDataParallel."
        )

    def is_whole(self, window: Window, agreement: Coordinator) -> bool:
        """Not so where other ranks have statistics in the same loss."""
        return len(window.micro_batches) == 1 and not isinstance(agreement, DataParallelCoordinator)

    def schedule(self, window: Window, transaction: Snapshot, agreement: Coordinator, plain: Schedule) -> Schedule:
        """In two phases."""
        inner = plain
        if len(window.micro_batches) > 1:
            inner = super().schedule(window, transaction, agreement, plain)
        if isinstance(inner, Cautious):  # it begins again as a whole
            inner = one_after_another
        return self._phases.schedule(window, transaction, agreement, inner, self._raises)

    def judge(self, is_content: bool) -> None:
        """Whether labels, too, are those of rows."""
        self._riders.judge(is_content, {self._phases.compute, *dtypes_of(self.model)})

    def explain(self, error: NotDecomposableError) -> NotDecomposableError:
        """In words about statistics, not about the probe."""
        return explain(self._loss_fn, error)


def find_coupling(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    weight: WeightOption,
    batch_norm: BatchNormOption,
    on_non_finite: str,
    compute: torch.dtype | None,
    is_scaled: bool,
    is_in_order: bool,
    is_collated: bool,
) -> Coupling:
    """The coupling that the options of an accumulator mean.

    Args:
        model: that is trained.
        loss_fn: as it is run.
        weight: as for `Accumulator`; the next two also.
        batch_norm: likewise.
        on_non_finite: likewise.
        compute: autocast's dtype around `loss_fn`.
        is_scaled: whether a loss scaler decides on what is not finite.
        is_in_order: whether micro-batches take the rows as they come, with the padding that they have.
        is_collated: whether micro-batches are collated one by one.

    Raises:
        OptionError: options do not go together.
    """
    if isinstance(loss_fn, TwoPhaseLoss):
        check_options(weight, batch_norm, on_non_finite)
        if loss_fn.combine == "concatenate" and not is_in_order:
            raise OptionError(
                "a TokenBudget takes rows in another order, in which the loss of a TwoPhaseLoss would see them. Give a "
                'number of rows as micro_batch_size, or statistics that are sums (combine="sum").'
            )
        raises = on_non_finite == "raise" and not is_scaled
        return TwoPhaseCoupling(model, loss_fn, batch_norm, compute, raises)
    if batch_norm == "exact":
        exact_batch_norm.check_goes_with(on_non_finite)
        if not is_in_order:
            raise OptionError(
                'batch_norm="exact" does not go with a TokenBudget: padding may be in the statistics of the batch, and '
                "the budget leaves most of it out. Give a number of rows as micro_batch_size."
            )
        return ExactCoupling(model, loss_fn, is_collated)
    return Coupling(model, loss_fn, batch_norm)


class Opening:
    """Opens the windows of an accumulator.

    Args:
        model: that is trained.
        weight: as for `Accumulator`.
        back_propagate: the backward pass.
        coupling: of samples.
        cutting: that made the micro-batches.
        self_check: the guard of the first window, if there is to be one.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: WeightOption,
        back_propagate: BackPropagation,
        coupling: Coupling,
        cutting: MicroBatcher,
        self_check: SelfCheck | None,
    ) -> None:
        self._model = model
        self._weight = weight
        self._back_propagate = back_propagate
        self._coupling = coupling
        self._cutting = cutting
        self._self_check = self_check
        self._warned_of: set[str] = set()

    def schedule(self, batch: Batch, transaction: Snapshot, agreement: Coordinator, window: Window) -> Schedule:
        """How to run a window that begins, also once more, after a look at it.

        Raises:
            GradfoldError: it cannot be run.
        """
        if not window.micro_batches:  # all were left out, but those of other ranks were not
            return agreement.around(one_after_another, window)
        self._check_padding(window, agreement)
        is_new_size = self._cutting.largest(window.micro_batches) > self._cutting.fitting.proven
        plain = Cautious(transaction) if is_new_size else self._plain(window)
        if self._coupling.is_whole(window, agreement):
            return agreement.around(plain, window)
        self._check_hooks(transaction.parameters)
        schedule = self._coupling.schedule(window, transaction, agreement, plain)
        self._look(batch, transaction.modules, agreement, window, schedule is plain)
        return agreement.around(schedule, window)

    def _plain(self, window: Window) -> Schedule:
        by_tokens = self._cutting.by_tokens
        if by_tokens is None:
            return one_after_another
        return by_tokens.timed(one_after_another, window.micro_batches, window.device)

    def _check_padding(self, window: Window, agreement: Coordinator) -> None:
        """Once, whether the model gives the same with less padding."""
        by_tokens = self._cutting.by_tokens
        if by_tokens is not None:
            can_check = self._self_check is not None and agreement.can_replay
            check_once(
                by_tokens, self._model, self._coupling.tried, self._weight, self._back_propagate, window, can_check
            )

    def _check_hooks(self, parameters: Sequence[nn.Parameter]) -> None:
        refuse_post_accumulate_hooks(self._model, parameters)
        named = parameters_with_hooks(self._model, parameters)
        if named:
            warn_of_hooks(named, self._warned_of)

    def _look(
        self, batch: Batch, modules: Sequence[nn.Module], agreement: Coordinator, window: Window, is_plain: bool
    ) -> None:
        """Have the first micro-batch tried out, where that is due."""
        check = self._self_check
        if check is None or window.is_looked_at or not agreement.can_try:
            return
        window.is_looked_at = True
        if not check.is_due(window.micro_batches, modules):
            return
        window.weights.arrive()  # another rank may have failed, which is not for the self-check to see
        fixed = self._coupling.accepted()
        if fixed is None:
            return
        dropouts = keyed_dropout.counter_based_layers(modules)
        try:
            with keyed_dropout.unkeyed(dropouts):
                window.after_first = check.look(
                    window.micro_batches,
                    window.weights,
                    window.device,
                    is_plain and not dropouts,
                    self._cutting.collate_rows(batch),
                    fixed.values(),
                )
        except NotDecomposableError as error:
            explained = self._coupling.explain(error)
            if explained is error:
                raise
            raise explained from error
        self._coupling.judge(check.is_content)


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
            with one entry per row are concatenated in the batch's own order. For losses that compare the rows of a
            batch, a `TwoPhaseLoss`.
        micro_batch_size: rows to run at once, at most; the batch is cut into nearly equal parts. None: as it is given.
            A `TokenBudget`: padded tokens to run at once, in micro-batches of rows of like length.
            Where memory runs out, half as many are run from there on (see `WindowResult.recoveries`), so that with None
            a batch of any size trains; after some hundred quiet windows more are tried again. "auto" or an `Auto` finds
            the fastest size of those that fit, in a few seconds of the first window (see `micro_batch_choice`).
        weight: what the mean is over: "samples", `token_count(...)`, or a callable that takes a micro-batch (still on
            the host, collated) and gives a number; or a dict of these by the name of the loss term or metric (a bare
            loss is called "loss"). A metric without a weight of its own takes that of a bare loss, else samples.
        collate: given, a batch is a list of samples, and each micro-batch is `collate(samples)`.
        precision: None leaves autocast and loss scaling to you; "bf16" and "fp16" run `loss_fn` under autocast, "fp16"
            with a loss scaler (`grad_scaler`); a `Precision` sets each part. Parameters in float16 or bfloat16 get
            gradients that were summed in float32, unless a `Precision` says otherwise.
        batch_norm: None refuses windows of several micro-batches where BatchNorm layers normalize by batch
            statistics; "exact" normalizes by the whole batch, of all ranks: forward passes run in lock-step, and what
            they save waits in host memory; "per_micro_batch" normalizes by micro-batch and advances running statistics
            once per window.
        on_non_finite: where a gradient is NaN or infinite: "raise" names the first micro-batch to blame;
            "skip_update" leaves no gradient at all, so that `optimizer.step()` does nothing; "skip_micro_batch" leaves
            out the micro-batches to blame, and their weight. A loss scaler decides instead, where there is one.
        backward: what to call instead of `loss.backward(gradient=...)`: `accelerator.backward`, `fabric.backward`,
            a LightningModule's `self.manual_backward`.
        ranks: None finds the processes that train together in the model: DistributedDataParallel (gradients are summed
            once per window) or `fully_shard` (once per micro-batch; "reduce_once": once per window, at the cost of
            whole gradients until then, which for n ranks is n times the bytes of a rank's own). "alone": this process
            trains by itself. Weights are summed over all ranks.
        self_check: whether the first window with several micro-batches is tried out for a gradient that is not the
            mean of its parts'. It raises on proof, warns once where it cannot know, costs two micro-steps, once, and
            leaves no trace.

    Attributes:
        num_windows: batches so far.

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
        micro_batch_size: MicroBatchSize = None,
        weight: WeightOption = "samples",
        collate: Collate | None = None,
        precision: PrecisionOption = None,
        batch_norm: BatchNormOption = None,
        on_non_finite: OnNonFinite = "raise",
        backward: BackwardFn | None = None,
        ranks: DistributedOption = None,
        self_check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
        for name, function in (("loss_fn", loss_fn), ("collate", collate), ("backward", backward)):
            if not callable(function) and (function is not None or name == "loss_fn"):
                raise OptionError(f"{name} is a {type(function).__name__}; expected a callable.")
        check_option(weight)
        batch_normalization.check_option(batch_norm)
        check_on_non_finite(on_non_finite)
        sync.check_option(ranks)
        self.model = model
        self.num_windows = 0
        self.loss_fn = loss_fn
        self.weight = weight
        self.collate = collate
        self.batch_norm = batch_norm
        self.ranks = ranks
        self.on_non_finite = on_non_finite
        self.precision = read_option(precision, model)
        if self.precision.is_scaled and backward is not None:
            raise OptionError(
                "a loss scaler and backward= are both given: what backward= calls scales the loss by itself where its "
                "framework is set to float16. Leave the scaler out."
            )
        self._backward = backward
        self._backward_is_probed = False
        self._back_propagate = BackPropagation(backward, self.grad_scaler)
        self._run = wrap_loss(loss_fn, self.precision.around)
        self._weigh = partial(weigh, weight)
        self._set_aside = partial(
            GradientBuffer,
            accumulate_dtype=self.precision.accumulate_dtype,
            keep_dtype=self.precision.keep_accumulate_dtype,
        )
        self._buffers = BufferKeeper()
        self._cutting = MicroBatcher(micro_batch_size, collate, counts_samples(weight))
        self._coupling = find_coupling(
            model,
            self._run,
            weight=weight,
            batch_norm=batch_norm,
            on_non_finite=on_non_finite,
            compute=self.precision.compute,
            is_scaled=self.precision.is_scaled,
            is_in_order=self._cutting.by_tokens is None,
            is_collated=collate is not None,
        )
        tried = self._coupling.tried
        self._self_check = SelfCheck(model, tried, weight, self._back_propagate) if self_check else None
        self._opening = Opening(model, weight, self._back_propagate, self._coupling, self._cutting, self._self_check)

    def backward(self, batch: Batch) -> WindowResult:
        """Add the gradient of the loss of the whole batch to `.grad`.

        Gradients found in `.grad` are kept and added to, as by `loss.backward()`. If anything fails, the user's own
        functions and an interrupt included, `.grad`, the buffers that forward passes change and torch's random state
        are as they were. Out-of-memory errors of accelerators, of torch's CPU allocator and of Python are survived;
        the kernel's out-of-memory killer cannot be.

        Args:
            batch: tensors that agree in dim 0 (rows), in any nesting of tuples, lists, dicts, dataclasses and named
                tuples, where 0-d tensors, numbers and text are the same for every micro-batch; or a list of samples,
                with `collate`; or a window from `gradfold.windows(loader, n)`, each of whose micro-batches is a batch.
                Rows go to the device of the model's first parameter.

        Returns:
            The loss, metrics and counts of the whole batch; the device is read once, to see that loss and gradient are
            finite.

        Raises:
            BatchError: the batch cannot be cut by rows.
            ModelError: nothing to train, BatchNorm, hooks, or processes that cannot train together: the message names
                the cause. DistributedError also where another rank has failed in this window.
            LossError: `loss_fn` returned no loss, or one that is NaN or infinite; RecomputeError where a `TwoPhaseLoss`
                did not give the same twice.
            NonFiniteGradientError: the gradient is NaN or infinite, though the losses are finite.
            DoesNotFitError: one row does not fit in memory, or fewer rows than do not fit cannot be run.
            WeightError: a weight is negative, not finite or not a number, or fits no loss term.
        """
        modules = list(self.model.modules())
        reshard(modules)
        parameters = parameters_of(modules)
        device = parameters[0].device if parameters else torch.device("cpu")
        ranks = find_process_group(modules, device, self.ranks)
        agreement = self._agree(ranks, modules)
        dropouts = keyed_dropout.counter_based_layers(modules)
        keyed_dropout.refuse_options(dropouts, self.batch_norm, isinstance(agreement, FsdpCoordinator))
        with (
            agreement,
            Snapshot(self.model, modules, parameters, self._buffers, self._set_aside) as transaction,
            nullcontext() if ranks is None else without_reductions(modules),
            keyed_dropout.keyed(dropouts, self.num_windows, device) if dropouts else nullcontext() as keys,
        ):
            check_trainable(self.model, parameters)
            self._probe_backward(device)
            self._choose(batch, device, _company(modules, ranks))
            micro_batches = self._cutting.cut(batch, is_first=self.num_windows == 0)
            window = Window(self.model, self._run, micro_batches, agreement.weigh, self._back_propagate, device)
            window.around = None if keys is None else keyed_dropout.RowPosition(keys, agreement.first_row)
            replay = Replay(
                transaction,
                agreement,
                partial(self._opening.schedule, batch, transaction, agreement),
                self._cutting.recut_of(batch),
                self._cutting.fitting,
                self._coupling.normalizes_parts(),
                self._coupling.find_culprit,
            )
            result = replay.run(window, None if self.precision.is_scaled else self.on_non_finite)
            agreement.conclude()
        if self._self_check is not None and len(micro_batches) > 1 and self._coupling.tries_loss:
            self._self_check.note_terms(replay.terms)
        if not result.recoveries:
            self._cutting.note_quiet(micro_batches)
        self.num_windows += 1
        return result

    @property
    def micro_batch_size(self) -> int | TokenBudget | None:
        """The size asked for, or chosen by "auto": rows or padded tokens to run at once."""
        return self._cutting.size

    @property
    def cut_by(self) -> int | TokenBudget | None:
        """`micro_batch_size`; a token budget with the cost that was measured."""
        return self._cutting.as_measured

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler. In a loop of your own: `unscale_(optimizer)`, clip, `step(optimizer)`, `update()`."""
        return self.precision.grad_scaler

    @property
    def micro_batch_choice(self) -> MicroBatchChoice | None:
        """The size that `micro_batch_size="auto"` has found, with the reason and the timings; None before that."""
        return None if self._cutting.sizer is None else self._cutting.sizer.choice

    def choose_micro_batch(self, batch: Batch) -> MicroBatchChoice:
        """Find the size now, for batches like this one, rather than in the first `backward`; leaves no trace.

        Of several ranks each finds its own, and waits for no other; under fully_shard all have to come, and find the
        same.

        Raises:
            OptionError: the micro-batch size was given.
        """
        modules = list(self.model.modules())
        reshard(modules)
        parameters = parameters_of(modules)
        device = parameters[0].device if parameters else torch.device("cpu")
        ranks = find_process_group(modules, device, self.ranks)
        found = self._set_aside(parameters)
        try:
            with on_its_own(modules) if ranks is not None else nullcontext():
                self._choose(batch, device, _company(modules, ranks))
        finally:
            found.put_back(self.model.parameters())
        if self.micro_batch_choice is None:
            raise OptionError(f'micro_batch_size={self.micro_batch_size}; expected "auto" or an Auto to choose one.')
        return self.micro_batch_choice

    def _choose(self, batch: Batch, device: torch.device, company: LocalGroup) -> None:
        """Find the micro-batch size, where that was asked for and is due."""
        if self._cutting.sizer is None:
            return

        def work_on(specimen: ProbeBatch) -> Work:
            of_loss = self.model, self.loss_fn, self.precision, self._back_propagate
            return Work(*of_loss, specimen, device, company, self.ranks == "reduce_once")

        with keyed_dropout.unkeyed(keyed_dropout.counter_based_layers(self.model.modules())):
            self._cutting.choose(batch, company, work_on)

    def twin(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batch_size: int | TokenBudget | None,
        *,
        collate: Collate | None,
        batch_norm: BatchNormOption,
        ranks: DistributedOption = "alone",
    ) -> Accumulator:
        """An accumulator for another model, with the same weights; to compare gradients, so nothing is checked."""
        twin = Accumulator(
            model,
            loss_fn,
            micro_batch_size=micro_batch_size,
            weight=self.weight,
            collate=collate,
            batch_norm=batch_norm,
            ranks=ranks,
            self_check=False,
        )
        if twin._cutting.by_tokens is not None:
            twin._cutting.by_tokens.is_checked = True
        return twin

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would have: the count of windows, sizes learned, the scaler."""
        return {
            "num_windows": self.num_windows,
            **self._cutting.state_dict(),
            "self_check": None if self._self_check is None else self._self_check.state_dict(),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            OptionError: this is no such state, or it has a loss scaler and this accumulator has none, or the other way
                round.
        """
        missing = {"num_windows", "fitting_size", "self_check", "grad_scaler"} - state.keys()
        if missing:
            raise OptionError(
                f"this is no state of an Accumulator: it has {sorted(state)}, {sorted(missing)} are missing."
            )
        if (state["grad_scaler"] is None) != (self.grad_scaler is None):
            there, here = ("no", "one") if state["grad_scaler"] is None else ("a", "none")
            raise OptionError(
                f"the saved state has {there} loss scaler, and this Accumulator has {here}: give it the precision= of "
                "the one saved."
            )
        self.num_windows = int(state["num_windows"])
        self._cutting.load_state_dict(state)
        if self._self_check is not None and state["self_check"] is not None:
            self._self_check.load_state_dict(state["self_check"])
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])

    def _agree(self, ranks: ProcessGroup | None, modules: Sequence[nn.Module]) -> Coordinator:
        """What this window has to agree on with other processes."""
        if ranks is None:
            return Coordinator(self._weigh)
        num_totals = 1 + (len(self.weight) if isinstance(self.weight, Mapping) else 1)
        sharded = sharded_modules(modules)
        if not sharded:
            return self._coupling.agreement(ranks, self._weigh, num_totals)
        self._coupling.refuse_shards()
        if self.on_non_finite == "skip_micro_batch" or self._backward is not None:
            raise OptionError(
                'fully_shard does not go with on_non_finite="skip_micro_batch", since no rank can run alone again, nor '
                "with backward=."
            )
        self._back_propagate.factor = divide_factor(sharded, ranks.size)
        reduces_once = self.ranks == "reduce_once"
        return FsdpCoordinator(
            ranks, self._weigh, num_totals, lambda is_last: set_reducing(sharded, is_last or not reduces_once)
        )

    def _probe_backward(self, device: torch.device) -> None:
        if self._backward is not None and not self._backward_is_probed:
            probe(self._backward, device)
            self._backward_is_probed = True


def _company(modules: Sequence[nn.Module], ranks: ProcessGroup | None) -> LocalGroup:
    """Who has to try micro-batch sizes together: ranks of which none can run its shards alone."""
    return LocalGroup() if ranks is None or not sharded_modules(modules) else SynchronizedGroup(ranks)
