"""Text files of a data set: lines or paragraphs of words, from a folder that the user names."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path

from gradfold.errors import DataError

__all__: list[str] = []

_HEADING = re.compile(r" = .* = ")


def read_pairs(folder: Path, part: str, languages: tuple[str, str]) -> list[tuple[list[str], list[str]]]:
    """The words of every pair of sentences of a part of Multi30k, of which line k says the same in both languages.

    Args:
        folder: holds `train.en.gz` and the like, gzipped or not.
        part: "train", "val" or "test_2016_flickr".
        languages: "en" and "de", in this order or the other.

    Raises:
        DataError: a file is missing or damaged, or the two have different numbers of lines.
    """
    first, second = (_lines(_one_of(folder, (f"{part}.{name}.gz", f"{part}.{name}"))) for name in languages)
    if len(first) != len(second):
        raise DataError(
            f"{folder}: expected {part}.{languages[0]} and {part}.{languages[1]} to have a line for each pair, found "
            f"{len(first):,} and {len(second):,} lines"
        )
    return [(one.split(), other.split()) for one, other in zip(first, second, strict=True) if one and other]


def read_paragraphs(folder: Path, names: Sequence[str]) -> list[list[str]]:
    """The words of every paragraph of a WikiText file, without headings.

    Args:
        folder: holds the file.
        names: what it may be called, the most likely first.

    Raises:
        DataError: the file is missing, damaged, or holds no paragraph.
    """
    path = _one_of(folder, names)
    paragraphs = [line.split() for line in _lines(path) if line.strip() and not _HEADING.fullmatch(line.rstrip() + " ")]
    if not paragraphs:
        raise DataError(f"{path} is foreign: expected paragraphs of WikiText, one a line, found none")
    return paragraphs


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


def _lines(path: Path) -> list[str]:
    # Not splitlines(): some sentences hold other characters that end lines elsewhere.
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} is damaged: expected text in UTF-8{', gzipped' * (path.suffix == '.gz')}: {error}"
        ) from error
