"""A key: everything that a choice of micro-batch size depends on, as text."""

from __future__ import annotations

import platform
from typing import Any

import torch

from gradfold.batch import map_tensors, structure
from gradfold.memory.auto import Auto
from gradfold.memory.work import Work

__all__: list[str] = []


def key_of(work: Work, option: Auto) -> str:
    """What a choice depends on, as text: model, loss, shapes, dtypes, device, threads, versions, options."""
    model = [
        (name, type(module).__qualname__, module.training, _code(type(module).forward))
        for name, module in work.model.named_modules()
    ]
    tensors = [
        (name, str(one.dtype), tuple(one.shape), one.requires_grad) for name, one in work.model.named_parameters()
    ]
    batch = work.specimen.take(1)
    shapes: list[Any] = []
    map_tensors(lambda tensor: shapes.append(tuple(tensor.shape)), batch)
    return repr(
        (
            *(model, tensors, _code(work.loss_fn), repr(structure(batch)), shapes, work.specimen.num_rows),
            *(str(work.precision.compute), str(work.precision.accumulate_dtype), option.memory, option.margin),
            *(_device_name(work.device), torch.get_num_threads(), torch.__version__, platform.python_version()),
        )
    )


def _code(function: Any) -> str:
    """The code of a function, so that another one of the same name is another."""
    inner = getattr(function, "func", function)  # of a partial
    code = getattr(inner, "__code__", None)
    return f"{getattr(inner, '__qualname__', type(inner).__qualname__)} {'' if code is None else code.co_code.hex()}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
