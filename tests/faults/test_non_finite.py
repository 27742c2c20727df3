"""Gradients and losses that are not finite: refused by name, or left out of the update or of the window."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch import nn

import gradfold
from gradfold.errors import NonFiniteGradientError, NonFiniteLossError

F = nn.functional
WAYS = ["loss", "gradient"]
BAD = [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)]


class Net(nn.Module):
    """Dropout, BatchNorm where it is wanted, a sparse table, and a root whose slope at 0 is infinite."""

    def __init__(self, norm=False, sparse=True):
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=sparse)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.dropout = nn.Dropout(0.4)
        self.linear = nn.Linear(3, 1)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        return self.linear(self.dropout(self.norm(self.table(ids))))


def make(way, bad, norm=False):
    """A model, and a batch of 12 rows of which the first in each bad micro-batch of 4 gives NaN."""
    torch.manual_seed(1)
    model = Net(norm).double()
    poison = torch.ones(12, 1).double()
    for index in bad:
        poison[4 * index] = float("nan") if way == "loss" else 0.0
    return model, (torch.randint(0, 5, (12,)), torch.randn(12, 1).double(), poison)


def loss_fn(model, batch):
    """A finite loss with a gradient of NaN where the poison is 0: the slope of a root at 0, times 0."""
    ids, targets, poison = batch
    root = ((poison + 0 * model.shift).square().sum() if poison.all() else (model.shift * 0).abs()).sqrt().sum()
    scale = poison.mean() if poison.isnan().any() else 1.0
    return F.mse_loss(model(ids), targets) * scale + 0 * root, {"ids": ids}


def accumulator_for(model, norm=False, **options):
    options = {"micro_batch_size": 4, "self_check": False, **options}
    if norm:
        options["batch_norm"] = "per_micro_batch"
    return gradfold.Accumulator(model, loss_fn, **options)


def without(batch, bad):
    """The micro-batches that are not bad."""
    return [tuple(tensor[4 * index : 4 * index + 4] for tensor in batch) for index in range(3) if index not in bad]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS)
class TestAnyMicroBatch:
    def test_raise_names_the_first_and_leaves_everything_as_it_was(self, way, bad, norm):
        model, batch = make(way, bad, norm)
        before = state(model)
        with pytest.raises((NonFiniteLossError, NonFiniteGradientError)) as caught:
            accumulator_for(model, norm).backward(batch)
        error = caught.value
        assert error.micro_batch == bad[0]
        assert f"micro-batch {bad[0]} of 3 (rows {4 * bad[0]} to {4 * bad[0] + 3})" in str(error)
        assert isinstance(error, NonFiniteLossError if way == "loss" else NonFiniteGradientError)
        if way == "gradient":
            assert (error.rows, error.parameters) == (range(4 * bad[0], 4 * bad[0] + 4), ("shift",))
        assert_same_state(state(model), before)

    @pytest.mark.parametrize("entry", ["empty", "gradients"])
    def test_skip_update_leaves_no_gradient_and_the_buffers_as_they_were(self, way, bad, norm, entry):
        model, batch = make(way, bad, norm)
        if entry == "gradients":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        before = state(model)
        result = accumulator_for(model, norm, on_non_finite="skip_update").backward(batch)
        assert all(parameter.grad is None for parameter in model.parameters())
        after = state(model)
        for name, buffer in before["buffers"].items():
            assert torch.equal(after["buffers"][name], buffer)
        assert not torch.equal(after["random"], before["random"]), "the next window draws other numbers"
        (recovery,) = result.recoveries
        assert result.is_skipped and (recovery.action, recovery.rows) == ("skipped_update", range(12))
        assert not recovery.changes_randomness and not recovery.changes_batch_statistics
        assert result.loss.isnan() == (way == "loss") and result.num_samples == 12

    @pytest.mark.parametrize("entry", ["empty", "gradients"])
    def test_skip_micro_batch_gives_the_gradient_of_the_others(self, way, bad, norm, entry):
        model, batch = make(way, bad, norm)
        twin = make(way, bad, norm)[0]
        if entry == "gradients":
            for one in [*model.parameters(), *twin.parameters()]:
                one.grad = torch.ones_like(one)
        held = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.manual_seed(5)
        result = accumulator_for(model, norm, on_non_finite="skip_micro_batch").backward(batch)
        skipped = [recovery for recovery in result.recoveries if recovery.action == "skipped_micro_batch"]
        assert [recovery.rows for recovery in skipped] == [range(4 * index, 4 * index + 4) for index in bad]
        if len(bad) == 3:
            assert result.is_skipped and result.recoveries[-1].action == "skipped_update"
            assert all(parameter.grad is None for parameter in model.parameters())
            return
        rest = without(batch, bad)
        torch.manual_seed(5)
        (window,) = gradfold.windows(rest, len(rest))
        expected = accumulator_for(twin, norm).backward(window)
        assert_same_state(state(model), state(twin))
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(result.metrics["ids"], expected.metrics["ids"])
        assert (result.num_micro_batches, result.weight) == (3 - len(bad), 12.0 - 4 * len(bad))
        assert result.num_samples == 12, "rows of the batch, whatever became of them"
        assert entry == "empty" or all(one.grad is held[name] for name, one in model.named_parameters())


def test_what_is_left_of_a_window_is_the_mean_over_what_is_left():
    """Against plain torch: the weight of what is left out is taken out of the denominator, too."""
    model, batch = make("gradient", (1,))
    model.eval()
    rest = tuple(torch.cat(tensors) for tensors in zip(*without(batch, (1,)), strict=True))
    expected = full_batch_gradient(model, lambda model: loss_fn(model, rest)[0])
    accumulator_for(model, on_non_finite="skip_micro_batch").backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12


def test_a_loss_that_is_not_finite_is_left_out_though_its_gradient_is():
    model, batch = nn.Linear(1, 1), torch.tensor([[1.0], [2.0], [3.0]])
    accumulator = gradfold.Accumulator(
        model,
        lambda model, batch: model(batch).mean() + (float("inf") if batch[0] == 2 else 0.0),
        micro_batch_size=1,
        on_non_finite="skip_micro_batch",
        self_check=False,
    )
    result = accumulator.backward(batch)
    assert result.recoveries[0].rows == range(1, 2)
    assert result.loss.isfinite() and model.weight.grad.item() == 2.0


def test_a_term_that_only_the_culprit_had_may_be_missing_from_then_on():
    model = nn.Linear(3, 1)

    def loss_fn(model, batch):
        inputs, mask = batch
        terms = {"all": model(inputs).square().mean()}
        if mask.any():
            terms["some"] = model(inputs).mean() * float("nan")
        return terms

    accumulator = gradfold.Accumulator(
        model,
        loss_fn,
        micro_batch_size=2,
        weight={"all": "samples", "some": lambda batch: batch[1].sum()},
        on_non_finite="skip_micro_batch",
        self_check=False,
    )
    result = accumulator.backward((torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 0, 0])))
    assert result.weight == {"all": 4.0, "some": 0.0}
    assert result.metrics["some"].isnan() and torch.equal(result.loss, result.metrics["all"])


@pytest.mark.parametrize("norm", [False, True])
def test_memory_that_runs_out_while_the_culprit_is_looked_for_makes_it_smaller(norm):
    model, batch = make("gradient", (1,), norm)
    calls = []

    def flaky(model, batch):
        calls.append(len(batch[0]))
        loss = loss_fn(model, batch)
        if len(calls) == 5:  # three micro-batches, then the second one to be inspected
            raise torch.OutOfMemoryError
        return loss

    accumulator = gradfold.Accumulator(
        model,
        flaky,
        micro_batch_size=4,
        batch_norm="per_micro_batch",
        on_non_finite="skip_micro_batch",
        self_check=False,
    )
    result = accumulator.backward(batch)
    assert [(recovery.action, recovery.rows) for recovery in result.recoveries] == [
        ("halved", range(4, 8)),
        ("skipped_micro_batch", range(4, 6)),
    ]
    assert result.metrics["ids"].tolist() == [*batch[0][:4].tolist(), *batch[0][6:].tolist()]
    assert result.weight == 10.0 and all(one.grad.to_dense().isfinite().all() for one in model.parameters())


def test_a_batch_that_cannot_run_again_is_refused_without_a_culprit():
    model, batch = make("gradient", (1,))
    before = state(model)

    def writing(model, batch):
        batch[1].add_(1)
        return loss_fn(model, batch)

    for option, error in {"raise": NonFiniteGradientError, "skip_micro_batch": gradfold.GradfoldError}.items():
        accumulator = gradfold.Accumulator(model, writing, micro_batch_size=4, on_non_finite=option, self_check=False)
        with pytest.raises(error, match=r"no micro-batch was found|changed micro-batch 0 .* in place"):
            accumulator.backward(batch)
        assert_same_state(state(model), before)


class Poisoned(nn.Module):
    """Gives a parameter exactly the gradient that the batch holds."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=dtype))


