"""Draws: the random numbers of a batch, handed again to its rows when they run in parts.

Dropout makes a batch and its parts incomparable: other masks, other gradients. Here every draw of the whole batch is
kept, and a part of it gets those rows of each draw that are its own. A draw is known by the state of its generator, so
that activation checkpointing, which sets generators back and draws again, finds the same numbers.

Source: `torch.utils._python_dispatch.TorchDispatchMode`, and the tag `torch.Tag.nondeterministic_seeded` of operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradfold.batch.rows import Rows

__all__: list[str] = []

# Operators whose results are nothing but random numbers, or depend on their inputs row by row.
_KEYED = frozenset(
    {
        *("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "random", "bernoulli", "uniform"),
        *("normal", "normal_functional", "exponential", "geometric", "cauchy", "log_normal", "poisson", "binomial"),
        "_standard_gamma",
    }
)


class RandomOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, and knows those that may take numbers from a generator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own_generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    def _generator_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
        generator: torch.Generator | None = kwargs.get("generator")
        if generator is None:
            return _default_generator(args, kwargs)
        if id(generator) not in self._own_generators:
            self._own_generators[id(generator)] = (generator, generator.get_state())
        return generator

    def restore_generators(self) -> bool:
        """Set the user's own generators back to where they were when first seen; whether there were any."""
        for generator, state in self._own_generators.values():
            generator.set_state(state)
        return bool(self._own_generators)


class _ReplayedRandomness(RandomOperators):  # type: ignore[no-untyped-call]
    """Calls `_draw` for the operators that took numbers from a generator."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[tuple[int, int], int] = {}  # generator and its state -> number of the draw

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            result = func(*args, **kwargs)
            self._see(func, args, result)
            return result
        generator = self._generator_of(args, kwargs)
        before = _state(generator)
        result = func(*args, **kwargs)
        if _state(generator) == before:  # a dropout of 0, for example
            return result
        number = self._numbers.setdefault((id(generator), before), len(self._numbers))
        return self._draw(number, func, args, result)

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        pass

    def _draw(self, number: int, func: Any, args: tuple[Any, ...], result: Any) -> Any:
        raise NotImplementedError


class RecordedRandomness(_ReplayedRandomness):  # type: ignore[no-untyped-call]
    """Runs a whole batch as it is, and keeps its draws.

    Attributes:
        values: the draws in order; None where they cannot be handed to rows.
        names: their operators.
        dtypes: of all floating point results, from which the rounding of the whole computation can be told.
        uses_batch_norm: whether some operator normalized by the statistics of the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor | None] = []
        self.names: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self.uses_batch_norm = False

    def _see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        if isinstance(result, Tensor) and result.is_floating_point():
            self.dtypes.add(result.dtype)
        if _is_batch_norm(func):
            # InstanceNorm runs as the normalization of a batch of one row with many channels.
            self.uses_batch_norm |= any(arg is True for arg in args) and args[0].shape[0] > 1

    def _draw(self, number: int, func: Any, args: tuple[Any, ...], result: Any) -> Any:
        if number == len(self.values):  # else it is drawn again, by a checkpoint
            self.values.append(kept(func, result))
            self.names.append(func._opname)
        return result


