"""A case: all that is known about a script after it ran, for the rules to judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gradfold.doctor.events import Tape
from gradfold.doctor.memory import Memory
from gradfold.doctor.training import E, Training

__all__: list[str] = []


@dataclass(frozen=True)
class Stray:
    """Parameters that get gradients and are in no optimizer.

    Attributes:
        names: of the parameters.
        num_elements: of all together.
        num_backwards: backward passes that gave them gradients.
        first: number of the first of these.
    """

    names: tuple[str, ...]
    num_elements: int
    num_backwards: int
    first: int


@dataclass(frozen=True)
class Case:
    """What is known.

    Attributes:
        script: the file.
        tape: all events.
        trainings: one per optimizer.
        ended: whether the script came to its own end.
        memory: peak and available memory.
        batch_norms: names of the BatchNorm layers in the user's models, by the running mean's address.
        stray: parameters that no optimizer has, None where there are none.
        precisions: dtypes of autocast regions.
        seconds: how long the script trained after its first step, without the doctor's own work.
        since: number of the first event of that time.
    """

    script: Path
    tape: Tape = field(repr=False)
    trainings: tuple[Training, ...]
    ended: bool
    memory: Memory
    batch_norms: dict[int, str]
    stray: Stray | None
    precisions: frozenset[str]
    seconds: float
    since: int

    @cached_property
    def accumulating(self) -> tuple[Training, ...]:
        """The optimizers that usually add up several micro-batches."""
        return tuple(one for one in self.trainings if one.accumulates)

    def events(self, kind: type[E]) -> list[E]:
        """All events of a kind."""
        return [one for one in self.tape.events if isinstance(one, kind)]
