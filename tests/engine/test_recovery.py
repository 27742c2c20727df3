"""Recovery: whatever fails and how often, the gradient is that of the same rows run in the sizes that went through."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import subprocess
import sys
import weakref
from collections import OrderedDict, UserDict, defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from faults.naive import plain_loop
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch import Tensor, nn

import gradfold
from gradfold.errors import BatchNormError, DoesNotFitError, HookError, LossError, NotDecomposableError

F = nn.functional


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """A recovery collects garbage: let it look at what these tests have made, not at all of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def make(dropout=0.5, rows=12):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, (torch.randn(rows, 3).double(), torch.randn(rows, 1).double(), torch.arange(rows))


class Flaky:
    """A loss function that runs out of memory where it is told to, and notes the rows that went through."""

    def __init__(self, fits=None, faults=()):
        self.fits = fits  # so many rows at once
        self.faults = dict(faults)  # number of the call, from 0 -> "forward" or "backward"
        self.calls: list[list[int]] = []

    def __call__(self, model, batch):
        inputs, targets, numbers = batch
        moment = self.faults.get(len(self.calls))
        self.calls.append(numbers.tolist())
        hidden = model[0](inputs)
        if moment == "backward":
            hidden.register_hook(self.fail)  # the last layer has its gradient by then
        output = model[1:](hidden)
        if moment == "forward" or (self.fits is not None and len(numbers) > self.fits):
            self.fail()
        return F.mse_loss(output, targets), {"numbers": numbers, "mean": output.mean()}

    def fail(self, *_):
        raise torch.OutOfMemoryError("no memory")

    def split(self):
        last = {row: index for index, rows in enumerate(self.calls) for row in rows}
        split = [rows for index, rows in enumerate(self.calls) if all(last[row] == index for row in rows)]
        assert sorted(row for rows in split for row in rows) == sorted(last)
        return split


def plainly(split, dropout=0.5, rows=12):
    model, batch = make(dropout, rows)
    torch.manual_seed(5)
    plain_loop(model, batch, split, Flaky())
    return state(model)


@pytest.mark.parametrize("fits", [1, 2, 3, 4, 5, 6, 7, 11, 12])
@pytest.mark.parametrize("size", [None, 1, 5, 7, 12])
def test_memory_for_so_many_rows_gives_the_gradient_of_parts_of_so_many(fits, size):
    model, batch = make()
    loss_fn = Flaky(fits)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, self_check=False)
    torch.manual_seed(5)
    result = accumulator.backward(batch)
    split = loss_fn.split()
    assert max(map(len, split)) <= fits
    assert_same_state(state(model), plainly(split))
    assert result.metrics["numbers"].tolist() == list(range(12))
    assert result.num_micro_batches == len(split) and result.num_samples == 12
    sizes = [recovery.micro_batch_size for recovery in result.recoveries]
    assert sizes == sorted(sizes, reverse=True) and (not sizes or sizes[-1] >= max(map(len, split)))


@pytest.mark.parametrize("fits", [1, 3, 5])
@pytest.mark.parametrize("kind", ["tuple", "samples", "window", "window of samples"])
def test_every_kind_of_batch_can_be_split_further(kind, fits):
    model, batch = make(dropout=0)
    expected = full_batch_gradient(model, lambda model: Flaky()(model, batch)[0])
    samples = list(zip(*batch, strict=True))
    parts = {
        "tuple": batch,
        "samples": samples,
        "window": [tuple(tensor[start : start + 4] for tensor in batch) for start in (0, 4, 8)],
        "window of samples": [samples[:5], samples[5:6], samples[6:]],
    }[kind]
    loss_fn = Flaky(fits)
    accumulator = gradfold.Accumulator(
        model, loss_fn, collate=torch.utils.data.default_collate if "samples" in kind else None
    )
    if kind.startswith("window"):
        (parts,) = gradfold.windows(parts, 3)
    result = accumulator.backward(parts)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert result.metrics["numbers"].tolist() == list(range(12))
    assert accumulator.backward(parts).num_micro_batches == len(loss_fn.split())


