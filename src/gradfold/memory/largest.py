"""The largest size that fits: how far rows, tokens or anything else counted can go under a bound."""

from __future__ import annotations

from collections.abc import Callable

__all__: list[str] = []


def largest_that_fits(fits: Callable[[int], bool], most: int, least: int = 1) -> int | None:
    """The largest number from `least` to `most` that fits, where everything below one that fits does too.

    Asks about log2(most - least) numbers, `most` first: often all of it fits, and a whole batch at once needs less than
    two halves (no gradient is there yet that its own would be added to).

    >>> largest_that_fits(lambda rows: 3 * rows <= 100, 128)
    33
    >>> largest_that_fits(lambda rows: False, 128) is None
    True
    """
    if least <= most and fits(most):
        return most
    if least >= most or not fits(least):
        return None
    low, high = least, most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
