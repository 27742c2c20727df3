"""The gradients as one value: set aside, added back into the same tensors, put back, and clipped."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.state.gradients import GradientBuffer, SumDtype, clip_norm, non_finite_flags, non_finite_names

F = nn.functional


def parameter(found=None):
    made = nn.Parameter(torch.zeros(4, 2).double())
    made.grad = found
    return made


def dense(seed=0):
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)).double()


def sparse(seed=0, rows=(1, 3, 1)):
    values = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(seed)).double()
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values, (4, 2), check_invariants=True
    )  # with a repeated row: not coalesced


KINDS = {"none": lambda seed: None, "dense": dense, "sparse": sparse}


@pytest.mark.parametrize("found_kind", KINDS)
@pytest.mark.parametrize("new_kind", KINDS)
def test_new_gradients_are_added_to_those_found(found_kind, new_kind):
    found, new = KINDS[found_kind](1), KINDS[new_kind](2)
    expected = (
        sum(g.to_dense() for g in (found, new) if g is not None) if found is not None or new is not None else None
    )
    one = parameter(found)
    aside = GradientBuffer([one]).open()
    assert one.grad is None, "meanwhile the field is empty"
    one.grad = new
    aside.settle()
    aside.add_back()
    if expected is None:
        assert one.grad is None
        return
    torch.testing.assert_close(one.grad.to_dense(), expected, rtol=1e-14, atol=0)
    if found_kind == "dense" or (found_kind == "sparse" and new_kind != "dense"):
        assert one.grad is found, "in the same tensor"
    if found is None:
        assert one.grad is new or one.grad.is_coalesced()


def test_repeated_rows_of_a_sparse_gradient_are_merged():
    one = parameter()
    aside = GradientBuffer([one]).open()
    one.grad = sparse(rows=(1, 3, 1, 1))
    aside.settle()
    aside.add_back()
    assert one.grad.is_coalesced() and one.grad._nnz() == 2


def test_gradients_that_are_views_of_one_flat_buffer_stay_so():
    flat = torch.arange(16.0).double()
    model = [parameter(flat[:8].view(4, 2)), parameter(flat[8:].view(4, 2))]
    aside = GradientBuffer(model).open()
    for one in model:
        one.grad = torch.ones(4, 2).double()
    aside.settle()
    aside.add_back()
    assert torch.equal(flat, torch.arange(16.0).double() + 1)
    assert model[1].grad.data_ptr() == flat[8:].data_ptr()


def test_a_view_of_a_flat_buffer_takes_in_a_sparse_gradient():
    flat = torch.zeros(8).double()
    one = parameter(flat.view(4, 2))
    aside = GradientBuffer([one]).open()
    one.grad = sparse(4)
    aside.settle()
    aside.add_back()
    assert torch.equal(flat.view(4, 2), sparse(4).to_dense())


def test_all_of_a_mixed_model_is_added_back():
    model = [parameter(dense(1)), parameter(), parameter(sparse(3)), parameter(dense(4)), parameter()]
    expected = [n + 1 + (torch.zeros(4, 2) if one.grad is None else one.grad.to_dense()) for n, one in enumerate(model)]
    aside = GradientBuffer(model).open()
    for n, one in enumerate(model[:4]):
        one.grad = torch.full((4, 2), n + 1.0).double()
    aside.settle()
    aside.add_back()
    for one, value in zip(model[:4], expected[:4], strict=True):
        torch.testing.assert_close(one.grad.to_dense(), value.double(), rtol=1e-14, atol=0)
    assert model[4].grad is None


def test_putting_back_drops_what_is_new_and_keeps_what_was_found():
    found, late = dense(1), parameter(dense(2))
    model = [parameter(found), parameter()]
    kept = found.clone()
    aside = GradientBuffer(model).open()
    for one in model:
        one.grad = torch.ones(4, 2).double()
    aside.put_back([*model, late])
    assert model[0].grad is found and torch.equal(found, kept)
    assert model[1].grad is None and late.grad is None


def plainly(one):
    one.sum().backward()


def set_aside(one):
    aside = GradientBuffer([one]).open()
    one.sum().backward()
    aside.settle()
    aside.add_back()


@pytest.mark.parametrize("run", [plainly, set_aside])
def test_a_gradient_at_entry_that_requires_grad_is_added_to_without_recording(run):
    """As backward() does it, whatever `create_graph=True` left there."""
    one = parameter(torch.zeros(4, 2).double().requires_grad_())
    run(one)
    assert one.grad.sum().item() == 8 and one.grad.is_leaf


class Embedded(nn.Module):
    """Sparse and dense use of one table, shared and frozen layers, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.double()

    def forward(self, ids):
        return self.frozen(self.second(self.first(self.table(ids)).tanh())).mean(1)


