"""The settings of a comparison: what the command line says, checked and completed from the workload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradfold.compare.arms import (
    ARMS,
    BATCH_NORM,
    EXACT_BATCH_NORM,
    GROUP_NORM_ARMS,
    LOWER_PRECISIONS,
    TOKEN_BUDGET,
    arms_in,
    default_arms,
)
from gradfold.compare.data import num_samples
from gradfold.errors import OptionError
from gradfold.workloads.workload import Workload

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What to compare; None stands for the workload's own default.

    Args:
        workload: a built-in name, `module:callable` or `path.py:callable`.
        data: a folder with the workload's data files.
        global_batch_size: samples of one update.
        micro_batch_size: samples that are run at once.
        num_epochs: passes over the training samples.
        seed: draws the first weights and the order of samples.
        arms: names of arms, in the order in which they run.
        num_threads: threads of torch in each arm.
        num_ranks: processes that share each global batch, in the arms that can.
        precision: "bf16" or "fp16" adds the arms that compute in it.
        chooses_micro_batch: the library's arms choose their micro-batch themselves; the others keep `micro_batch_size`.
    """

    workload: str = "digits"
    data: Path | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    num_epochs: int | None = None
    seed: int = 0
    arms: tuple[str, ...] | None = None
    num_threads: int | None = None
    precision: str | None = None
    num_ranks: int = 1
    chooses_micro_batch: bool = False

    def to_json(self) -> dict[str, Any]:
        """The settings without the data folder, which is a path of this machine."""
        return {
            "workload": self.workload,
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": self.micro_batch_size,
            "num_epochs": self.num_epochs,
            "seed": self.seed,
            "arms": None if self.arms is None else list(self.arms),
            "num_threads": self.num_threads,
            "precision": self.precision,
            "num_ranks": self.num_ranks,
            "chooses_micro_batch": self.chooses_micro_batch,
        }


@dataclass(frozen=True)
class Sizes:
    """How much is trained, with every default filled in."""

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    num_epochs: int
    num_ranks: int = 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a full window, on each rank."""
        return max(1, self.global_batch_size // (self.micro_batch_size * self.num_ranks))

    @property
    def last_window(self) -> int:
        """Samples of the last, partial window of an epoch; 0 where all windows are full."""
        return self.num_samples % self.global_batch_size


def check_options(settings: Settings) -> None:
    """Check what can be checked before the workload is built.

    Raises:
        OptionError: an arm or precision is unknown, an arm is named twice, or a number is out of range.
    """
    arms = settings.arms
    unknown = [name for name in arms or () if name not in ARMS]
    if unknown or arms == ():
        named = ", ".join(map(repr, unknown)) or "none"
        raise OptionError(
            f"unknown arms: {named}; the arms are {', '.join(ARMS)}, for example --arms full-batch,gradfold."
        )
    if arms is not None and len(set(arms)) < len(arms):
        raise OptionError(f"an arm is named twice: {', '.join(arms)}.")
    if settings.precision not in (None, *LOWER_PRECISIONS):
        raise OptionError(f"--precision {settings.precision}: expected {' or '.join(LOWER_PRECISIONS)}.")
    for option, value, least in (
        ("--global-batch", settings.global_batch_size, 1),
        ("--micro-batch", settings.micro_batch_size, 1),
        ("--epochs", settings.num_epochs, 1),
        ("--threads", settings.num_threads, 1),
        ("--seed", settings.seed, 0),
    ):
        if value is not None and value < least:
            raise OptionError(f"{option} {value}: expected at least {least}.")
    if settings.seed >= 2**32:
        raise OptionError(f"--seed {settings.seed}: expected less than 2**32.")


def chosen_arms(settings: Settings, workload: Workload) -> tuple[str, ...]:
    """The arms that the settings mean for this workload.

    Raises:
        OptionError: an arm replaces BatchNorm, and the workload has none that sees micro-batches; or an arm has a token
            budget, and the workload has none.
    """
    arms = default_arms(workload) if settings.arms is None else settings.arms
    needless = [name for name in arms if name in (EXACT_BATCH_NORM, BATCH_NORM, *GROUP_NORM_ARMS)]
    if needless and workload.batch_norm is None:
        raise OptionError(
            f"--arms {','.join(needless)}: there is no BatchNorm by micro-batch in workload "
            f"{workload.name!r}, whose batch_norm is None. Leave {'them' if len(needless) > 1 else 'it'} out."
        )
    if TOKEN_BUDGET in arms and workload.token_budget is None:
        raise OptionError(
            f"--arms {TOKEN_BUDGET}: the rows of workload {workload.name!r} have no lengths; its token_budget is None. "
            "Leave it out."
        )
    return (*arms, *(name for name in arms_in(settings.precision) if name not in arms))


def complete(settings: Settings, workload: Workload) -> Sizes:
    """The sizes that the settings mean for this workload.

    Raises:
        OptionError: the batches do not fit into each other or into the data.
    """
    num = num_samples(workload)
    global_batch = settings.global_batch_size or workload.global_batch_size
    # A default follows the number that was asked for; a number that was asked for is never changed.
    of_a_rank = -(-global_batch // settings.num_ranks)
    micro_batch = settings.micro_batch_size or min(workload.micro_batch_size, of_a_rank)
    if global_batch > num:
        raise OptionError(
            f"a global batch of {global_batch} is larger than the data: workload {workload.name!r} has {num} training "
            f"samples. Pass --global-batch {num} or less."
        )
    if micro_batch > of_a_rank:
        share = "" if settings.num_ranks == 1 else f"'s share of {of_a_rank} on each of {settings.num_ranks} processes"
        raise OptionError(
            f"a micro-batch of {micro_batch} is larger than the global batch of {global_batch}{share}. "
            f"Pass --micro-batch {of_a_rank} or less."
        )
    sizes = Sizes(
        num, global_batch, micro_batch, settings.num_epochs or workload.num_epochs, num_ranks=settings.num_ranks
    )
    least = min(global_batch, sizes.last_window or global_batch)
    if least < settings.num_ranks:
        raise OptionError(
            f"a window of {least} samples cannot be shared by {settings.num_ranks} processes ({num} samples in global "
            f"batches of {global_batch}). Pass another --global-batch."
        )
    return sizes


def as_options(settings: Settings, sizes: Sizes, arms: tuple[str, ...]) -> Settings:
    """The settings with the sizes and arms that were used written in."""
    return replace(
        settings,
        arms=arms,
        global_batch_size=sizes.global_batch_size,
        micro_batch_size=sizes.micro_batch_size,
        num_epochs=sizes.num_epochs,
    )
