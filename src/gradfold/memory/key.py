"""A key: everything that a choice of micro-batch size depends on, as text."""

from __future__ import annotations

import hashlib
import platform
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradfold.batch import map_tensors, structure
from gradfold.memory.auto import Auto
from gradfold.memory.work import Work
from gradfold.reach import reach
from gradfold.version import __version__

__all__: list[str] = []


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