def test_samples_whose_collation_cannot_be_cut_are_collated_again():
    model, batch = make(dropout=0)
    expected = full_batch_gradient(model, lambda model: Flaky()(model, batch)[0])

    def collate(samples):
        inputs, targets, numbers = map(torch.stack, zip(*samples, strict=True))
        return {"data": (inputs, targets, numbers), "bounds": torch.arange(len(samples) + 1)}  # one more than rows

    loss_fn = Flaky(2)
    accumulator = gradfold.Accumulator(
        model, lambda model, batch: loss_fn(model, batch["data"]), collate=collate, self_check=False
    )
    accumulator.backward(list(zip(*batch, strict=True)))
    assert relative_error(gradients(model), expected) <= 1e-12


FAULTS = [
    dict(zip(calls, moments, strict=True))
    for calls in itertools.chain(*(itertools.combinations(range(5), n) for n in (1, 2, 3)))
    for moments in itertools.product(("forward", "backward"), repeat=len(calls))
]


@pytest.mark.parametrize("entry", ["fresh", "warm"])
def test_several_faults_in_one_window(entry):
    """Every way for up to three of the first five calls to fail, in forward and in backward."""
    known: dict[str, dict] = {}
    kinds = set()
    for faults in FAULTS:
        model, batch = make(rows=9)
        loss_fn = Flaky(faults=faults)
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False)
        if entry == "warm":
            accumulator._micro_batcher.fitting.proven = 5
        torch.manual_seed(5)
        try:
            result = accumulator.backward(batch)
        except DoesNotFitError as error:
            assert error.sizes[-1] == 1, faults
            assert all(parameter.grad is None for parameter in model.parameters())
            continue
        split = loss_fn.split()
        if repr(split) not in known:
            known[repr(split)] = plainly(split, rows=9)
        assert_same_state(state(model), known[repr(split)])
        assert result.metrics["numbers"].tolist() == list(range(9)), faults
        kinds.update(recovery.replayed for recovery in result.recoveries)
        moments = [faults[call] for call in sorted(faults) if call < len(loss_fn.calls)]
        expected = [moment == "backward" or entry == "warm" for moment in moments]
        assert [recovery.replayed for recovery in result.recoveries] == expected, faults
    assert kinds == ({True, False} if entry == "fresh" else {True})
    assert len(known) >= 5


def test_finished_micro_batches_are_not_run_again_where_only_the_failed_one_has_to_be():
    model, batch = make()
    loss_fn = Flaky(faults={2: "forward"})
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4, self_check=False).backward(batch)
    assert [len(rows) for rows in loss_fn.calls] == [4, 4, 4, 2, 2]


def test_a_window_begins_again_where_backward_has_touched_a_gradient():
    model, batch = make()
    loss_fn = Flaky(faults={2: "backward"})
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4, self_check=False).backward(batch)
    assert [len(rows) for rows in loss_fn.calls] == [4, 4, 4, 2, 2, 2, 2, 2, 2]


class Counting(nn.Module):
    """A buffer that counts forward passes."""

    def __init__(self, rebind):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("passes", torch.zeros(()))
        self.rebind = rebind

    def forward(self, inputs):
        if self.rebind:
            self.passes = self.passes + 1
        else:
            self.passes.add_(1)
        return self.linear(inputs)


@pytest.mark.parametrize("rebind", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_buffer_is_not_advanced_twice(rebind, at):
    model = Counting(rebind)
    calls = itertools.count()

    def loss_fn(model, batch):
        loss = model(batch).mean()
        if next(calls) == at:
            raise torch.OutOfMemoryError
        return loss

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, self_check=False)
    result = accumulator.backward(torch.randn(12, 3))
    assert model.passes.item() == result.num_micro_batches == 6
    assert result.recoveries[0].replayed


def test_one_row_that_does_not_fit_is_an_error_with_the_sizes_tried():
    model, batch = make()
    before = state(model)
    accumulator = gradfold.Accumulator(model, Flaky(0), micro_batch_size=8, self_check=False)
    with pytest.raises(
        DoesNotFitError, match=r"one row .*\(row 0\): tried 8, 4, 2 and 1 rows at once.*: no memory"
    ) as caught:
        accumulator.backward(batch)
    assert caught.value.sizes == (8, 4, 2, 1)
    assert_same_state(state(model), before)