def gradient_of(model, batch):
    return (model.weight * batch).sum(1).mean()


@pytest.mark.parametrize("option", ["raise", "skip_micro_batch"])
def test_a_sum_that_overflows_has_no_culprit(option):
    model, batch = Poisoned(), torch.full((8, 2), 3e38)
    accumulator = gradfold.Accumulator(
        model,
        lambda model, batch: 8 * gradient_of(model, batch / 4),
        micro_batch_size=4,
        on_non_finite=option,
        self_check=False,
    )
    with pytest.raises(NonFiniteGradientError, match=r"no micro-batch was found.*their sum overflows") as caught:
        accumulator.backward(batch)
    assert (caught.value.micro_batch, caught.value.rows, caught.value.parameters) == (None, range(8), ())
    assert model.weight.grad is None


def test_a_sum_that_overflows_can_be_skipped():
    model, batch = Poisoned(), torch.full((8, 2), 3e38)
    accumulator = gradfold.Accumulator(
        model,
        lambda model, batch: 8 * gradient_of(model, batch / 4),
        micro_batch_size=4,
        on_non_finite="skip_update",
        self_check=False,
    )
    assert accumulator.backward(batch).is_skipped and model.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_of_every_dtype_are_looked_at(dtype, value):
    model, batch = Poisoned(dtype), torch.ones(6, 2, dtype=dtype)
    batch[4, 1] = value

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, rows):
            ctx.save_for_backward(rows)
            return torch.zeros(())

        @staticmethod
        def backward(ctx, seed):
            return ctx.saved_tensors[0].mean(0) * seed.to(dtype), None

    accumulator = gradfold.Accumulator(
        model, lambda model, batch: Slope.apply(model.weight, batch), micro_batch_size=2, self_check=False
    )
    with pytest.raises(
        NonFiniteGradientError, match=r"micro-batch 2 of 3 \(rows 4 to 5\) is finite, .* of weight is not"
    ):
        accumulator.backward(batch)


