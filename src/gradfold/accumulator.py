"""The accumulator: the front door. A global batch goes in, and its gradient stands in `.grad` afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from gradfold import split, sync
from gradfold.agreement import Alone, Together
from gradfold.backward import BackPropagation, BackwardFn, probe
from gradfold.batch import Batch
from gradfold.buffers import BufferKeeper
from gradfold.coupled import batch_norm as batch_normalisation
from gradfold.coupled import exact_batch_norm, keyed_dropout
from gradfold.coupled.batch_norm import BatchNormOption
from gradfold.coupled.company import InLockStep
from gradfold.coupled.phases import Phases, check_options
from gradfold.coupled.two_phase import TwoPhaseLoss, explain, probe_of, wrap_loss
from gradfold.errors import BatchError, NotDecomposableError, OptionError, WindowError
from gradfold.fitting_size import FittingSize
from gradfold.gradients import SetAside, check_trainable, parameters_of
from gradfold.hooks import parameters_with_hooks, refuse_post_accumulate_hooks, warn_of_hooks
from gradfold.loader import LoopWindow, Window
from gradfold.loss import LossFn
from gradfold.memory.auto import Auto, MicroBatchSize, read_auto
from gradfold.memory.choice import MicroBatchChoice
from gradfold.memory.sizer import Sizer, Work
from gradfold.memory.specimen import Specimen
from gradfold.padding_check import check_once
from gradfold.precision import PrecisionOption, read_option
from gradfold.ranks import Ranks
from gradfold.replay import Cautious, OnNonFinite, Replay, check_on_non_finite
from gradfold.rows import Rows
from gradfold.self_check import SelfCheck
from gradfold.sharded import Sharded
from gradfold.split import Collate, CollateRows, MicroBatch
from gradfold.sync import RanksOption, find_ranks, without_reductions
from gradfold.token_budget import TokenBudget
from gradfold.token_split import TokenSplit
from gradfold.transaction import Transaction
from gradfold.weight import WeightOption, check_option, counts_samples, weigh
from gradfold.window import AfterFirst, OpenWindow, Schedule, WindowResult, one_after_another

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
        batch_norm: None refuses windows of several micro-batches where BatchNorm layers normalise by batch
            statistics; "exact" normalises by the whole batch, of all ranks: forward passes run in lock-step, and what
            they save waits in host memory; "per_micro_batch" normalises by micro-batch and advances running statistics
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
        ranks: RanksOption = None,
        self_check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
        for name, function in (("loss_fn", loss_fn), ("collate", collate), ("backward", backward)):
            if not callable(function) and (function is not None or name == "loss_fn"):
                raise OptionError(f"{name} is a {type(function).__name__}; expected a callable.")
        self._sizer: Sizer | None = None
        if isinstance(micro_batch_size, (str, Auto)):
            self._sizer = Sizer(read_auto(micro_batch_size))
            micro_batch_size = None  # until the first batch
        self._token_split = TokenSplit(micro_batch_size) if isinstance(micro_batch_size, TokenBudget) else None
        if not isinstance(micro_batch_size, TokenBudget):
            split.check_size(micro_batch_size)
        check_option(weight)
        batch_normalisation.check_option(batch_norm)
        check_on_non_finite(on_non_finite)
        if batch_norm == "exact":
            exact_batch_norm.check_goes_with(on_non_finite)
        self.model = model
        self.micro_batch_size: int | TokenBudget | None = micro_batch_size
        self.num_windows = 0
        self.loss_fn = loss_fn
        self.weight = weight
        self.collate = collate
        self.batch_norm = batch_norm
        sync.check_option(ranks)
        self.ranks = ranks
        self._num_weights = len(weight) if isinstance(weight, Mapping) else 1
        self.on_non_finite = on_non_finite
        self.precision = read_option(precision, model)
        if self.precision.is_scaled and backward is not None:
            raise OptionError(
                "a loss scaler and backward= are both given: what backward= calls scales the loss by itself where its "
                "framework is set to float16. Leave the scaler out."
            )
        self._backward = backward
        self._backward_is_probed = False
        self._hooks_warned_of: set[str] = set()
        self._back_propagate = BackPropagation(backward, self.grad_scaler)
        self._run = wrap_loss(loss_fn, self.precision.around)
        self._phases: Phases | None = None
        checked = self._run
        if isinstance(self._run, TwoPhaseLoss):
            check_options(weight, batch_norm, on_non_finite)
            self._phases = Phases(self._run, self.precision.compute)
            checked = probe_of(self._run)
        self._weigh = partial(weigh, weight)
        self._set_aside = partial(
            SetAside,
            accumulate_dtype=self.precision.accumulate_dtype,
            keep_dtype=self.precision.keep_accumulate_dtype,
        )
        self._buffers = BufferKeeper()
        self._fitting_size = FittingSize()
        tried = exact_batch_norm.uncoupled(checked) if batch_norm == "exact" else checked
        self._self_check = SelfCheck(model, tried, weight, self._back_propagate) if self_check else None
        self._is_looked_at = False  # in the window that is running

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
                the cause. RanksError also where another rank has failed in this window.
            LossError: `loss_fn` returned no loss, or one that is NaN or infinite.
            NonFiniteGradientError: the gradient is NaN or infinite, though the losses are finite.
            DoesNotFitError: one row does not fit in memory, or fewer rows than do not fit cannot be run.
            WeightError: a weight is negative, not finite or not a number, or fits no loss term.
        """
        modules = list(self.model.modules())
        parameters = parameters_of(modules)
        device = parameters[0].device if parameters else torch.device("cpu")
        self._is_looked_at = False
        ranks = find_ranks(modules, device, self.ranks)
        agreement = self._agree(ranks, modules)
        dropouts = keyed_dropout.keyed_layers(modules)
        keyed_dropout.refuse_options(dropouts, self.batch_norm, isinstance(agreement, Sharded))
        with (
            agreement,
            Transaction(self.model, modules, parameters, self._buffers, self._set_aside) as transaction,
            nullcontext() if ranks is None else without_reductions(modules),
            keyed_dropout.keyed(dropouts, self.num_windows, device) as keys,
        ):
            check_trainable(self.model, parameters)
            self._probe_backward(device)
            if self._sizer is not None:
                self._size(self._sizer, batch, device, agreement.can_replay)
            micro_batches = self._cut(batch)
            window = OpenWindow(self.model, self._run, micro_batches, agreement.weigh, self._back_propagate, device)
            window.around = None if keys is None else keyed_dropout.Placed(keys, agreement.first_row)
            prepare = partial(self._prepare, transaction, agreement, batch, modules, parameters)
            recut = partial(split.recut, collate_rows=self._collate_rows(batch))
            normalises = self.batch_norm == "per_micro_batch" and bool(
                batch_normalisation.batch_statistics_layers(self.model)
            )
            replay = Replay(transaction, agreement, prepare, recut, self._fitting_size, normalises)
            replay.is_joint = self.batch_norm == "exact"
            result = replay.run(window, None if self.precision.is_scaled else self.on_non_finite)
            agreement.conclude()
        if self._self_check is not None and len(micro_batches) > 1 and self._phases is None:
            self._self_check.note_terms(replay.terms)
        if not result.recoveries:
            self._fitting_size.note_quiet(max(part.size for part in micro_batches), self._asked_size)
            if self._token_split is not None:
                self._token_split.settle()
        self.num_windows += 1
        return result

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler. In a loop of your own: `unscale_(optimizer)`, clip, `step(optimizer)`, `update()`."""
        return self.precision.grad_scaler

    @property
    def micro_batch_choice(self) -> MicroBatchChoice | None:
        """The size that `micro_batch_size="auto"` has found, with the reason and the timings; None before that."""
        return None if self._sizer is None else self._sizer.choice

    def choose_micro_batch(self, batch: Batch) -> MicroBatchChoice:
        """Find the size now, for batches like this one, rather than in the first `backward`; leaves no trace.

        Raises:
            OptionError: the micro-batch size was given.
        """
        if self._sizer is None:
            raise OptionError(f'micro_batch_size={self.micro_batch_size}; expected "auto" or an Auto to choose one.')
        modules = list(self.model.modules())
        parameters = parameters_of(modules)
        device = parameters[0].device if parameters else torch.device("cpu")
        found = self._set_aside(parameters)
        try:
            with without_reductions(modules) if find_ranks(modules, device, self.ranks) else nullcontext():
                self._size(self._sizer, batch, device, not sync.sharded_modules(modules))
        finally:
            found.put_back(self.model.parameters())
        assert self._sizer.choice is not None
        return self._sizer.choice

    def _size(self, sizer: Sizer, batch: Batch, device: torch.device, can_replay: bool) -> None:
        """Ask for a micro-batch size where one is due."""
        if not can_replay:
            raise OptionError(
                'micro_batch_size="auto" tries sizes out, which no rank can do alone under fully_shard. Give a number; '
                "gradfold.plan on the model before it is sharded says what fits."
            )
        of = batch[0] if isinstance(batch, Window) and batch else batch
        specimen = Specimen(of, self.collate)
        if sizer.is_due(specimen.num_rows):
            work = Work(self.model, self.loss_fn, self.precision, self._back_propagate, specimen, device)
            self.micro_batch_size = sizer.choose(work).micro_batch_size

    def twin(self, model: nn.Module, loss_fn: LossFn, micro_batch_size: int | TokenBudget | None) -> Accumulator:
        """An accumulator for another model in this process alone, with the same weights, collation and BatchNorm."""
        twin = Accumulator(
            model,
            loss_fn,
            micro_batch_size=micro_batch_size,
            weight=self.weight,
            collate=self.collate,
            batch_norm=self.batch_norm,
            ranks="alone",
            self_check=False,
        )
        if twin._token_split is not None:
            twin._token_split.is_checked = True  # who asks for a twin compares gradients
        return twin

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would have: the count of windows, sizes learned, the scaler."""
        return {
            "num_windows": self.num_windows,
            "fitting_size": self._fitting_size.state_dict(),
            "self_check": None if self._self_check is None else self._self_check.state_dict(),
            "token_split": None if self._token_split is None else self._token_split.state_dict(),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "micro_batch_choice": None if self.micro_batch_choice is None else self.micro_batch_choice.to_json(),
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
        choice = state.get("micro_batch_choice")
        if self._sizer is not None and choice is not None:  # another one would cut batches otherwise
            self._sizer.choice = MicroBatchChoice.from_json(choice)
            self.micro_batch_size = self._sizer.choice.micro_batch_size
        self.num_windows = int(state["num_windows"])
        self._fitting_size.load_state_dict(state["fitting_size"])
        if self._self_check is not None and state["self_check"] is not None:
            self._self_check.load_state_dict(state["self_check"])
        if self._token_split is not None and state.get("token_split") is not None:
            self._token_split.load_state_dict(state["token_split"])
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])

    def _cut(self, batch: Batch) -> list[MicroBatch]:
        if isinstance(batch, LoopWindow):
            raise WindowError(
                "this window has a backward of its own; for accumulator.backward(window) leave model= out: "
                "gradfold.windows(loader, n)."
            )
        if isinstance(batch, Window):
            if not batch:
                raise BatchError("the window holds no micro-batches. Skip empty windows.")
            if self._token_split is not None and self.collate is not None:  # one pool of samples to choose from
                return self._cut([sample for part in batch for sample in part])
            return split.join_batches(self._cut(part) for part in batch)
        size = self._fitting_size.limit(self._asked_size)
        if self.collate is not None:
            if self._token_split is None:
                micro_batches = split.split_samples(batch, size, self.collate)
            else:
                micro_batches = self._token_split.cut(batch, size, self.collate, is_first=self.num_windows == 0)
            if counts_samples(self.weight):
                split.check_collated(micro_batches)
            return micro_batches
        if self._token_split is not None:
            return self._token_split.cut(batch, size, None, is_first=self.num_windows == 0)
        return split.split_rows(batch, size)

    def _prepare(
        self,
        transaction: Transaction,
        agreement: Alone,
        batch: Batch,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        window: OpenWindow,
    ) -> Schedule:
        """How to run a window that begins, after a look at it."""
        if not window.micro_batches:  # all were left out, but those of other ranks were not
            return agreement.around(one_after_another, window)
        if self._token_split is not None:
            can_check = self._self_check is not None and agreement.can_replay
            check_once(self._token_split, self.model, self._run, self.weight, self._back_propagate, window, can_check)
        is_new_size = max(part.size for part in window.micro_batches) > self._fitting_size.proven
        plain = Cautious(transaction) if is_new_size else self._plain_schedule(window)
        num_micro_batches = len(window.micro_batches)
        if num_micro_batches == 1 and not isinstance(agreement, InLockStep):
            return agreement.around(self._in_phases(plain, transaction, agreement, window), window)
        self._check_hooks(parameters)
        if self.batch_norm == "exact":
            schedule: Schedule = exact_batch_norm.schedule_for(window, agreement)
        else:
            schedule = batch_normalisation.schedule_for(
                self.model, modules, self.batch_norm, num_micro_batches, window.num_samples, plain
            )
        schedule = self._in_phases(schedule, transaction, agreement, window)
        if self._self_check is not None and not self._is_looked_at and agreement.can_try:
            self._is_looked_at = True
            if self._self_check.is_due(window.micro_batches, modules):
                dropouts = keyed_dropout.keyed_layers(modules)
                with keyed_dropout.unkeyed(dropouts):
                    is_plain = schedule is plain and not dropouts
                    window.after_first = self._look(self._self_check, batch, window, is_plain)
        return agreement.around(schedule, window)

    @property
    def cut_by(self) -> int | TokenBudget | None:
        """`micro_batch_size`; a token budget with the cost that was measured."""
        return self.micro_batch_size if self._token_split is None else self._token_split.budget_as_measured

    @property
    def _asked_size(self) -> int | None:
        """The user's limit, in rows or in padded tokens."""
        size = (
            self.micro_batch_size.max_tokens
            if isinstance(self.micro_batch_size, TokenBudget)
            else self.micro_batch_size
        )
        assert size != "auto"
        return size

    def _plain_schedule(self, window: OpenWindow) -> Schedule:
        if self._token_split is None:
            return one_after_another
        return self._token_split.timed(one_after_another, window.micro_batches, window.device)

    def _in_phases(
        self, schedule: Schedule, transaction: Transaction, agreement: Alone, window: OpenWindow
    ) -> Schedule:
        """The schedule, or that of a two-phase loss around it; one process runs a whole batch in one phase."""
        if self._phases is None or (len(window.micro_batches) == 1 and not isinstance(agreement, Together)):
            return schedule
        raises = self.on_non_finite == "raise" and not self.precision.is_scaled
        inner = one_after_another if isinstance(schedule, Cautious) else schedule  # it begins again as a whole
        return self._phases.schedule(window, transaction, agreement, inner, raises)

    def _agree(self, ranks: Ranks | None, modules: Sequence[nn.Module]) -> Alone:
        """What this window has to agree on with other processes."""
        if ranks is None:
            return Alone(self._weigh)
        sharded = sync.sharded_modules(modules)
        if not sharded:
            kind = InLockStep if self.batch_norm == "exact" and ranks.size > 1 else Together
            return kind(ranks, self._weigh, self._num_weights + 1)
        if self._phases is not None:
            raise OptionError(
                "fully_shard does not go with a TwoPhaseLoss, whose sweeps would have to gather parameters in step on "
                "all ranks. Use DistributedDataParallel."
            )
        if self.on_non_finite == "skip_micro_batch" or self._backward is not None or self.batch_norm is not None:
            raise OptionError(
                'fully_shard does not go with on_non_finite="skip_micro_batch", since no rank can run alone again, nor '
                "with backward=, nor with batch_norm=, whose statistics blank turns would move."
            )
        self._back_propagate.factor = sync.divide_factor(sharded, ranks.size)
        reduces_once = self.ranks == "reduce_once"
        return Sharded(
            ranks,
            self._weigh,
            self._num_weights + 1,
            lambda is_last: sync.set_reducing(sharded, is_last or not reduces_once),
        )

    def _look(self, self_check: SelfCheck, batch: Batch, window: OpenWindow, is_plain: bool) -> AfterFirst | None:
        window.weights.arrive()  # another rank may have failed, which is not for the self-check to see
        layers: Mapping[str, nn.Module] = {}
        if self.batch_norm is not None:  # what is known not to fit, and was accepted
            layers = batch_normalisation.batch_statistics_layers(self.model)
            without = [name for name, layer in layers.items() if getattr(layer, "running_mean", None) is None]
            if without and self.batch_norm != "exact":
                return None
            layers = {name: layer for name, layer in layers.items() if name not in without}
        collate_rows = self._collate_rows(batch)
        frozen = layers.values()
        try:
            return self_check.look(window.micro_batches, window.weights, window.device, is_plain, collate_rows, frozen)
        except NotDecomposableError as error:
            if not isinstance(self.loss_fn, TwoPhaseLoss):
                raise
            raise explain(self.loss_fn, error) from error

    def _collate_rows(self, batch: Batch) -> CollateRows | None:
        if self.collate is None:
            return None
        return partial(_collate_rows, self.collate, batch)

    def _probe_backward(self, device: torch.device) -> None:
        if self._backward is not None and not self._backward_is_probed:
            probe(self._backward, device)
            self._backward_is_probed = True

    def _check_hooks(self, parameters: Sequence[nn.Parameter]) -> None:
        refuse_post_accumulate_hooks(self.model, parameters)
        named = parameters_with_hooks(self.model, parameters)
        if named:
            warn_of_hooks(named, self._hooks_warned_of)


def _collate_rows(collate: Collate, batch: Batch, rows: Rows) -> Batch:
    samples = [sample for part in batch for sample in part] if isinstance(batch, Window) else batch
    return collate([samples[row] for row in rows])
