"""A key: everything that a choice of micro-batch size depends on, as text.

A cache on disk of choices that were searched for, so that the next start of the same training is instant.

Several processes may read and write at once: a file is written beside its place and moved there whole, and one that
cannot be read is as good as none.

A memo: a choice as it is kept for the next start, with the memory that it takes and that there was.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradfold import __version__
from gradfold.batch.nesting import map_tensors, structure
from gradfold.memory.auto import Auto, MicroBatchChoice
from gradfold.memory.budget import Budget
from gradfold.memory.probe_batch import Work
from gradfold.memory.trace import MemoryBreakdown
from gradfold.state.external import reach

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


def key_of(work: Work, option: Auto) -> str:
    """What a choice depends on, as text: model, loss, shapes, dtypes, device, threads, versions, options."""
    model = [
        (name, type(module).__qualname__, _settings(module), *_forward(module))
        for name, module in work.model.named_modules()
    ]
    tensors = [
        (name, str(one.dtype), tuple(one.shape), one.requires_grad) for name, one in work.model.named_parameters()
    ]
    own = [one for one in reach(work.model, work.loss_fn) if isinstance(one, types.FunctionType)]
    functions = sorted((one.__qualname__, *_written(one)) for one in own)
    batch = work.specimen.take(1)
    shapes: list[Any] = []
    map_tensors(lambda tensor: shapes.append(tuple(tensor.shape)), batch)
    return repr(
        (
            *(model, tensors, functions, repr(structure(batch)), shapes, work.specimen.num_rows),
            *(str(work.precision.compute), str(work.precision.accumulate_dtype), option.memory, option.margin),
            *(_device_name(work.device), torch.get_num_threads(), torch.__version__, platform.python_version()),
            *(__version__, _searching(), work.company.size, work.reduces_once),
        )
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers on a module: its mode, strides, how many heads or blocks it has."""
    return {name: value for name, value in vars(module).items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (type(value) is tuple and all(isinstance(one, int) for one in value))


def _forward(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, torch.jit.ScriptModule):
        return (str(module.code),)
    return _written(type(module).forward)


def _written(function: Any) -> tuple[str, ...]:
    """The code of a function, so that another one of the same name is another."""
    code = getattr(function, "__code__", None)
    return () if code is None else tuple(_written_code(code))


def _written_code(code: types.CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _written_code(constant)
        elif constant is None or isinstance(constant, (int, float, str)):
            yield repr(constant)


@cache
def _searching() -> str:
    """A digest of what predicts and searches, whose choices are another version's as soon as it is changed."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


_MUCH_MORE = 2  # times the memory that there was: sizes that did not fit then may be faster


@dataclass(frozen=True)
class CachedChoice:
    """What an earlier start has found.

    Args:
        choice: its choice.
        make_up: predicted for it; None where nothing could be predicted.
        budget_bytes: that there was; None where nobody said.
    """

    choice: MicroBatchChoice
    make_up: MemoryBreakdown | None
    budget_bytes: int | None

    def holds_under(self, budget: Budget) -> bool:
        """Whether the size still fits, and is not the largest of a time when there was much less."""
        if self.make_up is not None and not budget.has_room_for(self.make_up):
            return False
        if not self.choice.is_bound_by_memory or budget.num_bytes is None or self.budget_bytes is None:
            return True
        return budget.num_bytes < _MUCH_MORE * self.budget_bytes

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        make_up = None if self.make_up is None else self.make_up.to_json()
        return {"choice": self.choice.to_json(), "make_up": make_up, "budget_bytes": self.budget_bytes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CachedChoice | None:
        """The memo from `to_json`; None where it is none."""
        try:
            choice, make_up = MicroBatchChoice.from_json(data["choice"]), data["make_up"]
            found = cls(choice, None if make_up is None else MemoryBreakdown(**make_up), data["budget_bytes"])
        except (TypeError, KeyError):  # damaged
            return None
        return found if type(choice.micro_batch_size) is int and choice.micro_batch_size >= 1 else None
