"""A data set of labeled images: training and held-out samples, from a folder that the user names or a download.

A CIFAR-10 binary file: records of one label byte and 3,072 pixels (the red, green and blue planes of 32 x 32).

An IDX file: the format of MNIST, one array of unsigned bytes behind a header of its sizes.

00 00 08 D            magic: two zeros, the code of unsigned bytes, the number of dimensions
D x uint32            the size of each dimension, big-endian
one byte an element   in row-major order

A mirror: where the files of a data set are published, and the SHA-256 that each must have.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gradfold.errors import DataError
from gradfold.workloads.extras import import_extra

__all__: list[str] = []

NUM_CLASSES = 10
_NUM_PIXELS = 3 * 32 * 32
_RECORD_BYTES = 1 + _NUM_PIXELS


def read_cifar_binary(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The images (N, 3, 32, 32) as unsigned bytes, and their labels (N,).

    Raises:
        DataError: the file is missing, truncated, or something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a CIFAR-10 file, found none that can be read: {error.strerror}") from error
    num_records, num_left = divmod(len(content), _RECORD_BYTES)
    if num_left or not num_records:
        raise DataError(
            f"{path} is truncated or foreign: expected records of {_RECORD_BYTES:,} bytes, "
            f"found {len(content):,} bytes, which is {num_records:,} records and {num_left:,} bytes"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(num_records, _RECORD_BYTES)
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
    if labels.max() >= NUM_CLASSES:
        raise DataError(f"{path} is foreign: expected labels from 0 to {NUM_CLASSES - 1}, found {int(labels.max())}")
    return images, labels


_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTES = b"\x00\x00\x08"


def read_idx(path: Path) -> torch.Tensor:
    """The array of an IDX file, which may be gzipped whatever its name says.

    Raises:
        DataError: the file is missing, truncated, corrupt, or something else.
    """
    content = _decompressed(path)
    magic = content[:4]
    if len(magic) < 4 or magic[:3] != _UNSIGNED_BYTES:
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes, which begins with the bytes 00 00 08, "
            f"found {magic.hex(' ') or 'an empty file'}"
        )
    header = 4 + 4 * magic[3]
    if len(content) < header:
        raise DataError(f"{path} is truncated: expected a header of {header} bytes, found {len(content)}")
    sizes = struct.unpack(f">{magic[3]}I", content[4:header])
    num_elements = math.prod(sizes)
    shape = " x ".join(str(size) for size in sizes)
    if len(content) - header != num_elements:
        raise DataError(
            f"{path} is truncated or damaged: expected {num_elements:,} bytes after the header, "
            f"which says {shape}, found {len(content) - header:,}"
        )
    if num_elements == 0:
        raise DataError(f"{path}: expected at least one element, found the sizes {shape}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(sizes)


def _decompressed(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except EOFError as error:
        raise DataError(
            f"{path} is truncated: expected a whole gzip file, found {len(content):,} bytes of one"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is corrupt: expected a gzip file, found one that does not decompress: {error}"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: expected an IDX file, found none that can be read: {error.strerror}") from error


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


# The hashes are those of the files that Yann LeCun and Alex Krizhevsky published.
MNIST = Mirror(
    name="mnist",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    sha256={
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
)
CIFAR10 = Mirror(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/",
    sha256={"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
)
_CIFAR10_FOLDER = "cifar-10-batches-bin"

# The held-out part of the digits: of each class, one image in five.
_DIGITS_HELD_OUT = 5


@dataclass(frozen=True)
class ImageData:
    """Images (N, C, H, W) in float32, normalized, and their classes (N,), to train on and held out."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @property
    def facts(self) -> dict[str, str]:
        """What a report says of the data."""
        return {
            "data": self.name,
            "training samples": f"{len(self.train_labels):,}",
            "held-out samples": f"{len(self.test_labels):,}",
        }


def load_mnist(data: Path | None, mirror: Mirror = MNIST, cache: Path | None = None) -> ImageData:
    """MNIST: 28 x 28 grey digits, from the four IDX files.

    Args:
        data: the folder that holds them, gzipped or not; None downloads them.
        mirror: where they are published.
        cache: see `Mirror.fetch`.

    Raises:
        DataError: a file is missing, damaged or foreign, or cannot be downloaded.
    """
    folder = mirror.fetch(cache) if data is None else _existing(data)
    train_images, train_labels = _read_mnist_part(folder, "train")
    test_images, test_labels = _read_mnist_part(folder, "t10k")
    return ImageData(
        name="MNIST (LeCun, Cortes and Burges)",
        train_images=_normalized(train_images, 255, (0.1307,), (0.3081,)),
        train_labels=train_labels,
        test_images=_normalized(test_images, 255, (0.1307,), (0.3081,)),
        test_labels=test_labels,
    )


