"""A cache on disk of choices that were searched for, so that the next start of the same training is instant.

Several processes may read and write at once: a file is written beside its place and moved there whole, and one that
cannot be read is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__: list[str] = []


def cache_folder() -> Path | None:
    """Where choices are kept: in `$GRADFOLD_CACHE_DIR`, which switches it off where it is empty, or as XDG says."""
    own = os.environ.get("GRADFOLD_CACHE_DIR")
    if own is not None:
        return Path(own) if own else None
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # nobody's home is known
        return (Path(base) if base else Path.home() / ".cache") / "gradfold" / "micro_batch"
    return None


def read(key: str) -> dict[str, Any] | None:
    """What was kept under a key; None where nothing was, or it cannot be read."""
    folder = cache_folder()
    if folder is None:
        return None
    with suppress(OSError, ValueError):
        found = json.loads(_path(folder, key).read_text("utf-8"))
        if isinstance(found, dict) and found.get("key") == key and isinstance(found.get("value"), dict):
            value: dict[str, Any] = found["value"]
            return value
    return None


def write(key: str, value: Mapping[str, Any]) -> None:
    """Keep a value under a key, if it can be written; it is a cache, and nobody waits for it."""
    folder = cache_folder()
    if folder is None:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"key": key, "value": dict(value)}, file)
            Path(name).replace(_path(folder, key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _path(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
