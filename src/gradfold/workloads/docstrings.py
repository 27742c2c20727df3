"""The docstrings of the Python standard library: text of uneven length that every Python brings along.

The text is read from the sources, and no module is imported for it. It differs a little from one Python version to
the next.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gradfold.errors import DataError
from gradfold.workloads.words import words_of

__all__: list[str] = []

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_docstrings(limit: int, folder: Path | None = None) -> list[list[str]]:
    """The words of the first `limit` different docstrings, in lower case.

    Args:
        limit: how many; the sources are read in the order of their names until there are enough.
        folder: where the sources are, instead of this Python's standard library.

    Raises:
        DataError: the folder does not have that many, as in a Python without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    texts: dict[str, None] = {}  # an ordered set: a text that occurs twice must not be both trained on and held out
    for path in sorted(folder.glob("*.py")):
        texts.update(dict.fromkeys(_docstrings_of(path)))
        if len(texts) >= limit:
            return [words_of(text) for text in list(texts)[:limit]]
    raise DataError(f"{folder}: expected Python sources with {limit:,} different docstrings, found {len(texts):,}")


def _docstrings_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
