"""A glance: what the guard runs before the window, what it leaves to the window, and that neither changes anything."""

from __future__ import annotations

import copy
import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold

PARTS = [6, 2]  # of 8 rows


def squares(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def rooted(model, batch):
    return squares(model, batch).sqrt()


def batch_of(num_rows=16):
    return torch.randn(num_rows, 4), torch.randn(num_rows, 3) * torch.linspace(0.2, 3, num_rows)[:, None]


def net(*layers):
    return nn.Sequential(nn.Linear(4, 6), *(layers or [nn.Tanh()]), nn.Linear(6, 3))


def runs(model, loss_fn=squares, batch=None, **options):
    """The numbers of rows that `loss_fn` is given, in order, in a first window of two micro-batches."""
    seen = []

    def counted(model, part):
        seen.append(len(part[0]))
        return loss_fn(model, part)

    gradfold.Accumulator(model, counted, **({"micro_batch_size": 8} | options)).backward(batch or batch_of())
    return seen


# --- What runs


def dropped(model, batch):
    return squares(lambda x: model(F.dropout(x)), batch)


def recomputed(model, batch):
    return squares(lambda x: checkpoint(model, x, use_reentrant=False), batch)


ONCE = {
    "plain": (net, squares),
    "dropout": (lambda: net(nn.Dropout(0.3)), squares),
    "dropout in place": (lambda: net(nn.Dropout(0.3, inplace=True)), squares),
    "dropout behind a checkpoint": (lambda: net(nn.Dropout(0.3)), recomputed),
    "a model that changes what it keeps": (lambda: Counting(), squares),
    "two terms": (net, lambda model, batch: {"a": squares(model, batch), "b": squares(model, batch) / 2}),
}


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


@pytest.mark.parametrize("name", ONCE)
def test_the_whole_is_the_windows_own_run(name):
    make, loss_fn = ONCE[name]
    assert runs(make(), loss_fn) == [*PARTS, 8, 8]


def test_what_draws_without_a_layer_that_says_so_begins_again():
    assert runs(net(), dropped) == [6, *PARTS, 8, 8]


def test_half_of_a_large_micro_batch_runs_in_the_trial():
    assert runs(net(), batch=batch_of(32), micro_batch_size=16) == [*PARTS, 8, 16, 16]
    assert runs(net(nn.Dropout()), batch=batch_of(32), micro_batch_size=16) == [*PARTS, 8, 16, 16]


def test_autocast_needs_no_second_look():
    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch[0])
        return F.mse_loss(output.float(), batch[1])

    assert runs(net(), loss_fn) == [*PARTS, 8, 8]
    assert runs(net(nn.Dropout(0.2)), loss_fn) == [*PARTS, 8, 8]


def test_a_first_micro_batch_of_one_row_leaves_nothing_to_compare():
    parts = [tuple(column[rows] for column in batch_of()) for rows in (slice(0, 1), slice(1, 9))]
    window = gradfold.windows([parts[0], parts[1]], 2)
    assert runs(net(), batch=next(window), micro_batch_size=None) == [*PARTS, 8, 1, 8]


def test_numbers_that_collate_draws_are_none_of_the_loss():
    def collate(samples):
        x, y = map(torch.stack, zip(*samples, strict=True))
        return x + torch.randn_like(x), y

    assert runs(net(), batch=list(zip(*batch_of(), strict=True)), collate=collate) == [*PARTS, 8, 8]


def test_rows_that_draw_keep_the_padding_of_the_whole():
    def collate(samples):
        x, y = zip(*samples, strict=True)
        return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.stack(y)

    def loss_fn(model, batch):
        x, y = batch
        return F.mse_loss((model(x) * x.any(-1, keepdim=True)).sum(1), y)

    samples = [(torch.randn(2 + 3 * (row % 8 > 3), 4), torch.randn(3)) for row in range(16)]
    assert runs(net(nn.Dropout(0.3)), loss_fn, samples, collate=collate) == [*PARTS, 8, 8]


def test_a_look_at_half_the_rows_that_failed_leaves_nothing_to_the_other():
    def loss_fn(model, batch):
        if len(batch[0]) in PARTS:
            torch.rand(3)
            raise ValueError("no")
        return squares(model, batch)

    seen = runs(net(), loss_fn, batch_of(32), micro_batch_size=16)
    assert seen == [6, 6, 8, 2, 11, 5, 16, 16, 16]


def test_draws_on_the_host_are_no_reason_to_trust_what_fits():
    def loss_fn(model, batch):
        random.random()
        return squares(model, batch)

    with pytest.warns(RuntimeWarning, match="draws from random"):
        assert runs(net(), loss_fn) == [*PARTS, 8, 8, 8]


def names_another_term(model, batch):
    return {"a": squares(model, batch)} | ({"b": 0 * squares(model, batch)} if len(batch[0]) == 2 else {})


