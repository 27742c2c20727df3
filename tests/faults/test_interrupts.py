"""An interrupt at any line of a window leaves everything as it was, or the window complete; the next one is exact.

Some lines of each kind of window here; all of them by dev/interrupt_sweep.py.
"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.batchnorm.coroutines import Coroutine
from gradfold.self_check.probe_run import ProbeRun
from gradfold.state import gradients as gradients_module
from gradfold.state.snapshot import Snapshot

SOURCE = str(Path(gradfold.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt in this thread at the line number `at` of gradfold; `was_raised` tells whether."""

    def __init__(self, at):
        self.left, self.was_raised = at, False

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.was_raised = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def network():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()


def entropy(model, batch):
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return F.cross_entropy(model(batch[0]), batch[1])


def embed(model, batch):
    return model[2](torch.utils.checkpoint.checkpoint(model[0], batch[0], use_reentrant=False))


def uniform(model, outputs):
    return torch.pdist(outputs).square().mul(-2).exp().mean().log()


KINDS = {
    "a frozen BatchNorm": (lambda: network().eval(), entropy, {}),
    "by micro-batch": (network, entropy, {"batch_norm": "per_micro_batch", "self_check": False}),
    "exact": (network, entropy, {"batch_norm": "exact"}),
    "two phases": (lambda: network().eval(), gradfold.TwoPhaseLoss(embed, uniform), {"self_check": False}),
}


def left_behind(model):
    """What a window may leave, beside gradients and buffers."""
    depths = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    autocast = torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()
    return {
        "modes": [(one.training, getattr(one, "momentum", None), sorted(vars(one))) for one in model.modules()],
        "hooks": [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()],
        "threads": [one.name for one in threading.enumerate() if one.name == "gradfold"],
        "torch": (torch.is_grad_enabled(), depths, autocast, torch.is_warn_always_enabled()),
        "filters": list(warnings.filters),
        "random": torch.get_rng_state().tolist(),
    }


def sums(model):
    return [*(one.grad for one in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_at_some_line_leaves_no_trace_or_a_complete_window(kind):
    make, loss_fn, options = KINDS[kind]
    model, batch = make(), (torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 1]))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    after = copy.deepcopy(model)
    for parameter in after.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    gradfold.Accumulator(after, loss_fn, micro_batch_size=3, **options).backward(batch)
    at, is_over = 3, False
    while not is_over:
        trained = copy.deepcopy(model)
        for parameter in trained.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        accumulator = gradfold.Accumulator(trained, loss_fn, micro_batch_size=3, **options)
        before, interrupt, tracing = left_behind(trained), Interrupt(at), sys.gettrace()
        sys.settrace(interrupt)
        try:
            accumulator.backward(batch)
        except KeyboardInterrupt:
            assert left_behind(trained) == before, at
        finally:
            sys.settrace(tracing)
        is_over, at = not interrupt.was_raised, at + 61
        is_complete = trained[0].weight.grad.ne(0.5).any()
        for found, wanted in zip(sums(trained), sums(after if is_complete else model), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert at > 700 and is_complete


class TestWhatIsLeftOn:
    """By an interrupt inside the exit of a block, of which a window can know nothing."""

    def block(self, kind):
        return {
            "no_grad": torch.no_grad(),
            "autocast": torch.autocast("cpu", torch.bfloat16),
            "a default device": torch.device("cpu"),
            "warnings": warnings.catch_warnings(),
            "offload": torch.autograd.graph.save_on_cpu(),
        }[kind]

    @pytest.mark.parametrize("kind", ["no_grad", "autocast", "a default device", "warnings", "offload"])
    def test_is_put_back(self, kind):
        model = nn.Linear(2, 1)

        def loss_fn(model, batch):
            self.left = self.block(kind)  # held, since some of them end when they are gone
            self.left.__enter__()
            if kind == "warnings":
                warnings.simplefilter("ignore")
            raise KeyboardInterrupt

        before, top = left_behind(model), torch._C._autograd._top_saved_tensors_default_hooks(True)
        with pytest.raises(KeyboardInterrupt):
            gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(torch.ones(4, 2))
        assert left_behind(model) == before
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is top

    def test_but_not_what_was_on_before(self):
        model = nn.Linear(2, 1)

        def loss_fn(model, batch):
            torch.autocast("cpu", torch.float16).__enter__()
            raise KeyboardInterrupt

        with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyboardInterrupt):
            gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(torch.ones(4, 2))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.ones(1, 2)).dtype == torch.bfloat16
        assert left_behind(model)["torch"][2] == (1, 0)

    def test_an_optimizer_step_shows_in_autocast_again(self):
        """Where the depth of blocks was left too large, weights cast before stayed in use."""
        model = nn.Linear(2, 1)

        def loss_fn(model, batch):
            torch.autocast("cpu", torch.bfloat16).__enter__()
            model(batch)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(torch.ones(4, 2))
        outputs = []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                outputs.append(model(torch.ones(1, 2)).item())
            with torch.no_grad():
                model.bias += 1
        assert outputs[1] == pytest.approx(outputs[0] + 1, abs=0.02)


