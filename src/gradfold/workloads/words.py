"""The words of a text that nobody has cut into words before."""

from __future__ import annotations

import re

__all__: list[str] = []

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Words and single punctuation marks, in lower case.

    >>> words_of("It's  here.")
    ['it', "'", 's', 'here', '.']
    """
    return _WORD.findall(text.lower())
