"""The front door of verification: a proof in one process, or across the ranks that a model is wrapped for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradfold.accumulator import Accumulator
from gradfold.batch import Batch
from gradfold.errors import OptionError, RanksError
from gradfold.gradients import parameters_of
from gradfold.sync import find_ranks, parallel_modules, sharded_modules
from gradfold.verification.proof import prove
from gradfold.verification.proof_across_ranks import prove_across_ranks
from gradfold.verification.verdict import Verdict

__all__ = ["verify"]


def verify(
    accumulator: Accumulator,
    batch: Batch,
    *,
    dtype: torch.dtype = torch.float64,
    micro_batch_sizes: Sequence[int] | None = None,
) -> Verdict:
    """Prove that the accumulated gradient of a batch is that of the whole batch, or name the cause by experiment.

    A copy of the model runs the batch at once in plain torch, and in micro-batches of several sizes by gradfold, each
    row with the random numbers that it had in the whole. The gradients are compared parameter by parameter. The model,
    its gradients and buffers, and torch's, numpy's and Python's random states stay as they are. The whole batch must
    fit; a small one proves as much. A `backward=` of the accumulator's is not called.

    Where the model is wrapped in DistributedDataParallel every rank calls this with rows of its own. Rank 0 proves the
    law for the rows of all ranks in one process; then all ranks accumulate theirs together, and the gradient is held
    against that of one process with the whole batch. Every rank gets the same verdict.

    Args:
        accumulator: as it is used for training.
        batch: what `accumulator.backward(batch)` takes, of at least two rows; no window.
        dtype: the precision of the copy. In float64 rounding cannot hide a mistake; where `loss_fn` does not run in
            it, the model's own is used, and the verdict says so.
        micro_batch_sizes: the sizes to try. None: a few, uneven ones and the accumulator's own among them.

    Returns:
        The verdict; print it.

    Raises:
        BatchError: the batch cannot be cut by rows, has one row only, or is a window.
        OptionError: `dtype` or a size cannot work.
        ModelError: the model cannot be copied, or the accumulator refuses it.
        RanksError: the model has `fully_shard` modules, or another rank has failed.
        LossError: `loss_fn` returned no loss.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(10, 5)
    >>> def loss_fn(model, batch):
    ...     return torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
    >>> batch = {"x": torch.randn(33, 10), "labels": torch.randint(0, 5, (33,))}
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8)
    >>> gradfold.verify(accumulator, batch).ok
    True
    >>> batch["labels"][:9] = -100  # not counted by the mean, so samples are not what it is over
    >>> verdict = gradfold.verify(accumulator, batch)
    >>> verdict.ok, verdict.causes[0].name, verdict.causes[0].weight
    (False, 'weights', 'gradfold.token_count("labels")')
    """
    if not isinstance(accumulator, Accumulator):
        raise OptionError(f"verify got a {type(accumulator).__name__}; expected a gradfold.Accumulator and a batch.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype!r}; expected torch.float64, or another floating point dtype.")
    modules = list(accumulator.model.modules())
    if accumulator.ranks != "alone" and sharded_modules(modules):
        raise RanksError(
            "verify runs on a copy of the model, and shards (fully_shard) cannot be copied. Verify the model as it is "
            "before fully_shard is applied, wrapped in DistributedDataParallel or alone."
        )
    if not parallel_modules(modules):
        return prove(accumulator, batch, dtype=dtype, micro_batch_sizes=micro_batch_sizes)
    device = parameters_of(modules)[0].device
    ranks = find_ranks(modules, device, accumulator.ranks)
    if ranks is None:  # it was said that this process trains alone
        return prove(accumulator, batch, dtype=dtype, micro_batch_sizes=micro_batch_sizes)
    return prove_across_ranks(accumulator, batch, ranks, dtype=dtype, micro_batch_sizes=micro_batch_sizes)
