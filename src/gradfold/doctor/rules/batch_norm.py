"""GF011: BatchNorm in training mode under accumulation (warning).

A BatchNorm layer uses the statistics of the micro-batch while gradients accumulate.

Why: BatchNorm makes each sample depend on the others in its batch. Split into micro-batches, a sample depends on fewer:
the gradient differs (by tens of percent in common networks), its noise grows as the micro-batch shrinks, and with
micro-batches of a few rows training suffers. Running statistics are updated n times per step.
Detection: In most windows, the autograd graph of a micro-batch has a batch normalization that uses the statistics of
its input.
Limits: Layers inside a compiled or reentrantly checkpointed region are not in the graph. Layers in eval mode, with
frozen statistics, are not reported, nor is what gradfold runs.

Fix:
- model = torchvision.models.resnet50()  # 53 BatchNorm layers
- for i, (x, y) in enumerate(loader):
-     (criterion(model(x), y) / 16).backward()
+ accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, batch_norm="exact")
+ for batch in loader:
+     accumulator.backward(batch)
"""

from __future__ import annotations

from gradfold.doctor.history import RunRecord
from gradfold.doctor.rule import Violation, Violations


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        walked = [one for one in history.accumulating if any(micro.graph.is_walked for micro in one.micro_batches)]
        found = [some for one in walked if (some := [micro for micro in one.micro_batches if micro.graph.batch_norms])]
        if 2 * len(found) <= len(walked):
            continue
        micro, n = found[0][0], history.window_length
        means = micro.graph.batch_norms
        layers = [record.batch_norms.get(mean.data_ptr(), "") if mean is not None else "" for mean in means]
        named = [name for name in layers if name]
        names = f" ({', '.join(named[:3])}{', ...' * (len(named) > 3)})" if named else ""
        sizes = f" over {micro.rows} rows, not over the {n * micro.rows} of an update" if micro.rows else ""
        many = f"{len(layers)} BatchNorm layers" if len(layers) > 1 else "one BatchNorm layer"
        yield Violation(
            micro.location,
            f"in training mode, {many}{names} normalize{'s' * (len(layers) == 1)} each micro-batch by itself{sizes}. "
            f"The gradient is not that of the whole batch, and the running statistics are updated {n} times per step.",
            "Use GroupNorm or LayerNorm, frozen statistics (`.eval()`), or the statistics of the whole batch: "
            'gradfold.Accumulator(model, loss_fn, batch_norm="exact").',
        )
