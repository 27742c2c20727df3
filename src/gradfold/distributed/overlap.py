"""Gradients that are summed over ranks while the last backward pass of a window runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.ddp import parallel_modules
from gradfold.distributed.failure import settle_failure
from gradfold.distributed.torch_private import drop_reduction, end_reduction
from gradfold.engine.loss_terms import LossTerms
from gradfold.engine.strategy import Run
from gradfold.engine.window import Window
from gradfold.errors import DistributedError, OptionError
from gradfold.state.gradients import GradientBuffer
from gradfold.state.snapshot import Snapshot


class OverlappedCoordinator(DataParallelCoordinator):
    """Several processes that hold the whole model each, whose DistributedDataParallel modules sum gradients.

    They do in the last backward pass of a window, which is in step on all ranks. Nothing can run again on one rank
    alone. The first window of a model, and one in which a rank has nothing to run, is summed after it.
    """

    can_replay = False
    runs_in_step = True

    def read_denominators(self) -> list[float]:
        """The denominators, summed over ranks; from here on it is known whether gradients are divided."""
        found = super().read_denominators()
        self.grad_factor = float(self.num_ranks) if self.overlaps else 1.0  # DistributedDataParallel makes means
        return found

    def run_in_step(self, run: Run, window: Window, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run micro-batches, the last one that weighs something at last, in step with the other ranks."""
        self.read_denominators()
        if not self.overlaps:
            run(window, indices, snapshot)
            return
        last = [index for index in indices if index not in window.zero_weight][-1]
        run(window, [index for index in indices if index != last], snapshot)
        modules = parallel_modules(window.context.modules)
        self.meet()  # all are ready: from here on they wait for each other in the backward pass
        self.is_awaited = False
        try:
            with _reducing(modules):
                run(window, [last], snapshot)
        except BaseException as error:
            for module in modules:
                drop_reduction(module)
            settle_failure(self.group, (), error, "the last backward pass of a window")
            raise
        self.is_awaited = True

    def end(self, losses: LossTerms, gradients: GradientBuffer) -> None:
        """[B]; gradients are summed already, where all ranks had some."""
        if not self.overlaps:
            super().end(losses, gradients)
            return
        losses.settle()
        self._join(losses, b"")

    def _can_overlap(self) -> bool:
        is_busy = len(self._own.zero_weight) < len(self._own.samples.values)
        return is_busy and bool(self._settings.names.terms)  # which the first window has found


def refuse_overlap(modules: Sequence[nn.Module]) -> None:
    """Raise OptionError where a DistributedDataParallel module cannot sum gradients that gradfold accumulates."""
    for module in parallel_modules(modules):
        if module.gradient_as_bucket_view:
            raise OptionError(
                'ddp_reduce="in_last_backward" is not supported with gradient_as_bucket_view=True, whose gradients of '
                "earlier windows share memory with new ones. Leave gradient_as_bucket_view out."
            )


@contextmanager
def _reducing(modules: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Modules sum gradients in the backward pass in here; DistributedError where one of them did not."""
    for module in modules:
        module.require_backward_grad_sync = True
    try:
        yield
        for module in modules:
            if not end_reduction(module):
                raise DistributedError(
                    f"{type(module.module).__name__} has parameters without a gradient in the last micro-batch, which "
                    "DistributedDataParallel waits for. Pass it find_unused_parameters=True, or leave "
                    'ddp_reduce="in_last_backward" out.'
                )
    finally:
        for module in modules:
            module.require_backward_grad_sync = False
            module.require_forward_param_sync = False
