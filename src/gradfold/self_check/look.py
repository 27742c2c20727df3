"""A look: one window is tried out before it runs, by parts that must make up the whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor

from gradfold.batch.cutting import cut_rows, join_rows
from gradfold.batch.nesting import Batch, equal, every_leaf
from gradfold.batch.rows import Rows, check_counts, name_rows, num_rows
from gradfold.batch.split import CollateRows, MicroBatch
from gradfold.engine.window import Window
from gradfold.errors import BatchError, GradfoldError, HookError, NotDecomposableError, is_out_of_memory
from gradfold.messages import first_line
from gradfold.self_check.diagnosis import diagnose, refuse_empty_part, refuse_left_state
from gradfold.self_check.experiment import CannotKnowError, PartFailedError, SplitExperiment, UndecidedError
from gradfold.self_check.probe_run import ProbeRun, Shares

_MANY_ROWS = 16  # of which half are enough; half of as many would miss losses that few rows decide
_FEW_ROWS = 4  # of each of two micro-batches, to see whether padding matters
_DOUBTFUL = ("coupled", "empty", "state")  # what parts may seem to show that no micro-batch would be


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
        index = next((index for index in self._busy if self._window.micro_batches[index].num_units > 1), None)
        doubt: Exception | None = None
        seen: Collection[str] = ()
        try:
            if index is None:
                raise UndecidedError("every micro-batch was one row, and two could not be compared")
            seen = self._check_one(index)
        except NotDecomposableError as error:
            if error.cause not in _DOUBTFUL:
                raise
            doubt = error
        except (PartFailedError, BatchError, UndecidedError) as error:
            doubt = error
        if doubt is not None:
            seen = self._check_micro_batches(doubt)
        self._check_padding()
        return seen

    def _check_one(self, index: int) -> Collection[str]:
        """One micro-batch in two parts: some of its rows, else all; where these differ, whole micro-batches, too."""
        part = self._window.micro_batches[index]
        self._check_counts(part)
        size = _enough_rows(part.num_units)
        if size == part.num_units:
            return self._check_parts(part, index)
        try:
            return self._check_parts(_first_rows(part, size, self._collate_rows), index, diagnoses=False)
        except HookError:  # which shows only once
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            has_convicted = isinstance(error, NotDecomposableError)
        seen = self._check_parts(part, index)
        if has_convicted:
            with suppress(UndecidedError, CannotKnowError):
                self._check_micro_batches(UndecidedError("some rows did not tell"))
        return seen

    def _check_parts(
        self, part: MicroBatch, index: int, fraction: float = 0.3, diagnoses: bool = True
    ) -> Collection[str]:
        size = part.num_units
        first = max(1, round(fraction * size))  # unequal parts, since equal ones would hide weights that are wrong
        rows = range(first), range(first, size)
        recollated = None if self._collate_rows is None else _recollate(part, rows, self._collate_rows)
        if part.groups is not None:
            if recollated is None:
                raise CannotKnowError("the batching does not give the same rows twice")
            taken = [part.some_rows(slice(own.start, own.stop)) for own in rows]
            return check_split(self._experiment(part.data, recollated, taken, self._of(index)), diagnoses)
        experiment = SplitExperiment(self._probe, part.data, rows, self._window.weight, recollated, self._of(index))
        try:
            return check_split(experiment, diagnoses)
        except Exception as error:
            self._window.note(error, index)
            raise

    def _experiment(
        self, whole: Batch, parts: Sequence[Batch], taken: Sequence[Rows], share: Shares
    ) -> SplitExperiment:
        """Parts that are given, with the rows of each: of groups in ascending order, else one after another."""
        first, second = map(len, taken)
        places: tuple[Rows, Rows] = range(first), range(first, first + second)
        if self._window.micro_batches[0].groups is not None:
            found = {row: place for place, row in enumerate(sorted(row for rows in taken for row in rows))}
            places = tuple(found[row] for row in taken[0]), tuple(found[row] for row in taken[1])
        return SplitExperiment(self._probe, whole, places, self._window.weight, None, share, parts)

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
        if part.num_units == 1:
            return self._check_joined(self._busy[:1], self._busy[1:4])
        self._check_counts(part)
        return self._check_parts(part, largest, 0.5)

    def _check_counts(self, part: MicroBatch) -> None:
        """Raise BatchError where a micro-batch that was not to be cut has counted its rows."""
        if self._collate_rows is None and not part.is_cut:
            check_counts(part.data, len(part.rows))

    def _check_joined(self, first: list[int], second: list[int], num_rows: int | None = None) -> Collection[str]:
        """Micro-batches all together, and in two groups; of each so many rows, collated, or all."""
        if not second:
            raise CannotKnowError("there is no other micro-batch to compare it with")
        groups = [[self._window.micro_batches[index] for index in group] for group in (first, second)]
        some = slice(num_rows)
        rows = [tuple(row for part in group for row in part.some_rows(some)) for group in groups]
        if self._collate_rows is None:
            parts = [join_rows([part.data for part in group]) for group in groups]
            whole = join_rows(parts)
        else:
            whole, *parts = map(self._collate_rows, (sum(rows, ()), *rows))
            if not equal(whole, self._collate_rows(sum(rows, ()))):
                raise CannotKnowError("collate does not return the same twice")
        try:
            experiment = self._experiment(whole, parts, rows, self._of(*first, *second))
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


def check_split(experiment: SplitExperiment, diagnoses: bool = True) -> Collection[str]:
    """The loss terms that could be seen, where the parts make up the whole.

    Raises NotDecomposableError on proof (without `diagnoses` it does not say why), UndecidedError where these rows do
    not tell, CannotKnowError where none will.
    """
    result = experiment.run_fast()
    if result is None or not result.comparison.fits:
        result = experiment.run()
    refuse_empty_part(experiment, result)
    comparison = result.comparison
    if comparison.is_proof:
        raise diagnose(experiment, result) if diagnoses else NotDecomposableError("parts differ", "coupled", "loss")
    refuse_left_state(experiment, result)
    if not comparison.fits:
        raise UndecidedError(f"the parts were {comparison.error:.1e} off, which rounding may explain")
    if not comparison.is_informative:
        raise UndecidedError("the parts had the same gradient, so that any weights fit", fits=True)
    return experiment.seen(result.whole.losses)


def _enough_rows(size: int) -> int:
    """How many rows of a micro-batch show in less time as much as all.

    Odd numbers, whose parts have one row and two, or two and three: a loss that picks some of its rows (hard examples,
    a median) does not pick as many in the parts together as in the whole.
    """
    if size >= _MANY_ROWS:
        return size // 2
    return min(size, 5 if size >= 8 else 3)


def _first_rows(part: MicroBatch, size: int, collate_rows: CollateRows | None) -> MicroBatch:
    num_rows(part.data)
    if collate_rows is None:
        data = cut_rows(part.data, [size, len(part.rows) - size])
    else:
        data = _recollate(part, [range(size)], collate_rows) or []
    if not data:
        raise CannotKnowError("collate does not return the same twice")
    groups = None if part.groups is None else part.groups[:size]
    return MicroBatch(data[0], part.some_rows(slice(size)), groups=groups)


def _recollate(part: MicroBatch, parts: Sequence[range], collate_rows: CollateRows) -> list[Batch] | None:
    """Parts collated by themselves; None where collation does not return the same twice (it draws or counts)."""
    try:
        if equal(collate_rows(part.rows), part.data):
            return [collate_rows(part.some_rows(slice(own.start, own.stop))) for own in parts]
    except Exception:  # groups of samples that belong together
        pass
    return None
