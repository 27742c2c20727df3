"""Auto: how a micro-batch size is to set itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from gradfold.errors import OptionError
from gradfold.memory.amount import read_bytes
from gradfold.token_budget import TokenBudget

__all__ = ["Auto"]


@dataclass(frozen=True)
class Auto:
    """Have the micro-batch size found: the fastest of those that fit. `"auto"` is `Auto()`.

    Args:
        memory: the most that the process (on a CPU) or the device may use, such as "16GiB". None: what is free.
        margin: the share that is added to predictions of memory. None: 10 %.
        seconds: for how long sizes are timed at most, after a prediction of some seconds.
        cache: whether a choice is kept on disk for the next start with the same model, shapes, dtypes, device and
            versions: in `$GRADFOLD_CACHE_DIR`, else in `$XDG_CACHE_HOME/gradfold`, else in `~/.cache/gradfold`.

    Raises:
        OptionError: an argument cannot work.

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
            raise OptionError(f"seconds={self.seconds!r}; expected how long sizes may be timed, such as 4.0.")


MicroBatchSize: TypeAlias = int | TokenBudget | Literal["auto"] | Auto | None


def read_auto(option: str | Auto) -> Auto:
    """The `Auto` that an option means.

    Raises:
        OptionError: it is none.
    """
    if isinstance(option, Auto):
        return option
    if option == "auto":
        return Auto()
    raise OptionError(
        f'micro_batch_size={option!r}; expected the number of rows to run at once, "auto", an Auto, or None for the '
        "batch as it is given."
    )
