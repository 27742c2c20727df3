"""Text files of a data set: their lines, from a folder that the user names, gzipped or not."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from gradfold.errors import DataError

__all__: list[str] = []


def read_lines(folder: Path, names: Sequence[str]) -> list[str]:
    """The lines of a text in UTF-8, without their ends.

    Args:
        folder: holds the file.
        names: what it may be called, the most likely first; one that ends in ".gz" is gzipped.

    Raises:
        DataError: there is no such folder, no such file in it, or it is damaged.
    """
    path = _one_of(folder, names)
    # Not splitlines(): some sentences hold other characters that end lines elsewhere.
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} is damaged: expected text in UTF-8{', gzipped' * (path.suffix == '.gz')}: {error}"
        ) from error


def has_one_of(folder: Path, names: Sequence[str]) -> bool:
    """Whether the folder holds a file of one of these names."""
    return any((folder / name).is_file() for name in names)


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: expected a folder with data files, found {found}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    content = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder}: expected a file {' or '.join(names)}, found {', '.join(content[:5]) or 'an empty folder'}"
    )