class OwnGenerators(TorchFunctionMode):
    """Sees the generators that a user passes as `generator=`, at less cost than a look at every operator.

    Attributes:
        dtypes: of the floating point results, as of `RecordedRandomness`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self._found: dict[int, tuple[torch.Generator, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        generator = kwargs.get("generator") if kwargs else None
        if generator is not None and id(generator) not in self._found:
            self._found[id(generator)] = (generator, generator.get_state())
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.dtypes.add(result.dtype)
        return result

    def restore_generators(self) -> bool:
        """Set those that were seen back; whether there were any."""
        for generator, state in self._found.values():
            generator.set_state(state)
        return bool(self._found)


class SlicedRandomness(_ReplayedRandomness):  # type: ignore[no-untyped-call]
    """Runs some rows of a batch with their share of its draws.

    Attributes:
        unknown: the first operator whose draws could not be handed to these rows, if any.
        is_certain: whether all draws had one entry per row, or the same shape; not so where rows were folded into a
            longer dimension, which could have been done in two ways.
        dims: by number of a draw, the dimension that holds its rows.
    """

    def __init__(self, recorded: RecordedRandomness, num_rows: int, rows: Rows) -> None:
        super().__init__()
        self._recorded = recorded
        self._num_rows = num_rows
        self._rows = rows
        self.unknown: str | None = None
        self.is_certain = True
        self.dims: dict[int, int] = {}

    def go_on_with(self, rows: Rows) -> None:
        """Run other rows of the same batch from here on."""
        self.finish()
        self._numbers.clear()
        self._rows = rows

    def finish(self) -> None:
        """Note whether these rows made other draws than the batch."""
        if len(self._numbers) != len(self._recorded.values):
            names = self._recorded.names or ["random numbers"]
            self.unknown = self.unknown or names[min(len(self._numbers), len(names) - 1)]

    def _draw(self, number: int, func: Any, args: tuple[Any, ...], result: Any) -> Any:
        values = self._recorded.values
        whole = values[number] if number < len(values) and self._recorded.names[number] == func._opname else None
        target = result[1] if isinstance(result, tuple) else result
        own = None if whole is None else self._of_rows(number, whole, target.shape)
        if own is None:
            self.unknown = self.unknown or func._opname
            return result
        return with_values(own, func, args, result)

    def _of_rows(self, number: int, whole: Tensor, shape: torch.Size) -> Tensor | None:
        if whole.shape == shape:
            return whole
        if whole.dim() != len(shape):
            return None
        differing = [dim for dim, size in enumerate(shape) if size != whole.shape[dim]]
        per_row, rest = divmod(whole.shape[differing[0]], self._num_rows)
        if len(differing) > 1 or rest or per_row * len(self._rows) != shape[differing[0]]:
            return None
        self.is_certain &= per_row == 1
        self.dims[number] = differing[0]
        if isinstance(self._rows, range):
            return whole.narrow(differing[0], self._rows.start * per_row, len(self._rows) * per_row)
        own = [row * per_row + place for row in self._rows for place in range(per_row)]
        return whole.index_select(differing[0], torch.tensor(own, device=whole.device))


@cache
def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


@cache
def _is_batch_norm(func: Any) -> bool:
    return "batch_norm" in func._opname and "backward" not in func._opname


def kept(func: Any, result: Any) -> Tensor | None:
    """A copy of the draw, since dropout scales its mask in place; masks as bytes."""
    name: str = func._opname
    if name == "native_dropout":
        mask: Tensor = result[1]
        return mask.clone()
    if name.rstrip("_") not in _KEYED or not isinstance(result, Tensor):
        return None
    return result.to(torch.bool) if name.rstrip("_") == "bernoulli" else result.clone()


class SharedRandomness(_ReplayedRandomness):  # type: ignore[no-untyped-call]
    """Runs a batch or some of its rows with the same draws for every row: those of the first.

    A model that sorts its rows, or folds them into a longer dimension, draws for them in another order than they came,
    and what was handed to a row need not have been its own. Here that makes no difference.
    """

    def __init__(self, recorded: RecordedRandomness, dims: Mapping[int, int]) -> None:
        super().__init__()
        self._recorded = recorded
        self._dims = dims

    def go_on_with(self, rows: Rows) -> None:
        """Run other rows of the same batch from here on."""
        self._numbers.clear()

    def _draw(self, number: int, func: Any, args: tuple[Any, ...], result: Any) -> Any:
        whole = self._recorded.values[number]
        assert whole is not None  # a part had its rows of it
        target = result[1] if isinstance(result, tuple) else result
        if number in self._dims:
            dim = self._dims[number]
            times = [1] * whole.dim()
            times[dim] = target.shape[dim]
            whole = whole.narrow(dim, 0, 1).repeat(times)  # one entry, as rows may be folded with others either way
        return with_values(whole, func, args, result)


def with_values(values: Tensor, func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """What `func` gives with these draws in the place of its own."""
    return _dropped(args[0], values, args[1]) if func._opname == "native_dropout" else result.copy_(values)


def _dropped(values: Tensor, mask: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    scale = 0.0 if probability == 1.0 else 1.0 / (1.0 - probability)
    return values * mask * scale, mask.clone()


def _default_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
    device = kwargs.get("device") or next((arg.device for arg in args if isinstance(arg, Tensor)), None)
    device = torch.device(device or "cpu")
    if device.type != "cuda":
        return torch.default_generator
    generators: Callable[[int], torch.Generator] = torch.cuda.default_generators.__getitem__
    return generators(torch.cuda.current_device() if device.index is None else device.index)


def _state(generator: torch.Generator) -> int:
    """A number that tells states apart: each word is in it by its place, since one counts up as another goes down."""
    words = generator.get_state().view(torch.int64)
    return int((words * torch.arange(1, len(words) + 1)).sum())