def test_a_probe_left_open_is_put_back_by_its_window(monkeypatch):
    """An interrupt before the first line of its end leaves what `loss_fn` has changed elsewhere."""
    seen, model = [], network()

    def loss_fn(model, batch):
        seen.append(len(batch[0]))
        return entropy(model, batch)

    def interrupted(self, *error):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProbeRun, "__exit__", interrupted)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, batch_norm="exact")
    with pytest.raises(KeyboardInterrupt):
        accumulator.backward((torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])))
    assert seen == [] and model[1].training and model[1].num_batches_tracked == 0


@pytest.mark.parametrize("where", ["__enter__", "__exit__"])
def test_gradients_are_safe_as_an_interrupt_comes_between_python_and_a_snapshot(where, monkeypatch):
    model, real = nn.Linear(2, 1), getattr(Snapshot, where)
    held = [torch.ones_like(one) for one in model.parameters()]
    for parameter, gradient in zip(model.parameters(), held, strict=True):
        parameter.grad = gradient

    def interrupted(self, *error):
        if where == "__enter__":
            real(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Snapshot, where, interrupted)
    accumulator = gradfold.Accumulator(model, lambda model, x: model(x).square().mean(), micro_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        accumulator.backward(torch.ones(4, 2))
    monkeypatch.undo()
    assert all(one.grad is gradient for one, gradient in zip(model.parameters(), held, strict=True))
    assert all(gradient.eq(1).all() for gradient in held)
    accumulator.backward(torch.ones(4, 2))


def test_an_interrupt_in_the_last_addition_leaves_the_window_complete(monkeypatch):
    """A signal is heard when that call returns; it cannot be undone."""
    model, x = nn.Linear(2, 1).double(), torch.randn(4, 2).double()
    expected = full_batch_gradient(model, lambda model: model(x).square().mean())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    real = gradients_module.foreach_add

    def interrupted(*tensors):
        real(*tensors)
        raise KeyboardInterrupt

    monkeypatch.setattr(gradients_module, "foreach_add", interrupted)
    accumulator = gradfold.Accumulator(model, lambda model, x: model(x).square().mean(), micro_batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        accumulator.backward(x)
    expected = {name: one + 1 for name, one in expected.items()}
    assert relative_error(gradients(model), expected) < 1e-12


class TestThreads:
    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("owner", [threading.Thread, Coroutine], ids=["start", "cancel"])
    def test_none_is_left_by_an_interrupt(self, owner, after, monkeypatch):
        model, name = network(), "start" if owner is threading.Thread else "cancel"
        real, calls = getattr(owner, name), []

        def interrupted(self):
            calls.append(self)
            if len(calls) == 2 and not after:
                raise KeyboardInterrupt
            real(self)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(owner, name, interrupted)
        accumulator = gradfold.Accumulator(model, entropy, micro_batch_size=2, batch_norm="exact", self_check=False)
        with pytest.raises(KeyboardInterrupt):
            accumulator.backward((torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])))
        assert left_behind(model)["threads"] == []
        assert len(calls) >= 2 and not gradients(model)

    def test_hooks_half_registered_are_removed(self, monkeypatch):
        model, real = network(), nn.Module.register_forward_hook

        def interrupted(self, *arguments, **options):
            real(self, *arguments, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
        accumulator = gradfold.Accumulator(model, entropy, micro_batch_size=3, batch_norm="exact", self_check=False)
        before = left_behind(model)
        with pytest.raises(KeyboardInterrupt):
            accumulator.backward((torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2])))
        assert left_behind(model)["hooks"] == before["hooks"]
