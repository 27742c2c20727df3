"""A window of micro-batches as a loader gave them: a batch that comes in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NoReturn, TypeVar, final, overload

from gradfold.errors import WindowError

__all__ = ["LoadedWindow"]

T = TypeVar("T")


class MicroBatchWindow(Generic[T]):
    """The micro-batches of one update, for an accumulator or for a loop body."""

    def pieces(self) -> Sequence[T]:
        """The micro-batches, for an accumulator; raises WindowError where the window is for a loop body."""
        raise WindowError(
            "this window has its own backward; for accumulator.backward(window) leave model= out: "
            "gradfold.windows(loader, n)."
        )


@final
class LoadedWindow(MicroBatchWindow[T], Sequence[T]):
    """The micro-batches of one update, for `accumulator.backward(window)`.

    Attributes:
        finish: what is called where the loader ends after this window; other ranks may have more.
    """

    finish: Callable[[], None] | None = None

    def __init__(self, micro_batches: Sequence[T]) -> None:
        self._micro_batches = tuple(micro_batches)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def pieces(self) -> Sequence[T]:
        """The micro-batches, for an accumulator."""
        return self._micro_batches

    def backward(self, loss: object) -> NoReturn:
        """Only windows of `windows(..., model=model)` have one: raises WindowError, which says how to get them."""
        raise WindowError(
            "this window does not know the model: write gradfold.windows(loader, n, model=model) for "
            "window.backward(loss), or pass the window to accumulator.backward(window)."
        )

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> LoadedWindow[T]: ...
    def __getitem__(self, index: int | slice) -> T | LoadedWindow[T]:
        return LoadedWindow(self._micro_batches[index]) if isinstance(index, slice) else self._micro_batches[index]
