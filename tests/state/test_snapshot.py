"""A snapshot: commits, rewinds, rolls back, returns to a savepoint, or is discarded, whatever interrupts it."""

from __future__ import annotations

import random
import sys

import numpy
import pytest
import torch
from reference import assert_same_state, state
from torch import nn

from gradfold.state import buffers as buffers_module
from gradfold.state import external as external_module
from gradfold.state import gradients as gradients_module
from gradfold.state import snapshot as snapshot_module
from gradfold.state.buffers import BufferKeeper
from gradfold.state.snapshot import Snapshot


class Model(nn.Module):
    """A layer, and a buffer that moves when it runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("passes", torch.zeros(()))

    def run(self):
        """One micro-batch: numbers are drawn, a buffer moves, gradients grow."""
        self.passes.add_(1)
        self.linear(torch.rand(3, 2)).sum().backward()


@pytest.fixture
def model():
    model = Model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    return model


def opened(model, buffers=None):
    return Snapshot(model, list(model.modules()), list(model.parameters()), buffers or BufferKeeper())


class Failed(Exception):
    pass


def fail(*_):
    raise Failed


def held(model):
    return [parameter.grad for parameter in model.parameters()]


def test_it_commits_at_the_end_of_its_block(model):
    tensors, before, buffers = held(model), state(model), BufferKeeper()
    with opened(model, buffers) as snapshot:
        assert held(model) == [None, None], "meanwhile the fields are empty"
        model.run()
        new = [gradient.clone() for gradient in held(model)]
        snapshot.settle()
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))
    assert all(torch.equal(total, 7.0 + one) for total, one in zip(tensors, new, strict=True))
    assert model.passes.item() == 1 and not torch.equal(torch.get_rng_state(), before["random"])
    assert not buffers.changes(), "nothing is kept any more"


@pytest.mark.parametrize("error", [Failed, KeyboardInterrupt])
def test_it_rolls_back_on_any_exception(model, error):
    tensors, before = held(model), state(model)
    with pytest.raises(error), opened(model):
        model.run()
        raise error
    assert_same_state(state(model), before)
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))


@pytest.mark.parametrize("method", ["learn", "add_back"])
def test_it_rolls_back_where_the_close_fails(model, method, monkeypatch):
    before, tensors = state(model), held(model)
    with pytest.raises(Failed), opened(model) as snapshot:
        model.run()
        owner = snapshot._buffers if method == "learn" else snapshot.gradients
        monkeypatch.setattr(type(owner), method, fail)
        snapshot.settle()
    assert_same_state(state(model), before)
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))


def test_the_random_state_is_restored_though_a_warning_about_buffers_is_an_error(model):
    buffers = BufferKeeper()
    with opened(model, buffers) as snapshot:
        snapshot.settle()  # nothing has changed, so that nothing is kept from now on
    before = state(model)
    with pytest.raises(RuntimeWarning, match=r"Model\.passes"), opened(model, buffers):
        model.run()
        raise Failed
    after = state(model)
    assert after["buffers"].pop("passes").item() == 1
    del before["buffers"]["passes"]
    assert_same_state(after, before)


def test_it_rolls_back_though_memory_does_not_suffice_to_compare_buffers(model, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    before = state(model)
    with pytest.raises(Failed), opened(model):
        model.run()
        monkeypatch.setattr("gradfold.state.buffers.BufferKeeper.changes", no_memory)
        raise Failed
    assert_same_state(state(model), before)


def test_a_rewind_begins_again_with_empty_gradients(model):
    with opened(model) as snapshot:
        model.run()
        first = [gradient.clone() for gradient in held(model)]
        model.run()
        snapshot.rewind()
        assert held(model) == [None, None] and model.passes.item() == 0
        model.run()
        assert all(torch.equal(*pair) for pair in zip(first, held(model), strict=True)), "the same random numbers"
    assert model.passes.item() == 1
    assert all(torch.equal(total, 7.0 + one) for total, one in zip(held(model), first, strict=True))


def test_a_window_can_be_rewound_and_rolled_back(model):
    before = state(model)
    with pytest.raises(Failed), opened(model) as snapshot:
        for _ in range(3):
            model.run()
            snapshot.rewind()
        model.run()
        raise Failed
    assert_same_state(state(model), before)


def test_a_rewind_goes_back_to_the_beginning_and_a_roll_back_to_the_opening(model):
    """In between the batch is cut, and collation may draw random numbers."""
    opening = torch.get_rng_state()
    with pytest.raises(Failed), opened(model) as snapshot:
        torch.rand(5)
        snapshot.begin()
        beginning = torch.get_rng_state()
        assert not snapshot.has_drawn()
        model.run()
        assert snapshot.has_drawn()
        snapshot.rewind()
        assert torch.equal(torch.get_rng_state(), beginning) and not snapshot.has_drawn()
        raise Failed
    assert torch.equal(torch.get_rng_state(), opening)


def test_discarded_it_leaves_no_gradient_and_the_buffers_as_they_were(model):
    with opened(model) as snapshot:
        model.run()
        moved = torch.get_rng_state()
        snapshot.discard()
    assert held(model) == [None, None] and model.passes.item() == 0
    assert torch.equal(torch.get_rng_state(), moved)


def test_what_was_discarded_can_still_be_rolled_back(model):
    tensors, before = held(model), state(model)
    with pytest.raises(KeyboardInterrupt), opened(model) as snapshot:
        model.run()
        snapshot.discard()
        raise KeyboardInterrupt
    assert_same_state(state(model), before)
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))


def test_gradients_that_are_not_finite_are_flagged(model):
    with opened(model) as snapshot:
        model.run()
        assert not any(flag.item() for flag in snapshot.settle())
        model.linear.weight.grad[0, 1] = float("nan")
        assert any(flag.item() for flag in snapshot.settle())


class TestSavepoint:
    def test_what_has_only_drawn_numbers_is_undone(self, model):
        with opened(model) as snapshot:
            snapshot.set_savepoint()
            state_then = torch.get_rng_state()
            model.linear(torch.rand(3, 2)).sum()
            assert snapshot.return_to_savepoint()
            assert torch.equal(torch.get_rng_state(), state_then)

    @pytest.mark.parametrize("which", ["weight", "bias"])
    @pytest.mark.parametrize("has_gradient", [False, True])
    def test_a_gradient_that_has_grown_is_a_trace(self, model, which, has_gradient):
        with opened(model) as snapshot:
            if has_gradient:
                model.linear(torch.ones(3, 2)).sum().backward()
            snapshot.set_savepoint()
            assert snapshot.return_to_savepoint(), "there is nothing to undo"
            snapshot.set_savepoint()
            moved = torch.rand(1), torch.get_rng_state()
            getattr(model.linear, which).sum().backward()
            assert not snapshot.return_to_savepoint()
            assert torch.equal(torch.get_rng_state(), moved[1]), "nothing is undone"

    def test_a_gradient_that_was_replaced_by_its_equal_is_a_trace(self, model):
        with opened(model) as snapshot:
            model.linear(torch.ones(3, 2)).sum().backward()
            snapshot.set_savepoint()
            model.linear.weight.grad = model.linear.weight.grad.clone()
            assert not snapshot.return_to_savepoint()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_buffer_that_has_moved_in_this_window_is_a_trace(self, model, when):
        """Only its value at the opening is known."""
        with opened(model) as snapshot:
            if when == "before":
                model.passes.add_(1)
            snapshot.set_savepoint()
            if when == "after":
                model.passes.add_(1)
            assert not snapshot.return_to_savepoint()

    def test_a_buffer_that_never_moved_before_is_a_trace(self, model):
        buffers = BufferKeeper()
        with opened(model, buffers):
            pass  # from now on it is not kept
        with opened(model, buffers) as snapshot:
            snapshot.set_savepoint()
            model.passes.add_(1)
            assert not snapshot.return_to_savepoint()


class Everything(Model):
    """A model of which a run changes all that a snapshot keeps: buffers by value and by identity, modes, attributes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("late", None)
        self.table = nn.Embedding(4, 2, sparse=True)
        self.history = [0]

    def run(self):
        self.passes.add_(1)
        hidden = self.norm(torch.rand(3, 2) + self.table(torch.tensor([0, 1, 1])))
        self.average = self.average + 1
        self.late = torch.ones(1)
        self.history.append(random.random())
        self.note = numpy.random.rand()
        self.linear(hidden).sum().backward()
        self.norm.eval()


