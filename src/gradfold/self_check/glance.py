"""A glance: the two parts of a micro-batch run first, and then the gradient of the whole is held against theirs.

It sees that parts fit, which they nearly always do, and never accuses: where anything is unclear it says nothing, and
an examination looks closely. Since the whole comes last, it may be a run that somebody makes anyway.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from gradfold.errors import is_out_of_memory
from gradfold.self_check.comparison import GradientComparison, tolerance_of
from gradfold.self_check.draws_ahead import DrawsAhead
from gradfold.self_check.experiment import SplitCase, UndecidedError
from gradfold.self_check.rng_replay import OwnGenerators
from gradfold.self_check.trial import ProbeResult, Trial

__all__: list[str] = []


class Glance:
    """Glances at one micro-batch within a trial that is at its beginning."""

    def __init__(self, trial: Trial, examined: SplitCase) -> None:
        self._trial = trial
        self._examined = examined
        self._parts: dict[int, ProbeResult] = {}
        self._dtypes = {parameter.dtype for parameter in trial.parameters}
        self._is_clear: bool | None = None  # not known before the parts have run

    def run(self) -> tuple[str, ...] | None:
        """Run the parts and the whole: the names of the loss terms that could be seen, or None where all is not clear.

        Raises:
            UndecidedError: these rows do not tell.
        """
        if not self.run_parts():
            return None
        self._trial.rewind()
        try:
            whole = self._trial.run(self._examined.whole, self._examined.shares, nullcontext())
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None  # the user's, then it comes again
        return self.compare(whole.gradients)

    def run_parts(self) -> bool:
        """Run the parts, if they have not been; whether the whole can be compared with them."""
        if self._is_clear is None:
            with _quietly():
                self._is_clear = self._run_parts()
        return self._is_clear

    def let_go(self) -> None:
        """Hold the rows no longer; only `compare` works from here on."""
        self._examined = replace(self._examined, whole=None, parts=(None, None), recollated=None)

    def compare(self, whole: Sequence[Tensor | None]) -> tuple[str, ...] | None:
        """Hold a sample of the gradient of the whole against the parts; see `run`."""
        names = self._parts[0].losses
        share = self._examined.part_shares[0](self._examined.telling(names))
        mixture = GradientComparison.of(whole, self._parts[0].gradients, self._parts[1].gradients, share)
        tolerance = tolerance_of(self._dtypes)
        if mixture is None or not float(mixture.errors.max()) <= tolerance:
            return None
        if not mixture.is_telling(tolerance):
            raise UndecidedError
        return self._examined.seen(names)

    def _run_parts(self) -> bool:
        rows = self._examined.rows[1]
        if not any(isinstance(one, _DropoutNd) and one.training and one.p for one in self._trial.modules):
            # Without an eye on every operator, which takes time.
            if self._try(OwnGenerators()):
                return True
            if not self._trial.has_drawn():
                return False
            self._trial.rewind()
        # What is compiled would be compiled again under a mode, and has taken its generators in anyway.
        return not self._is_compiled() and self._try(DrawsAhead(rows.stop, len(rows)))

    def _try(self, mode: OwnGenerators | DrawsAhead) -> bool:
        """Run the parts; whether their losses are numbers and what they drew is what they will draw in the whole."""
        parts = self._examined.parts
        if not isinstance(mode, DrawsAhead) and self._examined.recollated is not None:
            parts = self._examined.recollated
        try:
            for index in (1, 0):  # first the more rows, which leave less doubt about the dimension that holds them
                if isinstance(mode, DrawsAhead) and index == 0:
                    mode.go_on()
                on = nullcontext() if self._is_compiled() else mode
                self._parts[index] = self._trial.run(parts[index], self._examined.seeds_of(index), on)
                if not isinstance(mode, DrawsAhead) and self._trial.has_drawn():
                    return False
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return False  # the user's, then it comes again, or of a mode where none may be
        finally:
            has_own = mode.restore_generators()
        if has_own or self._trial.has_drawn_on_host() is not None:
            return False
        if isinstance(mode, DrawsAhead) and mode.unknown is not None:
            return False
        self._dtypes |= mode.dtypes
        return self._parts[0].losses.keys() == self._parts[1].losses.keys() and all(map(self._is_number, (0, 1)))

    def _is_number(self, index: int) -> bool:
        """Whether the loss of a part weighs something, and is finite where it does."""
        seed = self._examined.seeds_of(index)
        weighed = [loss for name, loss in self._parts[index].losses.items() if seed(name)]
        return bool(weighed) and all(math.isfinite(float(loss)) for loss in weighed)

    def _is_compiled(self) -> bool:
        return any(
            getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
            for module in self._trial.modules
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Say no warnings, which the window itself will say, and use none up that torch says once."""
    was_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_warn_always(was_always)
