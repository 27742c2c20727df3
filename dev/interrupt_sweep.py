"""Interrupts a window at every line of gradfold in turn, and looks at what is left: modes, gradients, buffers, threads.

    python dev/interrupt_sweep.py                    # all kinds of windows, every line
    python dev/interrupt_sweep.py plain --every 7    # one kind, every seventh line

A tracer raises KeyboardInterrupt in the main thread at the n-th line that gradfold executes, for n = 1, 2, ... After
each, everything must be as before the window (or as after it, if it was complete), and the next window must have the
exact gradient. A tracer also raises
where CPython takes no signal (between two lines of one `finally`), so it asks for more than Ctrl-C can.
"""

from __future__ import annotations

import argparse
import collections
import copy
import gc
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradfold

SOURCE = str(Path(gradfold.__file__).parent)
SIZE = 4  # rows of a micro-batch


class Case(NamedTuple):
    """A kind of window.

    Attributes:
        make: a model, fresh.
        loss_fn: as for `Accumulator`.
        options: of the accumulator.
        tolerance: of the gradient, relative.
    """

    make: Callable[[], nn.Module]
    loss_fn: Any
    options: dict[str, Any]
    tolerance: float = 1e-12


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, in float32 at least."""
    outputs = model(batch[0].to(next(model.parameters()).dtype))
    return F.cross_entropy(outputs.float() if outputs.dtype == torch.bfloat16 else outputs, batch[1])


def batch_norm_net() -> nn.Module:
    """With BatchNorm."""
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()


def contrast(model: nn.Module, outputs: Tensor) -> Tensor:
    """Rows against all others."""
    outputs = F.normalize(outputs, dim=1)
    return F.cross_entropy(5 * outputs @ outputs.T, torch.arange(len(outputs)).roll(1))


def embed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The outputs of some rows."""
    outputs: Tensor = model(batch[0])
    return outputs


def simple_net() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


CASES = {
    "plain": Case(simple_net, mean_loss, {}),
    "per_micro_batch": Case(batch_norm_net, mean_loss, {"batch_norm": "per_micro_batch"}),
    "exact": Case(batch_norm_net, mean_loss, {"batch_norm": "exact"}),
    "two_phase": Case(simple_net, gradfold.TwoPhaseLoss(embed, contrast), {}),
    "bf16": Case(lambda: simple_net().bfloat16(), mean_loss, {}, tolerance=3e-2),
}


class Interrupter:
    """Raises KeyboardInterrupt at one line of gradfold; `last` counts the lines, and `where` is that line."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.last = 0
        self.where = ""

    def __enter__(self) -> Interrupter:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.last += 1
            if self.last == self.at:
                self.where = f"{frame.f_code.co_filename.removeprefix(SOURCE + '/')}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a window must leave as it was."""
    return {
        "modes": [module.training for module in model.modules()],
        "gradients": [None if one.grad is None else one.grad.double().tolist() for one in model.parameters()],
        "buffers": [one.double().tolist() for one in model.buffers()],
        "parameters": [one.tolist() for one in model.parameters()],
        "hooks": [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()],
        "momentum": [getattr(one, "momentum", None) for one in model.modules()],
        "attributes": [sorted(vars(one)) for one in model.modules()],
        "threads": sorted(one.name for one in threading.enumerate()),
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "modes of torch": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "warnings": (list(warnings.filters), torch.is_warn_always_enabled()),
        "grad_dtype": [str(one.grad_dtype) for one in model.parameters()],
    }


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states differ by more than rounding: memory of another alignment is summed in another order."""
    rounded = "gradients", "buffers"
    for part in rounded:
        try:
            torch.testing.assert_close(one[part], other[part], rtol=1e-12, atol=1e-12)
        except AssertionError:
            return True
    return any(one[part] != other[part] for part in one if part not in rounded)


def gradient_error(case: Case, model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Of a window of a new accumulator, against plain torch."""
    model.zero_grad()
    reference = copy.deepcopy(model)
    loss_fn, options = case.loss_fn, {"micro_batch_size": SIZE} | case.options
    size = options["micro_batch_size"] if case.options.get("batch_norm") == "per_micro_batch" else len(batch[0])
    parts = list(zip(batch[0].split(size), batch[1].split(size), strict=True))
    if isinstance(loss_fn, gradfold.TwoPhaseLoss):
        loss_fn.loss(reference, torch.cat([loss_fn.statistic(reference, part) for part in parts])).backward()
    else:
        for part in parts:
            (loss_fn(reference, part) * size / len(batch[0])).backward()
    gradfold.Accumulator(model, loss_fn, **options).backward(batch)
    found, expected = (torch.cat([p.grad.double().flatten() for p in one.parameters()]) for one in (model, reference))
    return float((found - expected).norm() / expected.norm())


def with_gradients(model: nn.Module) -> nn.Module:
    """The model, with gradients that a window finds."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    return model


def sweep(case: Case, every: int) -> Iterator[tuple[str, str]]:
    """Interrupt at one line after another; yields the line and what was wrong after it, or ""."""
    at = 1
    while True:
        torch.manual_seed(0)
        batch = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))
        model = with_gradients(case.make())
        twin = with_gradients(copy.deepcopy(model))
        accumulator, other = (
            gradfold.Accumulator(one, case.loss_fn, micro_batch_size=SIZE, **case.options) for one in (model, twin)
        )
        before, interrupter = state_of(model), Interrupter(at)
        try:
            with interrupter:
                accumulator.backward(batch)
        except KeyboardInterrupt:
            pass
        if not interrupter.where:
            return
        now = state_of(model)
        faults = [key for key, value in now.items() if value != before[key]]
        torch.set_grad_enabled(True)
        if faults:
            torch.set_rng_state(torch.tensor(before["random"], dtype=torch.uint8))
            other.backward(batch)
            faults = faults if differ(now, state_of(twin)) else []
        try:
            error = gradient_error(case, model, batch)
            if not error <= case.tolerance:
                faults.append(f"next window {error:.1e} off")
        except Exception as failure:
            faults.append(f"next window: {traceback.format_exception_only(failure)[-1].strip()[:120]}")
        yield interrupter.where, ", ".join(faults)
        at += every


def main() -> None:
    """Sweep the kinds of windows that were named, and print a tally of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=[], help=f"of windows: {', '.join(CASES)}; without any, all")
    parser.add_argument("--every", type=int, default=1, help="interrupt at every n-th line only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.kinds or CASES:
        begin, num_points, wrong = time.perf_counter(), 0, collections.Counter[str]()
        for where, fault in sweep(CASES[name], options.every):
            num_points += 1
            if num_points % 500 == 0:
                gc.collect()
                print(f"  {name}: {num_points} lines, {wrong.total()} wrong", file=sys.stderr)
            if fault:
                wrong[f"{where}: {fault}"] += 1
        print(f"{name}: {num_points} interrupts, {wrong.total()} left something, {time.perf_counter() - begin:.0f} s")
        for text, count in wrong.most_common(20):
            print(f"    {count} x {text}")


if __name__ == "__main__":
    main()
