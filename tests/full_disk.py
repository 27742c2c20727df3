"""Files that cannot grow, as on a full disk, and streams like those of a program."""

from __future__ import annotations

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow any larger, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def text_file(path: Path | int, encoding: str = "utf-8") -> io.TextIOWrapper:
    """A stream like those that Python opens for a program."""
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(path, "w")), encoding)
