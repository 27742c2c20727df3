"""Output that nothing outside takes away: files written whole or not at all, and standard streams that never raise.

A full disk, a reader that has gone, or a character that the locale lacks must not end a run of hours.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, so its name never has a part of it; an `OSError` names it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # nothing but what was said already
            beside.unlink(missing_ok=True)


class _LastingFile(io.FileIO):
    """A descriptor whose writes never raise: `failure` is the first error, and what comes after it is dropped."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


@contextmanager
def lasting_streams() -> Iterator[Callable[[], OSError | None]]:
    """While the block runs, what it prints never raises, and characters that the locale lacks are escaped.

    The value returns why standard output could not be written, if so. It flushes it.
    """
    before = sys.stdout, sys.stderr
    files = [_file_of(stream) for stream in before]

    def failure() -> OSError | None:
        if files[0] is None:
            return None
        sys.stdout.flush()
        return files[0].failure

    try:
        sys.stdout, sys.stderr = map(_stream_to, files, before)
        yield failure
    finally:
        sys.stdout, sys.stderr = before


def _file_of(stream: TextIO | None) -> _LastingFile | None:
    """The descriptor of a stream; None where the stream is closed, or is not a file."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return _LastingFile(raw.fileno(), "wb", closefd=False) if isinstance(raw, io.FileIO) else None


def _stream_to(file: _LastingFile | None, like: Any) -> Any:
    if file is None:
        return like
    like.flush()
    options = {"line_buffering": like.line_buffering, "write_through": like.write_through}
    return io.TextIOWrapper(io.BufferedWriter(file), like.encoding, "backslashreplace", **options)