def test_windows_add_up_with_sparse_shared_frozen_and_unused_parameters():
    model, ids = Embedded(), torch.randint(0, 6, (7, 4))

    def loss_fn(model, batch):
        return model(batch).square().mean()

    expected = full_batch_gradient(model, lambda model: 2 * loss_fn(model, ids))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2)
    accumulator.backward(ids)
    held = {name: one.grad for name, one in model.named_parameters()}
    accumulator.backward(ids)
    assert relative_error(gradients(model), expected) < 1e-12
    assert all(one.grad is held[name] for name, one in model.named_parameters())
    assert model.unused.weight.grad is None and model.frozen.weight.grad is None


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_a_table_used_sparsely_and_densely_gets_the_sum(first):
    """Tied embeddings: autograd itself turns the gradient dense, in one order of the losses or the other."""
    model = nn.Embedding(6, 3, sparse=True).double()
    ids = torch.randint(0, 6, (5,))

    def sparsely(model, batch):
        return model(batch).square().mean()

    def densely(model, batch):
        return (model.weight.sum(0) * batch[:, None]).mean()

    losses = [sparsely, densely] if first == "sparse" else [densely, sparsely]
    expected = full_batch_gradient(model, lambda model: sum(loss(model, ids) for loss in losses))
    for loss in losses:
        gradfold.Accumulator(model, loss, micro_batch_size=2).backward(ids)
    assert relative_error(gradients(model), expected) < 1e-12


class TestClip:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        max_norm=st.sampled_from([1e-3, 0.5, 1.0, 7.0, 1e6]),
        scales=st.lists(st.sampled_from([0.0, 1e-8, 1.0, 1e4]), min_size=1, max_size=4),
    )
    def test_equals_torch(self, max_norm, scales):
        ours = [parameter(dense(n) * scale) for n, scale in enumerate(scales)] + [parameter()]
        theirs = [parameter(dense(n) * scale) for n, scale in enumerate(scales)] + [parameter()]
        norm = clip_norm(ours, max_norm)
        expected = nn.utils.clip_grad_norm_(theirs, max_norm)
        torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=0)
        assert ours[-1].grad is None

    def test_sparse_gradients_count_with_merged_rows_and_stay_sparse(self):
        ours = [parameter(sparse(1)), parameter(dense(2))]
        theirs = [parameter(sparse(1).to_dense()), parameter(dense(2))]
        norm = clip_norm(ours, 0.1)
        expected = nn.utils.clip_grad_norm_(theirs, 0.1)
        torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
        assert ours[0].grad.is_sparse
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad.to_dense(), other.grad, rtol=1e-14, atol=0)

    def test_what_is_below_the_norm_is_not_touched(self):
        one = parameter(dense(1))
        kept = one.grad.clone()
        clip_norm([one], 1e6)
        assert torch.equal(one.grad, kept)

    def test_an_infinite_limit_measures_only(self):
        one = parameter(dense(1))
        kept = one.grad.clone()
        assert clip_norm(iter([one]), math.inf).item() == pytest.approx(kept.norm().item())
        assert torch.equal(one.grad, kept)

    def test_an_infinite_limit_leaves_gradients_alone_whose_norm_overflows(self):
        one = nn.Parameter(torch.zeros(2))
        one.grad = torch.full((2,), 1e25)
        assert clip_norm([one], math.inf).isinf()
        assert one.grad.tolist() == torch.full((2,), 1e25).tolist()

    def test_no_gradients_have_norm_0(self):
        assert clip_norm([parameter()], 1.0).item() == 0
        assert clip_norm([], 1.0).item() == 0


class TestFoundSparseGradients:
    """They are tensors that somebody may hold, as dense ones are."""

    def made(self):
        model = [parameter(sparse(1)), parameter(sparse(2, rows=(0, 0, 2))), parameter(dense(3))]
        return model, [one.grad for one in model], [one.grad.to_dense().clone() for one in model]

    def test_keep_their_tensor_and_hold_the_sum(self):
        model, held, before = self.made()
        aside = GradientBuffer(model).open()
        for one in model:
            one.grad = sparse(4)
        aside.settle()
        aside.add_back()
        for one, tensor, value in zip(model, held, before, strict=True):
            assert one.grad is tensor
            torch.testing.assert_close(tensor.to_dense(), value + sparse(4).to_dense(), rtol=1e-14, atol=0)

    def test_are_as_they_were_where_adding_fails(self, monkeypatch):
        model, held, before = self.made()
        aside = GradientBuffer(model).open()
        for one in model:
            one.grad = sparse(4)
        aside.settle()

        def fail(*_):
            raise MemoryError

        monkeypatch.setattr("gradfold.state.gradients.foreach_add", fail)
        with pytest.raises(MemoryError):
            aside.add_back()
        aside.put_back(model)
        for one, tensor, value in zip(model, held, before, strict=True):
            assert one.grad is tensor and torch.equal(tensor.to_dense(), value)


def test_an_expanded_gradient_is_replaced_since_it_cannot_be_written_to():
    one = parameter(torch.ones(()).double().expand(4, 2))
    aside = GradientBuffer([one]).open()
    one.grad = dense(1)
    aside.settle()
    aside.add_back()
    assert torch.equal(one.grad, dense(1) + 1)


