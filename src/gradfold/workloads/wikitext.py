"""WikiText: paragraphs of Wikipedia's good articles, as words with spaces between.

Source: Merity, Xiong, Bradbury and Socher 2016, "Pointer Sentinel Mixture Models", arXiv 1609.07843.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gradfold.errors import DataError
from gradfold.workloads.text_files import read_lines

__all__: list[str] = []

_HEADING = re.compile(r" = .* = ")


def read_paragraphs(folder: Path, names: Sequence[str]) -> list[list[str]]:
    """The words of every paragraph of a file, without headings.

    Args:
        folder: holds the file.
        names: what it may be called, the most likely first.

    Raises:
        DataError: the file is missing, damaged, or holds no paragraph.
    """
    lines = read_lines(folder, names)
    paragraphs = [line.split() for line in lines if line.strip() and not _HEADING.fullmatch(line.rstrip() + " ")]
    if not paragraphs:
        raise DataError(f"{folder} is foreign: expected paragraphs of WikiText in {names[0]}, one a line, found none")
    return paragraphs
