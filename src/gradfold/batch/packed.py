"""Packed sequences: a batch that is one row of sequences behind each other, split where one of them ends.

As `DataCollatorWithFlattening` of transformers makes them:
https://huggingface.co/docs/transformers/main_classes/data_collator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, final

import torch
from torch import Tensor

from gradfold.batch.batching import Batching
from gradfold.batch.nesting import CONSTANTS, Batch, refilled
from gradfold.batch.rows import Rows
from gradfold.errors import BatchError

__all__ = ["Packed"]

_LONGEST = ("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "max_seqlen", "max_length")


@final
@dataclass(frozen=True)
class Packed(Batching):
    """Sequences packed into one: each is a row, and `micro_batch_size` counts them.

    Tensors go with the tokens where they are (tokens, ...) or (1, tokens, ...). Boundaries and the longest length
    (`max_length_q`, ...) are those of each micro-batch.

    Args:
        cu_seqlens: the key of the boundaries, (sequences + 1,), from 0 to the number of tokens. None: a sequence begins
            where `position_ids` are 0.
        position_ids: the key of the positions, (1, tokens) or (tokens,).

    >>> import gradfold, torch
    >>> batch = {"input_ids": torch.arange(6)[None], "position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]])}
    >>> packed = gradfold.Packed()
    >>> packed.num_rows(batch), packed.take(batch, [0, 2])["input_ids"].tolist()
    (3, [[0, 1, 3, 4, 5]])
    """

    cu_seqlens: str | None = None
    position_ids: str = "position_ids"

    def num_rows(self, batch: Batch) -> int:
        """The sequences."""
        return len(self._bounds(batch)) - 1

    def groups(self, batch: Batch, total: int) -> Sequence[Rows]:
        """Each sequence by itself."""
        return [(row,) for row in range(total)]

    def take(self, batch: Batch, rows: Rows) -> Batch:
        """These sequences, packed; raises BatchError where something has no entry per token."""
        bounds = self._bounds(batch)
        lengths = [bounds[row + 1] - bounds[row] for row in rows]
        tokens = torch.cat([torch.arange(bounds[row], bounds[row + 1]) for row in rows])
        longest = max(stop - start for start, stop in pairwise(bounds))
        values: dict[Any, Any] = {}
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.shape == (len(bounds),) and value.tolist() == bounds:
                values[key] = value.new_tensor([0, *accumulate(lengths)])
            elif key in _LONGEST and int(value) == longest:
                values[key] = torch.full_like(value, max(lengths)) if isinstance(value, Tensor) else max(lengths)
            else:
                values[key] = _with_tokens(value, tokens, bounds[-1], key)
        return refilled(batch, values)

    def _bounds(self, batch: Any) -> list[int]:
        """Where sequences begin, and the number of tokens."""
        key = self.position_ids if self.cu_seqlens is None else self.cu_seqlens
        found = batch.get(key) if isinstance(batch, Mapping) else None
        if not isinstance(found, Tensor):
            raise BatchError(
                f"Packed finds no tensor {key!r} in the batch. Pass a dict with position_ids that begin at 0 in each "
                'sequence, or name the boundaries: Packed(cu_seqlens="cu_seq_lens_q").'
            )
        flat = found.reshape(-1)
        bounds: list[int] = flat.tolist() if self.cu_seqlens else [*(flat == 0).nonzero().flatten().tolist(), len(flat)]
        if bounds[0] != 0 or len(bounds) < 2 or any(a >= b for a, b in pairwise(bounds)):
            raise BatchError(f"Packed: {key!r} gives no sequences that begin at 0 and follow each other: {bounds[:8]}.")
        return bounds


def _with_tokens(value: Any, tokens: Tensor, total: int, key: Any) -> Any:
    if isinstance(value, Tensor) and value.dim():
        dim = 1 if value.dim() > 1 and value.shape[:2] == (1, total) else 0
        if value.shape[dim] == total:
            return value.index_select(dim, tokens.to(value.device))
    if value is None or isinstance(value, CONSTANTS) or (isinstance(value, Tensor) and not value.dim()):
        return value
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise BatchError(
        f"Packed: batch[{key!r}], a {type(value).__name__}{shape}, has no entry per token ({total}). Leave it "
        "out of the batch, and bind it to loss_fn with functools.partial."
    )
