"""Labeled images: MNIST, CIFAR-10 and scikit-learn's digits, from a folder that the user names or a download.

A file that is missing, damaged or of another data set, or cannot be downloaded, is a `DataError`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from gradfold.errors import DataError
from gradfold.workloads.data_files import (
    Mirror,
    find_file,
    import_extra,
    listed,
    names_in,
    open_data,
    read_file,
    require_folder,
    unpack,
)

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

_NUM_CLASSES = 10
_CIFAR10_FOLDER = "cifar-10-batches-bin"
_CIFAR10_RECORD_BYTES = 1 + 3 * 32 * 32
_IDX_UNSIGNED_BYTES, _IDX_MOST_DIMS = b"\x00\x00\x08", 8
_DIGITS_HELD_OUT = 5  # of each class, one image in five

Part: TypeAlias = "tuple[Tensor, Tensor]"  # images (N, C, H, W), and labels (N,)


@dataclass(frozen=True)
class ImageData:
    """Images in float32, normalized, and their classes, to train on and held out."""

    name: str
    train: Part
    test: Part

    @property
    def facts(self) -> dict[str, str]:
        """What a report says about the data."""
        num_train, num_test = len(self.train[1]), len(self.test[1])
        return {"data": self.name, "training samples": f"{num_train:,}", "held-out samples": f"{num_test:,}"}


def load_mnist(data: Path | None, mirror: Mirror = MNIST, cache: Path | None = None) -> ImageData:
    """MNIST: 28 x 28 gray digits, from the folder with the four IDX files, gzipped or not; None downloads them."""
    folder = mirror.fetch(cache) if data is None else data
    train, test = (
        _normalized(_read_mnist_part(folder, part), 255, mean=(0.1307,), std=(0.3081,)) for part in ("train", "t10k")
    )
    return ImageData("MNIST (LeCun, Cortes and Burges)", train, test)


def load_cifar10(data: Path | None, mirror: Mirror = CIFAR10, cache: Path | None = None) -> ImageData:
    """CIFAR-10: 32 x 32 color images of ten classes, from the binary version; None downloads it.

    The folder holds `test_batch.bin` and any number of `data_batch_*.bin`, or it is the folder above that.
    """
    if data is None:
        (archive,) = mirror.sha256
        data = unpack(mirror.fetch(cache) / archive)
    inner = require_folder(data) / _CIFAR10_FOLDER
    folder = inner if inner.is_dir() else data
    train, test = (
        _normalized(_read_cifar10(paths), 255, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
        for paths in (_training_batches(folder), [folder / "test_batch.bin"])
    )
    return ImageData("CIFAR-10 (Krizhevsky, 2009)", train, test)


def load_digits() -> ImageData:
    """The 8 x 8 gray digits that scikit-learn ships, with the same split everywhere."""
    bunch = import_extra("sklearn.datasets", "The data set of digits").load_digits()
    every = torch.from_numpy(bunch.images)[:, None], torch.from_numpy(bunch.target).long()
    images, labels = _normalized(every, 16, mean=(0.3053,), std=(0.3761,))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(_NUM_CLASSES):
        held_out[(labels == digit).nonzero()[::_DIGITS_HELD_OUT]] = True
    name = "Optical recognition of handwritten digits (Alpaydin and Kaynak), from scikit-learn"
    return ImageData(name, (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out]))


def read_idx(path: Path) -> Tensor:
    """The array of an IDX file, gzipped or not.

    The format: bytes 00 00 08 (unsigned bytes) and D, D big-endian uint32 sizes, a byte an element in row-major order.
    """
    with open_data(path, "an IDX file") as (file, most):
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != _IDX_UNSIGNED_BYTES:
            raise DataError(
                f"{path}: expected an IDX file of unsigned bytes, which begins with the bytes 00 00 08, "
                f"found {magic.hex(' ') or 'an empty file'}"
            )
        num_dims = magic[3]
        if not 1 <= num_dims <= _IDX_MOST_DIMS:
            raise DataError(f"{path} is damaged: expected 1 to {_IDX_MOST_DIMS} dimensions, its header says {num_dims}")
        header = file.read(4 * num_dims)
        if len(header) < 4 * num_dims:
            expected, found = 4 + 4 * num_dims, 4 + len(header)
            raise DataError(f"{path} is truncated: expected a header of {expected} bytes, found {found}")
        sizes = struct.unpack(f">{num_dims}I", header)
        num_elements = math.prod(sizes)
        content = bytearray(file.read(min(num_elements, most) + 1))  # one more, which shows that there is more
    if len(content) != num_elements:
        more = " or more" * (len(content) > num_elements)
        raise DataError(
            f"{path} is truncated or damaged: expected {num_elements:,} bytes after the header, "
            f"which says {_written(sizes)}, found {len(content):,}{more}"
        )
    if num_elements == 0:
        raise DataError(f"{path}: expected at least one element, found the sizes {_written(sizes)}")
    return torch.frombuffer(content, dtype=torch.uint8).view(sizes)


def _read_mnist_part(folder: Path, part: str) -> Part:
    """The images (N, 1, 28, 28) as unsigned bytes, and labels (N,), of "train" or "t10k"."""
    images_path, labels_path = (
        find_file(folder, [f"{part}-{name}.gz", f"{part}-{name}"])
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28):
        found = _written(images.shape)
        raise DataError(f"{images_path} is not of MNIST: expected the sizes N x 28 x 28, found {found}")
    if labels.dim() != 1:
        raise DataError(f"{labels_path} is not of MNIST: expected one size N, found {_written(labels.shape)}")
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: expected {len(images):,} labels, one for each image of {images_path.name}, "
            f"found {len(labels):,}"
        )
    return images[:, None], _checked_labels(labels_path, labels)


def _read_cifar10(paths: Sequence[Path]) -> Part:
    """The images (N, 3, 32, 32) as unsigned bytes, and labels (N,), of files with records of label, then R, G, B."""
    images, labels = [], []
    for path in paths:
        content = read_file(path, "a CIFAR-10 file")
        num_records, num_left = divmod(len(content), _CIFAR10_RECORD_BYTES)
        if num_left or not num_records:
            raise DataError(
                f"{path} is truncated or not a CIFAR-10 file: expected records of {_CIFAR10_RECORD_BYTES:,} bytes, "
                f"found {len(content):,} bytes, which is {num_records:,} records and {num_left:,} bytes"
            )
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(num_records, _CIFAR10_RECORD_BYTES)
        images.append(records[:, 1:].reshape(-1, 3, 32, 32))
        labels.append(_checked_labels(path, records[:, 0]))
    return torch.cat(images), torch.cat(labels)


def _training_batches(folder: Path) -> list[Path]:
    """`data_batch_*.bin` in the order of their numbers: 10 comes after 9."""
    numbered = [(re.fullmatch(r"data_batch_(\d+)\.bin", name), folder / name) for name in names_in(folder)]
    paths = [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]
    if not paths:
        raise DataError(f"{folder}: expected files data_batch_1.bin, data_batch_2.bin, ..., found {listed(folder)}")
    return paths


def _checked_labels(path: Path, labels: Tensor) -> Tensor:
    """Labels as int64."""
    if labels.max() >= _NUM_CLASSES:
        raise DataError(f"{path} is damaged: expected labels from 0 to {_NUM_CLASSES - 1}, found {int(labels.max())}")
    return labels.long()


def _normalized(part: Part, maximum: float, mean: Sequence[float], std: Sequence[float]) -> Part:
    """Pixels from 0 to `maximum` in float32 with mean 0 and deviation 1 in each channel."""
    pixels, labels = part
    images = pixels.to(torch.float32, copy=True)
    images /= maximum
    images -= torch.tensor(mean).view(-1, 1, 1)
    images /= torch.tensor(std).view(-1, 1, 1)
    return images, labels


def _written(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
