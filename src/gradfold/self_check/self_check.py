"""The self-check: tries once, in the first window, whether this loss can be accumulated at all.

It raises only on proof. Where it cannot know it warns once; where these rows do not tell it is repeated in windows 2,
4, 8 and 16. It costs about two micro-steps, once per structure of batches and loss terms, and has no side effects.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradfold.batch.nesting import Batch, cut_rows, equal, structure
from gradfold.batch.rows import num_rows
from gradfold.batch.split import CollateRows, MicroBatch
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.window import Window
from gradfold.errors import BatchError, NotDecomposableError, is_out_of_memory
from gradfold.messages import warn
from gradfold.self_check.diagnosis import diagnose, refuse_empty_part
from gradfold.self_check.experiment import CannotKnowError, SplitExperiment, UndecidedError
from gradfold.self_check.probe_run import ProbeRun

_ENOUGH_ROWS = 8  # half of as many would miss losses that few rows decide (hard-example mining)
_RETRIES = (1, 2, 4, 8, 16)  # windows of one structure at which undecided ones are checked


class SelfCheck:
    """Knows what was checked, and checks what is new; `loss_fn` is what must be the mean of its parts."""

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn
        # By structure, as text, which a resumed run can compare with that of another process.
        self._num_windows: dict[str, int] = {}  # of those not settled
        self._settled: dict[str, tuple[str, ...] | None] = {}  # the loss terms that were seen; None: cannot know
        self._current = ""

    def is_due(self, window: Window) -> bool:
        """Whether to check this window."""
        self._current = repr((structure(window.micro_batches[0].data), window.context.modes))
        if self._current in self._settled:
            return False
        count = self._num_windows[self._current] = self._num_windows.get(self._current, 0) + 1
        return count in _RETRIES

    @property
    def is_passed(self) -> bool:
        """Whether parts were seen to make up the whole in windows like the last one."""
        return bool(self._settled.get(self._current))

    @property
    def is_settled(self) -> bool:
        """Whether windows like the last one are not checked any more."""
        return self._current in self._settled or self._num_windows.get(self._current, 0) >= _RETRIES[-1]

    def forget(self) -> None:
        """The window was refused: check the next one like it, which would be as wrong."""
        self._settled.pop(self._current, None)
        self._num_windows[self._current] -= 1

    def note_terms(self, names: Collection[str]) -> None:
        """Check again if this window had loss terms that were not seen yet."""
        seen = self._settled.get(self._current)
        if seen is not None and not set(names) <= set(seen):
            del self._settled[self._current]

    def check(self, window: Window, collate_rows: CollateRows | None = None, frozen: Iterable[nn.Module] = ()) -> None:
        """Check the first micro-batch of a window with two rows and a weight; `frozen` modules run in eval mode."""
        window.weights.wait()  # another rank may have failed, which is not for the self-check to see
        parts, idle = window.micro_batches, window.zero_weight
        index = next((one for one, part in enumerate(parts) if one not in idle and len(part.rows) > 1), None)
        probe = ProbeRun(window.model, self._loss_fn, window.back_propagate, frozen)
        if index is None or any(map(is_lazy, probe.parameters)):  # the first window makes lazy layers
            return
        try:
            with probe:
                self._settled[self._current] = _check(probe, window, index, collate_rows)
        except UndecidedError:
            pass
        except NotDecomposableError:
            self.forget()
            raise
        except (CannotKnowError, BatchError) as reason:
            self._settled[self._current] = None
            warn(
                f"the self-check cannot know whether this loss can be accumulated: {reason}. "
                "gradfold.verify(accumulator, batch) tries harder. If the loss is a mean over what weight= counts, and "
                "no sample depends on another, accumulation is exact: pass self_check=False."
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise  # else it is undecided: the window itself will find out what fits

    def state_dict(self) -> dict[str, Any]:
        """What was checked, so that a resumed run does not check, and warn, again; and when to retry the rest."""
        return {"settled": dict(self._settled), "num_windows": dict(self._num_windows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._settled, self._num_windows = dict(state["settled"]), dict(state["num_windows"])


def _check(probe: ProbeRun, window: Window, index: int, collate_rows: CollateRows | None) -> tuple[str, ...]:
    def check(part: MicroBatch) -> tuple[str, ...]:
        size = len(part.rows)
        first = max(1, round(0.3 * size))  # equal parts would hide weights that are wrong
        rows = range(first), range(first, size)
        recollated = None if collate_rows is None else _recollate(part, rows, collate_rows)
        return check_split(SplitExperiment(probe, part.data, rows, window.weight, recollated, share))

    def share(name: str) -> float:
        return window.weights.of_term(name).normalized[index]

    part = window.micro_batches[index]
    if len(part.rows) >= 2 * _ENOUGH_ROWS:
        try:
            return check(_first_half(part, collate_rows))
        except (NotDecomposableError, UndecidedError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # A loss for batches of one size, groups of rows that belong together, ...: then all rows.
    return check(part)


def check_split(experiment: SplitExperiment) -> tuple[str, ...]:
    """The loss terms that could be seen, where the parts make up the whole.

    Raises NotDecomposableError on proof, UndecidedError where these rows do not tell, CannotKnowError where none will.
    """
    with without_warnings():
        result = experiment.run_fast()
        if result is None or not result.comparison.fits:
            result = experiment.run()
        refuse_empty_part(experiment, result)
        if result.comparison.is_proof:
            raise diagnose(experiment, result)
    if not result.comparison.fits or not result.comparison.is_informative:
        raise UndecidedError
    return experiment.seen(result.whole.losses)


def _first_half(part: MicroBatch, collate_rows: CollateRows | None) -> MicroBatch:
    """Half the rows of a large micro-batch, which show as much in half the time."""
    half = len(part.rows) // 2
    num_rows(part.data)
    if collate_rows is None:
        data = cut_rows(part.data, [half, len(part.rows) - half])
    else:
        data = _recollate(part, [range(half)], collate_rows) or []
    if not data:
        raise CannotKnowError("collate does not return the same twice")
    return MicroBatch(data[0], part.rows[:half])


def _recollate(part: MicroBatch, parts: Sequence[range], collate_rows: CollateRows) -> list[Batch] | None:
    """Parts collated by themselves; None where collation does not return the same twice (it draws or counts)."""
    try:
        if equal(collate_rows(part.rows), part.data):
            return [collate_rows(part.rows[own.start : own.stop]) for own in parts]
    except Exception:  # groups of samples that belong together
        pass
    return None


@contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress warnings, which the window itself will show, and use up none of those that torch shows once."""
    was_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_warn_always(was_always)
