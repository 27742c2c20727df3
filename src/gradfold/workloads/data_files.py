"""Data files: found in a folder that the user names, downloaded from a mirror and verified, and read whole.

Packages that only the commands need are imported where a workload asks for them.
"""

from __future__ import annotations

import gzip
import importlib
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gradfold.errors import DataError, WorkloadError

_GZIP_MAGIC = b"\x1f\x8b"


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


def listed(folder: Path) -> str:
    """The first five names in a folder, for messages."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "an empty folder"


def read_file(path: Path, kind: str, *, must_be_gzipped: bool = False) -> bytes:
    """The content of a file, decompressed where it is gzipped, whatever its name says; or a `DataError`."""
    try:
        content = path.read_bytes()
        is_gzipped = must_be_gzipped or content.startswith(_GZIP_MAGIC)
        return gzip.decompress(content) if is_gzipped else content
    except EOFError as error:
        raise DataError(f"{path} is truncated: expected a whole gzip file, found {len(content):,} bytes") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is corrupt: expected a gzip file, this does not decompress: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: expected {kind}, found none that can be read: {error.strerror}") from error


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
    """The folder beside a verified tar archive with its files: all or none, even if several processes unpack it."""
    folder = archive.with_name(f"{archive.name}.untar")
    if folder.exists():
        return folder
    pooch = import_extra("pooch", f"Unpacking {archive.name}")
    with tempfile.TemporaryDirectory(dir=archive.parent) as partial:
        unpacked = Path(partial, "unpacked")
        pooch.Untar(extract_dir=str(unpacked))(str(archive), "download", None)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder
