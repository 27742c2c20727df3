"""InfoNCE in tiles: the contrastive loss of each query against all keys, without the matrix of their scores.

With scores s[i, j] = <q[i], k[j]> / t the loss of query i is logsumexp_j s[i, j] - s[i, i]. Its log-sum-exp is
accumulated over tiles of scores, and the backward pass recomputes the tiles. So N queries and M keys take memory of
order (N + M) d instead of N M, and half as much time again.

Sources: van den Oord, Li and Vinyals 2018, "Representation Learning with Contrastive Predictive Coding", arXiv
1807.03748, eq. 4; Radford et al. 2021, arXiv 2103.00020, figure 3 (both directions); Cheng et al. 2024, "Breaking the
Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss", arXiv 2410.17243 (tiles).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from gradfold.errors import LossError, OptionError


def info_nce(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    symmetric: bool = True,
    tile: int = 1024,
) -> Tensor:
    """The mean cross-entropy of classifying each query's own key among all keys, in tiles.

    Equal to, but for rounding, and without the N x M matrix:

        scores = queries @ keys.T / temperature
        labels = torch.arange(len(queries))
        loss = cross_entropy(scores, labels)                                        # symmetric=False
        loss = (cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2

    Args:
        queries: (N, d), used unchanged: for cosine similarity pass `F.normalize(queries, dim=1)`.
        keys: (M, d) with M >= N: the key of query i is row i, further rows are negatives for all.
        temperature: the divisor of scores; a 0-d tensor gets its gradient. For CLIP's scale pass `1 / scale`.
        symmetric: also classify each key's query among all queries; then M must be N.
        tile: queries and keys per tile; at most tile x tile scores exist at once.

    Returns:
        The loss, 0-d; in float32 where the inputs have fewer digits. It has no second derivative.

    Raises:
        LossError: the shapes or dtypes of the tensors do not fit.
        OptionError: the temperature or the tile is not positive.

    >>> import torch, gradfold
    >>> queries, keys = torch.eye(3), torch.eye(3)
    >>> gradfold.losses.info_nce(queries, keys, temperature=1.0, tile=2)
    tensor(0.5514)
    """
    _check(queries, keys, temperature, symmetric, tile)
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float64)
    with torch.autocast(queries.device.type, enabled=False):
        loss: Tensor = _InfoNCE.apply(queries, keys, temperature, symmetric, tile)  # type: ignore[no-untyped-call]
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: Tensor, symmetric: bool, tile: int) -> Tensor:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scale = 1 / temperature.detach().to(queries.device, dtype)
        own = queries.new_empty(len(queries), dtype=dtype)  # the score of each query with its own key
        row_sums = own.new_full((len(queries),), -torch.inf)  # as logarithms
        column_sums = own.new_full((len(keys),), -torch.inf) if symmetric else None
        for rows, columns in _tiles(len(queries), len(keys), tile):
            scores = queries[rows].to(dtype) @ keys[columns].to(dtype).T * scale
            row_sums[rows] = torch.logaddexp(row_sums[rows], scores.logsumexp(1))
            if column_sums is not None:
                column_sums[columns] = torch.logaddexp(column_sums[columns], scores.logsumexp(0))
            if rows.start == columns.start:
                own[rows] = scores.diagonal()
        ctx.save_for_backward(queries, keys, temperature, row_sums, column_sums)
        ctx.tile = tile
        loss = (row_sums - own).mean()
        return loss if column_sums is None else (loss + (column_sums - own).mean()) / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # which torch's once_differentiable would let pass, as a derivative of 0
            raise LossError("info_nce has no second derivative (create_graph=True); write it out for a small batch.")
        queries, keys, temperature, row_sums, column_sums = ctx.saved_tensors
        dtype, factor = row_sums.dtype, 1 / len(queries)
        scale = 1 / temperature.to(queries.device, dtype)
        to_queries, to_keys = (torch.zeros_like(one, dtype=dtype) for one in (queries, keys))
        to_log_scale = torch.zeros((), dtype=dtype, device=queries.device)
        for rows, columns in _tiles(len(queries), len(keys), ctx.tile):
            own_queries, own_keys = queries[rows].to(dtype), keys[columns].to(dtype)
            scores = own_queries @ own_keys.T * scale
            to_scores = torch.exp(scores - row_sums[rows, None])  # softmax
            if column_sums is not None:
                to_scores = to_scores.add_(torch.exp(scores - column_sums[columns])).div_(2)
            if rows.start == columns.start:
                to_scores.diagonal().sub_(1)
            to_queries[rows] += to_scores @ own_keys
            to_keys[columns] += to_scores.T @ own_queries
            to_log_scale += (to_scores * scores).sum()
        upstream = gradient.to(dtype) * factor
        to_temperature = None
        if ctx.needs_input_grad[2]:
            to_temperature = (-to_log_scale * scale * upstream).to(temperature).reshape(temperature.shape)
        return (
            to_queries.mul_(upstream * scale).to(queries.dtype),
            to_keys.mul_(upstream * scale).to(keys.dtype),
            to_temperature,
            None,
            None,
        )


def _tiles(num_rows: int, num_columns: int, tile: int) -> Iterator[tuple[slice, slice]]:
    # Columns are also cut where the rows end, so the last tile on the diagonal is square where there are more keys.
    of_rows, of_columns = {*range(0, num_rows, tile), num_rows}, {*range(0, num_columns, tile), num_rows, num_columns}
    rows, columns = ([slice(*ends) for ends in pairwise(sorted(bounds))] for bounds in (of_rows, of_columns))
    return product(rows, columns)


def _check(queries: Tensor, keys: Tensor, temperature: float | Tensor, symmetric: bool, tile: int) -> None:
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1] or not len(queries):
        raise LossError(
            f"info_nce got queries {tuple(queries.shape)} and keys {tuple(keys.shape)}; expected (N, d) and (M, d)."
        )
    if len(keys) < len(queries) or (symmetric and len(keys) != len(queries)):
        raise LossError(
            f"info_nce got {len(queries)} queries and {len(keys)} keys; expected one key for each query, first and in "
            "order. Further keys need symmetric=False."
        )
    if not queries.is_floating_point() or not keys.is_floating_point():
        raise LossError(f"info_nce got {queries.dtype} queries and {keys.dtype} keys; expected floating point.")
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise LossError(f"info_nce got a temperature of shape {tuple(temperature.shape)}; expected one number.")
    elif not temperature > 0:
        raise OptionError(f"temperature={temperature!r}; expected a positive number or a 0-d tensor.")
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise OptionError(f"tile={tile!r}; expected a whole number of at least 1.")
