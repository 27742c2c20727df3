"""What functions hold and name, put back: each kind of thing that a run may change, and what is left alone."""

from __future__ import annotations

import functools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque

import numpy
import pytest
import reference
import torch
from torch import nn

import gradfold
from gradfold.state.external import ExternalState, reach

HISTORY: list[float] = []
STEPS = 0


def logged(value):
    HISTORY.append(value)


class Meter:
    """Counts on itself."""

    def __init__(self):
        self.count = 0
        self.losses = defaultdict(list)

    def update(self, value):
        self.count += 1
        self.losses["train"].append(value)


def container(make, change):
    def build():
        one = make()
        return lambda: change(one), lambda: (type(one), list(one), dict(one) if isinstance(one, dict) else None)

    return build


def nested():
    history = {"loss": [1.0], "more": ({"deep": [2]},)}

    def run():
        history["loss"].append(2.0)
        history["more"][0]["deep"].clear()

    return run, lambda: str(history)


def rebound_variable():
    count = 0

    def run():
        nonlocal count
        count += 1

    return run, lambda: count


def unbound_variable():
    def run():
        nonlocal late
        late = 1

    def look():
        try:
            return late
        except NameError:
            return None

    if look() is not None:
        late = 0
    return run, look


def rebound_global():
    def run():
        global STEPS
        STEPS += 1

    return run, lambda: STEPS


def new_global():
    def run():
        global FIRST
        FIRST = 1

    return run, lambda: "FIRST" in globals()


def attribute_of_the_function():
    def run():
        run.calls = getattr(run, "calls", 0) + 1

    return run, lambda: vars(run).copy()


def list_on_the_function():
    def run():
        run.history.append(1)

    run.history = []
    return run, lambda: list(run.history)


def by_a_helper():
    return lambda: logged(1.0), lambda: list(HISTORY)


def by_a_partial():
    return functools.partial(lambda to, value: to.append(value), HISTORY, value=1.0), lambda: list(HISTORY)


def by_a_default():
    def run(to=[1]):  # noqa: B006  # as people write it
        to.append(2)

    return run, lambda: list(run.__defaults__[0])


def by_a_keyword_default():
    def run(*, to=[1]):  # noqa: B006
        to.append(2)

    return run, lambda: list(run.__kwdefaults__["to"])


def by_what_is_wrapped():
    @functools.cache
    def run():
        logged(2.0)

    return lambda: run.__wrapped__(), lambda: list(HISTORY)


def by_a_bound_method():
    meter = Meter()
    return functools.partial(meter.update, 3), lambda: (meter.count, dict(meter.losses))


def by_a_user_s_module():
    def run():
        reference.relative_error = None

    return run, lambda: reference.relative_error


def by_a_cache():
    @functools.cache
    def run(number):
        return torch.arange(number)

    return lambda: run(3), lambda: run.cache_info().currsize


def by_a_callable_object():
    class Loss:
        def __init__(self):
            self.calls = 0

        def __call__(self):
            self.calls += 1
            self.new = True

    loss = Loss()
    return loss, lambda: vars(loss).copy()


def namespace():
    state = types.SimpleNamespace(step=0)
    return lambda: setattr(state, "step", 1), lambda: state.step


def tensor_in_place():
    total = torch.zeros(3)
    return lambda: total.add_(1), lambda: total.tolist()


def tensor_in_place_with_a_view():
    total = torch.zeros(3, 1)
    wide = total.expand(3, 4)
    return lambda: (total.add_(1), wide), lambda: total.tolist()


def teacher():
    layer = nn.Sequential(nn.BatchNorm1d(2))
    layer[0].calls = []

    def run():
        layer(torch.randn(4, 2))
        layer[0].calls.append(1)
        layer[0].last = 1

    return run, lambda: (layer[0].running_mean.tolist(), layer[0].calls.copy(), hasattr(layer[0], "last"))


def generator(make, draw, read):
    def build():
        one = [make()]
        return lambda: draw(one[0]), lambda: read(one[0])

    return build


