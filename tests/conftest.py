"""What all tests share: one thread (several worker processes share the cores), a fixed seed, a small heap."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error, total

import gradfold

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_start():
    """The same seed; and recoveries collect the garbage of one test, not of all of torch."""
    torch.manual_seed(0)
    gc.collect()
    gc.freeze()
    yield
    assert not gradfold.is_probing(), "a probe was left open"


@pytest.fixture(scope="session")
def exact():
    """`exact(model, loss_fn, batch, **options)`: a window on a copy has the gradient of plain torch; its result."""

    def run(model, loss_fn, batch, *, tolerance=None, **options):
        trained, collate = copy.deepcopy(model), options.get("collate", lambda samples: samples)
        result = gradfold.Accumulator(trained, loss_fn, **options).backward(batch)
        expected = full_batch_gradient(model, lambda model: total(loss_fn(model, collate(batch))))
        is_double = all(parameter.dtype == torch.float64 for parameter in model.parameters())
        tolerance = tolerance or (1e-12 if is_double else 2e-6)
        assert relative_error(gradients(trained), expected) <= tolerance
        return result

    return run
