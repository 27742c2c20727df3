"""InfoNCE in tiles: cross-entropy over the matrix of scores, without the matrix."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradfold

info_nce = gradfold.losses.info_nce


def embeddings(num_queries, num_keys, width=4, shift=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        (torch.randn(num, width, generator=generator, dtype=torch.float64) + shift).to(dtype).requires_grad_()
        for num in (num_queries, num_keys)
    )
    return queries, keys, torch.tensor(0.3, dtype=dtype, requires_grad=True)


def naive(queries, keys, temperature, symmetric):
    """The whole matrix, as everybody writes it."""
    scores = queries @ keys.T / temperature
    labels = torch.arange(len(queries))
    loss = cross_entropy(scores, labels)
    return (loss + cross_entropy(scores.T, labels)) / 2 if symmetric else loss


SHAPES = [(1, 1, True), (7, 7, True), (8, 8, True), (7, 7, False), (7, 12, False), (6, 9, False), (1, 5, False)]


@pytest.mark.parametrize(("num_queries", "num_keys", "symmetric"), SHAPES)
@pytest.mark.parametrize("tile", [1, 2, 3, 7, 100])
def test_loss_and_gradients_are_those_of_the_whole_matrix(num_queries, num_keys, symmetric, tile):
    found, expected = embeddings(num_queries, num_keys), embeddings(num_queries, num_keys)
    loss = info_nce(*found, symmetric=symmetric, tile=tile)
    reference = naive(*expected, symmetric)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-12)
    (3 * loss).backward()
    (3 * reference).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_queries", "num_keys", "symmetric"), [(5, 5, True), (4, 7, False)])
def test_gradcheck(num_queries, num_keys, symmetric):
    inputs = embeddings(num_queries, num_keys)
    assert torch.autograd.gradcheck(lambda *args: info_nce(*args, symmetric=symmetric, tile=3), inputs)


def test_scores_far_from_zero_do_not_overflow():
    queries, keys, _ = embeddings(9, 9, shift=1e4)
    for one in (info_nce(queries, keys, 0.01, tile=4), info_nce(-queries, keys, 0.01, tile=4)):
        assert bool(one.isfinite())
    torch.testing.assert_close(
        info_nce(queries, keys, 0.3, tile=4), naive(queries, keys, 0.3, True), rtol=1e-12, atol=1e-6
    )


def test_half_types_are_computed_in_float32():
    queries, keys, temperature = embeddings(9, 9, dtype=torch.bfloat16)
    loss = info_nce(queries, keys, temperature, tile=4)
    loss.backward()
    expected = embeddings(9, 9, dtype=torch.bfloat16)
    reference = naive(*[one.float() for one in expected], True)
    reference.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-5)
    for one, other in zip((queries, keys, temperature), expected, strict=True):
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad, other.grad, rtol=0.02, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        full = info_nce(queries.float(), keys.float(), tile=4)
    torch.testing.assert_close(full, naive(queries.float(), keys.float(), 0.07, True), rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *[size // 8 for size in sizes]])
        return result


def test_the_matrix_of_scores_never_exists():
    """512 x 512 scores of float64 would be 262,144 elements; a tile has 1,024, the embeddings 2,048."""
    inputs = embeddings(512, 512)
    with Largest() as largest:
        info_nce(*inputs, tile=32).backward()
    assert largest.num_elements == 512 * 4
    with Largest() as largest:
        naive(*embeddings(512, 512), True).backward()
    assert largest.num_elements == 512 * 512  # so the test can fail


def test_a_second_derivative_is_refused():
    queries, keys, _ = embeddings(3, 3)
    with pytest.raises(gradfold.LossError, match="no second derivative"):
        torch.autograd.grad(info_nce(queries, keys), queries, create_graph=True)


def test_inputs_are_checked():
    queries, keys, _ = embeddings(4, 4)
    for arguments, options, message in (
        ((queries, keys[:3]), {}, r"4 queries and 3 keys"),
        ((queries[:3], keys), {}, r"symmetric=False"),
        ((queries, keys[:, :2]), {}, r"\(4, 4\) and keys \(4, 2\)"),
        ((queries, keys.long()), {}, r"expected floating point"),
        ((queries, keys, torch.ones(2)), {}, r"temperature of shape \(2,\)"),
        ((queries[:0], keys[:0]), {}, r"\(0, 4\)"),
    ):
        with pytest.raises(gradfold.LossError, match=message):
            info_nce(*arguments, **options)
    for options in ({"temperature": 0}, {"temperature": -1.0}, {"tile": 0}, {"tile": 2.5}, {"tile": True}):
        with pytest.raises(gradfold.OptionError):
            info_nce(queries, keys, **options)