def load_cifar10(data: Path | None, mirror: Mirror = CIFAR10, cache: Path | None = None) -> ImageData:
    """CIFAR-10: 32 x 32 color images of ten classes, from the binary version.

    Args:
        data: the folder that holds `test_batch.bin` and any number of `data_batch_*.bin`, or the folder above it;
            None downloads them.
        mirror: where their archive is published.
        cache: see `Mirror.fetch`.

    Raises:
        DataError: a file is missing, damaged or foreign, or cannot be downloaded.
    """
    if data is None:
        (archive,) = mirror.sha256
        data = unpack(mirror.fetch(cache) / archive)
    folder = _existing(data)
    if (folder / _CIFAR10_FOLDER).is_dir():
        folder = folder / _CIFAR10_FOLDER
    parts = [read_cifar_binary(path) for path in _training_batches(folder)]
    test_images, test_labels = read_cifar_binary(folder / "test_batch.bin")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return ImageData(
        name="CIFAR-10 (Krizhevsky, 2009)",
        train_images=_normalized(torch.cat([images for images, _ in parts]), 255, mean, std),
        train_labels=torch.cat([labels for _, labels in parts]),
        test_images=_normalized(test_images, 255, mean, std),
        test_labels=test_labels,
    )


def load_digits() -> ImageData:
    """The 8 x 8 grey digits that scikit-learn brings along, with the same split everywhere."""
    bunch = import_extra("sklearn.datasets", "The data set of digits").load_digits()
    images = _normalized(torch.from_numpy(bunch.images)[:, None], 16, (0.3053,), (0.3761,))
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[::_DIGITS_HELD_OUT]] = True
    return ImageData(
        name="Optical recognition of handwritten digits (Alpaydin and Kaynak), from scikit-learn",
        train_images=images[~held_out],
        train_labels=labels[~held_out],
        test_images=images[held_out],
        test_labels=labels[held_out],
    )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a folder with data files, found {'a file' if folder.exists() else 'nothing'}"
        )
    return folder


def _read_mnist_part(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images (N, 1, 28, 28) and labels (N,) of "train" or "t10k"."""
    images_path = _plain_or_gzipped(folder, f"{part}-images-idx3-ubyte")
    labels_path = _plain_or_gzipped(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} is foreign: expected the sizes N x 28 x 28, found {_sizes(images)}")
    if labels.dim() != 1:
        raise DataError(f"{labels_path} is foreign: expected one size N, found {_sizes(labels)}")
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: expected {len(images):,} labels, one for each image of {images_path.name}, "
            f"found {len(labels):,}"
        )
    if labels.max() > 9:
        raise DataError(f"{labels_path} is foreign: expected labels from 0 to 9, found {int(labels.max())}")
    return images[:, None], labels.long()


def _plain_or_gzipped(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return path
    raise DataError(f"{folder}: expected a file {name}.gz or {name}, found {_content(folder)}")


def _training_batches(folder: Path) -> list[Path]:
    """`data_batch_*.bin` in the order of their numbers, so that 10 comes after 9."""
    numbered = [(re.fullmatch(r"data_batch_(\d+)\.bin", path.name), path) for path in folder.iterdir()]
    paths = [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]
    if not paths:
        raise DataError(f"{folder}: expected files data_batch_1.bin, data_batch_2.bin, ..., found {_content(folder)}")
    return paths


def _normalized(pixels: torch.Tensor, maximum: float, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pixels (N, C, H, W) from 0 to `maximum` in float32 with mean 0 and deviation 1 in each channel."""
    images = pixels.to(torch.float32, copy=True)
    images /= maximum
    images -= torch.tensor(mean).view(-1, 1, 1)
    images /= torch.tensor(std).view(-1, 1, 1)
    return images


def _sizes(array: torch.Tensor) -> str:
    return " x ".join(str(size) for size in array.shape)


def _content(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "an empty folder"
