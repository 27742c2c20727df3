"""The samples of a workload: how many there are, in which order an epoch visits them, and batches in that order.

Every arm takes its batches from here, so all of them see the same samples in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, every_leaf, map_tensors
from gradfold.distributed.process_group import ProcessGroup
from gradfold.errors import DataError, OptionError
from gradfold.workloads.workload import Workload

_EPOCHS_PER_SEED = 2**24


@dataclass(frozen=True)
class Sizes:
    """How much is trained, with every default filled in."""

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    num_epochs: int
    num_ranks: int = 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a full window, on each rank."""
        return max(1, self.global_batch_size // (self.micro_batch_size * self.num_ranks))

    @property
    def last_window(self) -> int:
        """Samples of the last, partial window of an epoch; 0 where all windows are full."""
        return self.num_samples % self.global_batch_size

    @property
    def total_samples(self) -> int:
        """Samples over all epochs."""
        return self.num_samples * self.num_epochs


def num_samples(workload: Workload) -> int:
    """The number of training samples; a `DataError` where tensors disagree in dim 0."""
    if workload.collate is not None:
        return len(workload.train_data)
    counts = {len(tensor) for tensor in tensors(workload.train_data) if tensor.dim() > 0}
    if len(counts) != 1:
        raise DataError(
            f"the training data of workload {workload.name!r} has tensors with {sorted(counts) or 'no'} rows; expected "
            "a nesting of tensors that agree in dim 0, or samples with collate=."
        )
    return counts.pop()


def epoch_order(num: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """The indices of all samples in the order in which an epoch visits them; a function of its arguments alone."""
    if not shuffle:
        return torch.arange(num)
    generator = torch.Generator().manual_seed(seed * _EPOCHS_PER_SEED + epoch)
    return torch.randperm(num, generator=generator)


def first_global_batch(workload: Workload, size: int | None, least: int, seed: int = 0) -> Tensor:
    """The indices of an epoch's first global batch of `least` samples or more, or an `OptionError`."""
    total = num_samples(workload)
    size = workload.global_batch_size if size is None else size
    if not least <= size <= total:
        raise OptionError(
            f"--global-batch {size}: expected {least} to {total} samples, which is what workload {workload.name!r} has."
        )
    return epoch_order(total, seed, 0, workload.shuffle)[:size]


def load(workload: Workload, indices: Tensor, device: torch.device) -> Batch:
    """The batch of the samples at these indices, on a device."""
    samples = take(workload, indices)
    batch = samples if workload.collate is None else workload.collate(samples)
    return map_tensors(lambda tensor: tensor.to(device), batch)


def take(workload: Workload, indices: Tensor) -> Batch:
    """The samples at these indices: a nesting of tensors, or a list of samples where the workload has `collate`."""
    if workload.collate is not None:
        return [workload.train_data[index] for index in indices.tolist()]
    return map_tensors(
        lambda tensor: tensor.index_select(0, indices.to(tensor.device)) if tensor.dim() else tensor,
        workload.train_data,
    )


def take_own(workload: Workload, indices: Tensor, group: ProcessGroup | None) -> Batch:
    """The samples of a global batch that this rank of a group runs; without a group, all of them."""
    return take(workload, indices if group is None else split_for_rank(indices, group.rank, group.size))


def split_for_rank(indices: Tensor, rank: int, num_ranks: int) -> Tensor:
    """The samples of a global batch that a rank runs: consecutive ones, nearly as many on every rank."""
    return torch.tensor_split(indices, num_ranks)[rank]


def split_epoch_for_rank(order: Tensor, global_batch_size: int, rank: int, num_ranks: int) -> tuple[Tensor, int]:
    """The samples of an epoch that a rank runs, and how many of them are not repetitions.

    Ranks that reduce gradients in every backward pass need the same number of samples. Therefore some samples are
    repeated, as by torch's DistributedSampler.
    """
    parts = []
    num_repeated = 0
    for window in torch.split(order, global_batch_size):
        own = split_for_rank(window, rank, num_ranks)
        missing = -(-len(window) // num_ranks) - len(own)
        parts += [own, window[:missing]]
        num_repeated += missing
    padded = torch.cat(parts)
    return padded, len(padded) - num_repeated


def in_float64(workload: Workload) -> Workload:
    """The workload with model and inputs in float64, and an optimizer that changes nothing."""

    def to_float64(batch: Batch) -> Batch:
        return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)

    collate, make_model = workload.collate, workload.make_model
    return replace(
        workload,
        make_model=lambda: make_model().double(),
        make_optimizer=partial(torch.optim.SGD, lr=0.0),
        train_data=to_float64(workload.train_data) if collate is None else workload.train_data,
        collate=None if collate is None else lambda samples: to_float64(collate(samples)),
    )


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a nesting."""
    return [leaf for leaf in every_leaf(batch) if isinstance(leaf, Tensor)]
