"""Windows over a loader of micro-batches: how they are grouped, and the loop body as it was, with exact weights."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.errors import (
    BatchError,
    BatchNormError,
    HookError,
    LossError,
    ModelError,
    NonFiniteLossError,
    OptionError,
    WeightError,
    WindowError,
)

F = nn.functional


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def make(*sizes: int, model=None):
    model = model or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model.double(), [(torch.randn(n, 3).double() + 1e4, torch.randn(n, 1).double()) for n in sizes]


def joined(parts):
    return tuple(torch.cat(leaves) for leaves in zip(*parts, strict=True))


def loop(window, model, loss_fn=loss_fn):
    for batch in window:
        window.backward(loss_fn(model, batch))


class Endless:
    """A loader that says in its own way that it has no length."""

    def __iter__(self):
        return iter(range(5))

    def __len__(self):
        raise NotImplementedError


class TestLength:
    """`len()`, for schedules and progress bars."""

    OPTIONS = ({}, {"model": nn.Linear(3, 1), "weight": lambda number: 0.0})

    @pytest.mark.parametrize("options", OPTIONS, ids=["accumulator", "loop body"])
    @pytest.mark.parametrize("total, size", [(8, 4), (9, 4), (3, 4), (1, 1), (0, 4), (7, 3)])
    def test_is_the_number_of_windows(self, total, size, options):
        windows = gradfold.windows(list(range(total)), size, **options)
        assert len(windows) == math.ceil(total / size)
        windows = gradfold.windows(list(range(total)), size)
        assert len(windows) == len(list(windows)) == len(windows)  # as that of a loader, whatever is left of the pass

    @pytest.mark.parametrize("options", OPTIONS, ids=["accumulator", "loop body"])
    @pytest.mark.parametrize("loader", [iter(range(5)), (item for item in range(5)), Endless()])
    def test_is_a_type_error_where_the_loader_has_none(self, loader, options):
        with pytest.raises(TypeError, match=r"has no len\(\)"):
            len(gradfold.windows(loader, 2, **options))

    def test_a_loader_without_one_can_still_be_listed(self):
        assert len(list(gradfold.windows(Endless(), 2))) == 3

    def test_one_pass_as_an_iterator_and_in_a_loop(self):
        windows = gradfold.windows(list(range(5)), 2)
        assert list(next(windows)) == [0, 1]
        assert [list(window) for window in windows] == [[2, 3], [4]]
        assert list(windows) == [] and next(windows, None) is None


class TestGrouping:
    @pytest.mark.parametrize(
        "total, size, sizes",
        [(8, 4, [4, 4]), (9, 4, [4, 4, 1]), (3, 4, [3]), (1, 1, [1]), (3, 1, [1, 1, 1]), (0, 4, [])],
    )
    @pytest.mark.parametrize("loader", [list, iter, lambda items: (item for item in items)])
    def test_the_last_window_is_as_short_as_it_comes(self, total, size, sizes, loader):
        windows = list(gradfold.windows(loader(range(total)), size))
        assert [len(window) for window in windows] == sizes
        assert [item for window in windows for item in window] == list(range(total))

    def test_a_loader_is_read_one_window_at_a_time(self):
        read = []

        def loader():
            for item in range(6):
                read.append(item)
                yield item

        windows = gradfold.windows(loader(), 2)
        assert read == []
        next(windows)
        assert read == [0, 1]
        next(windows)
        assert read == [0, 1, 2, 3]

    def test_a_torch_loader_can_be_gone_through_again_each_epoch(self):
        loader = torch.utils.data.DataLoader(torch.arange(10), batch_size=3, shuffle=True)
        for _ in range(2):
            rows = [row for window in gradfold.windows(loader, 2) for part in window for row in part.tolist()]
            assert sorted(rows) == list(range(10))

    def test_a_window_is_a_sequence(self):
        (window,) = gradfold.windows("abc", 3)
        assert window[0] == "a" and window[-1] == "c" and "b" in window and len(window) == 3
        assert isinstance(window[1:], gradfold.LoadedWindow) and list(window[1:]) == ["b", "c"]
        assert list(window) == list(window) == list("abc")

    @pytest.mark.parametrize("number", [0, -1, 2.0, True, "4", None])
    def test_a_number_that_cannot_work_is_refused_at_once(self, number):
        with pytest.raises(OptionError, match=r"num_micro_batches.*at least 1") as caught:
            gradfold.windows([], number)
        assert repr(number) in str(caught.value) or type(number).__name__ in str(caught.value)

    def test_a_loader_that_cannot_be_gone_through_is_refused_at_once(self):
        with pytest.raises(OptionError, match=r"int.*iterable of micro-batches"):
            gradfold.windows(4, 4)

    @pytest.mark.parametrize("option", [{"weight": len}, {"batch_norm": "per_micro_batch"}, {"backward": print}])
    def test_options_of_the_loop_body_without_a_model_are_refused_with_where_they_belong(self, option):
        with pytest.raises(OptionError, match=r"model=model.*Accumulator"):
            gradfold.windows([], 2, **option)


class TestPlainWindows:
    @pytest.mark.parametrize("size", [None, 1, 2, 100])
    def test_have_the_gradient_of_all_their_rows(self, size):
        model, parts = make(3, 5, 1)
        expected = full_batch_gradient(model, lambda model: loss_fn(model, joined(parts)))
        (window,) = gradfold.windows(parts, 4)
        result = gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(window)
        assert relative_error(gradients(model), expected) < 1e-12
        assert result.num_samples == 9
        assert result.num_micro_batches == {None: 3, 1: 9, 2: 6, 100: 3}[size]

    def test_may_hold_lists_of_samples(self):
        model, (batch,) = make(7)
        samples = list(zip(*batch, strict=True))
        expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, collate=torch.utils.data.default_collate)
        accumulator.backward(gradfold.LoadedWindow([samples[:3], samples[3:]]))
        assert relative_error(gradients(model), expected) < 1e-12

    def test_metrics_are_in_the_order_of_the_loader(self):
        model, parts = make(3, 1, 2)
        accumulator = gradfold.Accumulator(
            model, lambda m, b: (loss_fn(m, b), {"rows": b[0][:, 0]}), micro_batch_size=2
        )
        metrics = accumulator.backward(gradfold.LoadedWindow(parts)).metrics
        assert torch.equal(metrics["rows"], joined(parts)[0][:, 0])

    def test_a_bad_micro_batch_is_refused(self):
        model, parts = make(3, 2)
        with pytest.raises(BatchError, match="dim 0"):
            gradfold.Accumulator(model, loss_fn).backward(
                gradfold.LoadedWindow([parts[0], (parts[1][0], parts[1][1][:1])])
            )

    def test_an_empty_window_is_refused_as_a_batch(self):
        model, parts = make(3)
        with pytest.raises(BatchError):
            gradfold.Accumulator(model, loss_fn).backward(gradfold.LoadedWindow(parts)[1:])

    def test_a_window_of_the_loop_body_is_not_for_an_accumulator(self):
        model, parts = make(3)
        (window,) = gradfold.windows(parts, 2, model=model)
        with pytest.raises(gradfold.GradfoldError, match=r"windows\(loader, n\)"):
            gradfold.Accumulator(model, loss_fn).backward(window)

    def test_a_window_that_does_not_know_the_model_has_no_backward_of_its_own(self):
        model, parts = make(3)
        (window,) = gradfold.windows(parts, 2)
        with pytest.raises(WindowError, match=r"windows\(loader, n, model=model\).*accumulator\.backward\(window\)"):
            window.backward(loss_fn(model, parts[0]))


class TestLoopBody:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=7), number=st.integers(1, 4))
    def test_has_the_gradient_and_the_loss_of_the_full_batch(self, sizes, number):
        torch.manual_seed(0)
        model, parts = make(*sizes)
        seen = 0
        for index, window in enumerate(gradfold.windows(iter(parts), number, model=model)):
            batch = joined(parts[number * index : number * (index + 1)])
            expected = full_batch_gradient(model, lambda model, batch=batch: loss_fn(model, batch))
            loop(window, model)
            assert relative_error(gradients(model), expected) < 1e-12
            assert window.loss.item() == pytest.approx(loss_fn(model, batch).item(), rel=1e-12)
            assert window.loss.dim() == 0 and not window.loss.requires_grad
            seen += len(window)
            model.zero_grad()
        assert seen == len(parts)

    def test_gives_the_micro_batches_as_the_loader_gave_them(self):
        model, parts = make(3, 2)
        (window,) = gradfold.windows(parts, 2, model=model)
        assert len(window) == 2
        for batch, part in zip(window, parts, strict=False):
            assert batch is part
            window.backward(loss_fn(model, batch))

    def test_trains_as_the_full_batch_does(self):
        model, parts = make(4, 2, 3, 1, 4)
        twin = copy.deepcopy(model)
        ours, theirs = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, twin))
        for window in gradfold.windows(parts, 2, model=model):
            loop(window, model)
            ours.step()
            ours.zero_grad()
        for start in (0, 2, 4):
            loss_fn(twin, joined(parts[start : start + 2])).backward()
            theirs.step()
            theirs.zero_grad()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    def test_token_weights_make_token_means_exact(self):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
        labels = torch.randint(0, 5, (6, 4))
        labels[torch.rand(6, 4) < 0.5] = -100
        labels[2:4] = -100
        batch = {"ids": torch.randint(0, 5, (6, 4)), "labels": labels}

        def token_loss(model, batch):
            return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())

        expected = full_batch_gradient(model, lambda model: token_loss(model, batch))
        parts = [{key: value[n : n + 2] for key, value in batch.items()} for n in (0, 2, 4)]
        (window,) = gradfold.windows(parts, 3, model=model, weight=gradfold.token_count("labels"))
        loop(window, model, token_loss)
        assert relative_error(gradients(model), expected) < 1e-12
        assert window.loss.item() == pytest.approx(token_loss(model, batch).item(), rel=1e-12)
        assert window.weight == labels.ne(-100).sum().item()

    def test_with_a_weight_the_micro_batches_may_be_anything(self):
        """Graphs, text and whatever the loop body understands, since nothing is cut here."""
        model, (batch,) = make(5)
        rows = [{"text": "a", "rows": [0, 1]}, {"text": "b", "rows": [2, 3, 4]}]
        expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
        (window,) = gradfold.windows(rows, 2, model=model, weight=lambda part: len(part["rows"]))
        for part in window:
            window.backward(loss_fn(model, (batch[0][part["rows"]], batch[1][part["rows"]])))
        assert relative_error(gradients(model), expected) < 1e-12

    def test_gradients_found_are_added_to(self):
        model, parts = make(3, 2)
        expected = full_batch_gradient(model, lambda model: 2 * loss_fn(model, joined(parts)))
        for _ in range(2):
            for window in gradfold.windows(parts, 2, model=model):
                loop(window, model)
        assert relative_error(gradients(model), expected) < 1e-12

    def test_a_micro_batch_that_weighs_nothing_needs_no_backward_and_does_no_harm_with_one(self):
        model, parts = make(3, 2, 1)
        expected = full_batch_gradient(model, lambda model: loss_fn(model, parts[0]))
        (window,) = gradfold.windows(parts, 3, model=model, weight=lambda part: len(part[0]) == 3)
        for index, batch in enumerate(window):
            if index < 2:
                window.backward(loss_fn(model, batch) * (math.nan if index == 1 else 1))
        assert relative_error(gradients(model), expected) < 1e-12

    def test_a_window_that_weighs_nothing_has_no_gradient_and_no_loss(self):
        model, parts = make(3, 2)
        (window,) = gradfold.windows(parts, 2, model=model, weight=lambda part: 0)
        loop(window, model)
        assert gradients(model) == {} and window.loss.isnan()

    def test_a_framework_runs_the_backward(self):
        model, parts = make(3, 2)
        expected = full_batch_gradient(model, lambda model: loss_fn(model, joined(parts)))
        calls = []

        def backward(loss, *, gradient):
            calls.append(gradient.item())
            loss.backward(gradient=gradient)

        for window in gradfold.windows(parts, 2, model=model, backward=backward):
            loop(window, model)
        assert calls == [3.0, 0.6, 0.4]  # the probe, then the shares
        assert relative_error(gradients(model), expected) < 1e-12


class TestMisuse:
    def window(self, *sizes, **options):
        model, parts = make(*sizes)
        return next(iter(gradfold.windows(parts, len(parts), model=model, **options))), model

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_backward_outside_of_the_loop_is_refused_with_the_loop(self, when):
        window, model = self.window(3, 2)
        if when == "after":
            loop(window, model)
        with pytest.raises(WindowError, match=r"inside the loop.*for micro_batch in window"):
            window.backward(torch.tensor(1.0, requires_grad=True))

    def test_two_backwards_of_one_micro_batch_are_refused(self):
        window, model = self.window(3, 2)
        with pytest.raises(WindowError, match=r"micro-batch 1 had its window\.backward\(loss\) already; sum"):
            for index, batch in enumerate(window):
                for _ in range(index + 1):
                    window.backward(loss_fn(model, batch))

    def test_a_missing_backward_is_refused_with_the_ways_out(self):
        window, model = self.window(3, 2)
        with pytest.raises(WindowError, match=r"micro-batch 0 of 2 ended without.*weight 0"):
            for index, batch in enumerate(window):
                if index:
                    window.backward(loss_fn(model, batch))

    def test_the_last_backward_may_not_be_missing_either(self):
        window, model = self.window(3, 2)
        with pytest.raises(WindowError, match=r"micro-batch 1 of 2 ended without"):
            for index, batch in enumerate(window):
                if not index:
                    window.backward(loss_fn(model, batch))

    def test_a_second_pass_is_refused(self):
        window, model = self.window(3)
        loop(window, model)
        with pytest.raises(WindowError, match="iterated before"):
            loop(window, model)

    @pytest.mark.parametrize("at", [0, 1])
    def test_a_break_in_the_middle_is_told_at_the_next_window(self, at):
        model, parts = make(3, 2, 1, 4)
        with pytest.raises(WindowError, match=r"left before its end.*a part of the batch's gradient"):
            for window in gradfold.windows(parts, 2, model=model):
                for index, batch in enumerate(window):
                    if index == at:
                        break
                    window.backward(loss_fn(model, batch))

    def test_a_break_in_the_last_window_is_told_too(self):
        model, parts = make(3, 2)
        with pytest.raises(WindowError, match="left before its end"):
            for window in gradfold.windows(parts, 2, model=model):
                for _ in window:
                    break

    def test_leaving_both_loops_is_fine(self):
        model, parts = make(3, 2)
        for window in gradfold.windows(parts, 2, model=model):
            for _ in window:
                break
            break

    def test_a_window_may_be_left_out_as_a_whole(self):
        model, parts = make(3, 2, 1)
        taken = [len(window) for window in gradfold.windows(parts, 2, model=model)]
        assert taken == [2, 1] and gradients(model) == {}

    def test_backward_after_a_break_is_refused(self):
        window, _ = self.window(3, 2)
        for _ in window:
            break
        with pytest.raises(WindowError):
            window.backward(torch.tensor(1.0, requires_grad=True))

    def test_the_loss_is_not_known_before_the_end(self):
        window, model = self.window(3, 2)
        with pytest.raises(WindowError, match="known after the loop"):
            _ = window.loss
        for batch in window:
            window.backward(loss_fn(model, batch))
            with pytest.raises(WindowError, match="known after the loop"):
                _ = window.loss
        assert window.loss.dim() == 0

    @pytest.mark.parametrize("loss", [torch.ones(2, requires_grad=True), 1.0, None, torch.tensor(1.0)], ids=repr)
    def test_what_is_no_loss_is_refused_and_leaves_no_gradient(self, loss):
        window, model = self.window(3, 2)
        with pytest.raises(LossError):
            for _ in window:
                window.backward(loss)
        assert gradients(model) == {}

    def test_metrics_have_no_place_here(self):
        window, model = self.window(3)
        with pytest.raises(LossError):
            for batch in window:
                window.backward((loss_fn(model, batch), {"accuracy": torch.tensor(1.0)}))

    def test_terms_have_no_place_here_either(self):
        window, model = self.window(3)
        with pytest.raises(LossError):
            for batch in window:
                window.backward({"loss": loss_fn(model, batch)})

    def test_a_loss_that_is_not_finite_is_told_at_the_end_of_its_window(self):
        window, model = self.window(3, 2)
        with pytest.raises(NonFiniteLossError, match=r"micro-batch 1 of 2 \(rows 3 to 4\)") as caught:
            for index, batch in enumerate(window):
                window.backward(loss_fn(model, batch) * (math.inf if index else 1))
        assert caught.value.micro_batch == 1
        with pytest.raises(WindowError):
            _ = window.loss


class TestRefusedAtTheDoor:
    def first(self, model, parts, **options):
        return next(iter(gradfold.windows(parts, 2, model=model, **options)))

    def test_a_model_without_trainable_parameters(self):
        model, parts = make(3)
        with pytest.raises(ModelError, match="no trainable parameters"):
            self.first(model.requires_grad_(False), parts)
        with pytest.raises(ModelError, match="no trainable parameters"):
            self.first(nn.ReLU(), parts)

    @pytest.mark.parametrize("weight", ["tokens", 3, None])
    def test_what_is_no_weight(self, weight):
        with pytest.raises(WeightError):
            gradfold.windows([], 2, model=nn.Linear(1, 1), weight=weight)

    def test_weights_by_name(self):
        with pytest.raises(OptionError, match=r"one weight.*Accumulator"):
            gradfold.windows([], 2, model=nn.Linear(1, 1), weight={"loss": "samples"})

    @pytest.mark.parametrize("batch_norm", ["exact", "local"])
    def test_what_is_no_option_for_batch_norm(self, batch_norm):
        with pytest.raises(OptionError, match=batch_norm):
            gradfold.windows([], 2, model=nn.Linear(1, 1), batch_norm=batch_norm)

    def test_a_micro_batch_whose_rows_disagree(self):
        model, ((inputs, targets),) = make(3)
        with pytest.raises(WeightError, match=r"rows of a tuple cannot be counted.*weight=lambda batch"):
            self.first(model, [(inputs, targets[:2])])

    def test_a_weight_that_is_no_number_names_the_micro_batch_and_no_rows_that_are_not_there(self):
        model, parts = make(3, 2)
        with pytest.raises(WeightError, match="micro-batch 0") as caught:
            self.first(model, parts, weight=lambda part: -1)
        assert "-1)" not in str(caught.value).replace("is -1", ""), str(caught.value)

    def test_hooks_after_accumulation(self):
        """An optimizer in the backward pass would step after each micro-batch."""
        model, parts = make(3, 2)
        model[0].weight.register_post_accumulate_grad_hook(lambda one: None)
        with pytest.raises(HookError, match=r"0\.weight"):
            self.first(model, parts)


def test_a_loss_that_is_not_finite_names_no_rows_that_are_not_there():
    model, parts = make(3, 2)
    (window,) = gradfold.windows(parts, 2, model=model, weight=lambda part: len(part[0]))
    with pytest.raises(NonFiniteLossError, match="micro-batch 0 of 2") as caught:
        loop(window, model, lambda model, batch: loss_fn(model, batch) * math.nan)
    assert "to -1" not in str(caught.value)


def normalized():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))


class TestBatchNorm:
    def test_is_refused_by_name_once_a_window_has_two_micro_batches(self):
        model, parts = make(4, 3, 2, model=normalized())
        windows = iter(gradfold.windows(parts, 2, model=model))
        with pytest.raises(
            BatchNormError, match=r"BatchNorm in 1 layer \(0\) would see 4 rows.*7 of the batch"
        ) as caught:
            next(windows)
        assert caught.value.layers == ("0",)

    def test_is_refused_without_naming_rows_that_nobody_counted(self):
        model, parts = make(4, 3, model=normalized())
        with pytest.raises(BatchNormError, match="per_micro_batch") as caught:
            next(iter(gradfold.windows(parts, 2, model=model, weight=lambda part: len(part[0]))))
        assert " 0 rows" not in str(caught.value)

    def test_is_no_obstacle_in_windows_of_one(self):
        model, parts = make(4, 3, model=normalized())
        for window, part in zip(gradfold.windows(parts, 1, model=model), parts, strict=True):
            expected = full_batch_gradient(model, lambda model, part=part: loss_fn(model, part))
            loop(window, model)
            assert relative_error(gradients(model), expected) < 1e-12
            model.zero_grad()
        assert model[0].num_batches_tracked.item() == 2

    @pytest.mark.parametrize("momentum", [0.1, None, 1.0])
    def test_per_micro_batch_advances_once_by_the_whole_window(self, momentum):
        model, parts = make(4, 2, 3, model=normalized())
        model[0].momentum = momentum
        twin = copy.deepcopy(model)
        for _ in range(2):
            for window in gradfold.windows(parts, 3, model=model, batch_norm="per_micro_batch"):
                loop(window, model)
            twin[0](joined(parts)[0])
        for name, value in twin[0].named_buffers():
            torch.testing.assert_close(getattr(model[0], name), value, rtol=1e-9, atol=0)
        assert model[0].num_batches_tracked.item() == 2 and model[0].momentum == momentum
        assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks

    def test_a_layer_that_runs_again_in_backward_counts_once(self):
        """Activation checkpointing."""
        model, parts = make(4, 2, 3, model=normalized())
        twin = copy.deepcopy(model)
        for window in gradfold.windows(parts, 3, model=model, batch_norm="per_micro_batch"):
            for inputs, targets in window:
                output = torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)
                window.backward(F.mse_loss(output, targets))
        twin[0](joined(parts)[0])
        for name, value in twin[0].named_buffers():
            torch.testing.assert_close(getattr(model[0], name), value, rtol=1e-9, atol=0)

    @pytest.mark.parametrize("how", ["break", "error", "no backward", "close", "drop"])
    def test_an_abandoned_loop_leaves_the_layer_as_it_was(self, how):
        model, parts = make(4, 3, 2, model=normalized())
        before = copy.deepcopy(model[0].state_dict())
        (window,) = gradfold.windows(parts, 3, model=model, batch_norm="per_micro_batch")
        self.abandon(window, model, how)
        gc.collect()
        assert model[0].momentum == 0.1
        assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
        for name, value in before.items():
            assert torch.equal(model[0].state_dict()[name], value), name
        model[0](parts[0][0])
        assert model[0].num_batches_tracked.item() == 1

    def abandon(self, window, model, how):
        if how == "break":
            for index, batch in enumerate(window):
                window.backward(loss_fn(model, batch))
                if index == 1:
                    break
        elif how == "error":
            with pytest.raises(ZeroDivisionError):
                for batch in window:
                    window.backward(loss_fn(model, batch))
                    raise ZeroDivisionError
        elif how == "no backward":
            with pytest.raises(WindowError, match="ended without"):
                for batch in window:
                    loss_fn(model, batch)
        else:
            iterator = iter(window)
            window.backward(loss_fn(model, next(iterator)))
            next(iterator)
            if how == "close":
                iterator.close()

    def test_a_loss_that_is_not_finite_leaves_the_layer_as_it_was(self):
        model, parts = make(4, 3, model=normalized())
        before = copy.deepcopy(model[0].state_dict())
        (window,) = gradfold.windows(parts, 2, model=model, batch_norm="per_micro_batch")
        with pytest.raises(NonFiniteLossError):
            loop(window, model, lambda model, batch: loss_fn(model, batch) * math.nan)
        for name, value in before.items():
            assert torch.equal(model[0].state_dict()[name], value), name

    def test_evaluation_mode_is_no_obstacle(self):
        model, parts = make(4, 3, model=normalized())
        model.eval()
        expected = full_batch_gradient(model, lambda model: loss_fn(model, joined(parts)))
        for window in gradfold.windows(parts, 2, model=model):
            loop(window, model)
        assert relative_error(gradients(model), expected) < 1e-12


class TestLock:
    """Nothing but the window's own backward passes may change gradients before it ends."""

    def run(self, before=lambda *_: None, after=lambda *_: None, model=None, optimizer=torch.optim.SGD):
        model, parts = make(2, 3, 3, model=model)
        optimizer = optimizer(model.parameters(), 0.1)
        (window,) = gradfold.windows(parts, 3, model=model)
        for batch in window:
            before(optimizer, model)
            window.backward(loss_fn(model, batch))
            after(optimizer, model)
        expected = full_batch_gradient(model, lambda model: loss_fn(model, joined(parts)))
        assert relative_error(gradients(model), expected) <= 1e-12

    @pytest.mark.parametrize("where", ["before", "after"])
    @pytest.mark.parametrize("to_none", [True, False])
    def test_zero_grad_is_refused(self, where, to_none):
        with pytest.raises(WindowError, match=r"the gradient of 0\.weight.* was changed \(zero_grad"):
            self.run(**{where: lambda optimizer, _: optimizer.zero_grad(set_to_none=to_none)})

    @pytest.mark.parametrize("where", ["before", "after"])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_a_step_is_refused_before_it_is_made(self, where, optimizer):
        model, before = nn.Linear(3, 1).double(), None
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(WindowError, match=rf"{optimizer.__name__}\.step would move weight and bias"):
            self.run(**{where: lambda optimizer, _: optimizer.step()}, model=model, optimizer=optimizer)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_a_step_by_hand_is_found(self):
        def step(_, model):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad

        with pytest.raises(WindowError, match="parameters were changed inside the loop"):
            self.run(after=step)

    @pytest.mark.parametrize(
        "change",
        [
            lambda _, model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
            lambda _, model: model(torch.ones(1, 3).double()).sum().backward(),
            lambda _, model: model[0].weight.grad.mul_(2),
        ],
    )
    def test_clipping_and_second_losses_are_refused(self, change):
        with pytest.raises(WindowError, match=r"the gradient of 0\.weight.* was changed"):
            self.run(after=change)

    @pytest.mark.parametrize(
        "harmless",
        [
            lambda _, model: sum(float(parameter.grad.norm()) for parameter in model.parameters()),
            lambda _, model: model.eval().train(),
            lambda _, model: torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1).step(),
        ],
    )
    def test_a_look_at_gradients_and_a_step_of_another_model_are_no_matter(self, harmless):
        self.run(after=harmless)

    def test_zeroing_before_the_first_backward_is_no_matter(self):
        calls = []

        def zero_once(optimizer, _):
            if not calls:
                optimizer.zero_grad()
            calls.append(1)

        self.run(before=zero_once)

    def test_a_forward_pass_may_renormalize_its_embedding(self):
        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.words, self.out = nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 1)

            def forward(self, _):
                return self.out(self.words(torch.tensor([[1, 2]])).mean(1))

        model, parts = make(2, 2, model=Words())
        (window,) = gradfold.windows(parts, 2, model=model)
        loop(window, model, lambda model, batch: (model(batch[0]) - batch[1].mean()).square().mean())

    def test_optimizers_step_as_ever_behind_the_loop_and_after_one_that_was_left(self):
        model, parts = make(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for window in gradfold.windows(parts, 2, model=model):
            loop(window, model)
            optimizer.step()
        with pytest.raises(ZeroDivisionError):
            for window in gradfold.windows(parts, 2, model=model):
                for _ in window:
                    raise ZeroDivisionError
        gc.collect()
        optimizer.step()


class TestRecycledMemory:
    def loader(self, write, sizes=(2, 2, 2)):
        inputs, targets = torch.zeros(2, 3).double(), torch.zeros(2, 1).double()
        for number, rows in enumerate(sizes):
            write(inputs, number)
            yield inputs[:rows], targets[:rows]

    WRITES = (
        lambda inputs, number: inputs.copy_(torch.full((2, 3), number + 1.0)),
        lambda inputs, number: inputs.numpy().fill(number + 1.0),
    )

    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("with_model", [True, False])
    def test_a_loader_that_fills_one_buffer_again_is_refused(self, write, with_model):
        options = {"model": make()[0]} if with_model else {}
        with pytest.raises(BatchError, match="written to micro-batch 0 of a window after it gave it out"):
            list(gradfold.windows(self.loader(write), 3, **options))

    @pytest.mark.parametrize("write", WRITES)
    def test_windows_of_one_micro_batch_are_done_before_the_next_write(self, write):
        assert len(list(gradfold.windows(self.loader(write), 1))) == 3

    def test_views_of_one_tensor_and_the_same_batch_again_are_no_matter(self):
        data = torch.arange(12.0)
        assert len(list(gradfold.windows(data.split(3), 4))) == 1
        assert len(list(gradfold.windows([data] * 4, 4))) == 1
        assert len(list(gradfold.windows([torch.tensor(1), torch.eye(3).T[1:], torch.empty(0)], 3))) == 1
