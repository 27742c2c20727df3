"""Cooperative threads: locks around a BatchNorm, and blocks that change something for the whole process."""

from __future__ import annotations

import copy
import re
import threading
import time

import pytest
import torch
from reference import gradients, relative_error
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradfold
from gradfold.batchnorm import coroutines


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    before = threading.active_count()
    yield
    torch.set_default_dtype(torch.float32)
    assert threading.active_count() == before


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(coroutines, "PATIENCE_S", 0.1)
    monkeypatch.setattr(coroutines, "GRACE_S", 0.1)


def wait_for_threads():
    for thread in threading.enumerate():
        if thread.name == "gradfold":
            thread.join(10)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


def squares(model, x):
    return model(x).square().mean()


def exact(model, loss_fn, **options):
    return gradfold.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="exact", **options)


def assert_exact(model, loss_fn, x=None, **options):
    x = torch.randn(12, 5) if x is None else x
    whole = copy.deepcopy(model)
    exact(model, loss_fn, **options).backward(x)
    loss_fn(whole, x).backward()
    assert relative_error(gradients(model), gradients(whole)) < 1e-12


# --- locks


class Guarded(Normed):
    def __init__(self, lock):
        super().__init__()
        self.lock = lock

    def forward(self, x):
        with self.lock:
            return super().forward(x)


def test_a_lock_around_the_model_is_named_with_the_line_that_waits_for_it(impatient, monkeypatch):
    """The first micro-batch holds it at the BatchNorm, the second one waits for it."""
    model, said = Guarded(threading.Lock()), []

    def interrupt(message):
        said.append(message)
        raise KeyboardInterrupt

    monkeypatch.setattr(coroutines, "warn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exact(model, squares, self_check=False).backward(torch.randn(12, 5))
    assert re.search(r"has been at .*test_coroutines\.py:\d+ .*a lock around a BatchNorm.*interrupt it", said[0])
    wait_for_threads()
    assert not gradients(model) and model.lock.acquire(blocking=False)
    assert model.norm.num_batches_tracked == 0


def test_a_lock_around_parts_without_batch_norm_is_fine(impatient):
    lock = threading.Lock()

    def loss_fn(model, x):
        with lock:
            hidden = model.first(x)
        return model.last(model.norm(hidden).tanh()).square().mean()

    assert_exact(Normed(), loss_fn)


def test_a_lock_that_another_thread_holds_for_a_while_is_waited_for():
    lock, is_held = threading.RLock(), threading.Event()

    def hold():
        with lock:
            is_held.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)

    def loss_fn(model, x):
        hidden = model.norm(model.first(x))
        with lock:
            return model.last(hidden).square().mean()

    model, whole, x = Normed(), Normed(), torch.randn(12, 5)
    whole.load_state_dict(model.state_dict())
    holder.start()
    is_held.wait()
    exact(model, loss_fn, self_check=False).backward(x)
    holder.join()
    loss_fn(whole, x).backward()
    assert relative_error(gradients(model), gradients(whole)) < 1e-12


def test_what_waits_for_anything_else_is_warned_of_once_and_goes_on(impatient, monkeypatch):
    event, said = threading.Event(), []
    monkeypatch.setattr(coroutines, "warn", lambda message: (said.append(message), time.sleep(0.1), event.set()))

    def loss_fn(model, x):
        event.wait()
        return squares(model, x)

    exact(Normed(), loss_fn, self_check=False).backward(torch.randn(12, 5))
    assert len(said) == 1
    assert re.search(r"has been at .*test_coroutines\.py:\d+ .*interrupt it", said[0])


def test_an_interrupt_ends_a_window_that_makes_no_progress(impatient, monkeypatch):
    """It waited for the thread that never comes back, and no interrupt was heard any more."""
    event, model = threading.Event(), Normed()

    def interrupt(message):
        raise KeyboardInterrupt

    monkeypatch.setattr(coroutines, "warn", interrupt)

    def loss_fn(model, x):
        event.wait()
        model.norm.running_mean.fill_(7.0)
        return squares(model, x)

    with pytest.raises(KeyboardInterrupt):
        exact(model, loss_fn, self_check=False).backward(torch.randn(12, 5))
    event.set()
    wait_for_threads()
    assert not model.norm.running_mean.any()  # what comes back late does nothing


# --- process-wide state


