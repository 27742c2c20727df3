"""A fault on one rank of several, at every operator that it runs."""

from __future__ import annotations

import gc
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from distributed.ddp_cases import cut, gradients, perceptron, regression_batch, rows_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import gradfold
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.process_group import ProcessGroup, Reduction

ERRORS = {
    "out of memory": lambda: torch.OutOfMemoryError("injected"),
    "a bug": lambda: ValueError("injected"),
    "interrupt": lambda: KeyboardInterrupt("injected"),
}


is_meeting = False


def without_faults(function):
    """A meeting that has begun is no place where one rank can fail alone."""

    def run(*args, **kwargs):
        global is_meeting
        before, is_meeting = is_meeting, True
        try:
            return function(*args, **kwargs)
        finally:
            is_meeting = before

    return run


@contextmanager
def spared_meetings():
    with ExitStack() as stack:
        for owner, name in (
            (ProcessGroup, "begin_gather"),
            (ProcessGroup, "begin_sum"),
            (ProcessGroup, "maximum"),
            (DataParallelCoordinator, "meet"),
            (ProcessGroup, "exchange"),
            (Reduction, "run"),
        ):
            stack.enter_context(mock.patch.object(owner, name, without_faults(getattr(owner, name))))
        yield


class FailAt(TorchDispatchMode):
    """Raises at the n-th operator; counts them all."""

    def __init__(self, at, make):
        super().__init__()
        self.at, self.make, self.count = at, make, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not is_meeting:
            self.count += 1
            if self.count == self.at:
                raise self.make()
        return func(*args, **(kwargs or {}))


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def one_window(rank, size, faulty_rank, at, error):
    """Gradients, or the name of the error and its text; and whether `.grad` was rolled back."""
    model = DistributedDataParallel(perceptron())  # which meets others, too
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, self_check=False)
    batch = cut(regression_batch(), rows_of(rank, size))
    mode = FailAt(at if rank == faulty_rank else 0, ERRORS[error])
    try:
        with mode:
            result = accumulator.backward(batch)
    except BaseException as caught:
        found = [one.grad for one in model.parameters() if one.grad is not None]
        return type(caught).__name__, str(caught), not found, mode.count
    return gradients(model), result.loss.clone(), len(result.recoveries), mode.count


def run_points(rank, size, faulty_rank, error, points):
    """A window for every point."""
    gc.collect()
    gc.freeze()  # a recovery collects garbage: of what the windows leave, not of all of torch
    with spared_meetings():
        found = [one_window(rank, size, faulty_rank, at, error) for at in points]
    gc.unfreeze()
    return found
