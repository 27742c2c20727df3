"""RNG replay: the random numbers of a batch (dropout masks), given again to its rows when they run in parts.

A draw is known by the state of its generator, so activation checkpointing, which sets generators back and draws again,
finds the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.rows import Rows
from gradfold.self_check.torch_private import TorchDispatchMode, TorchFunctionMode, operator_name
from gradfold.torch_private import top_saved_tensor_hooks

_DROPOUT = "native_dropout"

# Operators whose results are nothing but random numbers, or depend on their inputs row by row.
_KEYED = {
    *("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "random", "bernoulli", "uniform"),
    *("normal", "normal_functional", "exponential", "geometric", "cauchy", "log_normal", "poisson", "binomial"),
    "_standard_gamma",
}


class _GeneratorStates:
    """A mode that sets the custom generators that it meets (`generator=`) back, on exit if it is not told otherwise.

    Attributes:
        may_draw_again: whether a checkpoint may, in the backward pass.
    """

    may_draw_again = True

    def __init__(self) -> None:
        super().__init__()
        self.restores_on_exit = True
        self.states: dict[int, tuple[torch.Generator, Tensor]] = {}  # when first met
        self.dtypes: set[torch.dtype] = set()  # of floating point results

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[misc]
        if self.restores_on_exit:
            self.restore_generators()

    def keep(self, generator: torch.Generator) -> None:
        """Record its state, the first time."""
        self.states.setdefault(id(generator), (generator, generator.get_state()))

    def note_dtype(self, result: Any) -> None:
        """Record the precision of a result."""
        if isinstance(result, Tensor) and result.is_floating_point():
            self.dtypes.add(result.dtype)

    def restore_generators(self) -> None:
        """Set the generators back to where they were when first met."""
        for generator, state in self.states.values():
            generator.set_state(state)


class CustomGenerators(_GeneratorStates, TorchFunctionMode):
    """Meets the custom generators of what runs under it, at less cost than a look at every operator."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        generator = kwargs.get("generator") if kwargs else None
        if generator is not None:
            self.keep(generator)
        result = func(*args, **(kwargs or {}))
        self.note_dtype(result)
        return result


class _RandomnessMode(_GeneratorStates, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Meets every operator; calls `_draw` for those that took numbers from a generator."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[tuple[int, int], int] = {}  # generator and its state -> number of the draw
        self.may_draw_again = False
        self.uses_batch_norm = False  # whether some operator normalized by the statistics of the batch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            result = func(*args, **kwargs)
            self._see(operator_name(func), args, result)
            return result
        self.may_draw_again |= top_saved_tensor_hooks() is not None
        generator = kwargs.get("generator")
        if generator is None:
            generator = _default_generator(args, kwargs)
        else:
            self.keep(generator)
        before = _digest(generator)
        result = func(*args, **kwargs)
        if _digest(generator) == before:  # a dropout of 0, for example
            return result
        number = self._numbers.setdefault((id(generator), before), len(self._numbers))
        return self._draw(number, operator_name(func), args, result)

    def _see(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        self.note_dtype(result)
        if "batch_norm" in name and "backward" not in name:
            # InstanceNorm runs as the normalization of a batch of one row with many channels.
            self.uses_batch_norm |= any(arg is True for arg in args) and args[0].shape[0] > 1

    def _draw(self, number: int, name: str, args: tuple[Any, ...], result: Any) -> Any:
        raise NotImplementedError


GeneratorMode: TypeAlias = CustomGenerators | _RandomnessMode | None


class RecordedRandomness(_RandomnessMode):  # type: ignore[no-untyped-call]
    """Runs a whole batch unchanged, and records its draws."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor | None] = []  # the draws in order; None where they cannot be handed to rows
        self.names: list[str] = []  # their operators

    def _draw(self, number: int, name: str, args: tuple[Any, ...], result: Any) -> Any:
        if number < len(self.values):  # drawn again, by a checkpoint
            return result
        is_known = name == _DROPOUT or (name.rstrip("_") in _KEYED and isinstance(result, Tensor))
        # A copy, since dropout scales its mask in place; masks as bytes.
        value = _drawn(name, result).clone() if is_known else None
        self.values.append(value.bool() if value is not None and name.rstrip("_") == "bernoulli" else value)
        self.names.append(name)
        return result


class RowRandomness(_RandomnessMode):  # type: ignore[no-untyped-call]
    """Runs some `rows` of a batch of `num_rows` with the numbers that they had in the whole.

    With `shared`, by number of a draw the dimension that holds its rows, every row gets the numbers of the first: a
    model that sorts its rows, or folds them into a longer dimension, draws for them in another order than they came.
    """

    def __init__(
        self, recorded: RecordedRandomness, num_rows: int, rows: Rows, shared: Mapping[int, int] | None = None
    ) -> None:
        super().__init__()
        self._recorded = recorded
        self._num_rows = num_rows
        self._rows = rows
        self._shared = shared
        self.unknown: str | None = None  # the first operator whose draws could not be handed to these rows
        self.dims: dict[int, int] = {}  # as `shared`, but as found

    def finish(self) -> None:
        """Note whether these rows made other draws than the batch."""
        if len(self._numbers) != len(self._recorded.values) and self._shared is None:
            names = self._recorded.names or ["random numbers"]
            self.unknown = self.unknown or names[min(len(self._numbers), len(names) - 1)]

    def _draw(self, number: int, name: str, args: tuple[Any, ...], result: Any) -> Any:
        values, names = self._recorded.values, self._recorded.names
        whole = values[number] if number < len(values) and names[number] == name else None
        own = None if whole is None else self._of_rows(number, whole, _drawn(name, result).shape)
        if own is None:
            self.unknown = self.unknown or name
            return result
        if name != _DROPOUT:
            return result.copy_(own)
        probability = args[1]
        return args[0] * own * (0.0 if probability == 1.0 else 1.0 / (1.0 - probability)), own.clone()

    def _of_rows(self, number: int, whole: Tensor, shape: torch.Size) -> Tensor | None:
        if self._shared is not None:
            dim = self._shared.get(number)
            # One entry, as rows may be folded with others either way.
            return whole if dim is None else whole.narrow(dim, 0, 1).expand(shape)
        if whole.shape == shape:
            return whole
        if whole.dim() != len(shape):
            return None
        dim, *others = [dim for dim, size in enumerate(shape) if size != whole.shape[dim]]
        per_row, rest = divmod(whole.shape[dim], self._num_rows)
        if others or rest or per_row * len(self._rows) != shape[dim]:
            return None
        self.dims[number] = dim
        own = [row * per_row + place for row in self._rows for place in range(per_row)]
        return whole.index_select(dim, torch.tensor(own, device=whole.device))


@cache
def is_random(func: Any) -> bool:
    """Whether an operator may take numbers from a generator, by its tag."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _drawn(name: str, result: Any) -> Tensor:
    """The random numbers in a result; of a dropout its mask."""
    drawn: Tensor = result[1] if name == _DROPOUT else result
    return drawn


def _default_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
    device = torch.device(kwargs.get("device") or next((one.device for one in args if isinstance(one, Tensor)), "cpu"))
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


def _digest(generator: torch.Generator) -> int:
    """A number that tells states apart: each word is in it by its place, since one counts up as another goes down."""
    words = generator.get_state().view(torch.int64)
    return int((words * torch.arange(1, len(words) + 1)).sum())
