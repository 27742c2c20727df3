"""A token budget: how many padded tokens to run at once, as the option of an accumulator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.errors import BatchError, OptionError
from gradfold.packing.packer import StepCost

__all__ = ["TokenBudget"]

Leaves: TypeAlias = "Sequence[str | int] | Mapping[str | int, int | tuple[int, ...]]"
"""Tensors of a batch by key, attribute or index, and maybe which of their dimensions."""

SINGLE = ""
"""The name of the input where rows have one length each."""


@dataclass(frozen=True)
class TokenBudget:
    """As `batching`: micro-batches of rows of similar length, by padded tokens instead of rows.

    The gradient does not depend on which rows of the batch run together. So they are sorted by length and cut where
    padding and micro-steps cost least, and each micro-batch is no longer than its longest row. The batch, its loss and
    its gradient stay the same; metrics with one value per row come back in the batch's own order.

    Args:
        max_tokens: padded tokens to run at once, at most: rows times the longest length. A row that is longer runs
            alone. On out-of-memory it is halved, as a number of rows is. "auto": found in the first window, as
            `micro_batch_size="auto"` is: as many of the longest rows as run fastest and fit.
        lengths: from the batch (with `collate`: the list of samples) to the length of each row, in tokens: a tensor
            (rows,) or a list of numbers; or a dict of them, by name, where a row has several inputs, such as source
            and target.
        padding_side: where padded tensors have their padding. On the left one column before the longest row stays,
            since it predicts that row's first token.
        trim: of padded tensors those are trimmed that have the padded length as a dimension, and beyond each row's
            length the same everywhere. What else goes with the tokens has to be named: by key or index
            (`("position_ids",)`) or with its dimensions (`{"bias": (2, 3)}`), of which `()` keeps it as it is. Where
            `lengths` returns a dict, a dict of these by the same names.
        cost: what a micro-step costs in padded tokens beside those it has. None: measured once, in the second window,
            on this machine; a number makes the cut the same everywhere. A `StepCost` has a term for attention.

    Raises:
        OptionError: an argument cannot work.

    >>> import torch, gradfold
    >>> samples = [torch.full((length,), length) for length in (9, 2, 8, 2, 2, 9)]
    >>> model = torch.nn.Embedding(10, 4)
    >>> def collate(samples):
    ...     return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    >>> def loss_fn(model, tokens):
    ...     valid = tokens > 0
    ...     return (model(tokens).square().mean(-1) * valid).sum() / valid.sum()
    >>> budget = gradfold.TokenBudget(20, lengths=lambda samples: [len(sample) for sample in samples], cost=2)
    >>> accumulator = gradfold.Accumulator(
    ...     model, loss_fn, batching=budget, collate=collate, weight=lambda tokens: (tokens > 0).sum()
    ... )
    >>> result = accumulator.backward(samples)
    >>> result.num_micro_batches, result.weight  # 2 x 9, 1 x 8 and 3 x 2 tokens, of which all count
    (3, 32.0)
    """

    max_tokens: int | Literal["auto"]
    lengths: Callable[[Any], Any] = field(kw_only=True)
    padding_side: Literal["right", "left"] = field(default="right", kw_only=True)
    trim: Leaves | Mapping[str, Leaves] | None = field(default=None, kw_only=True)
    cost: float | StepCost | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        tokens, kind = self.max_tokens, type(self.max_tokens).__name__
        if tokens != "auto" and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise OptionError(
                f"max_tokens={tokens!r} is a {kind}; expected the number of padded tokens to run at once (an int of at "
                'least 1), or "auto".'
            )
        if not callable(self.lengths):
            raise OptionError(
                f"lengths= is a {type(self.lengths).__name__}; expected a callable from the batch to one length per "
                'row: lengths=lambda batch: batch["attention_mask"].sum(1), or with collate= '
                "lengths=lambda samples: [len(sample) for sample in samples]."
            )
        if self.padding_side not in ("right", "left"):
            raise OptionError(f'padding_side={self.padding_side!r}; expected "right" or "left".')
        if isinstance(self.trim, (str, bytes)) or not isinstance(self.trim, (Sequence, Mapping, type(None))):
            raise OptionError(
                f'trim={self.trim!r}; expected the names of tensors, trim=("position_ids",), or their dimensions, '
                'trim={"bias": (2, 3)}.'
            )
        if self.cost is not None and not isinstance(self.cost, StepCost):
            StepCost(self.cost)

    @property
    def step_cost(self) -> StepCost:
        """The cost of a micro-step; its overhead is None where it is to be measured."""
        return self.cost if isinstance(self.cost, StepCost) else StepCost(self.cost)

    def lengths_of(self, batch: Batch, num_rows: int) -> dict[str, Tensor]:
        """For each input the length of every row, (rows,), on the host; raises BatchError where they are not."""
        found = self.lengths(batch)
        if not isinstance(found, Mapping):
            return {SINGLE: _read_lengths(found, num_rows, "lengths= returned")}
        if not found:
            raise BatchError("lengths= returned an empty dict; expected one length per row, by the name of the input.")
        what = "lengths= returned for"
        return {str(name): _read_lengths(one, num_rows, f"{what} {name!r}") for name, one in found.items()}

    def trim_of(self, name: str, names: Sequence[str]) -> dict[str | int, tuple[int, ...] | None]:
        """What the user says of the tensors of an input: their dimensions, None where those are to be found.

        Raises:
            OptionError: `trim=` does not fit the names that `lengths=` returned.
        """
        trim: Any = self.trim
        if name != SINGLE and trim is not None:
            if not isinstance(trim, Mapping) or not set(trim) <= set(names):
                raise OptionError(
                    f"lengths= returns several inputs, {', '.join(map(repr, names))}, so trim= has to say of which "
                    f"each tensor is: trim={{{names[0]!r}: (...)}}. It has {list(trim)}."
                )
            trim = trim.get(name)
        if trim is None:
            return {}
        if isinstance(trim, Mapping):
            return {leaf: (dims,) if isinstance(dims, int) else tuple(dims) for leaf, dims in trim.items()}
        return dict.fromkeys([trim] if isinstance(trim, str) else trim)


def _read_lengths(found: Any, num_rows: int, what: str) -> Tensor:
    expected = f"expected one length for each of the {num_rows} rows, a whole number of at least 0"
    try:
        lengths = torch.as_tensor(found).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(f"{what} a {type(found).__name__}; {expected}.") from error
    if lengths.shape != (num_rows,):
        raise BatchError(f"{what} the shape {tuple(lengths.shape)}; {expected}.")
    if lengths.is_floating_point() and bool((lengths == lengths.round()).all()):
        lengths = lengths.long()  # the sum of a mask in floating point
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool or bool((lengths < 0).any()):
        raise BatchError(f"{what} {lengths[:8].tolist()}{', ...' if num_rows > 8 else ''}; {expected}.")
    return lengths.long()