def test_an_error_without_a_message_is_named_by_its_type():
    def loss_fn(model, batch):
        raise MemoryError

    accumulator = gradfold.Accumulator(nn.Linear(1, 1), loss_fn, self_check=False)
    with pytest.raises(DoesNotFitError, match=r"tried 1 row at once. The last error was: MemoryError"):
        accumulator.backward(torch.ones(1, 1))


def test_what_only_looks_like_lack_of_memory_comes_out_as_it_is():
    error = RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807]")

    def loss_fn(model, batch):
        raise error

    accumulator = gradfold.Accumulator(nn.Linear(1, 1), loss_fn, self_check=False)
    with pytest.raises(RuntimeError) as caught:
        accumulator.backward(torch.ones(4, 1))
    assert caught.value is error


class TestWeights:
    """Losses over tokens, terms by name, and micro-batches that weigh nothing."""

    labels = torch.tensor([[1, 0, -1], [-1, -1, -1], [-1, -1, -1], [0, 1, 1], [-1, -1, -1], [1, -1, -1], [0, 0, -1]])

    def make(self):
        torch.manual_seed(2)
        return nn.Linear(3, 2).double(), {"x": torch.randn(7, 3, 3).double(), "y": self.labels}

    @staticmethod
    def loss(model, batch):
        logits = model(batch["x"])
        token = F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), ignore_index=-1)
        return {"token": token, "row": logits.square().mean()}, {
            "correct": (logits.argmax(-1) == batch["y"]).sum(1),
            "size": logits.abs().mean(),
        }

    @pytest.mark.parametrize("failing", [(0,), (1,), (2,), (3,), (0, 2), (1, 2), (2, 4), (0, 1, 2)])
    @pytest.mark.parametrize("size", [2, 3, 7])
    def test_terms_metrics_and_empty_parts_survive_a_halving(self, size, failing):
        model, batch = self.make()
        reference = self.make()[0]
        terms, metrics = self.loss(reference, batch)
        (terms["token"] + terms["row"]).backward()
        calls = itertools.count()

        def loss_fn(model, batch):
            output = self.loss(model, batch)
            if next(calls) in failing and len(batch["y"]) > 1:
                raise torch.OutOfMemoryError
            return output

        weight = {"token": gradfold.token_count("y", ignore_index=-1), "row": "samples"}
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, weight=weight, self_check=False)
        result = accumulator.backward(batch)
        assert relative_error(gradients(model), gradients(reference)) <= 1e-12
        assert result.metrics["correct"].tolist() == metrics["correct"].tolist()
        for name, value in {"token": terms["token"], "row": terms["row"], "size": metrics["size"]}.items():
            torch.testing.assert_close(result.metrics[name].item(), value.item(), rtol=1e-12, atol=0)
        assert result.weight == {"token": 8.0, "row": 7.0}

    @pytest.mark.parametrize("failing", [(0,), (1,), (2,), (3,), (4,), (0, 2), (2, 3), (3, 4), (1, 3, 5)])
    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    def test_parts_that_weigh_nothing_keep_their_place(self, size, failing):
        """They run last, without a gradient, and a halving can make new ones."""
        model, batch = self.make()
        reference = self.make()[0]
        terms, metrics = self.loss(reference, batch)
        terms["token"].backward()
        calls = itertools.count()

        def loss_fn(model, batch):
            terms, metrics = self.loss(model, batch)
            if next(calls) in failing and len(batch["y"]) > 1:
                raise torch.OutOfMemoryError
            return terms["token"], {"correct": metrics["correct"]}

        weight = gradfold.token_count("y", ignore_index=-1)
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, weight=weight, self_check=False)
        result = accumulator.backward(batch)
        assert relative_error(gradients(model), gradients(reference)) <= 1e-12
        assert result.metrics["correct"].tolist() == metrics["correct"].tolist()
        torch.testing.assert_close(result.loss.item(), terms["token"].item(), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("failing", [(1,), (2,), (1, 3), (2, 4), (2, 3), (2, 5), (1, 2, 4)])
    def test_finished_parts_move_on_where_one_that_weighs_nothing_is_cut_before_them(self, failing):
        torch.manual_seed(2)
        model, weights = nn.Linear(3, 1).double(), torch.tensor([1.0, 1, 0, 0, 0, 0, 1, 1, 2, 1, 1, 1]).double()
        batch = torch.randn(12, 3).double(), weights
        calls = itertools.count()

        def loss(model, batch):
            inputs, weights = batch
            losses = model(inputs)[:, 0].square()
            return (losses * weights).sum() / weights.sum(), {"losses": losses}

        def loss_fn(model, batch):
            if next(calls) in failing and len(batch[0]) > 1:
                raise torch.OutOfMemoryError
            return loss(model, batch)

        expected = full_batch_gradient(model, lambda model: loss(model, batch)[0])
        accumulator = gradfold.Accumulator(
            model, loss_fn, micro_batch_size=4, weight=lambda batch: batch[1].sum(), self_check=False
        )
        (window,) = gradfold.windows(
            [tuple(tensor[a:b] for tensor in batch) for a, b in ((0, 2), (2, 6), (6, 9), (9, 12))], 4
        )
        result = accumulator.backward(window)
        value, metrics = loss(model, batch)
        assert result.recoveries and not any(recovery.replayed for recovery in result.recoveries)
        assert relative_error(gradients(model), expected) <= 1e-12
        torch.testing.assert_close(result.loss.item(), value.item(), rtol=1e-12, atol=0)
        torch.testing.assert_close(result.metrics["losses"], metrics["losses"].detach(), rtol=1e-12, atol=0)

    def test_a_weight_that_is_not_a_count_is_refused(self):
        model, batch = make()
        before = state(model)
        accumulator = gradfold.Accumulator(
            model, Flaky(6), weight=lambda batch: batch[0].abs().mean(), self_check=False
        )
        with pytest.raises(DoesNotFitError, match=r"12 rows .* weight= gives .* so it is not a count") as caught:
            accumulator.backward(batch)
        assert caught.value.sizes == (12,)
        assert_same_state(state(model), before)

    def test_a_weight_summed_in_float32_is_a_count(self):
        """It differs by rounding, as it does between the splits of windows without a fault."""
        torch.manual_seed(0)
        model, batch, weights = nn.Linear(3, 1), torch.randn(64, 3), torch.rand(64)
        assert weights.sum() != weights[:32].sum() + weights[32:].sum()

        def loss_fn(model, batch):
            if len(batch[0]) > 32:
                raise torch.OutOfMemoryError
            return (model(batch[0])[:, 0] * batch[1]).sum() / batch[1].sum()

        accumulator = gradfold.Accumulator(model, loss_fn, weight=lambda batch: batch[1].sum())
        assert accumulator.backward((batch, weights)).num_micro_batches == 2

    def test_a_weight_function_that_fails_on_fewer_rows_comes_out_as_it_is(self):
        def weight(batch):
            if len(batch[0]) < 12:
                raise ZeroDivisionError
            return 1

        model, batch = make()
        before = state(model)
        accumulator = gradfold.Accumulator(model, Flaky(6), weight=weight, self_check=False)
        with pytest.raises(ZeroDivisionError):
            accumulator.backward(batch)
        assert_same_state(state(model), before)


class TestFromOneToMany:
    """Only a window of several micro-batches is looked at; one of them may become several."""

    def test_the_guard_looks_when_a_whole_batch_has_to_be_cut(self):
        model, batch = make(dropout=0)

        def loss_fn(model, batch):
            if len(batch[0]) > 6:
                raise torch.OutOfMemoryError
            return F.mse_loss(model(batch[0]), batch[1], reduction="sum")

        before = state(model)
        with pytest.raises(NotDecomposableError, match="sum"):
            gradfold.Accumulator(model, loss_fn).backward(batch)
        assert_same_state(state(model), before)

    def test_a_guard_that_runs_out_of_memory_leaves_it_to_the_window(self):
        model, batch = make()
        loss_fn = Flaky(1)
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=6)
        torch.manual_seed(5)
        accumulator.backward(batch)
        assert_same_state(state(model), plainly([[row] for row in range(12)]))

    def test_hooks_are_refused(self):
        model, batch = make()
        model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
        gradfold.Accumulator(model, Flaky()).backward(batch)  # which is as good as a plain backward pass
        before = state(model)
        with pytest.raises(DoesNotFitError, match=r"12 rows do not fit .* fewer cannot be run: 0\.weight") as caught:
            gradfold.Accumulator(model, Flaky(6)).backward(batch)
        assert isinstance(caught.value.__cause__, HookError) and caught.value.sizes == (12,)
        assert_same_state(state(model), before)

    def test_batch_norm_is_refused(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def loss_fn(model, batch):
            loss = model(batch).square().mean()
            if len(batch) > 6:
                raise torch.OutOfMemoryError
            return loss

        batch = torch.randn(12, 3)
        before = state(model)
        with pytest.raises(DoesNotFitError, match=r"12 rows do not fit .* BatchNorm in 1 layer") as caught:
            gradfold.Accumulator(model, loss_fn).backward(batch)
        assert isinstance(caught.value.__cause__, BatchNormError)
        assert_same_state(state(model), before)

    def test_batch_norm_of_one_row_is_refused(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def loss_fn(model, batch):
            loss = model(batch).square().mean()
            if len(batch) > 1:
                raise torch.OutOfMemoryError
            return loss

        batch = torch.randn(8, 3)
        before = state(model)
        accumulator = gradfold.Accumulator(model, loss_fn, batch_norm="per_micro_batch", self_check=False)
        with pytest.raises(DoesNotFitError, match=r"8, 4 and 2 rows do not fit .* one value per channel"):
            accumulator.backward(batch)
        assert_same_state(state(model), before)
        assert model[1].momentum == 0.1 and not model[1]._forward_hooks


@dataclasses.dataclass
class Fields:
    x: Tensor
    y: Tensor


def cut_into_two(batch):
    return {"micro_batch_size": 6}, batch


def whole(batch):
    return {}, batch


def collated(batch):
    def collate(samples):
        return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}

    return {"micro_batch_size": 6, "collate": collate}, list(zip(batch["x"], batch["y"], strict=True))


@pytest.mark.parametrize("given", [cut_into_two, whole, collated])
class TestWhatALossFunctionDoesToItsBatch:
    """It may run again on the same rows, and must find them as they were."""

    def run(self, given, change, fault):
        """The relative error of a window whose call number `fault` fails after `change` was made to its batch."""
        torch.manual_seed(4)
        model = nn.Linear(3, 1).double()
        batch = {"x": torch.randn(12, 3).double(), "y": torch.randn(12, 1).double()}
        expected = full_batch_gradient(model, lambda model: F.mse_loss(model(batch["x"] / 10), batch["y"]))
        calls = itertools.count()

        def loss_fn(model, batch):
            loss = change(model, batch)
            if next(calls) == fault:
                raise torch.OutOfMemoryError
            return loss

        options, batch = given(batch)
        gradfold.Accumulator(model, loss_fn, self_check=False, **options).backward(batch)
        return relative_error(gradients(model), expected)

    @pytest.mark.parametrize("fault", [0, 1])
    def test_a_key_may_be_set_to_something_else(self, given, fault):
        def change(model, batch):
            batch["x"] = batch["x"] / 10
            return F.mse_loss(model(batch["x"]), batch["y"])

        assert self.run(given, change, fault) <= 1e-12

    @pytest.mark.parametrize("fault", [0, 1])
    def test_a_key_may_be_taken_out(self, given, fault):
        def change(model, batch):
            targets = batch.pop("y", torch.zeros(()))
            return F.mse_loss(model(batch["x"] / 10), targets)

        assert self.run(given, change, fault) <= 1e-12

    @pytest.mark.parametrize("fault", [0, 1])
    def test_a_change_in_place_is_refused(self, given, fault):
        def change(model, batch):
            batch["x"].div_(10)
            return F.mse_loss(model(batch["x"]), batch["y"])

        if given is whole and fault == 1:
            assert self.run(given, change, fault) <= 1e-12  # there is no second call
            return
        with pytest.raises(DoesNotFitError, match=r"changed micro-batch .* in place.*inputs\.clone"):
            self.run(given, change, fault)


@pytest.mark.parametrize("kind", [list, Fields, UserDict, dict])
def test_containers_in_containers_are_new_for_each_run(kind):
    torch.manual_seed(4)
    model = nn.Linear(3, 1).double()
    inputs, targets = torch.randn(12, 3).double(), torch.randn(12, 1).double()
    expected = full_batch_gradient(model, lambda model: F.mse_loss(model(inputs / 10), targets))
    inner = {
        list: lambda: [inputs, targets],
        Fields: lambda: Fields(inputs, targets),
        UserDict: lambda: UserDict(x=inputs, y=targets),
        dict: lambda: {"x": inputs, "y": targets},
    }[kind]()

    def loss_fn(model, batch):
        (part,) = batch["inner"]
        if kind is list:
            part[0] = part[0] / 10
            x, y = part
        elif kind is Fields:
            part.x = part.x / 10
            x, y = part.x, part.y
        else:
            part["x"] = part["x"] / 10
            x, y = part["x"], part["y"]
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return F.mse_loss(model(x), y)

    gradfold.Accumulator(model, loss_fn, self_check=False).backward({"inner": (inner,)})
    assert relative_error(gradients(model), expected) <= 1e-12


class Pair(NamedTuple):
    inputs: Any
    targets: Tensor


class Attributes(dict):
    """A dict whose keys are attributes."""

    def __init__(self, **values):
        super().__init__(**values)
        self.__dict__ = self


NESTED = {  # how to make a batch, and from a batch: what to assign to, and the targets
    "named tuple": (lambda x, y: Pair({"x": x}, y), lambda b: (b.inputs, "x", b.targets)),
    "dataclass": (lambda x, y: Fields({"x": x}, y), lambda b: (b.x, "x", b.y)),
    "list in a dataclass": (lambda x, y: Fields([x], y), lambda b: (b.x, 0, b.y)),
    "OrderedDict": (lambda x, y: OrderedDict(inputs={"x": x}, y=y), lambda b: (b["inputs"], "x", b["y"])),
    "UserDict": (lambda x, y: UserDict(inputs={"x": x}, y=y), lambda b: (b["inputs"], "x", b["y"])),
    "defaultdict": (lambda x, y: defaultdict(list, x=[x], y=y), lambda b: (b["x"], 0, b["y"])),
    "attributes": (
        lambda x, y: Attributes(inputs=Attributes(x=x), y=y),
        lambda b: (vars(b.inputs), "x", b.y),
    ),
    "named tuple in a tuple": (lambda x, y: {0: (Pair([x], y), y)}, lambda b: (b[0][0].inputs, 0, b[0][1])),
    "object": (lambda x, y: SimpleNamespace(inputs={"x": x}, y=y), lambda b: (b.inputs, "x", b.y)),
}


@pytest.mark.parametrize("fault", [0, 1, 2])
@pytest.mark.parametrize("given", ["cut", "collated", "whole"])
@pytest.mark.parametrize("kind", NESTED)
def test_what_is_assigned_in_a_nested_container_is_not_found_by_a_replay(kind, given, fault):
    """The objects of an unknown class, which only `collate` can make, are refused by name instead."""
    torch.manual_seed(4)
    model = nn.Linear(3, 1).double()
    inputs, targets = torch.randn(12, 3).double(), torch.randn(12, 1).double()
    expected = full_batch_gradient(model, lambda model: F.mse_loss(model(inputs / 10), targets))
    make, find = NESTED[kind]
    calls = itertools.count()

    def loss_fn(model, batch):
        container, key, targets = find(batch)
        container[key] = container[key] / 10
        if next(calls) == fault:
            raise torch.OutOfMemoryError
        return F.mse_loss(model(container[key]), targets)

    options = {"self_check": False} | ({} if given == "whole" else {"micro_batch_size": 5})
    if given == "collated":
        batch = list(zip(inputs, targets, strict=True))
        options["collate"] = lambda samples: make(*map(torch.stack, zip(*samples, strict=True)))
    else:
        batch = make(inputs, targets)
    accumulator = gradfold.Accumulator(model, loss_fn, **options)
    if kind == "object":
        with pytest.raises(gradfold.GradfoldError, match=r"batch\.inputs\['x'\].* to a variable|cannot split by rows"):
            accumulator.backward(batch)
        return
    accumulator.backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("given", [cut_into_two, whole, collated])
def test_a_batch_that_was_changed_in_place_before_the_window_can_run_again(given):
    model = nn.Linear(3, 1)
    batch = {"x": torch.randn(12, 3).div_(10), "y": torch.randn(12, 1).div_(10)}

    def loss_fn(model, batch):
        if len(batch["x"]) > 3:
            raise torch.OutOfMemoryError
        return F.mse_loss(model(batch["x"]), batch["y"])

    options, batch = given(batch)
    assert gradfold.Accumulator(model, loss_fn, self_check=False, **options).backward(batch).num_micro_batches == 4


def test_a_change_in_place_is_seen_however_long_ago_the_micro_batch_was_done():
    """The first micro-batch is kept over one fault, and has to run again after another."""
    model, (inputs, _, _) = make(dropout=0)
    calls = itertools.count()

    def loss_fn(model, batch):
        call = next(calls)
        if call == 0:
            batch.mul_(2)
        hidden = model[0](batch)
        if call == 1:
            raise torch.OutOfMemoryError
        if call == 3:
            hidden.register_hook(Flaky().fail)
        return model[1:](hidden).mean()

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, collate=torch.stack, self_check=False)
    with pytest.raises(DoesNotFitError, match=r"changed micro-batch 0 \(rows 0 to 3\) in place"):
        accumulator.backward(list(inputs))


