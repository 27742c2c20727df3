"""Draws ahead: a batch runs in parts before it runs whole, with the random numbers that it will draw for their rows.

The last rows come first. Every draw is made for all rows, so that the generator goes the way that it will go with the
whole batch; these rows use their share, and the rest is kept for the others, which make the same draws in the same
order. Which dimension holds the rows is a guess, checked against the shapes that the others ask for. Where it is wrong,
gradients do not fit, and somebody must look closely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.self_check.rng_replay import RandomOperators, is_random, kept, with_values

__all__: list[str] = []

# Operators whose draws depend on a shape, and on nothing else that belongs to a row.
_BY_SHAPE = frozenset(
    {
        *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "native_dropout"),
        *("random_", "bernoulli_", "uniform_", "normal_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
    }
)


class DrawsAhead(RandomOperators):  # type: ignore[no-untyped-call]
    """Runs the last rows of a batch, and then the others.

    Attributes:
        unknown: the first operator whose draws could not be foreseen, if any.
        dtypes: of all floating point results.
    """

    def __init__(self, num_rows: int, num_last: int) -> None:
        super().__init__()
        self._num_rows = num_rows
        self._num_last = num_last
        self._kept: list[Tensor | None] = []  # by draw, what is for the other rows
        self._ahead: list[Tensor | None] | None = None  # of these, what they have not had; None while the last rows run
        self.unknown: str | None = None
        self.dtypes: set[torch.dtype] = set()

    def go_on(self) -> None:
        """Run the other rows from here on."""
        self._ahead = self._kept[::-1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.is_floating_point():
                self.dtypes.add(result.dtype)
            return result
        generator = self._generator_of(args, kwargs)
        shape = _shape(args)
        is_by_shape = func._opname in _BY_SHAPE and not any(isinstance(arg, Tensor) for arg in args[1:])
        if is_by_shape and shape is not None and "out" not in kwargs:
            return self._draw(func, args, kwargs, shape) if self._ahead is None else self._hand(func, args, kwargs)
        before = generator.get_state()
        result = func(*args, **kwargs)
        if not torch.equal(before, generator.get_state()):  # else an attention without dropout, for example
            self.unknown = self.unknown or func._opname
        return result

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shape: list[int]) -> Any:
        """Draw for all rows."""
        size = self._num_last
        dim = shape.index(size) if size in shape else 0 if shape and shape[0] and shape[0] % size == 0 else None
        if dim is None:  # one draw for the whole batch
            result = func(*args, **kwargs)
            self._kept.append(kept(func, result))
            return result
        whole = [*shape[:dim], shape[dim] // size * self._num_rows, *shape[dim + 1 :]]
        num_others = whole[dim] - shape[dim]
        wide = [_widened(arg, shape, whole) for arg in args]
        if func._opname == "native_dropout":
            wide[0].narrow(dim, num_others, shape[dim]).copy_(args[0])
        result = func(*wide, **kwargs)
        values = result if isinstance(result, tuple) else (result,)
        others = [one.narrow(dim, 0, num_others) for one in values]
        own = [one.narrow(dim, num_others, shape[dim]) for one in values]
        self._kept.append(kept(func, tuple(others) if isinstance(result, tuple) else others[0]))
        if func._opname.endswith("_"):
            return args[0].copy_(own[0])
        return tuple(one.clone() for one in own) if isinstance(result, tuple) else own[0].clone()

    def _hand(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give these rows what was drawn for them."""
        result = func(*args, **kwargs)
        values = self._ahead.pop() if self._ahead else None
        if values is None or values.shape != (result[1] if isinstance(result, tuple) else result).shape:
            self.unknown = self.unknown or func._opname
            return result
        return with_values(values, func, args, result)


def _shape(args: Sequence[Any]) -> list[int] | None:
    """The shape of what will be drawn: that of a tensor, or as it is given."""
    for arg in args:
        if isinstance(arg, Tensor):
            return list(arg.shape)
        if isinstance(arg, (list, tuple)):
            return list(arg)
    return None


def _widened(arg: Any, shape: list[int], whole: list[int]) -> Any:
    """A shape for all rows, or room for them."""
    if isinstance(arg, (list, tuple)) and list(arg) == shape:
        return whole
    if not isinstance(arg, Tensor) or list(arg.shape) != shape:
        return arg
    order = sorted(range(len(whole)), key=lambda at: -arg.stride()[at])  # numbers come in the order of memory
    return torch.empty_permuted(whole, order, dtype=arg.dtype, device=arg.device)
