"""The comparison: the relation between the gradients of a whole and of its two parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradfold.self_check.comparison import GradientComparison, perturbed, tolerance_of

TOLERANCE = 1e-6
SHARES = [0.3, 0.5, 1e-6, 1 - 1e-6]


def means(sizes=(7, 1, 5), scale=1.0, dtype=torch.float64):
    """The mean gradients of two parts, per parameter."""
    return [[scale * torch.randn(size, dtype=dtype) for size in sizes] for _ in range(2)]


def comparison_of(whole, first, second, share, tolerance=TOLERANCE):
    return GradientComparison.of(whole, first, second, share, tolerance)


def compared(share, relation, a, b, tolerance=TOLERANCE):
    """Parts as they are back-propagated, scaled by their shares, and a whole made by `relation(a, b)`."""
    whole = [relation(one, other) for one, other in zip(a, b, strict=True)]
    return comparison_of(whole, [share * one for one in a], [(1 - share) * other for other in b], share, tolerance)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_the_mean_of_parts_has_no_error(share, scale):
    of_mean = compared(share, lambda a, b: share * a + (1 - share) * b, *means(scale=scale))
    assert float(of_mean.errors.max()) < 1e-9
    assert of_mean.contrast() > 0.1


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-24, 1e18])
def test_errors_do_not_depend_on_the_scale_in_float32(scale):
    a, b = means(dtype=torch.float32)
    reference = compared(0.3, lambda a, b: 0.4 * a + 0.6 * b, a, b)
    scaled = compared(0.3, lambda a, b: 0.4 * a + 0.6 * b, [scale * one for one in a], [scale * one for one in b])
    torch.testing.assert_close(scaled.errors, reference.errors, rtol=1e-3, atol=0)
    assert scaled.contrast() == pytest.approx(reference.contrast(), rel=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.01])
@pytest.mark.parametrize("fitting", [0.1, 0.9, 0.0, 1.0])
def test_another_weighting_is_found_with_its_share(share, fitting):
    found = compared(share, lambda a, b: fitting * a + (1 - fitting) * b, *means())
    cause, of_first = found.explain()
    assert cause == "weights"
    assert of_first == pytest.approx(fitting, abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_sum_is_told_from_a_mean(share):
    assert compared(share, lambda a, b: a + b, *means()).explain() == ("sum", None)


@pytest.mark.parametrize("unscaled", [1e-3, 0.3, 1.0])
def test_the_part_of_a_gradient_that_does_not_follow_grad_output_is_told(unscaled):
    a, b = means()
    whole = [0.3 * one + 0.7 * other for one, other in zip(a, b, strict=True)]
    found = comparison_of(whole, a, b, 0.3)
    runs = {f: [(unscaled + (1 - unscaled) * f) * one for one in whole] for f in (0.3, 0.7)}
    nothing = torch.zeros(len(found.lengths))
    assert found.unscaled(runs, nothing) == pytest.approx(unscaled, rel=1e-6)
    assert found.unscaled(runs, nothing + 10) is None, "rounding may do as much"
    assert found.unscaled({f: [f * one for one in whole] for f in (0.3, 0.7)}, nothing) is None
    rounded = {0.3: [0.31 * one for one in whole], 0.7: [0.69 * one for one in whole]}  # as small types do
    assert found.unscaled(rounded, nothing) is None


@pytest.mark.parametrize(
    "relation", [lambda a, b: a * b, lambda a, b: 0.2 * a + 0.5 * b, lambda a, b: 2 * a - b, lambda a, b: a.flip(0)]
)
def test_what_no_weighting_explains_is_coupled(relation):
    assert compared(0.3, relation, *means()).explain() == ("coupled", None)


def test_a_weak_coupling_is_no_other_weighting():
    a, b = means(sizes=(50,))
    weak = 1e-4 * torch.randn(50, dtype=torch.float64)
    assert compared(0.3, lambda a, b: 0.3 * a + 0.7 * b + weak, a, b).explain() == ("coupled", None)


def test_a_coupling_within_the_tolerance_is_no_other_weighting_either():
    a, b = means(sizes=(50,))
    weak = 1e-3 * torch.randn(50, dtype=torch.float64)
    assert compared(0.3, lambda a, b: 0.3 * a + 0.7 * b + weak, a, b, 1e-2).explain()[0] != "weights"


def test_a_parameter_with_small_gradients_has_a_say_in_the_cause():
    (a, small_a), (b, small_b) = means(sizes=(9, 9))
    whole = [1e6 * (0.9 * a + 0.1 * b), 3e3 * small_a * small_b]
    found = comparison_of(whole, [0.3e6 * a, 0.9e3 * small_a], [0.7e6 * b, 2.1e3 * small_b], 0.3, 1e-2)
    assert found.explain() == ("coupled", None)


def test_a_sum_is_told_though_the_rounding_of_a_small_part_is_blown_up():
    a, b = means(sizes=(50,), dtype=torch.float64)
    noise = 1e-4 * torch.randn(50, dtype=torch.float64)
    assert compared(1e-3, lambda a, b: a + b + noise, a, b).explain() == ("sum", None)


def test_a_parameter_is_negligible_by_its_elements_and_not_by_their_number():
    one, many = torch.ones(1), torch.full((10_000,), 1e-4)
    found = comparison_of([one, many], [0.5 * one, -0.5 * many], [0.5 * one, -0.5 * many], 0.5)
    assert float(found.errors[1]) == pytest.approx(0.2, rel=1e-3)  # 2e-4 by a thousandth of 1


def test_one_number_or_two_tell_no_weighting():
    # Any x between them is a weighting of two numbers.
    assert compared(0.3, lambda a, b: 0.4 * a + 0.6 * b, *means(sizes=(1,))).explain()[0] == "coupled"


def test_one_number_can_still_fit():
    fits = compared(0.3, lambda a, b: 0.3 * a + 0.7 * b, *means(sizes=(1,)))
    assert float(fits.errors.max()) < 1e-12


def test_equal_parts_have_no_contrast():
    a, _ = means()
    assert compared(0.3, lambda a, b: a, a, a).contrast() < 1e-12


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_part_of_zero_weight_has_no_contrast(share):
    assert compared(share, lambda a, b: share * a + (1 - share) * b, *means()).contrast() == 0.0


def test_missing_gradients_are_zero_and_parameters_without_any_are_left_out():
    one = torch.ones(3)
    found = comparison_of([one, one, None, None], [None, one, None, one], [one, None, None, None], 0.3)
    assert len(found.lengths) == 3
    assert found.errors.tolist() == pytest.approx([0.0, 0.0, 1.0])


def test_nothing_to_see_is_none():
    assert comparison_of([None, None], [None, None], [None, None], 0.5) is None


def test_zeros_have_no_error_and_no_contrast():
    zero = [torch.zeros(3)]
    found = comparison_of(zero, zero, zero, 0.5)
    assert found.errors.tolist() == [0.0]
    assert found.contrast() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_gives_errors_that_are_not(value, where):
    three = [[torch.ones(3)], [torch.ones(3)], [torch.ones(3)]]
    three[where][0][1] = value
    assert not comparison_of(*three, 0.5).errors.isfinite().all()


def test_a_parameter_with_a_negligible_gradient_is_measured_by_the_largest():
    whole = [torch.ones(4), torch.full((4,), 1e-8)]
    found = comparison_of(whole, [0.5 * whole[0], -whole[1]], [0.5 * whole[0], -whole[1]], 0.5)
    assert float(found.errors.max()) < 1e-4
    alone = comparison_of(whole[1:], [-whole[1]], [-whole[1]], 0.5)
    assert float(alone.errors.max()) > 1


def test_errors_are_per_parameter_whatever_its_length():
    long, short = torch.ones(10_000), torch.ones(1)
    found = comparison_of([long, short * 1.1], [0.5 * long, 0.5 * short], [0.5 * long, 0.5 * short], 0.5)
    assert found.errors.tolist() == pytest.approx([0.0, 0.1 / 1.1])


def test_parameters_of_several_types_are_compared_together():
    whole = [torch.ones(3), torch.ones(3, dtype=torch.float64)]
    found = comparison_of(whole, [0.3 * one for one in whole], [0.7 * one for one in whole], 0.3, 1e-4)
    assert float(found.errors.max()) < 1e-6
    assert found.explain() is not None


def test_differences_to_another_run():
    whole = [torch.ones(3), torch.ones(3)]
    half = [0.5 * one for one in whole]
    found = comparison_of([*whole, None], [*half, None], [*half, None], 0.5)
    assert found.differences([*whole, None]).tolist() == [0.0, 0.0]
    assert found.differences([1.5 * whole[0], None, whole[1]]).tolist() == pytest.approx([0.5, 0.0])
    assert found.differences([whole[0], None, None]).tolist() == [torch.inf, torch.inf]


def test_what_fits_and_what_is_proof_depend_on_the_tolerance():
    a, b = means()
    for factor, fits, is_proof in ((0.5, True, False), (2, False, False), (8, False, True)):
        found = compared(0.5, lambda a, b, factor=factor: (0.5 * a + 0.5 * b) * (1 + factor * TOLERANCE), a, a)
        assert (found.fits, found.is_proof) == (fits, is_proof)
    assert not compared(0.3, lambda a, b: a * torch.nan, a, b).is_proof


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ([], torch.float64),
        ([None, torch.int64], torch.float64),
        ([torch.float64, torch.float32], torch.float32),
        ([torch.complex64], torch.float32),
        ([torch.bfloat16, torch.float16], torch.bfloat16),
        ([torch.float8_e4m3fn], torch.bfloat16),
    ],
)
def test_the_lowest_precision_sets_the_tolerance(dtypes, expected):
    assert tolerance_of(dtypes) == tolerance_of([expected])


def test_parameters_are_as_before_where_moving_them_fails(monkeypatch):
    parameters = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    before, rand = [one.detach().clone() for one in parameters], torch.rand

    def interrupted(*args, **kwargs):
        if not torch.equal(parameters[1], before[1]):  # in the middle
            raise KeyboardInterrupt
        return rand(*args, **kwargs)

    monkeypatch.setattr(torch, "rand", interrupted)
    with pytest.raises(KeyboardInterrupt), perturbed(parameters, 0):
        pass
    assert all(map(torch.equal, parameters, before))
    assert [one._version for one in parameters] == [0, 0, 0]