def test_a_replay_draws_the_numbers_of_the_first_run_though_collation_draws_some():
    model, batch = make()
    numbers = []

    def collate(samples):
        torch.rand(7)
        return torch.utils.data.default_collate(samples)

    def loss_fn(model, batch):
        numbers.append(torch.rand(()).item())
        if len(numbers) == 2:
            model[0](batch[0]).sum().backward()  # leaves a trace
            raise torch.OutOfMemoryError
        return F.mse_loss(model(batch[0]), batch[1])

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=6, collate=collate, self_check=False)
    accumulator.backward(list(zip(*batch, strict=True)))
    assert numbers[2] == numbers[0]


class Watched(nn.Module):
    """A layer that knows of its outputs whether they are alive, and how many were when it was called."""

    def __init__(self):
        super().__init__()
        self.outputs: list[weakref.ref] = []
        self.at_start: list[int] = []

    def alive(self):
        return sum(ref() is not None for ref in self.outputs)

    def forward(self, inputs):
        self.at_start.append(self.alive())
        output = inputs.tanh()  # which autograd keeps
        self.outputs.append(weakref.ref(output))
        return output


def make_watched():
    model, batch = make()
    model[2] = Watched()
    return model, batch, model[2]


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_activations_of_what_failed_are_gone_before_it_runs_again(at, moment):
    model, batch, layer = make_watched()
    loss_fn = Flaky(faults={at: moment})
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4, self_check=False).backward(batch)
    assert layer.at_start == [0] * len(loss_fn.calls)
    assert len(loss_fn.calls) > 4 and not layer.alive()


