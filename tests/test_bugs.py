"""Things that went wrong once, each with its story."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradfold


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def make():
    return nn.Linear(3, 1), (torch.randn(5, 3), torch.randn(5, 1))


def test_a_window_without_a_model_says_how_to_get_a_backward():
    """Tried as a new user would: model= forgotten, and all that came was an AttributeError."""
    (window,) = gradfold.windows([1, 2], 2)
    with pytest.raises(gradfold.WindowError, match=r"windows\(loader, n, model=model\)"):
        window.backward(torch.tensor(1.0))


def test_a_window_with_a_model_is_not_for_the_accumulator():
    """Tried as a new user would: the error asked for collate=, which was no help at all."""
    model, batch = make()
    (window,) = gradfold.windows([batch], 1, model=model)
    with pytest.raises(gradfold.WindowError, match="leave model= out"):
        gradfold.Accumulator(model, loss_fn).backward(window)


def test_a_metric_keeps_the_weight_of_the_loss_when_the_loss_is_named():
    """weight=f and weight={"loss": f} meant different means for every metric."""
    model = nn.Linear(1, 1)
    batch = (torch.ones(3, 1), torch.tensor([1.0, 2.0, 5.0]))

    def with_metric(model, batch):
        return model(batch[0]).mean(), {"value": batch[1].mean()}

    def by_value(batch):
        return batch[1].sum()

    found = [
        gradfold.Accumulator(model, with_metric, micro_batch_size=1, weight=weight).backward(batch).metrics["value"]
        for weight in (by_value, {"loss": by_value}, {"loss": "samples"})
    ]
    assert [value.item() for value in found] == pytest.approx([30 / 8, 30 / 8, 8 / 3])


def test_an_output_object_with_a_loss_is_answered_with_its_loss():
    """A transformers ModelOutput is a mapping of tensors; the error spoke of the shape of the logits."""
    model, batch = make()

    def output(model, batch):
        return {"loss": loss_fn(model, batch), "logits": model(batch[0])}

    with pytest.raises(gradfold.LossError, match=r"Return output\.loss"):
        gradfold.Accumulator(model, output).backward(batch)


class Prepared:
    """What a framework makes of an optimizer or a scheduler."""

    def __init__(self, optimizer=None, scheduler=None):
        self.optimizer, self.scheduler = optimizer, scheduler
        self.param_groups = optimizer.param_groups if optimizer is not None else None

    def step(self, closure=None):
        raise AssertionError("never stepped")


def test_a_wrapped_optimizer_or_scheduler_is_refused_for_what_is_inside():
    """A prepared LBFGS passed the check and died at the first step, after the backward pass."""
    model, _ = make()
    accumulator = gradfold.Accumulator(model, loss_fn)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(gradfold.TrainStepError, match="def closure"):
        gradfold.TrainStep(accumulator, Prepared(torch.optim.LBFGS(model.parameters())))
    plateau = Prepared(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(sgd))
    with pytest.raises(gradfold.TrainStepError, match="ReduceLROnPlateau"):
        gradfold.TrainStep(accumulator, sgd, plateau)


def test_parts_of_the_wrong_kind_are_refused_by_what_they_are():
    """TrainStep(model, optimizer) failed with 'Linear' object has no attribute 'model'."""
    model, _ = make()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(gradfold.TrainStepError, match=r"accumulator is a Linear.*Accumulator\(model, loss_fn"):
        gradfold.TrainStep(model, sgd)
    with pytest.raises(gradfold.TrainStepError, match="optimizer is a list"):
        gradfold.TrainStep(gradfold.Accumulator(model, loss_fn), [sgd])


def test_an_optimizer_of_another_model_is_refused():
    """Built before the model was replaced, it trained nothing and said applied=True."""
    model, _ = make()
    other = torch.optim.SGD(nn.Linear(3, 1).parameters(), 0.1)
    with pytest.raises(gradfold.TrainStepError, match="would train nothing"):
        gradfold.TrainStep(gradfold.Accumulator(model, loss_fn), other)


def test_a_foreign_state_is_refused():
    """It was a bare KeyError."""
    model, _ = make()
    accumulator = gradfold.Accumulator(model, loss_fn)
    step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(gradfold.OptionError, match="no state of a TrainStep"):
        step.load_state_dict({})
    with pytest.raises(gradfold.OptionError, match="no state of an Accumulator"):
        accumulator.load_state_dict({"updates": 1})


def test_swapped_arguments_of_windows_do_not_print_the_whole_loader():
    """The message was the repr of every tensor in it."""
    with pytest.raises(gradfold.OptionError, match=r"num_micro_batches is list"):
        gradfold.windows(4, [torch.randn(1000)])
    with pytest.raises(gradfold.OptionError, match=r"loader is int"):
        gradfold.windows(4, 4)


def test_a_window_takes_one_loss():
    """A dict of terms was taken although a window has one weight."""
    model, batch = make()
    (window,) = gradfold.windows([batch], 1, model=model)
    for part in window:
        with pytest.raises(gradfold.LossError, match="one 0-d tensor; got a dict"):
            window.backward({"loss": loss_fn(model, part)})
        window.backward(loss_fn(model, part))
    assert window.loss.item() == pytest.approx(loss_fn(model, batch).item()) and window.weight == 5
