"""Whether ranks agree, seen from sums over them, so that what is sent does not grow with their number.

Ranks have one number in common where its variance over them is 0: N * sum(x * x) == sum(x) * sum(x). A digest is three
numbers of 16 bits, sent with their squares; sums of these are exact in float64 on up to 2^21 ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

NUM_NUMBERS = 6
"""The length of a `digest`."""


def digest(content: bytes) -> list[float]:
    """What is summed over ranks to see that all have the same content; another one has it with a probability of 2^-48.

    >>> is_common([2 * number for number in digest(b"same")], 2)
    True
    >>> is_common([a + b for a, b in zip(digest(b"one"), digest(b"other"))], 2)
    False
    """
    found = hashlib.blake2b(content, digest_size=6).digest()
    parts = [float(int.from_bytes(found[start : start + 2], "little")) for start in (0, 2, 4)]
    return [*parts, *[part * part for part in parts]]


def is_common(sums: Sequence[float], num_ranks: int) -> bool:
    """Whether all ranks had the same digest, or the same numbers followed by their squares; alike on all ranks."""
    half = len(sums) // 2
    return all(
        num_ranks * int(square) == int(total) ** 2 for total, square in zip(sums[:half], sums[half:], strict=True)
    )
