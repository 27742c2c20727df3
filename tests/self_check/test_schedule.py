"""What the self-check runs before the window, in which order, and that it changes nothing in the window."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_log import RunLog
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold

PARTS = [2, 3]  # of 5 of 8 rows
CHECKED = [5, *PARTS]  # whole and parts
ALL_CHECKED = [8, 2, 6]  # where 5 rows do not tell, or 8 are half of 16
WINDOW = [8, 8]


def squares(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def rooted(model, batch):
    return squares(model, batch).sqrt()


def batch_of(num_rows=16):
    return torch.randn(num_rows, 4), torch.randn(num_rows, 3) * torch.linspace(0.2, 3, num_rows)[:, None]


def net(*layers):
    return nn.Sequential(nn.Linear(4, 6), *(layers or [nn.Tanh()]), nn.Linear(6, 3))


def runs(model, loss_fn=squares, batch=None, **options):
    """The numbers of rows that `loss_fn` is called with, in order, in a first window of two micro-batches."""
    seen = RunLog()

    def counted(model, part):
        seen.append(len(part[0]))
        return loss_fn(model, part)

    gradfold.Accumulator(model, counted, **({"micro_batch_size": 8} | options)).backward(batch or batch_of())
    return seen


# --- What runs


def drops_twice():
    """So that rows which draw in turns do not happen to draw as they did together."""
    return net(nn.Dropout(0.3), nn.Linear(6, 6), nn.Dropout(0.4))


def recomputed(model, batch):
    return squares(lambda x: checkpoint(model, x, use_reentrant=False), batch)


def recomputed_without_a_graph(model, batch):
    return squares(lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=True), batch)


class NoisyBackward(torch.autograd.Function):
    """Draws in its backward pass alone, for every row."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + torch.rand_like(grad))


def noisy_backward(model, batch):
    return squares(lambda x: NoisyBackward.apply(model(x)), batch)


def in_bfloat16(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch[0])
    return F.mse_loss(output.float(), batch[1])


def names_another_term(model, batch):
    return {"a": squares(model, batch)} | ({"b": 0 * squares(model, batch)} if len(batch[0]) == 2 else {})