def test_the_names_of_the_terms_are_remembered_over_a_fault():
    calls = itertools.count()

    def loss_fn(model, batch):
        loss, call = model(batch).mean(), next(calls)
        if call == 1:
            raise torch.OutOfMemoryError
        return {"one": loss} if call == 0 else {"one": loss, "two": loss}

    accumulator = gradfold.Accumulator(nn.Linear(1, 1), loss_fn, micro_batch_size=2, self_check=False)
    with pytest.raises(LossError, match="the same names every time"):
        accumulator.backward(torch.ones(4, 1))


def test_what_only_refers_to_itself_is_gone_before_the_next_run():
    class Knot:
        def __init__(self, tensor):
            self.itself, self.tensor = self, tensor

    model, batch = make()
    knots: list[weakref.ref] = []
    alive = []

    def loss_fn(model, batch):
        alive.append(sum(ref() is not None for ref in knots))
        knot = Knot(model(batch[0]))
        knots.append(weakref.ref(knot))
        if len(batch[0]) > 6:
            raise torch.OutOfMemoryError
        return F.mse_loss(model(batch[0]), batch[1])

    gc.disable()
    try:
        gradfold.Accumulator(model, loss_fn, self_check=False).backward(batch)
    finally:
        gc.enable()
    assert alive[:2] == [0, 0]


