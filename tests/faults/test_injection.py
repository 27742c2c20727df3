"""Faults at every operator of a window: memory that runs out is survived, anything else leaves no trace.

A dispatch mode raises at the n-th operator, for every n. On a CPU it sees backward passes, too.
"""

from __future__ import annotations

import functools
import gc
import itertools
from contextlib import suppress

import pytest
import torch
from faults.naive import SPECIMENS, Logged, build, plain_loop
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch.utils._python_dispatch import TorchDispatchMode

import gradfold

ENTRIES = ["fresh", "warm"]
OUT_OF_MEMORY = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: MemoryError(),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
]


class Fault(TorchDispatchMode):
    """Raises at the operator number `at`, before or after it has done its work."""

    def __init__(self, at=0, error=None, after=False):
        super().__init__()
        self.at, self.error, self.after = at, error, after
        self.count = 0
        self.operator = ""
        self.window = None
        self.is_survivable = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        is_here = self.count == self.at
        if is_here:
            self.operator = str(func)
            self.is_survivable = self.window is not None and self.window.is_in_the_middle()
            if self.after:
                with suppress(RuntimeError):  # sparse tensors lack some, for which there is another way
                    func(*args, **(kwargs or {}))
            raise self.error
        return func(*args, **(kwargs or {}))


class Window:
    """One window of a specimen, ready to run: by a new accumulator, or as a second one that adds to a first."""

    def __init__(self, specimen, entry):
        self.model, self.batch = build(specimen)
        self.loss_fn = Logged()
        self.accumulator = gradfold.Accumulator(
            self.model,
            self.loss_fn,
            micro_batch_size=specimen.micro_batch_size,
            self_check=False,
            **specimen.options,
        )
        if entry == "warm":
            self.accumulator.backward(self.batch)
            self.loss_fn.calls.clear()
        self.found = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        torch.manual_seed(7)

    def run(self, fault):
        fault.window = self
        with fault:
            return self.accumulator.backward(self.batch)

    def is_in_the_middle(self):
        """Whether micro-batches have begun, but not all of them: memory that runs out is survived there."""
        rows = {row for call in self.loss_fn.calls for row in call}
        return 0 < len(rows) < len(self.batch[0])

    def keeps_its_tensors(self):
        return all(
            parameter.grad is self.found[name]
            for name, parameter in self.model.named_parameters()
            if self.found[name] is not None
        )


@functools.cache
def count_points(name, entry):
    for _ in range(2):  # what is cached in the process is there the second time
        fault = Fault()
        Window(SPECIMENS[name], entry).run(fault)
    return fault.count


FAST = ("running statistics", "warm")
CASES = [
    pytest.param(*case, marks=[] if case == FAST else pytest.mark.slow)
    for case in itertools.product(SPECIMENS, ENTRIES)
]


def live_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


class Expected:
    """What the plain loop gives for each split, from where a window of a specimen begins."""

    def __init__(self, specimen, entry):
        self.specimen, self.entry = specimen, entry
        self.known = {}
        self.of_the_whole = None
        if not specimen.is_random:
            model, batch = build(specimen)
            num_windows = 2 if entry == "warm" else 1
            self.of_the_whole = full_batch_gradient(model, lambda model: num_windows * Logged()(model, batch)[0])

    def after(self, split):
        key = tuple(map(tuple, split))
        if key not in self.known:
            start = Window(self.specimen, self.entry)
            plain_loop(start.model, start.batch, split)
            self.known[key] = state(start.model)
        return self.known[key]


def assert_like_the_plain_loop(window, expected):
    """Bitwise, but for statistics that a plain loop pools otherwise."""
    found, pooled = state(window.model), ("running_mean", "running_var")
    for name in [name for name in found["buffers"] if name.endswith(pooled)]:
        torch.testing.assert_close(found["buffers"][name], expected["buffers"][name], rtol=1e-13, atol=1e-15)
        found["buffers"][name] = expected["buffers"][name]
    assert_same_state(found, expected)


