"""The samples of a workload: how many there are, in which order an epoch visits them, and batches cut from that order.

Every arm draws from here, so that all of them see the same samples in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, map_tensors
from gradfold.errors import DataError
from gradfold.workloads.workload import Workload

__all__: list[str] = []

_EPOCHS_PER_SEED = 2**24


def num_samples(workload: Workload) -> int:
    """The number of training samples.

    Raises:
        DataError: the data holds no rows, or its tensors disagree about them.
    """
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
    """Which samples epoch `epoch` visits, in order: it depends on nothing but the arguments."""
    if not shuffle:
        return torch.arange(num)
    generator = torch.Generator().manual_seed(seed * _EPOCHS_PER_SEED + epoch)
    return torch.randperm(num, generator=generator)


def cut(workload: Workload, order: Tensor, size: int, device: torch.device) -> Iterator[tuple[Batch, int]]:
    """Consecutive batches of `size` samples of the order, the last one maybe smaller, each with its number of rows."""
    for indices in torch.split(order, size):
        yield to_device(collated(workload, take(workload, indices)), device), len(indices)


def take(workload: Workload, indices: Tensor) -> Batch:
    """The samples at these indices: a nesting of tensors, or a list of samples where the workload collates."""
    if workload.collate is not None:
        return [workload.train_data[index] for index in indices.tolist()]
    return map_tensors(
        lambda tensor: tensor.index_select(0, indices.to(tensor.device)) if tensor.dim() else tensor,
        workload.train_data,
    )


def share(indices: Tensor, rank: int, size: int) -> Tensor:
    """Which of a global batch's samples are this rank's: consecutive ones, nearly as many on every rank."""
    return torch.tensor_split(indices, size)[rank]


def share_of_epoch(order: Tensor, global_batch_size: int, rank: int, size: int) -> tuple[Tensor, int]:
    """A rank's samples of an epoch, the same number on every rank, and how many of them are not repeated.

    Ranks that reduce gradients in every backward pass must take as many as each other. So some samples are repeated, as
    by torch's DistributedSampler.
    """
    windows = torch.split(order, global_batch_size)
    own = [share(window, rank, size) for window in windows]
    missing = [-(-len(window) // size) - len(part) for window, part in zip(windows, own, strict=True)]
    padded = torch.cat(
        [torch.cat([part, window[:short]]) for window, part, short in zip(windows, own, missing, strict=True)]
    )
    return padded, len(padded) - sum(missing)


def collated(workload: Workload, samples: Batch) -> Batch:
    """Samples as `loss_fn` takes them."""
    return samples if workload.collate is None else workload.collate(samples)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on the device."""
    return map_tensors(lambda tensor: tensor.to(device), batch)


def to_float64(batch: Batch) -> Batch:
    """The batch with every floating-point tensor in float64."""
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def in_float64(workload: Workload) -> Workload:
    """The workload on float64 inputs."""
    collate = workload.collate
    if collate is None:
        return dataclasses.replace(workload, train_data=to_float64(workload.train_data))
    return dataclasses.replace(workload, collate=_then(collate, to_float64))


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a nesting."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def weight_of(workload: Workload, batch: Batch, num_rows: int) -> float:
    """What the loss of a batch counts in a mean over many: the workload's weight, or samples where it has several."""
    if isinstance(workload.weight, str | Mapping):
        return float(num_rows)
    return float(workload.weight(batch))


def _then(first: Callable[[Any], Any], second: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: second(first(value))
