"""GF014: gradients accumulate in bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import WARNING, Observation
from gradfold.doctor.history import RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_LOW = ("bfloat16", "float16")


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        low = [one for one in training.accumulating if any(set(_LOW) & micro.dtypes for micro in one.micro_batches)]
        if not low:
            continue
        dtype = next(name for name in _LOW if name in low[0].micro_batches[-1].dtypes | low[0].micro_batches[0].dtypes)
        errors = [one.step.rounding for one in low if one.step.rounding is not None]
        measured = (
            f"measured here: off by {max(errors):.1e} of its norm, of the parameters looked at"
            if errors
            else "not measured"
        )
        yield Observation(
            low[0].micro_batches[0].place,
            f"`.grad` is {dtype}, and {training.usual} micro-batches are added up in it: every addition rounds to "
            f"{'3' if dtype == 'bfloat16' else '4'} digits, and what is smaller than that vanishes ({measured}). It "
            "grows with the number of micro-batches.",
            "Keep the parameters in float32 and use autocast, set `parameter.grad_dtype = torch.float32`, or let "
            "gradfold.Accumulator add up in float32.",
        )


RULE = Rule(
    code="GF014",
    name="accumulation in a low precision",
    severity=WARNING,
    what="Parameters, and so their gradients, are in bfloat16 or float16, and several micro-batches are added up in "
    "them.",
    why="bfloat16 has 8 bits of mantissa: adding 1 to 256 changes nothing. The more micro-batches there are, the more "
    "of each is lost, mostly of the small contributions.",
    detection="The dtype of `.grad` is read after each backward pass. Up to a million elements are added up in float32 "
    "beside it, and the difference at the step is measured.",
    limits="Sums kept elsewhere by hand (float32 buffers) are not `.grad`, and are left alone.",
    wrong="""model = Model().to(torch.bfloat16)
(criterion(model(x), y) / 32).backward()
""",
    right="""model = Model()
with torch.autocast("cuda", torch.bfloat16):
    loss = criterion(model(x), y)
(loss / 32).backward()
""",
    check=_check,
)
