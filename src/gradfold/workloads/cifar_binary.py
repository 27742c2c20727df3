"""A CIFAR-10 binary file: records of one label byte and 3,072 pixels (the red, green and blue planes of 32 x 32)."""

from __future__ import annotations

from pathlib import Path

import torch

from gradfold.errors import DataError

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
