"""A mirror: where the files of a data set are published, and the SHA-256 that each must have."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gradfold.errors import DataError
from gradfold.workloads.extras import import_extra

__all__: list[str] = []


@dataclass(frozen=True)
class Mirror:
    """The published files of a data set.

    Args:
        name: the folder of the data set in the cache.
        url: the address that file names are appended to.
        sha256: the hash of each file, by file name.
    """

    name: str
    url: str
    sha256: Mapping[str, str]

    def fetch(self, cache: Path | None = None) -> Path:
        """The folder that holds the files, downloaded if they are not there yet, and verified in any case.

        Args:
            cache: where to keep them instead of the operating system's folder for caches.

        Raises:
            DataError: a file could not be downloaded, or is not the published one.
            WorkloadError: pooch is not installed.
        """
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
    """The folder beside a verified tar archive that holds its files: all of them or none, whoever else unpacks it."""
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