def test_the_gradients_of_a_window_that_begins_again_are_gone():
    """Two of each would be the last straw."""
    model, batch = make()
    dropped: list[weakref.ref] = []
    alive = []

    class Last(Flaky):
        def __call__(self, model, batch):
            alive.append(sum(ref() is not None for ref in dropped))
            return super().__call__(model, batch)

        def fail(self, *_):
            dropped.extend(weakref.ref(one.grad) for one in model.parameters() if one.grad is not None)
            super().fail()

    gradfold.Accumulator(model, Last(faults={1: "backward"}), micro_batch_size=6, self_check=False).backward(batch)
    assert len(dropped) == 4
    assert alive == [0] * 6


@pytest.mark.parametrize(
    ("fits", "options"), [(0, {}), (6, {"weight": lambda batch: batch[0].abs().mean()})], ids=["one row", "weight"]
)
def test_an_error_that_it_does_not_fit_keeps_no_activations_alive(fits, options):
    model, batch, layer = make_watched()
    gc.disable()
    try:
        with pytest.raises(DoesNotFitError) as caught:
            gradfold.Accumulator(model, Flaky(fits), self_check=False, **options).backward(batch)
        assert layer.outputs and not layer.alive()
        assert not isinstance(caught.value.__context__, torch.OutOfMemoryError)
    finally:
        gc.enable()


