"""A memo: a choice as it is kept for the next start, with the memory that it takes and that there was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradfold.memory.budget import Budget
from gradfold.memory.choice import MicroBatchChoice
from gradfold.memory.ledger import MakeUp

__all__: list[str] = []

_MUCH_MORE = 2  # times the memory that there was: sizes that did not fit then may be faster


@dataclass(frozen=True)
class Memo:
    """What an earlier start has found.

    Args:
        choice: its choice.
        make_up: predicted for it; None where nothing could be predicted.
        budget_bytes: that there was; None where nobody said.
    """

    choice: MicroBatchChoice
    make_up: MakeUp | None
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
    def from_json(cls, data: Mapping[str, Any]) -> Memo | None:
        """The memo from `to_json`; None where it is none."""
        try:
            choice, make_up = MicroBatchChoice.from_json(data["choice"]), data["make_up"]
            found = cls(choice, None if make_up is None else MakeUp(**make_up), data["budget_bytes"])
        except (TypeError, KeyError):  # damaged
            return None
        return found if type(choice.micro_batch_size) is int and choice.micro_batch_size >= 1 else None
