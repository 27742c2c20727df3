"""A two-phase loss: one that compares the samples of a batch, written as a statistic of each and a loss of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import every_leaf, leaves_by_path
from gradfold.batch.rows import count_rows
from gradfold.engine.loss_terms import LossFn, LossOutput, check_loss_fn
from gradfold.errors import NotDecomposableError, OptionError
from gradfold.self_check.experiment import CannotKnowError, UndecidedError

__all__ = ["TwoPhaseLoss"]

Combine: TypeAlias = Literal["concatenate", "sum"]
Statistic: TypeAlias = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class TwoPhaseLoss:
    """A loss over the whole batch for `Accumulator(model, loss_fn)`, whose samples may depend on each other.

    After `accumulator.backward(batch)`, `.grad` is, to rounding, that of this expression over the rows of all ranks,
    whatever the split:

        loss(model, statistic(model, batch)).backward()

    Called as `two_phase_loss(model, batch)` it is that expression, so it can be used as any `loss_fn`. In windows of
    several micro-batches, and on several ranks, each micro-batch runs forward twice. Every forward pass must return the
    same statistics for the same rows and random state; else `RecomputeError` is raised.

    Args:
        statistic: `(model, micro_batch) -> S`: tensors in any nesting of tuples, lists, dicts and dataclasses.
            Gradients flow through floating point ones; labels and masks have none. A row must not depend on others
            here.
        loss: `(model, S of the whole batch) -> loss` or `-> (loss, metrics)`, as of any `loss_fn`. It may use
            parameters of the model (a temperature). Metrics belong here; one with an entry per row is returned in the
            batch's own order.
        combine: "concatenate": S has rows in dim 0, which are concatenated (embeddings). "sum": S is a sum over rows,
            and is summed (moments, overlaps, counts); so are numbers.

    Raises:
        OptionError: an argument is not supported.

    >>> import torch, gradfold
    >>> model = torch.nn.ModuleDict({"en": torch.nn.Linear(10, 4), "de": torch.nn.Linear(12, 4)})
    >>> def embed(model, batch):
    ...     return model["en"](batch["en"]), model["de"](batch["de"])
    >>> def match(model, embeddings):
    ...     return gradfold.losses.info_nce(*embeddings, temperature=0.1)
    >>> loss_fn = gradfold.TwoPhaseLoss(embed, match)
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8)
    >>> result = accumulator.backward({"en": torch.randn(33, 10), "de": torch.randn(33, 12)})
    >>> result.num_micro_batches  # and each of the 33 sentences was told apart from 32 others
    5
    """

    statistic: Statistic
    loss: Callable[[Any, Any], LossOutput]
    combine: Combine = "concatenate"

    def __post_init__(self) -> None:
        check_loss_fn(self.statistic, "statistic(model, batch)")
        check_loss_fn(self.loss, "loss(model, statistics)")
        if self.combine not in get_args(Combine):
            raise OptionError(f'combine={self.combine!r}; expected "concatenate" (rows) or "sum" (sums over rows).')

    def __call__(self, model: Any, batch: Any) -> LossOutput:
        """The loss of a whole batch, in one phase."""
        return self.loss(model, self.statistic(model, batch))

    def wrapped(self, wrap: Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]) -> TwoPhaseLoss:
        """The same with a wrapper (autocast, a timer) around functions."""
        return replace(self, statistic=wrap(self.statistic), loss=wrap(self.loss))


def wrap_loss(loss_fn: LossFn, wrap: Callable[[LossFn], LossFn]) -> LossFn:
    """`wrap(loss_fn)`; of a two-phase loss, each of its phases."""
    return loss_fn.wrapped(wrap) if isinstance(loss_fn, TwoPhaseLoss) else wrap(loss_fn)


def probe_of(loss_fn: TwoPhaseLoss, note: Callable[[int | None, dict[str, Any]], None] | None = None) -> LossFn:
    """A loss that is a mean over samples if (and, coincidence aside, only if) the statistics can be combined.

    It weighs all statistics with fixed random numbers, the same for every row; rows also by their squares, since
    centered rows sum to zero. `note` gets the number of rows of every run, and its statistics without a gradient.
    """

    def probe(model: nn.Module, batch: Any) -> Tensor:
        statistics = loss_fn.statistic(model, batch)
        leaves = [leaf for leaf in every_leaf(statistics) if has_gradient(leaf) and leaf.is_floating_point()]
        num_rows = count_rows(batch)
        if note is not None:
            note(num_rows, {path: leaf for path, leaf in leaves_by_path(statistics) if not has_gradient(leaf)})
        if not leaves:
            raise UndecidedError("no statistic has a gradient")  # all may be frozen, and the loss trained alone
        if num_rows is None:
            raise CannotKnowError("the rows of this batch cannot be counted")
        generator = torch.Generator().manual_seed(0)
        dtype = torch.promote_types(leaves[0].dtype, torch.float32)
        total: Tensor = leaves[0].new_zeros((), dtype=dtype)
        for leaf in leaves:
            are_rows = loss_fn.combine == "concatenate"
            direction = torch.randn(leaf.shape[are_rows:], generator=generator, dtype=torch.float64).to(leaf)
            total = total + ((leaf + leaf.square() if are_rows else leaf) * direction).sum(dtype=dtype)
        mean: Tensor = total / num_rows
        return mean

    return probe


def explain(loss_fn: TwoPhaseLoss, error: NotDecomposableError) -> NotDecomposableError:
    """What the self-check found with the probe, in words about the statistics."""
    rule = (
        "those of two parts of a micro-batch, concatenated, must be those of the micro-batch: a row must not depend on "
        "others in statistic(model, micro_batch). What compares rows belongs in loss(model, statistics)"
        if loss_fn.combine == "concatenate"
        else "those of two parts of a micro-batch, summed, must be those of the micro-batch: "
        "statistic(model, micro_batch) must return sums over rows, not means. Divide in loss(model, statistics)"
    )
    is_known = error.cause in ("batch_norm", "state")  # other causes are about the probe, not about the user's loss
    return NotDecomposableError(
        f"the statistics of the TwoPhaseLoss cannot be combined: {rule}." + (f" Seen: {error}" if is_known else ""),
        error.cause if is_known else "coupled",
        error.term,
    )


def has_gradient(leaf: Any) -> bool:
    """Whether a gradient flows through a statistic."""
    return isinstance(leaf, Tensor) and leaf.requires_grad
