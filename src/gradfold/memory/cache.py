"""The cache on disk of chosen micro-batch sizes: the next start of the same training needs no search.

Several processes may read and write at once: a file is moved to its place whole; one that cannot be read is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gradfold import __version__
from gradfold.batch.nesting import every_leaf, structure
from gradfold.memory.auto import Auto, MicroBatchChoice
from gradfold.memory.budget import Budget
from gradfold.memory.dry_run import DryRun
from gradfold.memory.tracker import MemoryBreakdown

_MUCH_MORE = 2  # times the memory that there was: sizes that did not fit then may be faster


def cache_folder() -> Path | None:
    """`$GRADFOLD_CACHE_DIR`, which switches the cache off where it is empty; else as XDG says."""
    own, base = os.environ.get("GRADFOLD_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own is not None:
        return Path(own) if own else None
    with suppress(RuntimeError):  # there is no home
        return (Path(base) if base else Path.home() / ".cache") / "gradfold" / "micro_batch"
    return None


def key_of(dry_run: DryRun, option: Auto, num_processes: int) -> str:
    """What a choice depends on, as text: layers, shapes, dtypes, device, threads, versions, options.

    The code of the loss and of `forward` is not in it: after a change there that matters, the size is still one that
    fits by the prediction, and an out-of-memory error halves it.
    """
    model, loss_fn, precision = dry_run.model, dry_run.loss_fn, dry_run.precision
    batch, device = dry_run.probe_batch.take(1), next(model.parameters()).device
    parameters = [(name, one.dtype, tuple(one.shape), one.requires_grad) for name, one in model.named_parameters()]
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in every_leaf(batch)]
    data = structure(batch), shapes, dry_run.probe_batch.num_rows
    options = precision.compute, precision.accumulate_dtype, dry_run.reduces_once, option.memory, option.margin
    machine = num_processes, _device_name(device), torch.get_num_threads()
    versions = __version__, torch.__version__, platform.python_version()
    loss = getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__)
    modes = [module.training for module in model.modules()]
    return repr((str(model), modes, parameters, loss, data, options, machine, versions))


def read(key: str, budget: Budget) -> MicroBatchChoice | None:
    """The choice kept under a key, if it still fits and was not bound by a much smaller budget."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # damaged files are missing ones
        found = json.loads(_path(key).read_text("utf-8"))
        choice, breakdown, then = MicroBatchChoice.from_json(found["choice"]), found["breakdown"], found["budget_bytes"]
        fits = breakdown is None or budget.has_room_for(MemoryBreakdown(**breakdown))
        if choice.is_bound_by_memory and budget.num_bytes is not None and then is not None:
            fits &= budget.num_bytes < _MUCH_MORE * then
        if found["key"] == key and choice.micro_batch_size >= 1 and fits:
            return replace(choice, is_cached=True)
    return None


def write(key: str, choice: MicroBatchChoice, breakdown: MemoryBreakdown | None, budget: Budget) -> None:
    """Keep a choice under a key, if it can be written, with the memory predicted for it."""
    predicted = None if breakdown is None else asdict(breakdown)
    kept = {"key": key, "choice": choice.to_json(), "breakdown": predicted, "budget_bytes": budget.num_bytes}
    with suppress(OSError):
        path = _path(key)
        beside = path.with_name(f"{uuid.uuid4()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(kept), "utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _path(key: str) -> Path:
    folder = cache_folder()
    if folder is None:
        raise FileNotFoundError("the cache is switched off")
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
