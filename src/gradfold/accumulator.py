"""The accumulator: the front door. A global batch goes in, and its gradient stands in `.grad` afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from gradfold.batch.batching import Batching
from gradfold.batch.group_batcher import GroupBatcher
from gradfold.batch.loaded_window import LoadedWindow, MicroBatchWindow
from gradfold.batch.nesting import Batch
from gradfold.batch.split import Collate, MicroBatcher, check_size, form_of
from gradfold.batchnorm.coordinator import SynchronizedCoordinator
from gradfold.batchnorm.exact import ExactBatchNorm
from gradfold.batchnorm.per_micro_batch import PerMicroBatchNorm
from gradfold.batchnorm.policy import (
    BatchNormOption,
    batch_statistics_layers,
    check_batch_norm,
    refuse_batch_statistics,
)
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.ddp import (
    DistributedOption,
    check_distributed,
    find_process_group,
    training_alone,
    without_reductions,
)
from gradfold.distributed.fsdp import divide_factor, refuse_small_dtypes, reshard, sharded_modules
from gradfold.distributed.overlap import OverlappedCoordinator, refuse_overlap
from gradfold.distributed.process_group import TuningGroup, is_initialized
from gradfold.distributed.settings import RankSettings
from gradfold.distributed.turns import FsdpCoordinator
from gradfold.dropout import DropoutKeys, counter_based_layers, keyed, refuse_options
from gradfold.engine.backward import BackPropagation, BackwardFn, probe
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.loss_terms import LossFn, check_loss_fn
from gradfold.engine.model_checks import check_hooks, refuse_split_dependent_layers
from gradfold.engine.recovery import OnNonFinite, check_on_non_finite, does_not_fit, run_with_recovery
from gradfold.engine.result import WindowResult
from gradfold.engine.strategy import Run, Sequential, Strategy
from gradfold.engine.window import NO_WEIGHT, Context, GraphForm, PassListener, Window
from gradfold.errors import GradfoldError, ModelError, NotDecomposableError, OptionError
from gradfold.memory.auto import Auto, MicroBatchChoice
from gradfold.memory.auto_tune import AutoTuner
from gradfold.memory.dry_run import DryRun
from gradfold.messages import warn
from gradfold.packing.token_batcher import TokenBatcher
from gradfold.packing.token_budget import TokenBudget
from gradfold.precision import LEFT_GRADIENTS, SAVED_SCALER, PrecisionOption, read_option
from gradfold.self_check.self_check import LOOK_AGAIN, SelfCheck
from gradfold.state.buffers import BufferKeeper, FrozenKeeper
from gradfold.state.gradients import GradientBuffer
from gradfold.state.saved import check_saved, loaded
from gradfold.state.snapshot import Snapshot
from gradfold.twophase.loss import TwoPhaseLoss, wrap_loss
from gradfold.twophase.strategy import TwoPhase
from gradfold.weights import WeightOption, check_option, counts_samples

__all__ = ["Accumulator"]

MicroBatchSize: TypeAlias = int | Literal["auto"] | Auto | None
DdpReduce: TypeAlias = Literal["after_last_backward", "in_last_backward"]
FsdpReduce: TypeAlias = Literal["per_micro_batch", "per_window"]

_PLAIN: AbstractContextManager[PassListener] = nullcontext(PassListener())
_ALONE = Coordinator()


class Accumulator:
    """Puts the gradient of a whole batch into `.grad`, running as many rows at once as fit.

    After `accumulator.backward(batch)`, `.grad` is, to rounding, what this would have left there:

        loss_fn(model, batch).backward()

    Args:
        model: the module whose parameters get gradients and whose buffers are kept safe. Where a step uses several
            modules, pass an `nn.ModuleList` of all of them.
        loss_fn: `(model, micro_batch) -> loss` or `-> (loss, metrics)`; it may be called again for the same rows.
            `loss` is a 0-d tensor, the mean over the micro-batch (a sum needs weight="sum"), or a dict of such
            terms, whose plain sum is the loss. `metrics` is a dict; 0-d values are combined as weighted means, values
            with one entry per row are concatenated in the batch's own order. For losses that compare the rows of a
            batch, a `TwoPhaseLoss`.
        micro_batch_size: rows to run at once: micro-batches of this size, and one of what is left; nearly equal ones
            with `batch_norm="per_micro_batch"`. None: the whole batch at once. On out-of-memory the size is halved (see
            `WindowResult.recoveries`), so with None a batch of any size trains; after some hundred windows without a
            fault a larger size is tried again. "auto" or an `Auto` finds the fastest size that fits, in a few seconds
            of the first window (see `micro_batch_choice`).
        batching: how a batch is split. None: by rows. `Grouped` and `Stacked`: by rows that belong together; `Packed`:
            by packed sequences; or a `Batching` of your own. A `TokenBudget`: by padded tokens, in micro-batches of
            rows of similar length.
        weight: what the mean is over: "samples", `token_count(...)`, or a callable that takes a micro-batch (still on
            the host, collated) and returns a number; or "sum": the losses of micro-batches add up, as a sum does, also
            one divided by a count of the whole batch (`num_items_in_batch`); or a dict of these by the name of the loss
            term or metric (an unnamed loss is called "loss"). A metric without its own weight takes that of an unnamed
            loss, but not "sum"; else samples.
        collate: given, a batch is a list of samples, and each micro-batch is `collate(samples)`.
        precision: None leaves autocast and loss scaling to you; "bf16" and "fp16" run `loss_fn` under autocast, "fp16"
            with a loss scaler (`grad_scaler`); a `Precision` sets each part. Parameters in float16 or bfloat16 get
            gradients that were summed in float32, unless a `Precision` says otherwise.
        batch_norm: None refuses windows of several micro-batches where BatchNorm layers normalize by batch
            statistics; "exact" normalizes by the whole batch, of all ranks: forward passes run in turns, and what they
            save waits in host memory; "per_micro_batch" normalizes by micro-batch and advances running statistics once
            per window.
        on_non_finite: what to do if a gradient is NaN or infinite: "raise" names the first offending micro-batch;
            "skip_update" leaves no gradient at all, so `optimizer.step()` does nothing; "skip_micro_batch" leaves out
            the offending micro-batches, and their weight. A loss scaler, where there is one, decides instead.
        backward: what to call instead of `loss.backward(gradient=...)`: `accelerator.backward`, `fabric.backward`,
            a LightningModule's `self.manual_backward`.
        distributed: None finds the processes that train together in the model: DistributedDataParallel (gradients are
            summed once per window) or `fully_shard`. False: this process trains by itself. Weights are summed over all
            ranks.
        ddp_reduce: when gradients are summed over the ranks of `DistributedDataParallel`: "after_last_backward", or
            "in_last_backward", overlapped with it. Then no micro-batch can run again on one rank alone, so an error is
            an error on all, and from the last backward pass on it ends the training.
        fsdp_reduce: when `fully_shard` modules sum gradients over ranks: "per_micro_batch", or "per_window" at the cost
            of whole gradients until then, which for n ranks is n times the bytes of a rank's own.
        self_check: whether the first window with several micro-batches is checked for a gradient that is not the mean
            of its parts'. It raises on proof, warns once if it cannot know, and costs about two micro-steps, once.

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
        batching: TokenBudget | Batching | None = None,
        weight: WeightOption = "samples",
        collate: Collate | None = None,
        precision: PrecisionOption = None,
        batch_norm: BatchNormOption = None,
        on_non_finite: OnNonFinite = "raise",
        backward: BackwardFn | None = None,
        distributed: DistributedOption = None,
        ddp_reduce: DdpReduce = "after_last_backward",
        fsdp_reduce: FsdpReduce = "per_micro_batch",
        self_check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
        check_loss_fn(loss_fn)
        for name, function in (("collate", collate), ("backward", backward)):
            if function is not None and not callable(function):
                raise OptionError(f"{name} is a {type(function).__name__}; expected a callable.")
        check_option(weight)
        check_batch_norm(batch_norm)
        check_on_non_finite(on_non_finite)
        check_distributed(distributed)
        if ddp_reduce not in ("after_last_backward", "in_last_backward"):
            raise OptionError(f'ddp_reduce={ddp_reduce!r}; expected "after_last_backward" or "in_last_backward".')
        if fsdp_reduce not in ("per_micro_batch", "per_window"):
            raise OptionError(f'fsdp_reduce={fsdp_reduce!r}; expected "per_micro_batch" or "per_window".')
        self.model = model
        self.loss_fn = loss_fn
        self.batching = batching
        self.weight = weight
        self.collate = collate
        self.batch_norm = batch_norm
        self.on_non_finite = on_non_finite
        self.distributed = distributed
        self.ddp_reduce = ddp_reduce
        self.fsdp_reduce = fsdp_reduce
        self.num_windows = 0
        self.precision = read_option(precision, model)
        if self.precision.is_scaled and backward is not None:
            raise OptionError(
                "a loss scaler is not supported with backward=: a framework that is set to float16 scales the loss by "
                "itself. Leave the scaler out."
            )
        self._backward = self._unprobed = backward
        self._back_propagate = BackPropagation(backward, self.grad_scaler)
        self._sums = self.precision.sums
        self._policy = None if self.precision.is_scaled else on_non_finite  # else the loss scaler's own
        self._run_loss = wrap_loss(loss_fn, self.precision.around)
        self._tuner = _tuner(micro_batch_size, batching)
        size = micro_batch_size if isinstance(micro_batch_size, int) else None
        counts = counts_samples(weight)
        self._token_batcher = TokenBatcher(batching, collate, counts) if isinstance(batching, TokenBudget) else None
        self._micro_batcher = self._token_batcher or self._row_batcher(size, counts)
        self._strategy = self._pick_strategy()
        self._self_check = SelfCheck(self._strategy.probe_loss) if self_check else None
        self._context = Context(model)
        self._buffers, self._frozen = BufferKeeper(), FrozenKeeper()
        self._warned_hooks: set[str] = set()
        self._passed: object = None  # the kind of window that needs no checks any more
        self._form: GraphForm | None = None  # of the loss of the last window of that kind, and the names of its terms
        self._seen_version = -1  # of the context when it was searched for counter-based dropout
        self._has_dropout = False
        self._has_seen_dropout = False  # whether it was said that torch's own was drawn beside it
        self._settings: tuple[int, RankSettings] | None = None  # of a version of the context
        self._has_warned_of_empty = False  # of a window that weighs nothing
        self._is_due = False  # whether the self-check may still have to see this window before it runs
        self._is_checked = False  # whether it has

    def _row_batcher(self, size: int | None, counts_samples: bool) -> MicroBatcher:
        if isinstance(self.batching, Batching):
            return GroupBatcher(self.batching, size, self.collate, counts_samples)
        return MicroBatcher(size, self.collate, counts_samples, is_even=self.batch_norm == "per_micro_batch")

    def backward(self, batch: Batch) -> WindowResult:
        """Add the gradient of the loss of the whole batch to `.grad`.

        Gradients found in `.grad` are kept and added to, as by `loss.backward()`. If anything fails, the user's own
        functions and an interrupt included, `.grad`, the buffers that forward passes change and torch's random state
        are as they were. Out-of-memory errors of accelerators, of torch's CPU allocator and of Python are survived;
        the kernel's out-of-memory killer cannot be.

        Args:
            batch: tensors that agree in dim 0 (rows), in any nesting of tuples, lists, dicts, dataclasses and named
                tuples, where 0-d tensors, numbers and text are the same for every micro-batch, and lists inside have
                one entry per row; or an object that can be sliced by rows (a TensorDict); or a list of samples,
                with `collate`; or a window from `gradfold.windows(loader, n)`, each of whose micro-batches is a batch.
                Rows go to the device of the model's first parameter.

        Returns:
            The loss, metrics and counts of the whole batch; the device is read once, to see that loss and gradient are
            finite.

        Raises:
            OptionError: `.grad` holds a gradient of another loss scale, from another Accumulator.
            BatchError: the batch cannot be split by rows. EmptyBatchError: it has none, on one process, or where rows
                depend on those of other ranks.
            ModelError: nothing to train, BatchNorm, hooks, or processes that cannot train together: the message names
                the cause. DistributedError also where another rank has failed in this window.
            LossError: `loss_fn` returned no loss, or one that is NaN or infinite; RecomputeError where a `TwoPhaseLoss`
                did not give the same twice.
            NonFiniteGradientError: the gradient is NaN or infinite, though the losses are finite.
            DoesNotFitError: one row does not fit in memory, or fewer rows than do not fit cannot be run.
            WeightError: a weight is negative, not finite or not a number, or fits no loss term.
        """
        context = self._update_context()
        if LEFT_GRADIENTS.is_used and self._backward is None:  # a framework may have a scaler of its own
            LEFT_GRADIENTS.check(self.model, self.precision)
        snapshot = Snapshot(context.model, context.modules, context.parameters, self._buffers, self._frozen, self._sums)
        try:
            with context.coordinator, snapshot, self._setting() as listener:
                context.check_trainable()
                if self._unprobed is not None:
                    probe(self._unprobed, context.device)
                    self._unprobed = None
                if self._tuner is not None:
                    self._tune(self._tuner, batch)
                others_have_rows = context.coordinator.num_ranks > 1 and not self._strategy.joins_ranks
                micro_batches = self._micro_batcher.split(batch, may_be_empty=others_have_rows)
                window = Window(
                    *(context, self._run_loss, micro_batches, self.weight, self._back_propagate, listener),
                    self._strategy.runs_zero_weight,
                )
                snapshot.begin()
                window = self._run(window, snapshot)
                if isinstance(listener, DropoutKeys) and not self._has_seen_dropout:
                    self._has_seen_dropout = listener.warn_of_torchs_own(snapshot.has_drawn())
                result = window.result()
                context.coordinator.commit()
                if isinstance(batch, LoadedWindow):
                    batch.finish = context.coordinator.finish
        except BaseException:  # an interrupt may have come before the first line of a roll-back, or in it
            snapshot.roll_back()
            raise
        if LEFT_GRADIENTS.is_used and self._backward is None:
            LEFT_GRADIENTS.note(context.parameters, self.precision)
        if result.recoveries:
            halved = [one.micro_batch_size for one in result.recoveries if one.action == "halved"]
            self._micro_batcher.shrink(halved)
        else:
            self._micro_batcher.learn(micro_batches)
        self.num_windows += 1
        return result

    def _run(self, window: Window, snapshot: Snapshot) -> Window:
        """Run a window until it is complete; what was halved is checked again, since it has become another one."""
        self._is_due, self._is_checked = True, False
        strategy, coordinator = self._strategy, self._context.coordinator
        run: Run = strategy.run if self._token_batcher is None else self._token_batcher.timed(strategy)
        if coordinator.runs_in_step:
            run = partial(coordinator.run_in_step, run)
        try:
            while not window.is_complete:
                self._preflight(window)
                window = run_with_recovery(window, strategy, run, snapshot, self._micro_batcher, self._policy)
        except ModelError as error:
            if not window.failed_sizes:
                raise
            raise does_not_fit(window, error) from error
        form = *sorted(window.losses.normalized), *window.form
        if form != self._form:
            self._check_form(window, form)
            self._form = form
        return window

    def _check_form(self, window: Window, form: GraphForm) -> None:
        """Look at a loss that is new, before its gradient is handed over; warn once where nothing has one."""
        if not self._has_warned_of_empty and window.is_empty:
            self._has_warned_of_empty = True
            warn(NO_WEIGHT)
        check = self._self_check if self._context.coordinator.can_probe else None
        if check is None or not self._strategy.probes_loss or window.is_undivided:
            return
        terms = tuple(window.losses.normalized)
        if check.is_new(terms, form, self._is_checked):
            self._look(check, window, terms)
            if not check.is_settled:
                self._passed = None

    # Checks before a window runs

    def _preflight(self, window: Window) -> None:
        """Check a window before it runs, unless one of its kind has passed all checks; raises where it cannot run."""
        if not window.micro_batches:  # all were left out, but those of other ranks were not
            return
        context = window.context
        is_whole = window.is_undivided
        kind = (context.version, is_whole, form_of(window.micro_batches[0].data), context.coordinator.num_ranks)
        is_known = kind == self._passed and (is_whole or not context.has_hooks())
        if is_known and (is_whole or self.num_windows not in LOOK_AGAIN):
            return
        check = self._self_check if context.coordinator.can_probe else None
        is_settled = True
        if self._token_batcher is not None:
            is_settled = self._token_batcher.check_padding(window, self._strategy.probe_loss, check is not None)
        if not is_whole:
            check_hooks(context.model, context.parameters, self._warned_hooks)
            layers = batch_statistics_layers(context.model) if self.batch_norm is None else {}
            if layers:
                at_once = max(len(part.rows) for part in window.micro_batches)
                refuse_batch_statistics(layers, at_once, context.coordinator.count_rows(window.num_samples))
            if check is not None:
                refuse_split_dependent_layers(context.model)
                is_settled &= self._check_decomposable(check, window)
        self._passed = kind if is_settled else None
        self._form = None

    def _check_decomposable(self, check: SelfCheck, window: Window) -> bool:
        """Have the first micro-batch checked, where that is due; whether nothing is left to check."""
        is_due, self._is_due = self._is_due and check.is_due(window, self.num_windows), False
        if is_due and not self._look(check, window):
            return True
        return check.is_settled

    def _look(self, check: SelfCheck, window: Window, terms: tuple[str, ...] = ()) -> bool:
        """Have a window checked; `terms`: new ones of the loss, which it has. False where it cannot be checked."""
        layers = self._strategy.split_dependent_layers(window.context)
        if layers is None:
            return False
        self._is_checked = True
        try:
            with keyed(counter_based_layers(window.context.modules), None):  # they draw as torch's do
                check.check(window, self._micro_batcher.collate_rows, layers.values(), terms)
        except NotDecomposableError as error:
            self._passed = None
            explained = self._strategy.explain(error)
            if explained is error:
                raise
            raise explained from error
        try:
            self._strategy.judge(check.is_passed)
        except GradfoldError:
            self._passed = None
            check.forget()
            raise
        return True

    # What a window runs in

    def _update_context(self) -> Context:
        """Look at the model again, and at the processes that train it."""
        context = self._context
        is_alone = self.distributed is False or not is_initialized()
        if not is_alone:
            reshard(list(self.model.modules()))  # else some of its parameters may be those that were gathered
        context.update()
        context.coordinator = _ALONE if is_alone else self._find_coordinator(context)
        return context

    def _find_coordinator(self, context: Context) -> Coordinator:
        group = find_process_group(context.modules, context.device, self.distributed)
        if group is None:
            return _ALONE
        if self._settings is None or self._settings[0] != context.version:
            self._settings = context.version, self._rank_settings()
        settings = self._settings[1]
        sharded = sharded_modules(context.modules)
        if sharded:
            reduces_once = self.fsdp_reduce == "per_window"
            return FsdpCoordinator(group, settings, divide_factor(sharded, group.size), reduces_once)
        if group.size == 1:
            return DataParallelCoordinator(group, settings)
        if self.ddp_reduce == "in_last_backward":
            self._check_overlap(context.modules)
            return OverlappedCoordinator(group, settings)
        return (SynchronizedCoordinator if self.batch_norm == "exact" else DataParallelCoordinator)(group, settings)

    def _rank_settings(self) -> RankSettings:
        """The options that all ranks must have, since they decide what is summed over them, and when."""
        precision, is_two_phase = self.precision, isinstance(self._run_loss, TwoPhaseLoss)
        return RankSettings.of(
            self.model,
            self.weight,
            is_two_phase or bool(counter_based_layers(self._context.modules)),
            loss_fn="a TwoPhaseLoss" if is_two_phase else "a loss",
            batch_norm=self.batch_norm,
            on_non_finite=self.on_non_finite,
            ddp_reduce=self.ddp_reduce,
            fsdp_reduce=self.fsdp_reduce,
            precision=(precision.compute, "scaled" if precision.is_scaled else "not scaled", self._sums.dtype),
        )

    def _check_overlap(self, modules: Sequence[nn.Module]) -> None:
        """Raise OptionError where an option is not supported with sums in the last backward pass."""
        is_two_phase = isinstance(self._run_loss, TwoPhaseLoss)
        is_skipping = self.on_non_finite == "skip_micro_batch"
        if is_two_phase or is_skipping or self.batch_norm == "exact" or self._backward is not None:
            raise OptionError(
                'ddp_reduce="in_last_backward" is not supported with a TwoPhaseLoss, batch_norm="exact", backward= or '
                'on_non_finite="skip_micro_batch", where the last backward pass of a window is none of one micro-batch.'
            )
        refuse_small_dtypes(self.model, self._sums.dtype, "DistributedDataParallel")
        refuse_overlap(modules)

    def _check_sharding(self) -> None:
        """Raise OptionError where an option is not supported with shards; warn once of what they leave unchecked."""
        if self._strategy.shards_refused:
            raise OptionError(self._strategy.shards_refused)
        if self.on_non_finite == "skip_micro_batch" or self._backward is not None:
            raise OptionError(
                'fully_shard is not supported with on_non_finite="skip_micro_batch", since no rank can run rows alone, '
                "nor with backward=."
            )
        refuse_small_dtypes(self.model, self._sums.dtype, "fully_shard")
        if self._self_check is not None:
            self._self_check = None
            warn(
                "the self-check does not run under fully_shard, since no rank can run rows alone. Check once that this "
                "loss can be accumulated, with gradfold.verify(accumulator, batch), which takes a copy without shards; "
                "self_check=False then leaves this warning out."
            )

    def _setting(self) -> AbstractContextManager[PassListener]:
        """What goes around the passes of a window: quiet reductions, and dropout that counts."""
        context = self._context
        if context.version != self._seen_version:
            self._seen_version = context.version
            self._has_dropout = bool(counter_based_layers(context.modules))
        if context.coordinator is _ALONE and not self._has_dropout:
            return _PLAIN
        return self._entered_setting(context)

    @contextmanager
    def _entered_setting(self, context: Context) -> Iterator[PassListener]:
        layers = counter_based_layers(context.modules)
        coordinator = context.coordinator
        side = self.batching.padding_side if isinstance(self.batching, TokenBudget) else None
        is_sharded = isinstance(coordinator, FsdpCoordinator)
        if is_sharded:
            self._check_sharding()
        refuse_options(layers, self.batch_norm, is_sharded, side)
        keys = DropoutKeys(layers, self.num_windows, context.device, coordinator) if layers else PassListener()
        quiet = nullcontext() if coordinator is _ALONE else without_reductions(context.modules)
        with quiet, keyed(layers, keys) if isinstance(keys, DropoutKeys) else nullcontext():
            yield keys

    def _pick_strategy(self) -> Strategy:
        """How windows run, as the options say; raises OptionError where one is not supported with another."""
        loss_fn, keeps_order = self._run_loss, self.batching is None
        if self.batch_norm == "exact" and not isinstance(loss_fn, TwoPhaseLoss):
            is_collated = self.collate is not None
            return ExactBatchNorm(loss_fn, self.on_non_finite, keeps_order=keeps_order, is_collated=is_collated)
        by_micro_batch = self.batch_norm == "per_micro_batch"
        order: Strategy = PerMicroBatchNorm(loss_fn) if by_micro_batch else Sequential(loss_fn)
        if not isinstance(loss_fn, TwoPhaseLoss):
            return order
        return TwoPhase(
            loss_fn,
            self.weight,
            self.batch_norm,
            self.on_non_finite,
            order=order,
            compute=self.precision.compute,
            raises=self.on_non_finite == "raise" and not self.precision.is_scaled,
            keeps_order=keeps_order,
        )

    # Finding a size

    def _tune(self, tuner: AutoTuner, batch: Batch) -> None:
        """Find the micro-batch size, where that is due; ranks that have to come together for it do so once."""
        context = self._context
        coordinator = context.coordinator
        group = TuningGroup()
        if isinstance(coordinator, FsdpCoordinator):
            if tuner.choice is not None:
                return
            group = TuningGroup(coordinator.group)
        piece = batch.pieces()[0] if isinstance(batch, MicroBatchWindow) else batch
        dry_run = group.attempt(lambda: DryRun.of(self, piece))
        if not tuner.is_due(dry_run.probe_batch.num_rows):
            return
        with keyed(counter_based_layers(context.modules), None):  # they draw as torch's do
            choice = tuner.tune(dry_run, self._back_propagate, group)
        self._micro_batcher.resize(choice.micro_batch_size, piece, dry_run.probe_batch.num_rows)

    def tune(self, batch: Batch) -> MicroBatchChoice:
        """Find the micro-batch size now, for batches like this one, rather than in the first `backward`.

        Each rank picks its own size, and waits for no other; under fully_shard all ranks have to come, and find the
        same.

        Raises:
            OptionError: the micro-batch size was given.
        """
        if self._tuner is None:
            given = self.micro_batch_size if self.batching is None else self.batching
            raise OptionError(f'micro_batch_size={given}; expected "auto" or an Auto, to tune it.')
        context = self._update_context()
        found = GradientBuffer(context.parameters)
        try:
            found.open()
            with training_alone(context.modules):
                self._tune(self._tuner, batch)
        finally:
            found.put_back(self.model.parameters())
        assert self._tuner.choice is not None
        return self._tuner.choice

    @property
    def micro_batch_size(self) -> int | None:
        """Rows (padded tokens with a `TokenBudget`) to run at once, as asked for or as found by "auto"."""
        return self._micro_batcher.size

    @property
    def token_budget(self) -> TokenBudget | None:
        """The budget of `batching=`, with the size that "auto" has found and the cost that was measured."""
        return None if self._token_batcher is None else self._token_batcher.budget

    @property
    def micro_batch_choice(self) -> MicroBatchChoice | None:
        """The size that `micro_batch_size="auto"` has found, with the reason and the timings; None before that."""
        return None if self._tuner is None else self._tuner.choice

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler. In a custom loop: `unscale_(optimizer)`, clip, `step(optimizer)`, `update()`."""
        return self.precision.grad_scaler

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue as this one would have: window count, sizes learned, loss scaler."""
        choice = self.micro_batch_choice
        return {
            "num_windows": self.num_windows,
            "micro_batcher": self._micro_batcher.state_dict(),
            "micro_batch_choice": None if choice is None else choice.to_json(),
            "self_check": None if self._self_check is None else self._self_check.state_dict(),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
        }

    def check_state(self, state: Mapping[str, Any], place: str = "state") -> None:
        """Raise OptionError where `load_state_dict` would; `place` is how to reach the state, for the message."""
        name, batcher = "an Accumulator", self._micro_batcher
        expected = {
            "num_windows": "count",
            "micro_batcher": MicroBatcher.saved,
            "micro_batch_choice": (None, MicroBatchChoice.saved),
            "self_check": (None, SelfCheck.saved),
            "grad_scaler": (None, {}),
        }
        check_saved(state, expected, name, place)
        if (state["grad_scaler"] is None) != (self.grad_scaler is None):
            saved, here = ("no", "one") if state["grad_scaler"] is None else ("a", "none")
            raise OptionError(
                f"the saved state has {saved} loss scaler, and this Accumulator has {here}: pass the precision= of the "
                "saved one."
            )
        if state["micro_batcher"]["unit"] == batcher.unit:
            check_saved(state["micro_batcher"], batcher.saved, name, f"{place}['micro_batcher']")
        if state["micro_batch_choice"] is not None:
            check_saved(state["micro_batcher"], {"size": "size"}, name, f"{place}['micro_batcher']")
        if type(self.grad_scaler) is torch.amp.GradScaler and self.grad_scaler.is_enabled():
            check_saved(state["grad_scaler"], SAVED_SCALER, name, f"{place}['grad_scaler']")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Everything is checked before anything changes.

        Raises:
            OptionError: it is not a state of an Accumulator, with the place where it is not, or only one of both has a
                loss scaler.
        """
        self.check_state(state)
        with loaded(self.grad_scaler, state["grad_scaler"], "state['grad_scaler']"):
            self.num_windows = state["num_windows"]
            choice: Any = state["micro_batch_choice"]
            tuner = (
                self._tuner if choice is not None else None
            )  # a size that the user gives counts more than a saved one
            if self._micro_batcher.load_state_dict(state["micro_batcher"], with_size=tuner is not None) and tuner:
                tuner.choice = MicroBatchChoice.from_json(choice)
            if self._self_check is not None and state["self_check"] is not None:
                self._self_check.load_state_dict(state["self_check"])


def _tuner(micro_batch_size: MicroBatchSize, batching: TokenBudget | Batching | None) -> AutoTuner | None:
    if isinstance(micro_batch_size, TokenBudget):
        raise OptionError(
            "micro_batch_size is a TokenBudget; expected rows. Pass it as batching=: Accumulator(..., batching=budget)."
        )
    if isinstance(batching, TokenBudget):
        if micro_batch_size is not None:
            raise OptionError(
                f"micro_batch_size={micro_batch_size!r} and batching= are both given; a TokenBudget says how much runs "
                "at once by its max_tokens. Leave micro_batch_size out."
            )
        return AutoTuner(Auto()) if batching.max_tokens == "auto" else None
    if batching is not None and not isinstance(batching, Batching):
        raise OptionError(
            f"batching is a {type(batching).__name__}; expected a TokenBudget, Grouped, Stacked, a Batching of your "
            "own, or None."
        )
    if micro_batch_size == "auto":
        return AutoTuner(Auto())
    if isinstance(micro_batch_size, Auto):
        return AutoTuner(micro_batch_size)
    check_size(micro_batch_size)
    return None