class Counting(nn.Module):
    """Changes attributes, buffers and a list in each forward pass."""

    def __init__(self):
        super().__init__()
        self.inner = net()
        self.calls, self.log = 0, []
        self.register_buffer("moved", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.log.append(len(x))
        self.moved.add_(1)
        return self.inner(x)


ONCE = {
    "plain": (net, squares),
    "dropout": (lambda: net(nn.Dropout(0.3)), squares),
    "dropout in place": (lambda: net(nn.Dropout(0.3, inplace=True)), squares),
    "dropout behind a checkpoint": (drops_twice, recomputed),
    "dropout behind a reentrant checkpoint": (drops_twice, recomputed_without_a_graph),
    "dropout, and draws in a backward pass": (drops_twice, noisy_backward),
    "autocast": (net, in_bfloat16),
    "autocast and dropout": (lambda: net(nn.Dropout(0.2)), in_bfloat16),
    "a model that changes what it keeps": (Counting, squares),
    "two terms": (net, lambda model, batch: {"a": squares(model, batch), "b": squares(model, batch) / 2}),
}


@pytest.mark.parametrize("name", ONCE)
def test_whole_and_parts_run_once(name):
    make, loss_fn = ONCE[name]
    again = [3, 3] if make is Counting else []  # one part after itself, which may depend on what it has left
    assert runs(make(), loss_fn) == [*CHECKED, *again, *WINDOW]


def test_what_draws_without_a_layer_of_dropout_runs_again_with_its_randomness_recorded():
    assert runs(net(), lambda model, batch: squares(lambda x: model(F.dropout(x)), batch)) == [5, *CHECKED, *WINDOW]


def test_parts_with_another_term_are_compared_by_those_of_the_whole():
    assert runs(net(), names_another_term) == [*CHECKED, *WINDOW]


def test_half_of_a_large_micro_batch_is_enough():
    assert runs(net(), batch=batch_of(32), micro_batch_size=16) == [*ALL_CHECKED, 16, 16]
    assert runs(net(nn.Dropout()), batch=batch_of(32), micro_batch_size=16) == [*ALL_CHECKED, 16, 16]


def test_all_rows_run_where_half_of_them_fail():
    def loss_fn(model, batch):
        if len(batch[0]) in PARTS:
            torch.rand(3)
            raise ValueError("no")
        return squares(model, batch)

    seen = runs(net(), loss_fn, batch_of(32), micro_batch_size=16)
    assert seen == [8, 2, 8, 2, 16, 5, 11, 16, 16]


@pytest.mark.parametrize("num_rows, expected", [(2, [2, 1, 1]), (3, [3, 1, 2]), (7, [3, 1, 2]), (15, [5, 2, 3])])
def test_some_rows_are_enough(num_rows, expected):
    assert runs(net(), batch=batch_of(2 * num_rows), micro_batch_size=num_rows) == [*expected, num_rows, num_rows]


def hardest(model, batch):
    losses = F.mse_loss(model(batch[0]), batch[1], reduction="none").mean(1)
    return losses.topk(len(losses) // 2).values.mean()


def test_what_some_rows_contradict_and_all_confirm_is_tried_on_whole_micro_batches():
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    columns = torch.cat([x, x]), torch.cat([x[:, :3] * 9, x[:, :3] * 0.1])  # all hard rows in the first micro-batch
    columns[1][torch.tensor([0, 2, 3, 4])] = 0.1 * x[torch.tensor([0, 2, 3, 4]), :3]  # but as many in its parts
    batch = tuple(columns)
    with pytest.raises(gradfold.NotDecomposableError):
        runs(net(), hardest, batch)


def test_a_first_micro_batch_of_one_row_is_passed_over():
    parts = [tuple(column[rows] for column in batch_of()) for rows in (slice(0, 1), slice(1, 9))]
    window = gradfold.windows([parts[0], parts[1]], 2)
    assert runs(net(), batch=next(window), micro_batch_size=None) == [*CHECKED, 1, 8]


def test_numbers_that_collate_draws_are_not_those_of_the_loss():
    def collate(samples):
        x, y = map(torch.stack, zip(*samples, strict=True))
        return x + torch.randn_like(x), y

    assert runs(net(), batch=list(zip(*batch_of(), strict=True)), collate=collate) == [*ALL_CHECKED, *WINDOW]


def test_rows_that_draw_keep_the_padding_of_the_whole():
    def collate(samples):
        x, y = zip(*samples, strict=True)
        return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.stack(y)

    def loss_fn(model, batch):
        x, y = batch
        return F.mse_loss((model(x) * x.any(-1, keepdim=True)).sum(1), y)

    samples = [(torch.randn(2 + 3 * (row % 8 > 3), 4), torch.randn(3)) for row in range(16)]
    assert runs(net(nn.Dropout(0.3)), loss_fn, samples, collate=collate) == [*CHECKED, *WINDOW]


def test_draws_on_the_host_are_no_reason_to_trust_what_fits():
    def loss_fn(model, batch):
        random.random()
        return squares(model, batch)

    with pytest.warns(RuntimeWarning, match="draws from random"):
        assert runs(net(), loss_fn) == [5, 5, 8, 8, *WINDOW]


def test_draws_of_a_hook_in_the_backward_pass_are_no_reason_to_accuse():
    def loss_fn(model, batch):
        output = model(batch[0])
        output.register_hook(lambda grad: grad * (1 + torch.rand_like(grad)))
        return F.mse_loss(output, batch[1])

    with pytest.warns(RuntimeWarning, match="a hook draws random numbers in the backward pass"):
        runs(net(nn.Dropout(0.3)), loss_fn)


def test_wrong_losses_with_dropout_are_found():
    with pytest.raises(gradfold.NotDecomposableError):
        runs(net(nn.Dropout(0.3)), rooted)


def test_a_part_whose_loss_is_not_a_number_proves_nothing_if_no_micro_batch_is_like_it():
    seen = runs(net(), lambda model, batch: squares(model, batch) + (torch.nan if len(batch[0]) == 2 else 0.0))
    assert seen == [*CHECKED, *ALL_CHECKED, 16, 8, 8, *WINDOW]  # the micro-batches together, and each by itself


def test_batch_norm_by_micro_batch_is_checked_in_evaluation_mode_alone():
    model = net(nn.BatchNorm1d(6))
    assert runs(model, batch_norm="per_micro_batch") == [*CHECKED, *WINDOW]
    assert model[1].num_batches_tracked == 1


def test_a_loss_that_has_passed_is_not_checked_again():
    seen = RunLog()

    def loss_fn(model, batch):
        seen.append(len(batch[0]))
        return squares(model, batch)

    accumulator = gradfold.Accumulator(net(), loss_fn, micro_batch_size=8)
    expected = copy.deepcopy(accumulator.model)
    batch = batch_of()
    for _ in range(2):
        accumulator.backward(batch)
    assert seen == [*CHECKED, *WINDOW, *WINDOW]
    (2 * squares(expected, batch)).backward()
    for parameter, reference in zip(accumulator.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


# --- Warnings


def test_warnings_of_its_runs_are_not_shown():
    def loss_fn(model, batch):
        if len(batch[0]) in PARTS:
            warnings.warn("so few", stacklevel=1)
        return squares(model, batch)

    assert runs(net(), loss_fn) == [*CHECKED, *WINDOW]


def test_warnings_that_torch_shows_once_are_left_to_the_window():
    always = RunLog()

    def loss_fn(model, batch):
        always.append(torch.is_warn_always_enabled())
        return squares(model, batch)

    runs(net(), loss_fn)
    assert always == [True, True, True, False, False]


def test_what_cannot_be_known_is_said_to_the_caller():
    with pytest.warns(RuntimeWarning, match="another order") as caught:
        gradfold.Accumulator(Sorted(), squares, micro_batch_size=8).backward(batch_of())
    assert [warning.filename for warning in caught] == [__file__]


# --- The window is bitwise one without a self-check


class Sorted(Counting):
    """Sorts its rows before dropout, so that each mask belongs to the row that it fell to: the parts cannot fit."""

    def forward(self, x):
        order = x[:, 0].argsort()
        return F.dropout(super().forward(x[order]), 0.4)[order.argsort()]


def changing(model, batch):
    """Changes its input in place."""
    return squares(model, (batch[0].mul_(2), batch[1]))


def popping(model, batch):
    """Takes its input out of the batch."""
    batch[0], x = None, batch[0]
    return squares(model, (x, batch[1]))


def with_critic(model, batch):
    """Back-propagates into a critic outside of the model."""
    return squares(model, batch) + model.critic[0](model(batch[0])).square().mean()


def left_by(self_check, loss_fn, make_batch):
    """All that a first window leaves."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, critic = Sorted(), nn.Linear(3, 1)
    vars(model)["critic"] = [critic]
    critic.weight.grad, model.inner[0].weight.grad = torch.ones(1, 3), torch.ones(6, 4)
    batch = make_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, self_check=self_check).backward(batch)
    assert len(caught) == self_check
    gradients = [parameter.grad for parameter in [*model.parameters(), *critic.parameters()]]
    tensors = [*gradients, model.moved, result.loss, torch.get_rng_state(), batch[1]]
    return tensors, (model.calls, model.log, random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("loss_fn", [squares, changing, popping, with_critic])
def test_a_window_after_a_diagnosis_is_bitwise_one_without(loss_fn):
    (found, others), (expected, reference) = (left_by(check, loss_fn, lambda: [*batch_of()]) for check in (True, False))
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert (value is None) == (wanted is None) and (value is None or torch.equal(value, wanted)), index
    assert others == reference
    assert others[1] == [8] * others[0]  # the log of the window alone


class Stop(BaseException):
    """An interrupt."""


# Of `Sorted`: fast, 5 rows and parts; fast, whole and parts; again; noise 4 + 2; with shared randomness.
NUM_CHECKED = 18


@pytest.mark.parametrize("call", range(1, NUM_CHECKED + 3))
@pytest.mark.parametrize("error", [Stop, ValueError])
def test_nothing_is_left_when_a_run_fails(call, error):
    torch.manual_seed(0)
    model, calls = Sorted(), RunLog()
    model.inner[0].weight.grad = kept = torch.ones(6, 4)

    def loss_fn(model, batch):
        calls.append(len(batch[0]))
        loss = squares(model, batch)
        if len(calls) == call:
            raise error
        return loss

    batch = batch_of()
    before, buffer = torch.get_rng_state(), model.moved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gradfold.Accumulator(model, loss_fn, micro_batch_size=8).backward(batch)
        except error:
            assert torch.equal(torch.get_rng_state(), before)
            assert model.moved is buffer
            assert torch.equal(buffer, torch.zeros(3))
            assert model.inner[0].weight.grad is kept
            assert torch.equal(kept, torch.ones(6, 4))
            assert model.inner[0].bias.grad is None
            # Attributes are the user's own in the window, as without the self-check.
            assert model.calls == max(0, call - NUM_CHECKED)
        else:
            assert error is ValueError  # of a part, which proves nothing
            assert model.calls == 2


@pytest.mark.parametrize("call", range(1, 10))
@pytest.mark.parametrize("fits", [True, False])
def test_out_of_memory_at_any_time_changes_no_gradient(call, fits):
    torch.manual_seed(0)
    model, calls = net(), RunLog()
    expected = copy.deepcopy(model)

    def loss_fn(model, batch):
        calls.append(len(batch[0]))
        if len(calls) == call:
            raise torch.OutOfMemoryError("out of memory")
        of_part = len(batch[0]) in PARTS and len(calls) < 4 and not fits  # for a full check that finds nothing
        return squares(model, batch) * (1.1 if of_part else 1.0)

    batch = batch_of()
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=8).backward(batch)
    assert len(result.recoveries) <= 1
    squares(expected, batch).backward()
    for parameter, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)
