"""Data files: found in a folder that the user names, downloaded from a mirror and verified, and read whole.

What a compressed file unpacks to is bounded, by what its header says or by its size: a megabyte of gzip may hold a
gigabyte of zeros. A damaged file is a `DataError` that names it.

Packages that only the commands need are imported where a workload asks for them.
"""

from __future__ import annotations

import gzip
import importlib
import io
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gradfold.errors import DataError, WorkloadError
from gradfold.messages import first_line

_GZIP_MAGIC = b"\x1f\x8b"
DEFLATE_RATIO = 1032  # the most that gzip can compress: https://zlib.net/zlib_tech.html
_USUAL_RATIO, _SMALL_BYTES = 32, 2**26  # texts and images compress 2 to 10 times


def import_extra(package: str, purpose: str) -> ModuleType:
    """A package of `gradfold[cli]`, or a `WorkloadError` with the line that installs it; `purpose` is its subject."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise WorkloadError(
            f"{purpose} needs {package.partition('.')[0]!r}, which is not installed ({error}). "
            'Install what the commands use: pip install "gradfold[cli]"'
        ) from error


def require_folder(folder: Path) -> Path:
    """The folder itself, or a `DataError`."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: expected a folder with data files, found {found}")
    return folder


def find_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of these names that the folder holds, or a `DataError`."""
    for name in names:
        if (require_folder(folder) / name).is_file():
            return folder / name
    raise DataError(f"{folder}: expected a file {' or '.join(names)}, found {listed(folder)}")


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; or a `DataError`."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: expected a folder with data files, it cannot be read: {error.strerror}") from error


def listed(folder: Path) -> str:
    """The first five names in a folder, for messages."""
    names = names_in(folder)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "an empty folder"


@contextmanager
def open_data(path: Path, kind: str, *, must_be_gzipped: bool = False) -> Iterator[tuple[io.BufferedIOBase, int]]:
    """A file, decompressed where it is gzipped, and the most bytes it can hold; a `DataError` while it cannot be read.

    The caller reads what it expects and one byte more, never all.
    """
    size = 0
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if must_be_gzipped or file.peek(2).startswith(_GZIP_MAGIC):
                with gzip.open(file) as unpacked:
                    yield unpacked, DEFLATE_RATIO * size
            else:
                yield file, size
    except EOFError as error:
        raise DataError(f"{path} is truncated: expected a whole gzip file, found {size:,} bytes") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is corrupt: expected a gzip file, this does not decompress: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: expected {kind}, found none that can be read: {error.strerror}") from error
    except DataError:
        raise
    except ValueError as error:  # a name with a NUL, or that the locale cannot encode
        raise DataError(f"{str(path)!r}: expected {kind}, this is not the name of a file: {error}") from error


def read_file(path: Path, kind: str, *, must_be_gzipped: bool = False) -> bytes:
    """The content of a file whose size no header says, decompressed where it is gzipped; or a `DataError`."""
    with open_data(path, kind, must_be_gzipped=must_be_gzipped) as (file, most):
        is_gzipped = isinstance(file, gzip.GzipFile)
        limit = _usual_size(path) if is_gzipped else most
        content = file.read(limit + 1)
    if is_gzipped and len(content) > limit:
        raise _unpacks_to_more(path, limit)
    return content


def _usual_size(path: Path) -> int:
    """The most bytes that a compressed data set is taken to hold."""
    return max(_SMALL_BYTES, _USUAL_RATIO * path.stat().st_size)


def _unpacks_to_more(path: Path, limit: int) -> DataError:
    return DataError(
        f"{path} unpacks to more than {limit:,} bytes, {limit / path.stat().st_size:,.0f} times its size: expected a "
        "data set, this is damaged or made to exhaust memory. If it is what you mean, unpack it first"
    )


@dataclass(frozen=True)
class Mirror:
    """Where the files of a data set are published."""

    name: str  # of the folder in the cache
    url: str  # file names are appended to it
    sha256: Mapping[str, str]  # by file name

    def fetch(self, cache: Path | None = None) -> Path:
        """The folder with the files, in `cache` or the system's: downloaded if missing, verified; or a `DataError`."""
        pooch = import_extra("pooch", f"Downloading {self.name}")
        folder = (Path(pooch.os_cache("gradfold")) if cache is None else cache) / self.name
        for name, sha256 in self.sha256.items():
            try:
                pooch.retrieve(self.url + name, f"sha256:{sha256}", fname=name, path=folder)
            except (OSError, ValueError) as error:  # pooch: no connection or no such file; another hash
                raise DataError(
                    f"cannot download {self.url}{name}: {error}\nDownload {', '.join(self.sha256)} by other means "
                    "and name the folder that holds the data set: --data DIR"
                ) from error
        return folder


def unpack(archive: Path) -> Path:
    """The folder beside a tar.gz archive with its files: all or none, even if several processes unpack it.

    An archive that is damaged, or that holds anything but files and folders of its own, is a `DataError`.
    """
    folder = archive.with_name(f"{archive.name}.untar")
    if folder.exists():
        return folder
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent) as partial:
            unpacked = Path(partial, "unpacked")
            _extract(archive, unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    except DataError:
        raise
    except Exception as error:  # of many classes where an archive is damaged
        raise DataError(
            f"{archive} cannot be unpacked: {first_line(error)}\nIf it is damaged, remove it: it is downloaded again"
        ) from error
    return folder


def _extract(archive: Path, folder: Path) -> None:
    """Extract a tar.gz archive into a new folder, one member after the other."""
    folder.mkdir()
    with gzip.open(archive) as file:
        bounded: Any = _Bounded(file, archive)
        with tarfile.open(fileobj=bounded, mode="r|") as members:
            for member in members:
                is_plain = member.isdir() or (member.isreg() and not member.issparse())
                if not is_plain or Path(member.name).is_absolute():
                    what = "a link, a device or an absolute path"
                    raise DataError(f"{archive}: expected files and folders, found {member.name!r}, {what}")
                members.extract(member, folder, filter="data")
        while bounded.read(2**16):  # to the checksum, which comes last
            pass


class _Bounded:
    """A compressed stream that ends with a `DataError` where it holds more than a data set of its size can."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        self._file, self._path = file, path
        self._limit = self._left = _usual_size(path)

    def read(self, size: int) -> bytes:
        content = self._file.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise _unpacks_to_more(self._path, self._limit)
        return content
