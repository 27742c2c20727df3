"""The self-check: tries in the first window whether this loss can be accumulated at all.

It raises only on proof. Where it cannot know it warns once. Where these rows do not tell it is repeated in windows 2,
4, 8 and 16, and then says so. A loss whose terms or graph are new is looked at before its gradient is handed over, and
any loss again in windows 64, 256, 1,024, ... A look costs about two micro-steps, and has no side effects.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradfold.batch.nesting import Batch, cut_rows, equal, every_leaf, join_rows, structure
from gradfold.batch.rows import name_rows, num_rows
from gradfold.batch.split import CollateRows, MicroBatch
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.window import GraphForm, Window
from gradfold.errors import BatchError, GradfoldError, NotDecomposableError, is_out_of_memory
from gradfold.messages import first_line, warn
from gradfold.self_check.diagnosis import diagnose, refuse_empty_part, refuse_left_state
from gradfold.self_check.experiment import CannotKnowError, PartFailedError, SplitExperiment, UndecidedError
from gradfold.self_check.probe_run import ProbeRun, Shares

_ENOUGH_ROWS = 8  # half of as many would miss losses that few rows decide (hard-example mining)
_FEW_ROWS = 4  # of each of two micro-batches, to see whether padding matters
_RETRIES = (1, 2, 4, 8, 16)  # windows of one structure at which undecided ones are checked
_LAST_RETRY = _RETRIES[-1]
LOOK_AGAIN = frozenset(4**power - 1 for power in range(3, 20))  # windows before one that is looked at in any case
_MAX_FORMS = 8  # of a loss that is never the same, to look at
_DOUBTFUL = ("coupled", "empty", "state")  # what parts may seem to show that no micro-batch would be
_ADVICE = (
    "gradfold.verify(accumulator, batch) tries harder. If the loss is a mean over what weight= counts, and no sample "
    "depends on another, accumulation is exact: pass self_check=False."
)


class SelfCheck:
    """Knows what was checked, and checks what is new; `loss_fn` is what must be the mean of its parts."""

    saved: ClassVar[Mapping[str, Any]] = {
        "settled": {"*": (None, ["text"])},
        "num_windows": {"*": "count"},
        "forms": {"*": [["text"]]},
    }

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn
        # By structure, as text, which a resumed run can compare with that of another process.
        self._num_windows: dict[str, int] = {}  # of those not settled
        self._settled: dict[str, set[str] | None] = {}  # the loss terms that were seen; None: cannot know
        self._forms: dict[str, list[GraphForm]] = {}  # of the loss, that were looked at
        self._current = ""

    def is_due(self, window: Window, num_windows: int) -> bool:
        """Whether to check this window, of an accumulator that has done as many."""
        self._current = repr((structure(window.micro_batches[0].data), window.context.modes))
        if self._current in self._settled:
            return self.is_passed and num_windows in LOOK_AGAIN
        count = self._num_windows[self._current] = self._num_windows.get(self._current, 0) + 1
        return count in _RETRIES

    @property
    def is_passed(self) -> bool:
        """Whether parts were seen to make up the whole in windows like the last one."""
        return self._settled.get(self._current) is not None

    @property
    def is_settled(self) -> bool:
        """Whether windows like the last one are not checked any more."""
        return self._current in self._settled

    def forget(self) -> None:
        """The window was refused: check the next one like it, which would be as wrong."""
        self._settled.pop(self._current, None)
        self._num_windows[self._current] = 0

    def is_new(self, terms: Collection[str], form: GraphForm, was_checked: bool) -> bool:
        """Whether a window, which has run, has a loss that must be looked at before its gradient is handed over."""
        forms, seen = self._forms.setdefault(self._current, []), self._settled.get(self._current)
        is_known = (was_checked or not forms) and seen is not None and seen >= set(terms)
        if seen is None or form in forms or len(forms) >= _MAX_FORMS:
            return False
        forms.append(form)
        return not is_known

    def check(
        self,
        window: Window,
        collate_rows: CollateRows | None = None,
        frozen: Iterable[nn.Module] = (),
        terms: Collection[str] = (),
    ) -> None:
        """Check micro-batches of a window before it runs, or is handed over.

        Args:
            window: the window.
            collate_rows: where samples are collated.
            frozen: modules that run in evaluation mode meanwhile, since they are known to depend on the split.
            terms: of the loss; a micro-batch that has them all is checked, if there is one.

        Raises:
            NotDecomposableError: the parts do not make up the whole.
        """
        window.weights.wait()  # another rank may have failed, which is not for the self-check to see
        probe = ProbeRun(window.model, self._loss_fn, window.back_propagate, frozen)
        if any(map(is_lazy, probe.parameters)):  # the first window makes lazy layers
            return
        try:
            with probe, without_warnings():
                seen = Look(probe, window, collate_rows, terms).decide()
            self._settled[self._current] = (self._settled.get(self._current) or set()) | set(seen)
        except UndecidedError as reason:
            if terms:  # which are new, and not seen yet
                self._settled.pop(self._current, None)
                self._num_windows[self._current] = 1
            elif self._num_windows.get(self._current) == _LAST_RETRY and self._current not in self._settled:
                self._settled[self._current] = None
                warn(
                    f"in {_LAST_RETRY} windows the self-check could not see whether this loss can be accumulated; in "
                    f"the last one, {reason}. {_ADVICE}"
                )
        except NotDecomposableError:
            self.forget()
            raise
        except (CannotKnowError, BatchError) as reason:
            self._settled[self._current] = None
            warn(f"the self-check cannot know whether this loss can be accumulated: {reason}. {_ADVICE}")
        except Exception as error:
            if not is_out_of_memory(error):
                raise  # else it is undecided: the window itself will find out what fits

    def state_dict(self) -> dict[str, Any]:
        """What was checked, so that a resumed run does not check, and warn, again; and when to retry the rest."""
        settled = {key: None if seen is None else sorted(seen) for key, seen in self._settled.items()}
        forms = {key: list(forms) for key, forms in self._forms.items()}
        return {"settled": settled, "num_windows": dict(self._num_windows), "forms": forms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._settled = {key: None if seen is None else set(seen) for key, seen in state["settled"].items()}
        self._num_windows = dict(state["num_windows"])
        self._forms = {key: list(map(tuple, forms)) for key, forms in state["forms"].items()}


class Look:
    """One look at a window: a micro-batch whole and in parts; and where that convicts or fails, real micro-batches.

    Parts that no micro-batch would be prove nothing: half a pair, a row of a group. So before a loss is refused as
    coupled, two micro-batches are run together and each by itself, which is what the window does.
    """

    def __init__(
        self, probe: ProbeRun, window: Window, collate_rows: CollateRows | None, terms: Collection[str]
    ) -> None:
        self._probe = probe
        self._window = window
        self._collate_rows = collate_rows
        self._busy = [index for index in range(len(window.micro_batches)) if index not in window.zero_weight]
        having = [index for index in self._busy if all(self._share(index, name) for name in terms)]
        self._busy.sort(key=lambda index: index not in having)

    def decide(self) -> Collection[str]:
        """The loss terms that were seen, where the parts make up the whole.

        Raises:
            NotDecomposableError: they do not, which is proved.
            UndecidedError: these rows do not tell.
            CannotKnowError, BatchError: no rows will tell.
        """
        if not self._busy:
            raise UndecidedError("the rows weighed nothing")
        index = next((index for index in self._busy if len(self._window.micro_batches[index].rows) > 1), None)
        doubt: Exception | None = None
        seen: Collection[str] = ()
        try:
            if index is None:
                doubt = UndecidedError("every micro-batch was one row, and two could not be compared")
            else:
                seen = self._check_one(index)
        except NotDecomposableError as error:
            if error.cause not in _DOUBTFUL:
                raise
            doubt = error
        except (PartFailedError, BatchError) as error:
            doubt = error
        if doubt is not None:
            seen = self._check_micro_batches(doubt)
        self._check_padding()
        return seen

    def _check_one(self, index: int) -> Collection[str]:
        """One micro-batch in two parts; of a large one half the rows, which show as much in half the time."""
        part = self._window.micro_batches[index]
        if len(part.rows) >= 2 * _ENOUGH_ROWS:
            try:
                return self._check_parts(_first_half(part, self._collate_rows), index)
            except (NotDecomposableError, UndecidedError):
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # A loss for batches of one size, groups of rows that belong together, ...: then all rows.
        return self._check_parts(part, index)

    def _check_parts(self, part: MicroBatch, index: int, fraction: float = 0.3) -> Collection[str]:
        size = len(part.rows)
        first = max(1, round(fraction * size))  # unequal parts, since equal ones would hide weights that are wrong
        rows = range(first), range(first, size)
        recollated = None if self._collate_rows is None else _recollate(part, rows, self._collate_rows)
        weight = self._window.weight
        return check_split(SplitExperiment(self._probe, part.data, rows, weight, recollated, self._of(index)))

    def _check_micro_batches(self, doubt: Exception) -> Collection[str]:
        """Parts as a window has them: two micro-batches; where these cannot be joined, the halves of one."""
        for attempt in (partial(self._check_joined, self._busy[:1], self._busy[1:2]), self._check_more):
            try:
                return attempt()
            except NotDecomposableError as error:
                if isinstance(doubt, NotDecomposableError) and (doubt.cause == error.cause or doubt.weight):
                    raise doubt from None  # the rows that it names are fewer
                raise
            except UndecidedError as error:
                if error.fits and not isinstance(doubt, UndecidedError):
                    raise
                doubt = error if isinstance(doubt, UndecidedError) else doubt
            except PartFailedError as error:
                doubt = error if isinstance(doubt, UndecidedError) else doubt
            except (CannotKnowError, BatchError):
                pass  # of these micro-batches, which says nothing about the loss
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        raise doubt

    def _check_more(self) -> Collection[str]:
        """The halves of the largest micro-batch; of single rows, which show little by twos, up to four."""
        largest = max(self._busy, key=lambda index: len(self._window.micro_batches[index].rows))
        part = self._window.micro_batches[largest]
        if len(part.rows) == 1:
            return self._check_joined(self._busy[:1], self._busy[1:4])
        return self._check_parts(part, largest, 0.5)

    def _check_joined(self, first: list[int], second: list[int], num_rows: int | None = None) -> Collection[str]:
        """Micro-batches all together, and in two groups; of each so many rows, collated, or all."""
        if not second:
            raise CannotKnowError("there is no other micro-batch to compare it with")
        groups = [[self._window.micro_batches[index] for index in group] for group in (first, second)]
        rows = [tuple(row for part in group for row in part.rows[:num_rows]) for group in groups]
        sizes = list(map(len, rows))
        if self._collate_rows is None:
            parts = [join_rows([part.data for part in group]) for group in groups]
            whole = join_rows(parts)
        else:
            whole, *parts = map(self._collate_rows, (sum(rows, ()), *rows))
            if not equal(whole, self._collate_rows(sum(rows, ()))):
                raise CannotKnowError("collate does not return the same twice")
        own, share = (range(sizes[0]), range(sizes[0], sum(sizes))), self._of(*first, *second)
        try:
            experiment = SplitExperiment(self._probe, whole, own, self._window.weight, None, share, parts)
        except PartFailedError as error:
            raise CannotKnowError(str(error)) from error
        try:
            return check_split(experiment)
        except (GradfoldError, CannotKnowError, UndecidedError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise PartFailedError(
                f"loss_fn takes {name_rows(rows[0])} and {name_rows(rows[1])} as micro-batches, and fails on them "
                f"together ({first_line(error)})"
            ) from error

    def _check_padding(self) -> None:
        """Where collation pads micro-batches to different lengths: a few rows of the shortest and of the longest."""
        if self._collate_rows is None:
            return
        lengths = {index: _shape_of_rows(self._window.micro_batches[index].data) for index in self._busy}
        first, second = (pick(lengths, key=lambda index: lengths[index]) for pick in (min, max))
        if lengths[first] == lengths[second]:
            return
        try:
            self._check_joined([first], [second], _FEW_ROWS)
        except (UndecidedError, CannotKnowError, BatchError):
            return  # the look at one micro-batch has told

    def _of(self, *indices: int) -> Shares:
        return lambda name: sum(self._share(index, name) for index in indices)

    def _share(self, index: int, name: str) -> float:
        return self._window.weights.of_term(name).normalized[index]


def _shape_of_rows(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape[1:]) for leaf in every_leaf(batch) if isinstance(leaf, Tensor)]


def check_split(experiment: SplitExperiment) -> Collection[str]:
    """The loss terms that could be seen, where the parts make up the whole.

    Raises NotDecomposableError on proof, UndecidedError where these rows do not tell, CannotKnowError where none will.
    """
    result = experiment.run_fast()
    if result is None or not result.comparison.fits:
        result = experiment.run()
    refuse_empty_part(experiment, result)
    comparison = result.comparison
    if comparison.is_proof:
        raise diagnose(experiment, result)
    refuse_left_state(experiment, result)
    if not comparison.fits:
        raise UndecidedError(f"the parts were {comparison.error:.1e} off, which rounding may explain")
    if not comparison.is_informative:
        raise UndecidedError("the parts had the same gradient, so that any weights fit", fits=True)
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