def test_narrow_parameters_keep_their_dtype_when_an_update_is_skipped():
    """The next window's gradient would be float32, which Adam refuses."""
    model = nn.Linear(3, 1, dtype=torch.bfloat16)
    poison = [float("nan")]

    def loss_fn(model, batch):
        return model(batch).float().square().mean() * (poison.pop() if poison else 1.0)

    accumulator = gradfold.Accumulator(
        model, loss_fn, micro_batch_size=2, on_non_finite="skip_update", self_check=False
    )
    assert accumulator.backward(torch.randn(4, 3, dtype=torch.bfloat16)).is_skipped
    accumulator.backward(torch.randn(4, 3, dtype=torch.bfloat16))
    assert model.weight.grad.dtype == torch.bfloat16
    torch.optim.Adam(model.parameters()).step()


@pytest.mark.parametrize("option", ["raise", "skip_update", "skip_micro_batch"])
def test_a_loss_scaler_decides_by_itself(option):
    """It counts on infinite gradients: it lowers its scale and leaves the step out."""
    model = nn.Linear(3, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    accumulator = gradfold.Accumulator(
        model,
        lambda model, batch: 1e4 * model(batch).square().mean(),
        micro_batch_size=2,
        precision=gradfold.Precision(grad_scaler=scaler),
        on_non_finite=option,
        self_check=False,
    )
    step = gradfold.TrainStep(accumulator, optimizer)
    before = model.weight.detach().clone()
    result = step(torch.randn(4, 3))
    assert not result.applied and not result.recoveries
    assert torch.equal(model.weight, before) and scaler.get_scale() == 2.0**126
    assert not model.weight.grad.isfinite().all()


def test_a_train_step_leaves_the_update_out_and_goes_on():
    model, batch = make("gradient", (1,))
    optimizer = torch.optim.SGD([model.linear.weight, model.linear.bias, model.shift], 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = gradfold.TrainStep(accumulator_for(model, on_non_finite="skip_update"), optimizer, scheduler)
    before = model.linear.weight.detach().clone()
    result = step(batch)
    assert not result.applied and torch.equal(model.linear.weight, before)
    assert (step.updates, step.skipped, scheduler.last_epoch) == (0, 1, 0)
    assert step(make("gradient", ())[1]).applied
    assert (step.updates, step.skipped, scheduler.last_epoch) == (1, 1, 1)
