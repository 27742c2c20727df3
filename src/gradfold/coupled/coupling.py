"""A coupling: whether and how the samples of a batch depend on each other, and so how a window of them runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gradfold.agreement import Alone, Together, Weigh
from gradfold.coupled import batch_norm as batch_normalisation
from gradfold.coupled import exact_batch_norm, uncoupled
from gradfold.coupled.batch_norm import BatchNormOption, batch_statistics_layers
from gradfold.coupled.company import InLockStep
from gradfold.coupled.normalised_rows import NormalisedRows
from gradfold.coupled.phases import Phases, check_options, dtypes_of
from gradfold.coupled.riders import Riders
from gradfold.coupled.two_phase import TwoPhaseLoss, explain, probe_of
from gradfold.errors import NotDecomposableError, OptionError
from gradfold.loss import LossFn
from gradfold.ranks import Ranks
from gradfold.replay import Cautious, FindCulprit
from gradfold.transaction import Transaction
from gradfold.weight import WeightOption
from gradfold.window import OpenWindow, Schedule, one_after_another

__all__: list[str] = []


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

    def normalises_parts(self) -> bool:
        """Whether layers normalise by micro-batch, so that a halved one has other statistics."""
        return self._batch_norm == "per_micro_batch" and bool(batch_statistics_layers(self.model))

    def agreement(self, ranks: Ranks, weigh: Weigh, num_totals: int) -> Together:
        """What a window has to agree on with processes that hold the whole model each."""
        return Together(ranks, weigh, num_totals)

    def refuse_shards(self) -> None:
        """Raise OptionError where processes cannot hold a part of the model each."""
        if self._batch_norm is not None:
            raise OptionError(
                "fully_shard does not go with batch_norm=, whose statistics the blank turns of a rank would move."
            )

    def is_whole(self, window: OpenWindow, agreement: Alone) -> bool:
        """Whether all that depends on each other is in one micro-batch, which then runs as in plain torch."""
        return len(window.micro_batches) == 1

    def schedule(self, window: OpenWindow, transaction: Transaction, agreement: Alone, plain: Schedule) -> Schedule:
        """How to run a window of several micro-batches.

        Args:
            window: this one.
            transaction: in which it runs.
            agreement: with other ranks.
            plain: how to run it if nothing in it were coupled.

        Raises:
            BatchNormError: layers would see a micro-batch instead of the batch, and nobody said that this is meant.
        """
        return batch_normalisation.schedule_for(
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

    find_culprit = staticmethod(uncoupled.find_culprit)

    def __init__(self, model: nn.Module, loss_fn: LossFn, is_collated: bool) -> None:
        super().__init__(model, loss_fn, "exact")
        self._normalised = NormalisedRows(is_collated)
        self.tried = uncoupled.watched(loss_fn, self._normalised)

    def agreement(self, ranks: Ranks, weigh: Weigh, num_totals: int) -> Together:
        """They also meet at every BatchNorm."""
        return (InLockStep if ranks.size > 1 else Together)(ranks, weigh, num_totals)

    def is_whole(self, window: OpenWindow, agreement: Alone) -> bool:
        """Not so where other ranks have rows in the same statistics."""
        return len(window.micro_batches) == 1 and not isinstance(agreement, InLockStep)

    def schedule(self, window: OpenWindow, transaction: Transaction, agreement: Alone, plain: Schedule) -> Schedule:
        """In lock-step."""
        return exact_batch_norm.schedule_for(window, agreement, self._normalised)

    def accepted(self) -> Mapping[str, nn.Module]:
        """Layers with running statistics; the others are fixed in what is tried."""
        layers = batch_statistics_layers(self.model)
        fixed = {name: layer for name, layer in layers.items() if getattr(layer, "running_mean", None) is not None}
        self._normalised.names.clear()
        self._normalised.names.update({id(layer.running_mean): name for name, layer in fixed.items()})
        return fixed

    def judge(self, is_content: bool) -> None:
        """Whether every BatchNorm normalises rows."""
        self._normalised.judge(is_content)


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
        self._riders = Riders(loss_fn.combine)
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

    def is_whole(self, window: OpenWindow, agreement: Alone) -> bool:
        """Not so where other ranks have statistics in the same loss."""
        return len(window.micro_batches) == 1 and not isinstance(agreement, Together)

    def schedule(self, window: OpenWindow, transaction: Transaction, agreement: Alone, plain: Schedule) -> Schedule:
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
