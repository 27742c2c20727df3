"""Runs a window out of memory at every operator in turn, and looks at what is left and at the next window.

    python dev/memory_sweep.py                    # all kinds of windows, every operator
    python dev/memory_sweep.py exact --every 7    # one kind, every seventh operator
    python dev/memory_sweep.py exact --lasting 9  # the next nine operators that take memory fail, too

A dispatch mode raises torch.OutOfMemoryError at the n-th operator, n = 1, 2, ..., forward and backward passes, the
self-check's own runs and roll-backs included. Each window must end with the gradient of its split, or with everything
as before, and an error that says so; the next window must be exact.
"""

from __future__ import annotations

import argparse
import collections
import copy
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from interrupt_sweep import (
    CASES,
    SIZE,
    Case,
    batch_norm_net,
    contrast,
    differ,
    embed,
    gradient_error,
    mean_loss,
    state_of,
    with_gradients,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfold

SOURCE = str(Path(gradfold.__file__).parent)
UNCHECKED = {"self_check": False}
KINDS = {
    "plain": CASES["plain"],
    "exact": CASES["exact"],
    "per_micro_batch": CASES["per_micro_batch"],
    "two_phase": CASES["two_phase"],
    "two_phase per_micro_batch": Case(
        batch_norm_net, gradfold.TwoPhaseLoss(embed, contrast), {"batch_norm": "per_micro_batch"}
    ),
    "two_phase halved to rows": Case(
        batch_norm_net, gradfold.TwoPhaseLoss(embed, contrast), {"batch_norm": "per_micro_batch", "micro_batch_size": 2}
    ),
    "exact, buffers": Case(lambda: Counting(), mean_loss, {"batch_norm": "exact"}),
}
KINDS |= {f"{name} unchecked": case._replace(options=case.options | UNCHECKED) for name, case in KINDS.items()}


class Counting(nn.Module):
    """With a buffer and an attribute that every forward pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = batch_norm_net()
        self.seen = 0
        self.register_buffer("total", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        self.seen += 1
        self.total += len(x)
        outputs: Tensor = self.net(x)
        return outputs


class Scarcity(TorchDispatchMode):
    """Raises at one operator; `count` counts them, `where` is the operator and the innermost line of gradfold."""

    def __init__(self, at: int, lasting: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.lasting, self.count, self.where = at, lasting, 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        if self.count == self.at:
            frame = sys._getframe()
            while frame.f_back is not None and not frame.f_code.co_filename.startswith(SOURCE):
                frame = frame.f_back
            self.where = f"{func} at {frame.f_code.co_filename.removeprefix(SOURCE + '/')}:{frame.f_lineno}"
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        takes_memory = all(one.alias_info is None for one in func._schema.returns)  # neither a view nor in place
        if self.where and takes_memory and self.lasting:
            self.lasting -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def faults_of(case: Case, at: int, lasting: int) -> tuple[str, str] | None:
    """Where memory ran out at operator `at` and what was wrong then; None where there are no such many."""
    torch.manual_seed(0)
    batch = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))
    model = with_gradients(case.make())
    twin = with_gradients(copy.deepcopy(model))
    accumulator, other = (
        gradfold.Accumulator(one, case.loss_fn, **{"micro_batch_size": SIZE} | case.options) for one in (model, twin)
    )
    before, scarcity, faults = state_of(model), Scarcity(at, lasting), []
    result = None
    try:
        with scarcity:
            result = accumulator.backward(batch)
    except (torch.OutOfMemoryError, gradfold.DoesNotFitError):
        pass
    except Exception as failure:
        faults.append(f"{traceback.format_exception_only(failure)[-1].strip()[:120]}")
    if not scarcity.where:
        return None
    now = state_of(model)
    if result is None:
        faults += [key for key, value in now.items() if value != before[key]]
    else:
        size = min(one.micro_batch_size for one in result.recoveries) if result.recoveries else SIZE
        if case.options.get("batch_norm") != "per_micro_batch" or size == SIZE:
            torch.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
            other.backward(batch)
            if differ(now, state_of(twin)):
                faults.append("the window is off")
    try:
        error = gradient_error(case, model, batch) if not faults else 0.0
        if not error <= case.tolerance:
            faults.append(f"next window {error:.1e} off")
    except Exception as failure:
        faults.append(f"next window: {traceback.format_exception_only(failure)[-1].strip()[:120]}")
    return scarcity.where, ", ".join(faults)


def sweep(case: Case, every: int, lasting: int) -> Iterator[tuple[str, str]]:
    """Run out of memory at one operator after another; yields where, and what was wrong after it, or ""."""
    at = 1
    while (found := faults_of(case, at, lasting)) is not None:
        yield found
        at += every


def main() -> None:
    """Sweep the kinds of windows that were named, and print a tally of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=[], help=f"of windows: {', '.join(KINDS)}; without any, all")
    parser.add_argument("--every", type=int, default=1, help="run out of memory at every n-th operator only")
    parser.add_argument("--lasting", type=int, default=0, help="so many operators that take memory fail after it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.kinds or KINDS:
        faults_of(KINDS[name], 1, 0)  # what is imported then is there
        begin, num_points, wrong = time.perf_counter(), 0, collections.Counter[str]()
        for where, fault in sweep(KINDS[name], options.every, options.lasting):
            num_points += 1
            if fault:
                wrong[f"{where}: {fault}"] += 1
        print(f"{name}: {num_points} operators, {wrong.total()} wrong, {time.perf_counter() - begin:.0f} s", flush=True)
        for text, count in wrong.most_common(20):
            print(f"    {count} x {text}", flush=True)


if __name__ == "__main__":
    main()