UNCLEAR = {
    "draws": (lambda model, batch: squares(model, batch) * F.dropout(torch.ones(6)).sum(), [6]),
    "names": (names_another_term, []),
    "a number": (lambda model, batch: squares(model, batch) + (0.0 if len(batch[0]) != 2 else torch.nan), []),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_is_unclear_from_the_parts_does_not_wait_for_the_window(name):
    loss_fn, again = UNCLEAR[name]
    seen = []

    def counted(model, batch):
        seen.append(len(batch[0]))
        return loss_fn(model, batch)

    accumulator = gradfold.Accumulator(net(), counted, micro_batch_size=8)
    if name == "a number":
        with pytest.raises(gradfold.NotDecomposableError):
            accumulator.backward(batch_of())
    else:
        accumulator.backward(batch_of())
    assert seen[: len(again) + 4] == [*again, *PARTS, 8, 2]


def test_wrong_losses_with_dropout_are_found():
    with pytest.raises(gradfold.NotDecomposableError):
        runs(net(nn.Dropout(0.3)), rooted)


def test_batch_norm_by_micro_batch_is_looked_at_in_evaluation_mode_alone():
    model = net(nn.BatchNorm1d(6))
    assert runs(model, batch_norm="per_micro_batch") == [*PARTS, 8, 8, 8]
    assert model[1].num_batches_tracked == 1


def test_warnings_of_parts_are_not_heard():
    def loss_fn(model, batch):
        if len(batch[0]) in PARTS:
            warnings.warn("so few", stacklevel=1)
        return squares(model, batch)

    assert runs(net(), loss_fn) == [*PARTS, 8, 8]


def test_no_warning_of_torchs_is_used_up_by_parts():
    always = []

    def loss_fn(model, batch):
        always.append(torch.is_warn_always_enabled())
        return squares(model, batch)

    runs(net(), loss_fn)
    assert always == [True, True, False, False]


# --- As if nobody had looked


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
def test_a_window_that_needed_a_close_look_is_bitwise_one_without(loss_fn):
    (found, others), (expected, reference) = (left_by(check, loss_fn, lambda: [*batch_of()]) for check in (True, False))
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert (value is None) == (wanted is None) and (value is None or torch.equal(value, wanted)), index
    assert others == reference


def test_the_close_look_begins_where_the_window_did():
    assert left_by(True, squares, batch_of)[1][:2] == (2, [8, 8])


def test_what_cannot_be_known_after_the_windows_first_run_is_said_to_the_caller():
    with pytest.warns(RuntimeWarning, match="another order") as caught:
        gradfold.Accumulator(Sorted(), squares, micro_batch_size=8).backward(batch_of())
    assert [warning.filename for warning in caught] == [__file__]


class Stop(BaseException):
    """An interrupt."""


@pytest.mark.parametrize("call", range(1, 10))
@pytest.mark.parametrize("error", [Stop, ValueError])
def test_nothing_is_left_when_a_run_fails(call, error):
    """Calls 1 to 3 are of parts, 4 is the window's own, and what follows is the close look."""
    torch.manual_seed(0)
    model, calls = Sorted(), []
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
            # Attributes are the user's own in the window, as without the guard.
            assert model.calls == (1 if call == 4 else 0)
        else:
            assert error is ValueError  # of a part, which proves nothing
            assert model.calls == 2


def test_a_glance_that_waits_holds_no_rows():
    collated = []

    def collate(samples):
        batch = tuple(map(torch.stack, zip(*samples, strict=True)))
        collated.append((len(samples), weakref.ref(batch[0])))
        return batch

    alive = []

    def loss_fn(model, batch):
        gc.collect()
        alive.append([size for size, reference in collated if reference() is not None and size < 8])
        return squares(model, batch)

    samples = list(zip(*batch_of(), strict=True))
    gradfold.Accumulator(net(), loss_fn, micro_batch_size=8, collate=collate).backward(samples)
    assert alive == [[2, 6], [2, 6], [], []]


def test_settled_by_the_window_it_is_not_looked_at_again():
    accumulator, seen = None, []

    def loss_fn(model, batch):
        seen.append(len(batch[0]))
        return squares(model, batch)

    accumulator = gradfold.Accumulator(net(), loss_fn, micro_batch_size=8)
    expected = copy.deepcopy(accumulator.model)
    batch = batch_of()
    for _ in range(2):
        accumulator.backward(batch)
    assert seen == [*PARTS, 8, 8, 8, 8]
    (2 * squares(expected, batch)).backward()
    for parameter, reference in zip(accumulator.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)


@pytest.mark.parametrize("call", range(1, 10))
@pytest.mark.parametrize("fits", [True, False])
def test_memory_that_runs_out_at_any_time_changes_no_gradient(call, fits):
    torch.manual_seed(0)
    model, calls = net(), []
    expected = copy.deepcopy(model)

    def loss_fn(model, batch):
        calls.append(len(batch[0]))
        if len(calls) == call:
            raise torch.OutOfMemoryError("out of memory")
        of_part = len(batch[0]) in PARTS and len(calls) < 3 and not fits  # for a close look that finds nothing
        return squares(model, batch) * (1.1 if of_part else 1.0)

    batch = batch_of()
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=8).backward(batch)
    assert len(result.recoveries) <= 1
    squares(expected, batch).backward()
    for parameter, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad)
