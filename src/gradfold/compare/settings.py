"""The settings of a comparison: what the command line asks for, checked and completed from the workload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gradfold.compare.arms import ARMS, LOWER_PRECISIONS, default_arms
from gradfold.compare.data import Sizes, num_samples
from gradfold.errors import OptionError
from gradfold.workloads.workload import Workload

_REQUIREMENTS = {"batch_norm": "BatchNorm by micro-batch", "token_budget": "lengths of samples"}


@dataclass(frozen=True)
class Settings:
    """What to compare; None stands for the workload's own default."""

    workload: str = "digits"  # a built-in name, `module:callable` or `path.py:callable`
    data: Path | None = None  # a folder with the workload's data files
    global_batch_size: int | None = None  # samples of one update
    micro_batch_size: int | None = None  # samples that are run at once
    num_epochs: int | None = None
    seed: int = 0  # draws the first weights and the order of samples
    arms: tuple[str, ...] | None = None  # names, in the order in which they run
    num_threads: int | None = None  # of torch in each arm
    precision: str | None = None  # "bf16" or "fp16" adds the arms that compute in it
    num_ranks: int = 1  # processes that share each global batch, in the arms that support it
    tunes_micro_batch: bool = False  # by gradfold's arms; the others keep `micro_batch_size`

    def check(self) -> None:
        """Check what can be checked before the workload is built; what cannot work is an `OptionError`."""
        arms = self.arms or ()
        unknown = [name for name in arms if name not in ARMS]
        if unknown or self.arms == ():
            raise OptionError(
                f"unknown arms: {', '.join(map(repr, unknown)) or 'none'}; the arms are {', '.join(ARMS)}, for example "
                "--arms full-batch,gradfold."
            )
        if len(set(arms)) < len(arms):
            raise OptionError(f"an arm is named twice: {', '.join(arms)}.")
        if self.precision not in (None, *LOWER_PRECISIONS):
            raise OptionError(f"--precision {self.precision}: expected {' or '.join(LOWER_PRECISIONS)}.")
        for option, value, least in (
            ("--global-batch", self.global_batch_size, 1),
            ("--micro-batch", self.micro_batch_size, 1),
            ("--epochs", self.num_epochs, 1),
            ("--threads", self.num_threads, 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise OptionError(f"{option} {value}: expected at least {least}.")
        if self.seed >= 2**32:
            raise OptionError(f"--seed {self.seed}: expected less than 2**32.")

    def arms_for(self, workload: Workload) -> tuple[str, ...]:
        """The names of the arms for a workload; an `OptionError` where it has not what a named arm needs."""
        arms = self.arms or default_arms(workload.batch_norm, workload.token_budget)
        for option, what in _REQUIREMENTS.items():
            needless = [name for name in arms if ARMS[name].requires == option]
            if needless and getattr(workload, option) is None:
                raise OptionError(
                    f"--arms {','.join(needless)}: workload {workload.name!r} has no {what} (its {option} is None). "
                    f"Leave {'them' if len(needless) > 1 else 'it'} out."
                )
        added = [name for name, arm in ARMS.items() if arm.precision and arm.precision == self.precision]
        return (*arms, *(name for name in added if name not in arms))

    def sizes_for(self, workload: Workload) -> Sizes:
        """How much is trained on a workload; an `OptionError` where batches do not fit into each other or the data."""
        num, num_ranks = num_samples(workload), self.num_ranks
        global_batch = self.global_batch_size or workload.global_batch_size
        # A default follows the number that was asked for; a number that was asked for is never changed.
        on_a_rank = -(-global_batch // num_ranks)
        micro_batch = self.micro_batch_size or min(workload.micro_batch_size, on_a_rank)
        if global_batch > num:
            raise OptionError(
                f"a global batch of {global_batch} is larger than the data: workload {workload.name!r} has {num} "
                f"training samples. Pass --global-batch {num} or less."
            )
        if micro_batch > on_a_rank:
            on_ranks = "" if num_ranks == 1 else f" ({on_a_rank} on each of {num_ranks} processes)"
            raise OptionError(
                f"a micro-batch of {micro_batch} is larger than the global batch of {global_batch}{on_ranks}. "
                f"Pass --micro-batch {on_a_rank} or less."
            )
        sizes = Sizes(num, global_batch, micro_batch, self.num_epochs or workload.num_epochs, num_ranks)
        smallest = sizes.last_window or global_batch
        if smallest < num_ranks:
            raise OptionError(
                f"a window of {smallest} samples cannot be shared by {num_ranks} processes ({num} samples in "
                f"global batches of {global_batch}). Pass another --global-batch."
            )
        return sizes
