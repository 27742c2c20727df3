"""The rules, in the order of their codes: one hazard per file."""

from __future__ import annotations

from gradfold.doctor.rules import (
    batch_norm,
    clipping,
    divided_twice,
    does_not_pay,
    host_synchronization,
    in_batch_loss,
    last_window_dropped,
    leftover_leaks,
    low_precision,
    not_divided,
    partial_window,
    redundant_reduction,
    scaler_misuse,
    scheduler_per_micro_batch,
    step_without_gradients,
    unequal_counts,
    zeroed_in_window,
)
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

RULES: tuple[Rule, ...] = tuple(
    module.RULE
    for module in (
        zeroed_in_window,
        not_divided,
        divided_twice,
        last_window_dropped,
        leftover_leaks,
        partial_window,
        unequal_counts,
        scheduler_per_micro_batch,
        clipping,
        scaler_misuse,
        batch_norm,
        host_synchronization,
        redundant_reduction,
        low_precision,
        step_without_gradients,
        in_batch_loss,
        does_not_pay,
    )
)