def test_gradients_set_aside_as_an_interrupt_came_can_be_put_back(monkeypatch):
    narrow = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    narrow.grad = torch.ones(4, dtype=torch.bfloat16)
    model = [parameter(dense(1)), parameter(sparse(2)), narrow]
    held = [one.grad for one in model]

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(GradientBuffer, "_widen", interrupted)
    aside = GradientBuffer(model, SumDtype(torch.float32))
    with pytest.raises(KeyboardInterrupt):
        aside.open()
    aside.put_back(model)
    assert all(one.grad is gradient for one, gradient in zip(model, held, strict=True))


class TestNarrowParameters:
    """Their gradients are summed in float32 while a window is open, and only then."""

    def made(self, is_kept=False):
        one = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        one.grad = torch.ones(4, dtype=torch.bfloat16)
        return one, GradientBuffer([one], SumDtype(torch.float32, is_kept)).open()

    def add(self, one, value):
        (one * value).float().sum().backward()

    def test_sums_are_rounded_once(self):
        one, aside = self.made()
        for _ in range(258):
            self.add(one, 1.0)  # in bfloat16, 256 + 1 is 256
        assert one.grad.dtype == torch.float32
        aside.settle()
        assert (one.grad.dtype, one.grad_dtype) == (torch.bfloat16, torch.bfloat16)
        assert one.grad.tolist() == [258.0] * 4

    @pytest.mark.parametrize("is_settled", [False, True])
    def test_a_window_that_begins_again_sums_in_float32_again(self, is_settled):
        one, aside = self.made()
        self.add(one, 1.0)
        if is_settled:
            aside.settle()
        aside.empty([one])
        assert one.grad is None and one.grad_dtype == torch.float32

    @pytest.mark.parametrize("is_settled", [False, True])
    def test_a_roll_back_leaves_the_dtype_as_it_was(self, is_settled):
        one, aside = self.made()
        self.add(one, 1.0)
        if is_settled:
            aside.settle()
        aside.put_back([one])
        assert one.grad_dtype == torch.bfloat16 and one.grad.tolist() == [1.0] * 4

    def test_discarding_leaves_no_gradient_and_the_dtype_as_it_was(self):
        one, aside = self.made()
        self.add(one, 1.0)
        aside.discard([one])
        assert one.grad is None and one.grad_dtype == torch.bfloat16


class TestNonFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("kind", ["dense", "sparse", "complex", "imaginary", "float16", "bfloat16"])
    def test_a_value_that_is_not_finite_is_flagged_and_named(self, kind, value):
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind, torch.float64)
        bad = torch.tensor([[0.0, 1.0], [value, 2.0]], dtype=dtype)
        if kind == "complex":
            bad = torch.complex(bad, torch.zeros_like(bad))
        if kind == "imaginary":
            bad = torch.complex(torch.zeros_like(bad), bad)
        good = torch.ones_like(bad)
        if kind == "sparse":
            bad, good = bad.to_sparse(1), good.to_sparse(1)
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, 2, dtype=bad.dtype)) for name in ("a", "b", "c")})
        for one in model.values():
            one.grad = good
        flags = non_finite_flags(model.values())
        assert flags and not any(flag.item() for flag in flags)
        assert non_finite_names(model) == ()
        model["b"].grad = bad
        assert any(flag.item() for flag in non_finite_flags(model.values()))
        assert non_finite_names(model) == ("b",)

    def test_entries_of_a_sparse_gradient_count_together(self):
        """Each is finite; the gradient that an optimizer sees is their sum."""
        model = nn.ParameterList([nn.Parameter(torch.zeros(2, 1))])
        big = torch.tensor([[3e38], [3e38]])
        model[0].grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), big, (2, 1), check_invariants=True)
        assert non_finite_names(model) == ("0",)
        assert any(flag.item() for flag in non_finite_flags(model))

    def test_looking_changes_no_gradient(self):
        values = torch.tensor([-0.0, 0.0, 1e-45, 1e-38, -3e38, math.pi])
        one = nn.Parameter(torch.zeros(6))
        one.grad = values.clone()
        non_finite_flags([one])
        assert torch.equal(one.grad.view(torch.int32), values.view(torch.int32))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_one_bad_element_of_a_large_gradient(self, dtype, value):
        """Large ones are looked at by their sum; infinities of both signs do not cancel."""
        one = nn.Parameter(torch.zeros(200, 200, dtype=dtype))
        one.grad = torch.ones_like(one)
        assert not any(flag.item() for flag in non_finite_flags([one]))
        one.grad[199, 199] = value
        assert any(flag.item() for flag in non_finite_flags([one]))
        one.grad[0, 0] = -value
        assert any(flag.item() for flag in non_finite_flags([one]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_sum_that_overflows_is_no_bad_gradient(self, dtype):
        one = nn.Parameter(torch.zeros(200, 200, dtype=dtype))
        one.grad = torch.full_like(one, torch.finfo(dtype).max)
        assert not one.grad.sum().isfinite()
        assert not any(flag.item() for flag in non_finite_flags([one]))

    def test_no_gradients_are_finite(self):
        assert non_finite_flags([parameter()]) == []
