"""An IDX file: the format of MNIST, one array of unsigned bytes behind a header of its sizes.

00 00 08 D            magic: two zeros, the code of unsigned bytes, the number of dimensions
D x uint32            the size of each dimension, big-endian
one byte an element   in row-major order
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch

from gradfold.errors import DataError

__all__: list[str] = []

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
