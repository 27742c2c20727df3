"""GF006: partial window divided by the full count (error).

The last window of an epoch has m < n micro-batches and is stepped, with each loss divided by n.

Why: Its gradient is m / n of what it should be: with 1 of 8 left, the update is an eighth. Accelerate and Lightning
also divide this way.
Detection: Full windows of n have losses scaled by 1 / n, and a shorter one that was stepped has the same scale.
Limits: Losses whose graph does not tell their scale are not reported, nor are sums.

Fix:
- (criterion(model(x), y) / 4).backward()
+ length = min(4, len(loader) - i // 4 * 4)
+ (criterion(model(x), y) / length).backward()
  if (i + 1) % 4 == 0 or i + 1 == len(loader):
      optimizer.step()
      optimizer.zero_grad()
"""

from __future__ import annotations

from gradfold.doctor.division import is_divided_by
from gradfold.doctor.history import RunRecord
from gradfold.doctor.rule import Violation, Violations, num_micro_batches


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        n = history.window_length
        if not any(is_divided_by(window, n) for window in history.full):
            continue
        partial = [one for one in history.windows if 0 < len(one) < n and not one.is_by_gradfold]
        wrong = [one for one in partial if is_divided_by(one, n)]
        if not wrong:
            continue
        m, location = len(wrong[0]), wrong[0].micro_batches[-1].location
        by = f" by {location.through[-1]}" if location.through else ""
        yield Violation(
            location,
            f"a window of {num_micro_batches(m)} is divided by {n}{by}, the length of a full one: its gradient is "
            f"{m / n:.3g} of what it should be ({len(wrong)} of {len(history.windows)} updates seen).",
            f"Divide by the actual number of micro-batches: `length = min({n}, len(loader) - i // {n} * {n})`, or let "
            "gradfold.windows(loader, n, model=model) measure it.",
        )
