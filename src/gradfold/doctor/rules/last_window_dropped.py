"""GF004: the micro-batches that an epoch ends with reach no update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradfold.doctor.events import Backward, Fetch
from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord, main_line, pass_of
from gradfold.doctor.rules.leftover_leaks import leaking
from gradfold.doctor.rules.rule import Rule
from gradfold.doctor.rules.zeroed_in_window import lost_in_windows
from gradfold.doctor.source import SourceLocation

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.trainings:
        tails = [] if lost_in_windows(training) else list(_tails(case, training))
        if not tails:
            continue
        place, some = tails[0]
        n, m = training.usual, len(some)
        if not training.windows:
            yield Observation(
                place,
                f"{m} backward passes ran and {training.optimizer}.step() never did: an epoch has fewer micro-batches "
                "than a window. Nothing was learned.",
                "Step at the end of the epoch, too: `if (i + 1) % n == 0 or i + 1 == len(loader)`.",
            )
            continue
        rows = sum(one.rows for one in some)
        yield Observation(
            place,
            f"the last {m} micro-batch{'es' * (m > 1)} of an epoch, after the last full window of {n}, "
            f"{'reach' if m > 1 else 'reaches'} no update"
            + (f": {rows} rows are computed and thrown away, every epoch." if rows else ": computed and thrown away."),
            "Step for the last, shorter window, too, and divide by its own length: "
            "`if (i + 1) % n == 0 or i + 1 == len(loader)`; gradfold.windows(loader, n, model=model) does both.",
        )


def _tails(case: RunRecord, training: OptimizerHistory) -> Iterator[tuple[SourceLocation, Sequence[Backward]]]:
    for clear in training.clears:
        some = main_line(training.backward(index) for index in clear.entries)
        if clear.is_used or not 0 < len(some) < max(training.usual, 2) or some[0].path not in training.lines:
            continue
        following = next((one for one in case.tape.backwards[some[-1].index + 1 :] if _same_line(one, some[0])), None)
        if training.usual > 1 and (following is None or pass_of(following) != pass_of(some[-1])):
            yield some[-1].place, some
    some = main_line(training.pending)
    if not some or not case.ended or leaking(training) or any(one.is_gradfold for one in some):
        return
    is_new = not training.windows and len(training.pending) > 1
    is_tail = training.usual > 1 and some[0].path in training.lines and len(some) < training.usual
    if (is_tail or is_new) and _is_exhausted(case, some[-1]):
        yield some[-1].place, some


def _same_line(one: Backward, other: Backward) -> bool:
    return one.path == other.path


def _is_exhausted(case: RunRecord, last: Backward) -> bool:
    """Whether the loop ended since there was no more data, and was not broken off."""
    if last.loader is None:
        return True
    return any(one.number < 0 and one.loader == last.loader and one.at > last.at for one in case.events(Fetch)) or any(
        place == "transformers" for place in last.place.through
    )


RULE = Rule(
    code="GF004",
    name="last window dropped",
    severity=ERROR,
    what="An epoch's number of micro-batches is no multiple of n, and what is left over reaches no update: it is "
    "zeroed when the next epoch begins, or the script ends.",
    why="The same computation is thrown away every epoch. Without shuffling it is the same samples, which are never "
    "learned from. An epoch shorter than a window never updates at all.",
    detection="Gradients of fewer micro-batches than a window has are zeroed unused between two passes over the data, "
    "or stand in `.grad` when the loader is exhausted and the script ends.",
    limits="Loops that break off on purpose before the data ends are left alone. Epochs are known from `DataLoader`s "
    "and from the whole numbers in the variables of `for` loops.",
    wrong="""for epoch in range(3):
    optimizer.zero_grad()
    for i, (x, y) in enumerate(loader):  # 10 batches
        (criterion(model(x), y) / 4).backward()
        if (i + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    right="""for window in gradfold.windows(loader, 4, model=model):  # 4, 4 and 2
    for x, y in window:
        window.backward(criterion(model(x), y))
    optimizer.step()
    optimizer.zero_grad()
""",
    check=_check,
)
