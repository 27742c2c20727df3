"""Saved states: what `load_state_dict` refuses is named, and leaves everything as it was."""

from __future__ import annotations

import contextlib
import copy
import math
import re

import pytest
import torch
from torch import nn

import gradfold
from gradfold.errors import BatchError, OptionError
from gradfold.state.saved import check_saved, loaded

F = nn.functional
MISSING = object()
LENGTHS = 1 + torch.arange(24) % 6
INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)) * (torch.arange(6) < LENGTHS[:, None])
BATCH = INPUTS, torch.arange(24) % 4


def loss_fn(model, batch):
    """With padding cut off or not."""
    return F.cross_entropy(F.linear(batch[0], model.weight[:, : batch[0].shape[1]], model.bias), batch[1])


AUTO = gradfold.Auto(cache=False, seconds=0.02)
OPTIONS = {
    "plain": {"micro_batch_size": 8},
    "auto": {"micro_batch_size": AUTO},
    "tokens": {"batching": gradfold.TokenBudget(48, lengths=lambda batch: LENGTHS)},
    "scaled": {"micro_batch_size": 8, "precision": gradfold.Precision(grad_scaler=torch.amp.GradScaler("cpu"))},
}


def step_of(kind):
    model = nn.Linear(6, 4)
    accumulator = gradfold.Accumulator(model, loss_fn, **copy.deepcopy(OPTIONS[kind]))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return gradfold.TrainStep(accumulator, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3))


@pytest.fixture(scope="module", params=OPTIONS)
def trained(request):
    """A kind of step, and the state of one that has run and has learned a size."""
    step = step_of(request.param)
    step(BATCH)
    step.accumulator._micro_batcher.fitting.shrink(16)
    return request.param, step.state_dict()


def paths(state, path=()):
    """Every place in a state but those in a scheduler, whose own values are torch's to judge."""
    yield path
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for key, one in () if path == ("scheduler",) else inside:
        yield from paths(one, (*path, key))


def changed(state, path, value):
    """The state with another value at a place, or without it."""
    if not path:
        return value
    if isinstance(state, (list, tuple)):
        return [changed(one, path[1:], value) if index == path[0] else one for index, one in enumerate(state)]
    if len(path) == 1 and value is MISSING:
        return {key: one for key, one in state.items() if key != path[0]}
    return {key: changed(one, path[1:], value) if key == path[0] else one for key, one in state.items()}


@pytest.mark.parametrize(
    "value", [MISSING, None, "x", -1, 0, 2.5, True, [], {}, math.nan], ids=lambda value: repr(value)[:10]
)
def test_a_damaged_state_is_refused_whole_or_can_be_trained_with(trained, value):
    kind, state = trained
    num_refused = 0
    for path in paths(state):
        if value is MISSING and (not path or isinstance(path[-1], int)):
            continue
        step = step_of(kind)
        before = copy.deepcopy(step.state_dict())
        try:
            step.load_state_dict(changed(state, path, value))
        except OptionError as error:
            num_refused += 1
            assert step.state_dict() == before, path
            assert all(repr(key) in str(error) for key in path[-1:] if isinstance(key, str)) or value in (None, {})
        else:
            with contextlib.suppress(BatchError):  # another program's tensors went with the tokens
                step(BATCH)
    assert num_refused >= (0 if value == 0 else 3)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((), None, "not a TrainStep state_dict: state is None; expected a dict"),
        (("updates",), "x", "not a TrainStep state_dict: state['updates'] is 'x'; expected a whole number of at least"),
        (("scheduler", "last_epoch"), MISSING, "missing keys ['last_epoch'] in state['scheduler'], found ['_"),
        (
            ("accumulator", "micro_batcher", "fitting_size", "rows"),
            0,
            "state['accumulator']['micro_batcher']['fitting_size']['rows'] is 0; expected a whole number of at least 1",
        ),
        (("accumulator", "micro_batcher", "fitting_size"), {}, "missing keys ['is_trying', 'patience', 'proven', "),
        (("accumulator", "grad_scaler", "scale"), "x", "['grad_scaler']['scale'] is 'x'; expected a finite number"),
        (("accumulator", "grad_scaler"), {}, "missing keys ['_growth_tracker', 'backoff_factor', 'growth_factor'"),
    ],
)
def test_the_message_has_the_place_and_what_was_found_and_expected(path, value, says):
    step = step_of("scaled")
    step(BATCH)
    with pytest.raises(OptionError, match=re.escape(says)):
        step_of("scaled").load_state_dict(changed(step.state_dict(), path, value))


def test_a_choice_needs_the_size_that_was_chosen():
    """Else "auto" would take the whole batch, or stop at an assertion of the token batcher."""
    first = gradfold.Accumulator(nn.Linear(6, 4), loss_fn, micro_batch_size=AUTO)
    first.backward(BATCH)
    second = gradfold.Accumulator(nn.Linear(6, 4), loss_fn, micro_batch_size=AUTO)
    with pytest.raises(OptionError, match=re.escape("state['micro_batcher']['size'] is None; expected a whole")):
        second.load_state_dict(changed(first.state_dict(), ("micro_batcher", "size"), None))
    assert second.micro_batch_choice is None


class Warmup:
    """A schedule that checks its state on the way."""

    def __init__(self):
        self.at = self.until = 0

    def step(self):
        self.at += 1

    def state_dict(self):
        return {"at": self.at, "until": self.until}

    def load_state_dict(self, state):
        self.at = state["at"]
        self.until = state["until"]


class Scaler(torch.amp.GradScaler):
    """One with a value more."""

    own = 0

    def state_dict(self):
        return {**super().state_dict(), "own": self.own}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.own = state["own"]


def custom_step(scheduler):
    model = nn.Linear(6, 4)
    precision = gradfold.Precision(grad_scaler=Scaler("cpu", init_scale=8.0))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, precision=precision)
    return gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.01), scheduler)


@pytest.mark.parametrize("part", ["scheduler", "grad_scaler"])
def test_what_a_part_of_the_user_refuses_half_way_leaves_all_as_it_was(part):
    step, other = custom_step(Warmup()), custom_step(Warmup())
    step(BATCH)
    state = step.state_dict()
    state["accumulator"]["grad_scaler"] |= {"scale": 2.0, "own": 1}
    if part == "scheduler":
        del state["scheduler"]["until"]
    else:
        del state["accumulator"]["grad_scaler"]["own"]
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(OptionError, match=rf"state\['{part}'\] cannot be loaded: .*load_state_dict raised KeyError"):
        other.load_state_dict(state)
    assert other.state_dict() == before


def test_an_interrupt_puts_a_part_back_and_comes_out():
    schedule = Warmup()

    def interrupt():
        with loaded(schedule, {"at": 5, "until": 6}, "state"):
            assert schedule.at == 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert schedule.state_dict() == {"at": 0, "until": 0}


def test_what_is_expected_of_every_key_and_every_entry():
    expected = {"of": {"*": (None, ["text"])}}
    check_saved({"of": {"a": None, "b": ["x"], "c": ()}, "more": 1}, expected, "a Thing")
    for bad, place in (
        ({"a": "x"}, "['a'] is 'x'; expected a list"),
        ({"b": ["x", 2]}, "['b'][1] is 2; expected text"),
    ):
        with pytest.raises(OptionError, match=re.escape(f"not a Thing state_dict: state['of']{place}")):
            check_saved({"of": bad}, expected, "a Thing")
