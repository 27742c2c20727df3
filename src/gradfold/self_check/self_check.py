"""The self-check: the guard of the first window, which tries out whether this loss can be accumulated at all.

The first micro-batch runs whole and in two parts of unequal size, in the model's own mode, with the seeds of the
engine, each row with the random numbers that it had in the whole; of 16 rows or more half are enough. With fewer rows
the parts run first, and the whole is the window's own run of its first micro-batch. The guard raises only on proof.
Where it cannot know it says so once, and where these rows do not tell it looks again at windows 2, 4, 8 and 16. It
costs about two micro-steps, once per structure of batches and loss terms, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradfold.batch.nesting import Batch, cut_rows, equal, structure
from gradfold.batch.rows import num_rows
from gradfold.batch.split import CollateRows, MicroBatch
from gradfold.engine.backward import BackPropagation
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.prefetch import prefetch
from gradfold.engine.window import AfterFirst, RunAgain
from gradfold.errors import BatchError, NotDecomposableError, is_out_of_memory
from gradfold.messages import warn
from gradfold.self_check.experiment import CannotKnowError, SplitCase, SplitExperiment, UndecidedError
from gradfold.self_check.glance import Glance
from gradfold.self_check.trial import Shares, Trial, sample_gradients
from gradfold.weights import WeightOption, WindowWeights, weigh

__all__: list[str] = []

_ENOUGH_ROWS = 8
_LOOKS = (1, 2, 4, 8, 16)  # windows of one structure at which undecided ones are looked at


class SelfCheck:
    """Knows what was looked at, and looks at what is new."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, weight: WeightOption, back_propagate: BackPropagation
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._weight = weight
        self._back_propagate = back_propagate
        # By structure, as text, which a resumed run can compare with that of another process.
        self._num_windows: dict[str, int] = {}  # of those not settled
        self._settled: dict[str, tuple[str, ...] | None] = {}  # the loss terms that were seen
        self._current = ""
        self._last_settled: tuple[Hashable, list[bool]] | None = None  # of the last window, if it was settled before

    def is_due(self, micro_batches: Sequence[MicroBatch], modules: Sequence[nn.Module]) -> bool:
        """Whether to look at this window; `modules` are all those of the model."""
        current = (structure(micro_batches[0].data), [module.training for module in modules])
        if current == self._last_settled:
            return False  # the usual case, without the text
        self._last_settled = None
        self._current = repr(current)
        if self._current in self._settled:
            self._last_settled = current
            return False
        count = self._num_windows[self._current] = self._num_windows.get(self._current, 0) + 1
        return count in _LOOKS

    @property
    def is_content(self) -> bool:
        """Whether the last look has seen that parts fit the whole."""
        return bool(self._settled.get(self._current))

    def state_dict(self) -> dict[str, Any]:
        """What was looked at, so that a resumed run does not look, and warn, again; and when to look at the rest."""
        return {"settled": dict(self._settled), "num_windows": dict(self._num_windows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._settled, self._num_windows = dict(state["settled"]), dict(state["num_windows"])
        self._last_settled = None

    def note_terms(self, names: Collection[str]) -> None:
        """Look again if this window had loss terms that were not seen yet."""
        seen = self._settled.get(self._current)
        if seen is not None and tuple(names) != seen and not set(names) <= set(seen):
            del self._settled[self._current]
            self._last_settled = None

    def look(
        self,
        micro_batches: Sequence[MicroBatch],
        weights: WindowWeights,
        device: torch.device,
        is_plain: bool,
        collate_rows: CollateRows | None = None,
        frozen: Iterable[nn.Module] = (),
    ) -> AfterFirst | None:
        """Examine the first micro-batch that has rows enough.

        Args:
            micro_batches: of the window.
            weights: of the window.
            device: that of the model.
            is_plain: whether the window runs one micro-batch after another.
            collate_rows: where samples are collated.
            frozen: modules that are looked at in evaluation mode, since they are known not to fit.

        Returns:
            What ends the look after the window's own run of that micro-batch; None where nothing is left to see.

        Raises:
            NotDecomposableError: the parts do not make up the whole.
        """
        idle = weights.idle()
        busy = [index for index in range(len(micro_batches)) if index not in idle]
        index = next((index for index in busy if len(micro_batches[index].rows) > 1), None)
        trial = Trial(self._model, self._loss_fn, self._back_propagate, frozen)
        if index is None or any(map(is_lazy, trial.parameters)):  # the first window makes lazy layers
            return None
        part = micro_batches[index]

        def shares(name: str) -> float:
            return weights.of_term(name).parts[index]

        prepare = partial(self._prepare, trial, shares, device, collate_rows)
        is_large = len(part.rows) >= 2 * _ENOUGH_ROWS
        # The first run of the window shows the whole, if it can be taken back for a closer look.
        may_wait = not is_large and index == busy[0] and is_plain

        def examine() -> tuple[str, ...] | AfterFirst:
            if is_large:
                seen = _try_half(
                    part, collate_rows, lambda half: SplitExperiment(trial, self._model, prepare(half)).run()
                )
                if seen is not None:
                    return seen
                trial.rewind()
            examined = prepare(part)
            glance = Glance(trial, examined)
            if may_wait and glance.run_parts() and trial.can_undo_others:
                glance.let_go()
                return partial(self._finish, trial, glance, partial(prepare, part))
            return SplitExperiment(trial, self._model, examined).run(glance)

        with trial:
            return self._conclude(examine)

    def _finish(self, trial: Trial, glance: Glance, prepare: Callable[[], SplitCase], run_again: RunAgain) -> None:
        """Compare the window's own run of its first micro-batch with the parts that have been run of it."""
        is_undone = False

        def compare() -> tuple[str, ...]:
            nonlocal is_undone
            seen = glance.compare(sample_gradients(trial.parameters))
            if seen is not None:
                return seen
            is_undone = True
            trial.undo()
            try:
                return SplitExperiment(trial, self._model, prepare()).look_closely()
            finally:
                trial.undo()

        self._conclude(compare)
        if is_undone:
            run_again()

    def _conclude(self, examine: Callable[[], tuple[str, ...] | AfterFirst]) -> AfterFirst | None:
        """Note what an examination found, or that it found nothing; give back what is to end it later."""
        try:
            found = examine()
            if callable(found):
                return found
            self._settled[self._current] = found
        except UndecidedError:
            pass
        except (CannotKnowError, BatchError) as reason:
            self._settled[self._current] = None
            warn(
                f"the self-check cannot know whether this loss can be accumulated: {reason}. "
                "gradfold.verify(accumulator, batch) tries harder. If the loss is a mean over what weight= counts, and "
                "no sample sees another, all is well, and self_check=False says that you know."
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise  # else it is undecided: the window itself will find out what fits
        return None

    def _prepare(
        self,
        trial: Trial,
        shares: Shares,
        device: torch.device,
        collate_rows: CollateRows | None,
        part: MicroBatch,
    ) -> SplitCase:
        sizes = _unequal(len(part.rows))
        rows = range(sizes[0]), range(sizes[0], sum(sizes))
        recollated = None if collate_rows is None else _recollate(part, rows, collate_rows)
        try:
            num_rows(part.data)
            first, second = cut_rows(part.data, sizes)
        except (BatchError, RuntimeError):
            if recollated is None:
                raise
            first, second = recollated
        pair = self._weigh([MicroBatch(first, rows[0]), MicroBatch(second, rows[1])])
        pieces = [MicroBatch(data, part.rows) for data in (part.data, first, second, *(recollated or ()))]
        take = prefetch(pieces, device)
        if collate_rows is not None:
            trial.rewind()  # it may have drawn
        return SplitCase(
            whole=take(0),
            parts=(take(1), take(2)),
            recollated=None if recollated is None else (take(3), take(4)),
            rows=rows,
            shares=shares,
            part_shares=(lambda name: pair.of_term(name).parts[0], lambda name: pair.of_term(name).parts[1]),
            weights_of=lambda name: (self._weigh([part]).of_term(name).total, pair.of_term(name).total),
            weight=self._weight,
        )

    def _weigh(self, parts: Sequence[MicroBatch]) -> WindowWeights:
        try:
            return weigh(self._weight, parts)
        except Exception as error:
            raise CannotKnowError(
                f"weight= fails on a part of a micro-batch ({type(error).__name__}: {error})"
            ) from error


def _try_half(
    part: MicroBatch, collate_rows: CollateRows | None, examine: Callable[[MicroBatch], tuple[str, ...]]
) -> tuple[str, ...] | None:
    """Examine half of the rows; None where that is not possible, and so says nothing."""
    try:
        half = _first_half(part, collate_rows)
        return None if half is None else examine(half)
    except (NotDecomposableError, UndecidedError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None  # a loss for batches of one size, groups of rows that belong together, ...


def _first_half(part: MicroBatch, collate_rows: CollateRows | None) -> MicroBatch | None:
    """Half the rows of a large micro-batch, which show as much in half the time; None where it is small."""
    half = len(part.rows) // 2
    if half < _ENOUGH_ROWS:
        return None
    num_rows(part.data)
    rows = part.rows[:half]
    if collate_rows is not None:
        return MicroBatch(collate_rows(rows), rows) if equal(collate_rows(part.rows), part.data) else None
    return MicroBatch(cut_rows(part.data, [half, len(part.rows) - half])[0], rows)


def _recollate(part: MicroBatch, rows: tuple[range, range], collate_rows: CollateRows) -> tuple[Batch, Batch] | None:
    """The parts collated by themselves; None where collation does not give the same twice (it draws or counts)."""
    try:
        if not equal(collate_rows(part.rows), part.data):
            return None
        first, second = (collate_rows(part.rows[own.start : own.stop]) for own in rows)
    except Exception:  # groups of samples that belong together
        return None
    return first, second


def _unequal(num_rows: int) -> tuple[int, int]:
    """Parts of about 30 and 70 %: equal ones would hide weights that are wrong."""
    first = max(1, round(0.3 * num_rows))
    return first, num_rows - first
