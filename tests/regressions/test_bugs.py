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
    with pytest.raises(gradfold.OptionError, match="not a TrainStep state_dict"):
        step.load_state_dict({})
    with pytest.raises(gradfold.OptionError, match="not an Accumulator state_dict"):
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


def test_a_list_of_single_values_is_cut_or_refused_as_tensors_too():
    """[tensor(1), tensor(2), tensor(3)], one per row, went whole to every micro-batch; numbers were refused."""
    model, (inputs, _) = make()
    seen = []

    def loss_fn(model, batch):
        seen.append([value.item() for value in batch[1]])
        return model(batch[0]).mean()

    values = list(torch.arange(5.0))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, self_check=False)
    accumulator.backward((inputs, values))
    assert seen == [[0, 1], [2, 3], [4]]
    with pytest.raises(gradfold.BatchError, match=r"batch\[1\] is a list of 4 single values"):
        accumulator.backward((inputs, values[:4]))


def test_a_loop_window_takes_batches_that_nobody_cuts():
    """A list of names beside the tensors was refused, with the advice to pass collate=, which windows() has not."""
    model, (inputs, targets) = make()
    batch = {"x": inputs, "y": targets, "names": ["a"] * 5, "graph": object()}
    (window,) = gradfold.windows([batch], 1, model=model)
    for part in window:
        window.backward(loss_fn(model, (part["x"], part["y"])))
    assert window.weight == 5


def test_a_backward_that_ignores_its_gradient_is_told_so():
    """It was told to set gradient_accumulation_steps=1, since 3 had become 1."""
    model, batch = make()
    with pytest.raises(gradfold.BackwardError, match="ignores its gradient argument"):
        gradfold.Accumulator(model, loss_fn, backward=lambda loss, gradient: loss.backward()).backward(batch)


def test_an_expanded_gradient_at_entry_is_added_to():
    """It cannot be written to: the window failed when it closed, where nothing is rolled back any more."""
    model, batch = make()
    model.weight.grad = torch.zeros(1, 1).expand(1, 3)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch)
    found = model.weight.grad.clone()
    model.zero_grad()
    loss_fn(model, batch).backward()
    torch.testing.assert_close(found, model.weight.grad)


def test_a_complex_metric_is_refused():
    """Its imaginary part went with no more than a warning of torch."""
    model, batch = make()

    def with_metric(model, batch):
        return loss_fn(model, batch), {"phase": torch.tensor(1j)}

    with pytest.raises(gradfold.LossError, match="complex"):
        gradfold.Accumulator(model, with_metric).backward(batch)


class Tagged(dict):
    """A dict that carries something besides its keys."""

    def __init__(self, values, device="cpu"):
        super().__init__(values)
        self.device = device


def test_what_a_dict_carries_besides_its_keys_stays():
    """Cutting rebuilt it through its constructor, which knew nothing of the rest."""
    model, (inputs, targets) = make()
    seen = []

    def tagged_loss(model, batch):
        seen.append(batch.device)
        return loss_fn(model, (batch["x"], batch["y"]))

    accumulator = gradfold.Accumulator(model, tagged_loss, micro_batch_size=3, self_check=False)
    accumulator.backward(Tagged({"x": inputs, "y": targets}, device="there"))
    assert seen == ["there", "there"]


def test_a_hook_that_writes_to_the_gradient_of_the_loss_does_so_once():
    """The seed was shared by the micro-batches of a weight: gradient.mul_(2) doubled it again for each of them."""
    model, batch = make()

    def hooked(model, batch):
        loss = loss_fn(model, batch)
        loss.register_hook(lambda gradient: gradient.mul_(2))
        return loss

    for _ in range(2):
        model.zero_grad()
        gradfold.Accumulator(model, hooked, micro_batch_size=1).backward(batch)
    found = model.weight.grad.clone()
    model.zero_grad()
    loss_fn(model, batch).backward()
    torch.testing.assert_close(found, 2 * model.weight.grad)


@pytest.mark.parametrize("nest", [tuple, list, lambda pair: dict(enumerate(pair))])
def test_a_model_may_change_its_input_in_place(nest):
    """Micro-batches were slices: the first such change made the whole batch a part of its graph, the next failed."""
    model, (inputs, targets) = make()
    model.register_parameter("scale", nn.Parameter(torch.tensor([2.0, 0.5, 3.0])))

    def in_place(model, batch):
        return nn.functional.mse_loss(model(batch[0].mul_(model.scale)), batch[1])

    in_place(model, nest((inputs.clone(), targets))).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    gradfold.Accumulator(model, in_place, micro_batch_size=2).backward(nest((inputs, targets)))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    assert not inputs.requires_grad


def test_a_batch_that_requires_grad_gets_its_gradient():
    """An attack on the input needs the gradient of the batch itself."""
    model, (inputs, targets) = make()
    inputs.requires_grad_()
    (expected,) = torch.autograd.grad(loss_fn(model, (inputs, targets)), inputs)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward((inputs, targets))
    torch.testing.assert_close(inputs.grad, expected)


@pytest.mark.parametrize(
    "term",
    [
        lambda weight, batch: weight.squeeze(),
        lambda weight, batch: weight.view(()),
        lambda weight, batch: batch.mean() + weight.squeeze(),  # a learned log-variance beside another term
        lambda weight, batch: weight.sum(),
    ],
)
@pytest.mark.parametrize("size", [None, 1, 2])
def test_a_parameter_of_one_element_that_is_viewed_does_not_share_the_seed(term, size):
    """Autograd made the shared seed's own memory the .grad, so that every micro-batch changed the seed of the next."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([3.0]))
    accumulator = gradfold.Accumulator(model, lambda model, batch: term(model.weight, batch), micro_batch_size=size)
    for _ in range(3):
        accumulator.backward(torch.ones(5, 1))
        torch.testing.assert_close(model.weight.grad, torch.ones(1))
        model.weight.grad.mul_(7)  # as clipping and optimizers do
        model.zero_grad()