def recover_at(at, name, entry, expected, before):
    """Run a window with memory that runs out at one operator; gives its recoveries."""
    specimen = SPECIMENS[name]
    window = Window(specimen, entry)
    fault = Fault(at, OUT_OF_MEMORY[at % 3]())
    try:
        result = window.run(fault)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        assert error is fault.error and not fault.is_survivable, (at, fault.operator)
        assert_same_state(state(window.model), before)
        assert all(one.grad is window.found[key] for key, one in window.model.named_parameters())
        return ()
    assert result.recoveries or not fault.is_survivable, (at, fault.operator)
    split = window.loss_fn.split()
    assert_like_the_plain_loop(window, expected.after(split))
    assert window.keeps_its_tensors()
    assert result.metrics["numbers"].tolist() == list(range(specimen.rows))
    assert (result.num_samples, result.num_micro_batches) == (specimen.rows, len(split))
    if expected.of_the_whole is not None:
        assert relative_error(gradients(window.model), expected.of_the_whole) <= 1e-12
    for recovery in result.recoveries:
        assert recovery.changes_randomness == specimen.is_random
        assert recovery.changes_batch_statistics == ("batch_norm" in specimen.options)
    return result.recoveries


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_out_of_memory_at_every_operator_ends_in_the_gradient_of_the_same_split(name, entry):
    before = state(Window(SPECIMENS[name], entry).model)
    expected = Expected(SPECIMENS[name], entry)
    recoveries = []
    live = []
    num_points = count_points(name, entry)
    for at in range(1, num_points + 1):
        recoveries += recover_at(at, name, entry, expected, before)
        if at in (num_points // 2, num_points):
            expected.known.clear()
            live.append(live_tensors())
    assert len(recoveries) >= 0.8 * num_points
    keeps = entry == "fresh" and "batch_norm" not in SPECIMENS[name].options
    assert {recovery.replayed for recovery in recoveries} == ({True, False} if keeps else {True})
    assert live[1] <= live[0], "tensors leak"


@pytest.mark.slow
def test_there_are_hundreds_of_points():
    assert sum(count_points(*case) for case in itertools.product(SPECIMENS, ENTRIES)) >= 1000


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("name", "entry"), CASES)
def test_an_interrupt_at_every_operator_leaves_everything_as_it_was(name, entry, after):
    """One window for all points, so that nothing may add up.

    The addition to the gradients found is the last thing that a window does, and cannot be undone once it is done.
    """
    num_points = count_points(name, entry) - (after and entry == "warm")
    window = Window(SPECIMENS[name], entry)
    before = state(window.model)
    for at in range(1, num_points + 1):
        fault = Fault(at, KeyboardInterrupt(), after)
        with pytest.raises(KeyboardInterrupt) as caught:
            window.run(fault)
        assert caught.value is fault.error
        assert_same_state(state(window.model), before)
        assert all(one.grad is window.found[key] for key, one in window.model.named_parameters())


def halve_and_retry(model, batch, size, fault):
    """The recovery that suggests itself, and is wrong: what the failed backward pass has added stays."""
    numbers = batch[2].tolist()
    waiting = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    with fault:
        while waiting:
            rows = waiting.pop(0)
            try:
                loss, _ = Logged()(model, [tensor[rows[0] : rows[-1] + 1] for tensor in batch])
                (loss * (len(rows) / len(numbers))).backward()
            except torch.OutOfMemoryError:
                middle = len(rows) // 2
                waiting = [rows[:middle], rows[middle:], *waiting]


def test_halving_and_retrying_without_a_roll_back_is_wrong_by_a_third_of_the_gradient_and_more():
    """The counter-example, for which all of this is needed."""

    def start():
        model, batch = build(SPECIMENS["shared and sparse"])
        return model, [tensor[:6] for tensor in batch]

    model, batch = start()
    whole = full_batch_gradient(model, lambda model: Logged()(model, batch)[0])
    fault = Fault()
    halve_and_retry(model, batch, 3, fault)
    assert relative_error(gradients(model), whole) <= 1e-12, "without a fault"
    errors = []
    for at in range(1, fault.count + 1):
        model, batch = start()
        halve_and_retry(model, batch, 3, Fault(at, torch.OutOfMemoryError()))
        errors.append(relative_error(gradients(model), whole))
    wrong = [error for error in errors if error > 1e-12]
    assert len(wrong) >= len(errors) // 4
    assert max(wrong) > 0.5 and sum(wrong) / len(wrong) > 0.3
