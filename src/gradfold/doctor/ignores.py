"""An ignore comment: `# gradfold: ignore[GF012]` at the end of a line silences that rule there."""

from __future__ import annotations

import re
import tokenize
from functools import lru_cache
from pathlib import Path

__all__: list[str] = []

_COMMENT = re.compile(r"#\s*gradfold:\s*ignore(?:\[([A-Z0-9,\s]+)\])?")


def is_ignored(file: str, line: int, code: str) -> bool:
    """Whether a comment on a line silences a rule there; without codes it silences all."""
    codes = _comments(file).get(line)
    return codes is not None and (not codes or code in codes)


@lru_cache(maxsize=64)
def _comments(file: str) -> dict[int, frozenset[str]]:
    found: dict[int, frozenset[str]] = {}
    try:
        with Path(file).open("rb") as source:
            for token in tokenize.tokenize(source.readline):
                match = _COMMENT.search(token.string) if token.type == tokenize.COMMENT else None
                if match:
                    found[token.start[0]] = frozenset(re.findall(r"[A-Z0-9]+", match[1] or ""))
    except (OSError, SyntaxError, tokenize.TokenError):
        pass
    return found
