"""Auto, the option by which an accumulator picks its own micro-batch size, and the choice, kept on disk for later."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from gradfold import __version__
from gradfold.batch.nesting import every_leaf, structure
from gradfold.errors import OptionError
from gradfold.memory.budget import Budget, read_bytes
from gradfold.memory.dry_run import DryRun
from gradfold.memory.tracker import MemoryBreakdown

__all__ = ["Auto", "MicroBatchChoice", "SizeTiming"]

_MUCH_MORE = 2  # times the memory that there was: sizes that did not fit then may be faster


@dataclass(frozen=True)
class Auto:
    """Pick the micro-batch size: the fastest of those that fit. `"auto"` is `Auto()`.

    Args:
        memory: the most that the process (on a CPU) or the device may use, such as "16GiB"; a ModelError says where it
            cannot be predicted. None: what is free.
        margin: the share that is added to predictions of memory. None: 10 %.
        seconds: for how long sizes are timed at most, after a prediction of some seconds.
        cache: whether a choice is kept on disk for the next start with the same model, shapes, dtypes, device, versions
            and options: in `$GRADFOLD_CACHE_DIR`, else in `$XDG_CACHE_HOME/gradfold`, else in `~/.cache/gradfold`.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(10, 1)
    >>> def loss_fn(model, batch):
    ...     return model(batch).square().mean()
    >>> auto = gradfold.Auto(memory="4GiB", seconds=0.1, cache=False)
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=auto)
    >>> _ = accumulator.backward(torch.randn(256, 10))
    >>> 1 <= accumulator.micro_batch_choice.micro_batch_size <= 256
    True
    """

    memory: int | str | None = None
    margin: float | None = None
    seconds: float = 4.0
    cache: bool = True

    def __post_init__(self) -> None:
        if self.memory is not None:
            read_bytes(self.memory)
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds > 0:
            raise OptionError(f"seconds={self.seconds!r}; expected a number of seconds to time sizes, such as 4.0.")


@dataclass(frozen=True)
class SizeTiming:
    """The speed of one size in forward and backward passes."""

    micro_batch_size: int
    samples_per_s: float  # median over the rounds in which it ran
    ratio: float  # of its pace to that of the fastest size in the same round, median
    num_rounds: int  # slower sizes are pruned on the way


@dataclass(frozen=True)
class MicroBatchChoice:
    """The size that was chosen, and why."""

    micro_batch_size: int
    reason: str
    timings: tuple[SizeTiming, ...]  # by size
    num_rows: int  # of the batch for which it was chosen
    largest_fitting: int  # the largest candidate
    peak_bytes: int  # predicted for forward and backward; 0 where nothing could be predicted
    elapsed_s: float
    is_cached: bool = False  # read from disk, timings of that machine included
    saved: ClassVar[Mapping[str, Any]] = {  # what `to_json` gives, for `state.saved`
        **{"micro_batch_size": "size", "reason": "text", "num_rows": "size", "largest_fitting": "size"},
        **{"peak_bytes": "count", "elapsed_s": "number", "is_cached": "flag"},
        "timings": [{"micro_batch_size": "size", "samples_per_s": "number", "ratio": "number", "num_rounds": "count"}],
    }

    @property
    def is_bound_by_rows(self) -> bool:
        """Whether the batch had no more rows to choose, so that a larger one may want more."""
        return self.micro_batch_size == self.num_rows

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether more rows might have been faster, and did not fit."""
        return self.micro_batch_size == self.largest_fitting < self.num_rows

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MicroBatchChoice:
        """The choice from `to_json`."""
        known = {field.name: data[field.name] for field in fields(cls)}
        timings = tuple(SizeTiming(**timing) for timing in data["timings"])
        return cls(**{**known, "timings": timings})


def cache_file(key: str) -> Path:
    """Where a choice is kept, as `Auto` says; FileNotFoundError where `$GRADFOLD_CACHE_DIR` is empty."""
    own, base = os.environ.get("GRADFOLD_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own == "":
        raise FileNotFoundError("the cache is switched off")
    folder = Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "gradfold" / "micro_batch"
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def cache_key(dry_run: DryRun, option: Auto, num_processes: int) -> str:
    """What a choice depends on, as text: layers, shapes, dtypes, device, threads, versions, options.

    The code of the loss and of `forward` is not in it: after a change there that matters, the size is still one that
    fits by the prediction, and an out-of-memory error halves it.
    """
    model, loss_fn, precision = dry_run.model, dry_run.loss_fn, dry_run.precision
    batch, device = dry_run.probe_batch.take(1), next(model.parameters()).device
    parameters = [(name, one.dtype, tuple(one.shape), one.requires_grad) for name, one in model.named_parameters()]
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in every_leaf(batch)]
    data = structure(batch), shapes, dry_run.probe_batch.num_rows
    run = precision.compute, precision.accumulate_dtype, dry_run.reduces_once, dry_run.coupling
    options = *run, option.memory, option.margin
    processor = torch.backends.cpu.get_cpu_capability() if device.type != "cuda" else torch.cuda.get_device_name(device)
    machine = num_processes, device.type, processor, platform.machine(), platform.processor(), torch.get_num_threads()
    versions = __version__, torch.__version__, platform.python_version()
    loss = getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__)
    modes = [module.training for module in model.modules()]
    return repr((str(model), modes, parameters, loss, data, options, machine, versions))


def read_cached(key: str, budget: Budget) -> MicroBatchChoice | None:
    """The choice kept under a key, if it still fits and was not bound by a much smaller budget."""
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):  # a damaged file is a missing one
        found = json.loads(cache_file(key).read_text("utf-8"))
        choice, breakdown, then = MicroBatchChoice.from_json(found["choice"]), found["breakdown"], found["budget_bytes"]
        fits = breakdown is None or budget.has_room_for(MemoryBreakdown(**breakdown))
        if choice.is_bound_by_memory and budget.num_bytes is not None and then is not None:
            fits &= budget.num_bytes < _MUCH_MORE * then
        if found["key"] == key and choice.micro_batch_size >= 1 and fits:
            return replace(choice, is_cached=True)
    return None


def write_cached(key: str, choice: MicroBatchChoice, breakdown: MemoryBreakdown | None, budget: Budget) -> None:
    """Keep a choice under a key, if it can be written, with the memory predicted for it."""
    predicted = None if breakdown is None else asdict(breakdown)
    kept = {"key": key, "choice": choice.to_json(), "breakdown": predicted, "budget_bytes": budget.num_bytes}
    with suppress(OSError, RuntimeError):  # there is no home
        path = cache_file(key)
        beside = path.with_name(f"{uuid.uuid4()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(kept), "utf-8")
            beside.replace(path)  # whole, since several processes may write at once
        finally:
            beside.unlink(missing_ok=True)
