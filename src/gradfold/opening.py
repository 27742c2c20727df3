"""An opening: what is looked at once a window is cut and before it runs, and the schedule that follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradfold.agreement import Alone
from gradfold.backward import BackPropagation
from gradfold.batch import Batch
from gradfold.coupled import keyed_dropout
from gradfold.coupled.coupling import Coupling
from gradfold.cutting import Cutting
from gradfold.errors import NotDecomposableError
from gradfold.hooks import parameters_with_hooks, refuse_post_accumulate_hooks, warn_of_hooks
from gradfold.padding_check import check_once
from gradfold.replay import Cautious
from gradfold.self_check import SelfCheck
from gradfold.transaction import Transaction
from gradfold.weight import WeightOption
from gradfold.window import OpenWindow, Schedule, one_after_another

__all__: list[str] = []


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
        cutting: Cutting,
        self_check: SelfCheck | None,
    ) -> None:
        self._model = model
        self._weight = weight
        self._back_propagate = back_propagate
        self._coupling = coupling
        self._cutting = cutting
        self._self_check = self_check
        self._warned_of: set[str] = set()

    def schedule(self, batch: Batch, transaction: Transaction, agreement: Alone, window: OpenWindow) -> Schedule:
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

    def _plain(self, window: OpenWindow) -> Schedule:
        by_tokens = self._cutting.by_tokens
        if by_tokens is None:
            return one_after_another
        return by_tokens.timed(one_after_another, window.micro_batches, window.device)

    def _check_padding(self, window: OpenWindow, agreement: Alone) -> None:
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
        self, batch: Batch, modules: Sequence[nn.Module], agreement: Alone, window: OpenWindow, is_plain: bool
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
        dropouts = keyed_dropout.keyed_layers(modules)
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