SAVED = [module.__file__ for module in (snapshot_module, gradients_module, buffers_module)]


class Interrupts:
    """Raises a KeyboardInterrupt before the line number `at` of those that run in the files that save and restore."""

    def __init__(self, at=None):
        self.at = at
        self.lines: list[str] = []

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in SAVED:
            return None
        if event == "line":
            self.lines.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
            if len(self.lines) - 1 == self.at:
                raise KeyboardInterrupt
        return self.trace


def everything(model):
    """What a snapshot of a probe keeps of a model, by value and by identity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "values": {name: (one, one.detach().clone()) for name, one in tensors},
        "modes": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
        "history": (model.history, list(model.history), sorted(vars(model))),
        "host": (random.getstate(), numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2]),
    }


def assert_as_before(found, before, where, *, is_probe):
    for name, (one, value) in before["values"].items():
        assert found["values"][name][0] is one, (where, name)
        assert torch.equal(found["values"][name][1], value), (where, name)
    assert found["values"].keys() == before["values"].keys(), where
    for name, gradient in before["gradients"].items():
        assert found["gradients"][name] is gradient, (where, name)
        assert gradient is None or torch.equal(gradient.to_dense(), torch.full_like(gradient.to_dense(), 7.0)), where
    assert found["modes"] == before["modes"], where
    assert torch.equal(found["random"], before["random"]), where
    if is_probe:
        assert found["history"][0] is before["history"][0] and found["history"] == before["history"], where
        assert found["host"] == before["host"], where


def run_interrupted(at, is_probe, *, on_entry=False):
    """A window, or a probe, that fails and is interrupted as it rolls back; the lines that ran, and what is left."""
    torch.set_grad_enabled(True)  # an interrupt at the end of a `with torch.no_grad()` leaves it off
    torch.manual_seed(0)
    model = Everything()
    for parameter in (model.linear.weight, model.norm.bias):
        parameter.grad = torch.full_like(parameter, 7.0)
    model.table.weight.grad = torch.full((4, 2), 7.0).to_sparse(1)
    before = everything(model)
    interrupts = Interrupts(at)
    snapshot = Snapshot(model, list(model.modules()), list(model.parameters()), probe=() if is_probe else None)
    tracing = sys.gettrace()
    try:
        try:
            if on_entry:
                sys.settrace(interrupts.trace)
            with snapshot:
                sys.settrace(None)
                model.run()
                model.run()
                if not on_entry:
                    sys.settrace(interrupts.trace)
                raise Failed
        except BaseException:  # as in a window
            snapshot.roll_back()
            raise
    except (Failed, KeyboardInterrupt) as error:
        is_interrupted = isinstance(error, KeyboardInterrupt)
    finally:
        sys.settrace(tracing)
    assert is_interrupted is (at is not None)
    return interrupts.lines, before, everything(model)


@pytest.mark.parametrize("is_probe", [False, True], ids=["window", "probe"])
@pytest.mark.parametrize("on_entry", [False, True], ids=["roll-back", "entry"])
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(is_probe, on_entry):
    """The first of `__exit__` and the last of `__enter__` among them, for which Python calls no `__exit__`."""
    lines, before, found = run_interrupted(None, is_probe, on_entry=on_entry)
    assert_as_before(found, before, "without an interrupt", is_probe=is_probe)
    assert len(lines) > 80
    for at in range(len(lines)):
        _, before, found = run_interrupted(at, is_probe, on_entry=on_entry)
        assert_as_before(found, before, lines[at], is_probe=is_probe)


class TestProbe:
    def opened(self, *functions):
        torch.manual_seed(0)
        model = Everything()
        return model, Snapshot(model, list(model.modules()), list(model.parameters()), probe=functions)

    @pytest.mark.parametrize("fails", [False, True])
    def test_it_puts_everything_back_though_it_goes_through(self, fails):
        seen = []
        model, snapshot = self.opened(lambda: seen.append(model))
        before = everything(model)
        try:
            with snapshot:
                model.run()
                seen.append("a loss")
                assert model.history != [0] and model.norm.training is False
                if fails:
                    raise Failed
        except Failed:
            assert fails
        assert_as_before(everything(model), before, "", is_probe=True)
        assert seen == []

    def test_all_modules_are_kept_however_many_objects_there_are(self, monkeypatch):
        monkeypatch.setattr(external_module, "_MAX_OBJECTS", 2)
        model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)])
        with Snapshot(model, list(model.modules()), list(model.parameters()), probe=(lambda: None,)):
            model[8].note = 1
        assert not hasattr(model[8], "note")

    def test_a_rewind_sets_the_generators_of_the_host_back_too(self):
        model, snapshot = self.opened()
        with snapshot:
            model.run()
            assert snapshot.has_drawn_on_host() == "random"
            first = [*model.history[1:], model.note]
            snapshot.rewind()
            assert snapshot.has_drawn_on_host() is None
            numpy.random.rand()
            assert snapshot.has_drawn_on_host() == "numpy.random"
            snapshot.rewind()
            model.run()
            assert [*model.history[1:], model.note] == first, "attributes go back, too"

    def test_it_names_the_buffers_that_have_changed(self):
        model, snapshot = self.opened()
        with snapshot:
            model.passes.add_(1)
            model.average = model.average + 1
            assert snapshot.changed_buffers() == ["passes", "average"]

    def test_a_window_leaves_attributes_and_generators_of_the_host_to_the_user(self):
        model = Everything()
        with pytest.raises(Failed), Snapshot(model, list(model.modules()), list(model.parameters())) as snapshot:
            model.run()
            assert snapshot.has_drawn_on_host() is None
            raise Failed
        assert len(model.history) == 2 and hasattr(model, "note")


def test_modules_are_put_back_though_memory_runs_out_in_that(monkeypatch):
    """Whoever caught the error would go on with a model that is half put back."""
    model, real, calls = Everything(), torch.Tensor.copy_, []

    def scarce(self, other):
        calls.append(self)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("none left")
        return real(self, other)

    before = {name: one.clone() for name, one in model.named_buffers()}
    with pytest.raises(torch.OutOfMemoryError), snapshot_module.restored_modules(model):
        model.passes.add_(1)
        model.norm(torch.rand(3, 2))
        model.history.append(1)
        monkeypatch.setattr(torch.Tensor, "copy_", scarce)
    monkeypatch.undo()
    assert len(calls) > 2 and model.history == [0]
    assert all(torch.equal(one, before[name]) for name, one in model.named_buffers())