CASES = {
    "list": container(lambda: [1], lambda one: one.append(2)),
    "list, an element": container(lambda: [1], lambda one: one.__setitem__(0, 2)),
    "dict": container(lambda: {"a": 1}, lambda one: one.update(a=2, b=3)),
    "set": container(lambda: {1}, lambda one: one.add(2)),
    "deque": container(lambda: deque([1, 2], maxlen=2), lambda one: one.append(3)),
    "Counter": container(lambda: Counter("aab"), lambda one: one.update("b")),
    "defaultdict": container(lambda: defaultdict(list), lambda one: one["new"].append(1)),
    "OrderedDict": container(lambda: OrderedDict(a=1, b=2), lambda one: one.move_to_end("a")),
    "generator": generator(
        lambda: torch.Generator().manual_seed(1),
        lambda one: torch.rand(2, generator=one),
        lambda one: one.get_state().tolist(),
    ),
    "random.Random": generator(lambda: random.Random(1), lambda one: one.random(), lambda one: one.getstate()),
    "numpy Generator": generator(
        lambda: numpy.random.default_rng(1), lambda one: one.random(), lambda one: str(one.bit_generator.state)
    ),
    "numpy RandomState": generator(
        lambda: numpy.random.RandomState(1), lambda one: one.rand(), lambda one: str(one.get_state())
    ),
    "torch": lambda: (lambda: torch.rand(1), lambda: torch.get_rng_state().tolist()),
    "numpy": lambda: (lambda: numpy.random.rand(), lambda: str(numpy.random.get_state())),
    "random": lambda: (lambda: random.random(), random.getstate),
    **{
        build.__name__.replace("_", " "): build
        for build in (
            *(nested, rebound_variable, unbound_variable, rebound_global, new_global, attribute_of_the_function),
            list_on_the_function,
            *(by_a_helper, by_a_partial, by_a_default, by_a_keyword_default, by_what_is_wrapped, by_a_bound_method),
            *(by_a_user_s_module, by_a_cache, by_a_callable_object, namespace),
            *(tensor_in_place, tensor_in_place_with_a_view, teacher),
        )
    },
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_run_changes_is_put_back(name):
    run, look = CASES[name]()
    before = look()
    with ExternalState(run):
        run()
        assert look() != before
    assert look() == before


def test_it_is_put_back_after_an_error():
    with pytest.raises(KeyError), ExternalState(logged):
        logged(1.0)
        raise KeyError
    assert not HISTORY


def test_what_has_not_changed_is_not_written_to():
    class Watched(list):
        def clear(self):
            pytest.fail("it was written to")

    elements = [Watched(), object()]
    tensor = torch.zeros(2)
    with ExternalState(lambda: (elements, tensor)):
        pass
    assert tensor._version == 0


def test_large_tensors_and_installed_packages_are_left_alone():
    large = torch.zeros(2**19)  # 2 MiB
    accumulator = gradfold.Accumulator(nn.Linear(1, 1), lambda model, batch: model(batch).mean())
    packages = functools.partial(lambda *_: None, accumulator, numpy, torch.optim.SGD(accumulator.model.parameters()))
    with ExternalState(lambda: (large, packages)):
        large.add_(1)
        accumulator.num_windows = 1
    assert large[0] == 1 and accumulator.num_windows == 1
    assert not any(one is torch or one is nn for one in reach(packages))


def test_modules_of_installed_packages_are_kept():
    """Everybody subclasses them, and their attributes are where state is kept."""
    layer = nn.Dropout(0.1)
    with ExternalState(lambda: layer):
        layer.p = 0.5
    assert layer.p == 0.1


def test_reach_ends():
    ring = []
    ring.append(ring)
    data = [[number] for number in range(5000)]
    found = list(reach(lambda: (ring, data)))
    assert sum(one is ring for one in found) == 1 and any(one is data for one in found) and len(found) < 20


def test_probes_know_that_they_are():
    seen = set()  # which a probe leaves as it was

    class Meter:  # of an installed package, for all that gradfold knows
        __module__ = "torch.meter"

        def __init__(self):
            self.calls = []

    meter = Meter()

    def loss_fn(model, batch):
        seen.add(gradfold.is_probing())
        meter.calls.append(gradfold.is_probing())
        return model(batch).square().mean()

    model = nn.Linear(3, 1).double()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2)
    accumulator.backward(torch.randn(4, 3).double())
    assert seen == {False} and meter.calls == [True, True, True, False, False]
    gradfold.verify(accumulator, torch.randn(4, 3).double())
    assert all(meter.calls[5:]) and len(meter.calls) > 5
    assert not gradfold.is_probing()


def test_a_probe_that_fails_is_over():
    def loss_fn(model, batch):
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        gradfold.Accumulator(nn.Linear(3, 1), loss_fn, micro_batch_size=2).backward(torch.randn(4, 3))
    assert not gradfold.is_probing()
