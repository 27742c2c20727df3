"""The arms: ways to train the same model on the same samples. `loops` has their training loops.

Two arms train another model, with GroupNorm in place of BatchNorm: one in full batches, which is the reference of the
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from gradfold.packing.token_budget import TokenBudget

LowerPrecision: TypeAlias = Literal["bf16", "fp16"]
LOWER_PRECISIONS: tuple[LowerPrecision, ...] = get_args(LowerPrecision)

REFERENCE = "full-batch"
GROUP_NORM_REFERENCE = "group-norm-full-batch"
CONTROL = "row-order-control"


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    loop: Literal["full_batch", "row_order_control", "gradfold", "plain_loop", "small_batch"]
    color: str  # in figures and the report
    description: str
    line_width: float = 1.6  # of its loss curve; the widest is drawn first, so narrow ones on top leave it visible
    requires: Literal["batch_norm", "token_budget"] | None = None  # the workload's option that the arm depends on
    precision: LowerPrecision | None = None  # of forward pass and loss, by autocast; None: the workload's own
    batch_norm: Literal["exact"] | None = None  # as for `Accumulator`; None: the workload's own
    has_group_norm: bool = False  # in place of BatchNorm, in another model

    @property
    def accumulates(self) -> bool:
        """Whether an update takes a whole global batch instead of one micro-batch."""
        return self.loop != "small_batch"

    @property
    def runs_on_one(self) -> bool:
        """Whether one process trains it even where several share the global batches of the other arms."""
        return self.loop in ("full_batch", "row_order_control")

    @property
    def reference(self) -> str:
        """The arm that trains the same model in full batches."""
        return GROUP_NORM_REFERENCE if self.has_group_norm else REFERENCE


def _in_lower_precision(precision: LowerPrecision, recipe: str, full_color: str, own_color: str) -> tuple[Arm, Arm]:
    """The full batch and the library under autocast; measured against the full batch in float32."""
    of_full, of_own = f"each global batch at once, in plain torch, in {recipe}", f"gradfold in {recipe}"
    return (
        Arm(f"{REFERENCE}-{precision}", "full_batch", full_color, of_full, line_width=6.2, precision=precision),
        Arm(f"gradfold-{precision}", "gradfold", own_color, of_own, line_width=3.0, precision=precision),
    )


# In the order in which they run by default. The colors are Okabe and Ito's, which color-blind readers can tell apart,
# and shades between them.
_ALL = (
    Arm(REFERENCE, "full_batch", "#8a8f98", "the reference: each global batch at once, in plain torch", line_width=8.0),
    Arm("gradfold", "gradfold", "#0072b2", "each global batch in micro-batches, by gradfold"),
    Arm(
        "token-budget",
        "gradfold",
        "#009e73",
        "by gradfold with a TokenBudget: micro-batches of samples of like length, which need little padding",
        line_width=2.8,
        requires="token_budget",
    ),
    Arm(
        "batch-norm-exact",
        "gradfold",
        "#004a77",
        'by gradfold with batch_norm="exact": BatchNorm normalizes by the whole batch',
        requires="batch_norm",
        batch_norm="exact",
    ),
    Arm(
        "batch-norm-per-micro",
        "gradfold",
        "#56b4e9",
        "by gradfold; BatchNorm normalizes by micro-batch, which is not the full batch",
        requires="batch_norm",
    ),
    Arm(
        "plain-loop",
        "plain_loop",
        "#e69f00",
        "the loop as articles print it: loss / n, a step every n micro-batches",
        line_width=4.4,
    ),
    Arm("small-batch", "small_batch", "#cc79a7", "no accumulation: an update for every micro-batch"),
    Arm(
        CONTROL,
        "row_order_control",
        "#5c9a3a",
        "the full batch with its rows in reverse, which shows how far rounding alone goes",
        line_width=2.8,
    ),
    Arm(
        GROUP_NORM_REFERENCE,
        "full_batch",
        "#f0b48a",
        "the full batch of another model: gradfold.convert_batch_norm replaces BatchNorm by GroupNorm",
        line_width=8.0,
        requires="batch_norm",
        has_group_norm=True,
    ),
    Arm(
        "group-norm",
        "gradfold",
        "#d55e00",
        f"that other model in micro-batches, by gradfold; its reference is {GROUP_NORM_REFERENCE}",
        requires="batch_norm",
        has_group_norm=True,
    ),
    *_in_lower_precision("bf16", "bfloat16 (autocast)", "#3f444b", "#7a4fa3"),
    *_in_lower_precision("fp16", "float16 (autocast and a loss scaler)", "#8c6d46", "#13807c"),
)
ARMS = {arm.name: arm for arm in _ALL}


def default_arms(batch_norm: str | None = None, token_budget: TokenBudget | None = None) -> tuple[str, ...]:
    """The arms of a workload with these options, by default.

    Samples that differ in length add the token budget. BatchNorm by micro-batch adds what can replace it.
    """
    by_micro_batch = batch_norm == "per_micro_batch"
    is_met = {None: True, "token_budget": token_budget is not None, "batch_norm": by_micro_batch}
    left_out = {CONTROL, "gradfold"} if by_micro_batch else {CONTROL}  # there gradfold is batch-norm-per-micro
    usual = (arm for arm in _ALL if arm.precision is None and is_met[arm.requires])
    return tuple(arm.name for arm in usual if arm.name not in left_out)


DEFAULT_ARMS = default_arms()
