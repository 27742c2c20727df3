"""GF003: means over micro-batches are divided by their number twice."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import RunRecord
from gradfold.doctor.rules.division import is_close, means_of, num_divisions
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        n = training.usual
        for window in training.full:
            means = means_of(window)
            place = window.micro_batches[0].place
            if not means or not all(mean.scale <= 1 / n**2 * 1.001 for mean in means):
                continue
            count = num_divisions(means, n, window.step.ratio, place)
            if count < 2:
                continue
            if is_close(window.step.ratio, 1 / n):
                who = "once in the loss and once in `.grad`"
            elif place.through:
                who = f"once in the code and once by {place.through[-1]}"
            else:
                who = f"{count} times"
            yield Observation(
                place,
                f"a window of {n} micro-batches is divided by {n} more than once ({who}): the gradient is "
                f"{n ** (count - 1)} times too small. Under SGD that is a learning rate of "
                f"1/{n ** (count - 1)} of the one set; under Adam it makes eps and coupled decay count more.",
                "Divide once: leave the division to the framework that does it, or to one line of yours.",
            )
            break


RULE = Rule(
    code="GF003",
    name="loss divided twice",
    severity=ERROR,
    what="The loss is divided by n in two places: in a function and in the loop, in the loss and in the gradients, or "
    "by hand under a framework that divides, such as `accelerator.backward`.",
    why="The gradient is n times too small, and training n times slower under SGD. The loss looks right.",
    detection="The autograd graph of the loss has two divisions by the length of the window, or one, and the gradients "
    "were divided by it once more between the last backward pass and the step.",
    limits="A multiplication by a constant such as `0.25 *` is taken for the weight of a loss. A division of as many "
    "terms as it divides by is taken for their mean.",
    wrong="""loss = criterion(model(x), y) / accelerator.gradient_accumulation_steps
accelerator.backward(loss)  # divides, too
""",
    right="""loss = criterion(model(x), y)
accelerator.backward(loss)
""",
    check=_check,
)