def test_an_error_of_the_users_keeps_activations_alive_no_longer_than_itself():
    model, batch, layer = make_watched()

    def failing(model, batch):
        loss, _ = Flaky()(model, batch)
        raise LossError(str(loss.shape))

    accumulator = gradfold.Accumulator(model, failing, self_check=False)
    gc.disable()
    try:
        try:
            accumulator.backward(batch)
        except LossError:
            assert layer.alive()
        assert layer.outputs and not layer.alive()
    finally:
        gc.enable()


UNDER_A_LIMIT = """
import resource, torch, gradfold
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 2**17), nn.Tanh(), nn.Linear(2**17, 1)).double()
batch = torch.randn(128, 4).double(), torch.randn(128, 1).double()


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def run(size, mebibytes):
    model.zero_grad()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mebibytes * 2**20, resource.RLIM_INFINITY))
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, self_check=False).backward(batch)
    return result, [parameter.grad.clone() for parameter in model.parameters()]


expected = run(16, 2**14)[1]
result, found = run(None, 150)
assert result.recoveries, "no lack of memory"
for ours, theirs in zip(found, expected):
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
print(result.num_micro_batches)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space limits")
def test_the_real_allocator_under_a_limit_of_the_address_space():
    """One activation of all rows takes 128 MiB."""
    result = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], capture_output=True, text=True)
    assert result.returncode == 0 and int(result.stdout) > 1, result.stderr


def test_a_small_micro_batch_that_fails_makes_the_others_small():
    """Long rows: two of them take more memory than five others."""
    model, batch = make(dropout=0)
    expected = full_batch_gradient(model, lambda model: Flaky()(model, batch)[0])
    sizes = []

    def loss_fn(model, batch):
        sizes.append(len(batch[2]))
        if len(batch[2]) > 1 and 5 in batch[2]:
            raise torch.OutOfMemoryError
        return Flaky()(model, batch)

    (window,) = gradfold.windows([tuple(t[a:b] for t in batch) for a, b in ((0, 5), (5, 7), (7, 12))], 3)
    result = gradfold.Accumulator(model, loss_fn, self_check=False).backward(window)
    assert sizes == [5, 2] + [1] * 7
    assert relative_error(gradients(model), expected) <= 1e-12
    assert result.recoveries[0].rows == range(5, 7)
