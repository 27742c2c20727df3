"""GF003: loss divided twice (error).

The loss is divided by n in two places: in a function and in the loop, in the loss and in the gradients, or by hand
under a framework that divides, such as `accelerator.backward`.

Why: The gradient is n times too small, and training n times slower under SGD. The loss looks right.
Detection: The autograd graph of the loss has two divisions by the length of the window; or it has one, and the
gradients were divided once more between the last backward pass and the step.
Limits: A multiplication by a constant such as `0.25 *` counts as the weight of a loss. A division of as many terms as
its divisor counts as their mean.

Fix:
- loss = criterion(model(x), y) / accelerator.gradient_accumulation_steps
- accelerator.backward(loss)  # divides, too
+ loss = criterion(model(x), y)
+ accelerator.backward(loss)
"""

from __future__ import annotations

from gradfold.doctor.division import is_close, means_of, num_divisions
from gradfold.doctor.history import RunRecord
from gradfold.doctor.rule import Violation, Violations


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        n = history.window_length
        for window in history.full:
            means, ratio = means_of(window), window.step.ratio
            location = window.micro_batches[0].location
            if not means or not all(mean.scale <= 1 / n**2 * 1.001 for mean in means):
                continue
            count = num_divisions(means, n, ratio, location)
            if count < 2:
                continue
            where = f"once in the code and once by {location.through[-1]}" if location.through else f"{count} times"
            where = "once in the loss and once in `.grad`" if is_close(ratio, 1 / n) else where
            factor = n ** (count - 1)
            yield Violation(
                location,
                f"a window of {n} micro-batches is divided by {n} more than once ({where}): the gradient is {factor} "
                f"times too small. Under SGD this equals a learning rate of 1/{factor} of the one set; under Adam, eps "
                "and coupled weight decay weigh more.",
                "Divide once: in the framework, if it divides, or in one line of the script.",
            )
            break
