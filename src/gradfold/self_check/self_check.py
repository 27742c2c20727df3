"""The self-check: tries in the first window whether this loss can be accumulated at all.

It raises only on proof. Where it cannot know it warns once. Where these rows do not tell it is repeated in windows 2,
4, 8 and 16, and then says so. A loss whose terms or graph are new is looked at before its gradient is handed over, and
any loss again in windows 64, 256, 1,024, ... A look costs about two micro-steps, and has no side effects.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradfold.batch.nesting import structure
from gradfold.batch.split import CollateRows
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.window import GraphForm, Window
from gradfold.errors import BatchError, NotDecomposableError, is_out_of_memory
from gradfold.messages import warn
from gradfold.self_check.experiment import CannotKnowError, UndecidedError
from gradfold.self_check.look import Look
from gradfold.self_check.probe_run import ProbeRun

_RETRIES = (1, 2, 4, 8, 16)  # windows of one structure at which undecided ones are checked
_LAST_RETRY = _RETRIES[-1]
LOOK_AGAIN = frozenset(4**power - 1 for power in range(3, 20))  # windows before one that is looked at in any case
_MAX_FORMS = 8  # of a loss that is never the same, to look at
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