def test_random_numbers_of_a_fork_are_those_of_the_fork_and_leave_no_trace():
    """The states that forks put back were those of other micro-batches: the caller went on with the fork's seed."""
    seen = []

    def loss_fn(model, x):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            first = torch.rand(3)
            hidden = model.norm(model.first(x))
            seen.append((first, torch.rand(3)))
        return model.last(hidden).square().mean()

    model, x = Normed(), torch.randn(12, 5)
    before = torch.get_rng_state()
    assert_exact(model, loss_fn, x, self_check=False)
    assert torch.equal(torch.get_rng_state(), before)
    for one in seen[1:]:
        assert all(map(torch.equal, one, seen[0]))


def test_random_numbers_of_micro_batches_and_windows_are_all_different_and_come_again():
    drawn = []

    def loss_fn(model, x):
        if torch.is_grad_enabled():
            drawn.append(torch.rand(4))
        loss = squares(model, x)
        drawn.append(torch.rand(4))
        return loss

    found = []
    for _ in "ab":
        accumulator = exact(Normed(), loss_fn, self_check=False)
        torch.manual_seed(3)
        for _ in "ab":
            accumulator.backward(torch.ones(12, 5).cumsum(0))
        drawn.append(torch.rand(4))
        found.append(torch.stack(drawn))
        drawn.clear()
    assert torch.equal(*found) and len(found[0]) == 13
    assert len({tuple(one) for one in found[0].tolist()}) == 13
    torch.manual_seed(3)
    assert torch.equal(found[0][0], torch.rand(4))  # the first goes on with the caller's


def test_windows_draw_other_numbers_where_the_first_micro_batch_draws_none():
    drawn = []

    def loss_fn(model, x):
        if x[0, 0] > 4:
            drawn.append(torch.rand(4))
        return squares(model, x)

    accumulator = exact(Normed(), loss_fn, self_check=False)
    for _ in "ab":
        accumulator.backward(torch.ones(12, 5).cumsum(0))
    assert len({tuple(one.tolist()) for one in drawn}) == 4


def test_layers_in_evaluation_mode_draw_as_in_plain_accumulation():
    def loss_fn(model, x):
        return (model(x) * torch.rand(len(x), 1)).square().mean()

    models = [Normed().eval() for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    after = []
    for model, batch_norm in zip(models, ("exact", None), strict=True):
        torch.manual_seed(5)
        gradfold.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm=batch_norm, self_check=False).backward(
            torch.ones(12, 5).cumsum(0)
        )
        after.append(torch.rand(3))
    assert relative_error(*map(gradients, models)) < 1e-12
    assert torch.equal(*after)


def flags():
    backends = torch.backends
    return (
        torch.get_default_dtype(),
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        torch._C._get_sdp_priority_order(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        backends.cudnn.deterministic,
    )


def changed():
    """Every block at once."""
    from contextlib import ExitStack, contextmanager

    @contextmanager
    def defaults():
        torch.set_default_dtype(torch.bfloat16)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(False)

    stack = ExitStack()
    stack.enter_context(sdpa_kernel([SDPBackend.MATH], set_priority=True))
    stack.enter_context(torch.backends.cudnn.flags(enabled=False, deterministic=True))
    stack.enter_context(torch.autograd.set_detect_anomaly(True))
    stack.enter_context(defaults())
    return stack


def test_an_interrupt_at_the_end_of_the_turns_leaves_the_process_as_it_was(monkeypatch):
    def interrupted(self, *error):
        torch.set_default_dtype(torch.float16)  # as the forward pass whose turn was the last had it
        raise KeyboardInterrupt

    monkeypatch.setattr(coroutines.GlobalState, "__exit__", interrupted)
    before = flags()
    with pytest.raises(KeyboardInterrupt):
        exact(Normed(), squares, self_check=False).backward(torch.randn(12, 5))
    assert flags() == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_blocks_that_change_the_process_do_so_for_their_own_micro_batch(fails):
    inside, outside = [], []

    def loss_fn(model, x):
        outside.append(flags())
        with changed():
            inside.append(flags())
            hidden = model.norm(model.first(x))
            inside.append(flags())
            if fails and len(inside) == 5:
                raise ValueError("now")
        outside.append(flags())
        return model.last(hidden).square().mean()

    before = flags()
    if fails:
        with pytest.raises(ValueError, match="now"):
            exact(Normed(), loss_fn, self_check=False).backward(torch.randn(12, 5))
    else:
        assert_exact(Normed(), loss_fn, self_check=False)
    assert flags() == before and set(map(str, outside)) == {str(before)}
    assert len(set(map(str, inside))) == 1 and inside[0] != before
