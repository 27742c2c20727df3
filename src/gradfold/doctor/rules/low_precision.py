"""GF014: accumulation in a low precision (warning).

Parameters, and so their gradients, are in bfloat16 or float16, and several micro-batches are summed there.

Why: bfloat16 has 8 bits of mantissa: adding 1 to 256 changes nothing. The more micro-batches there are, the more of
each is lost, mostly of the small contributions.
Detection: The dtype of `.grad` is read after each backward pass. Gradients of up to a million elements are also summed
in float32, and the difference at the step is measured.
Limits: Sums that the script keeps elsewhere (float32 buffers) are not `.grad`, and are not judged.

Fix:
- model = Model().to(torch.bfloat16)
- (criterion(model(x), y) / 32).backward()
+ model = Model()
+ with torch.autocast("cuda", torch.bfloat16):
+     loss = criterion(model(x), y)
+ (loss / 32).backward()
"""

from __future__ import annotations

from gradfold.doctor.history import RunRecord
from gradfold.doctor.rule import Violation, Violations

_DIGITS = {"bfloat16": 3, "float16": 4}


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        low = [one for one in history.accumulating if any(_DIGITS.keys() & micro.dtypes for micro in one.micro_batches)]
        if not low:
            continue
        first, n = low[0].micro_batches, history.window_length
        dtype = next(name for name in _DIGITS if any(name in micro.dtypes for micro in first))
        errors = [one.step.rounding for one in low if one.step.rounding is not None]
        measured = f"measured here: off by {max(errors):.1e} of its norm, in a sample" if errors else "not measured"
        yield Violation(
            first[0].location,
            f"`.grad` is {dtype}, and {n} micro-batches are summed in it: every addition rounds to {_DIGITS[dtype]} "
            f"digits, and smaller contributions vanish ({measured}). The error grows with "
            "the number of micro-batches.",
            "Keep the parameters in float32 and use autocast, set `parameter.grad_dtype = torch.float32`, or use "
            "gradfold.Accumulator, which sums in float32.",
        )
