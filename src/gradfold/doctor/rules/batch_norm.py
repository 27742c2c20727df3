"""GF011: BatchNorm normalizes each micro-batch by itself."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.events import Backward
from gradfold.doctor.finding import WARNING, Observation
from gradfold.doctor.history import RunRecord, UpdateWindow
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        seen = [one for one in training.accumulating if any(_layers(case, micro) for micro in one.micro_batches)]
        if not seen or 2 * len(seen) <= len([one for one in training.accumulating if _was_looked_at(one)]):
            continue
        micro = next(one for one in seen[0].micro_batches if _layers(case, one))
        layers = _layers(case, micro)
        named = [name for name in layers if name]
        names = f" ({', '.join(named[:3])}{', ...' * (len(named) > 3)})" if named else ""
        n, rows = training.usual, micro.rows
        sizes = f" over {rows} rows, not over the {n * rows} of an update" if rows else f", {n} times per update"
        many = f"{len(layers)} BatchNorm layers" if len(layers) > 1 else "one BatchNorm layer"
        yield Observation(
            micro.place,
            f"in training mode, {many}{names} normalize{'s' * (len(layers) == 1)} each micro-batch by itself{sizes}. "
            f"The gradient is not the whole batch's, and the running statistics move {n} times per update.",
            "GroupNorm or LayerNorm, frozen statistics (`.eval()`), or the whole batch's statistics: "
            'gradfold.Accumulator(model, loss_fn, batch_norm="exact").',
        )


def _layers(case: RunRecord, micro: Backward) -> list[str]:
    if micro.census is None:
        return []
    means = micro.census.batch_norms
    return [case.batch_norms.get(mean.data_ptr(), "") if mean is not None else "" for mean in means]


def _was_looked_at(window: UpdateWindow) -> bool:
    return any(one.census is not None for one in window.micro_batches)


RULE = Rule(
    code="GF011",
    name="BatchNorm in training mode under accumulation",
    severity=WARNING,
    what="A BatchNorm layer uses the statistics of the micro-batch while gradients accumulate.",
    why="Samples of a batch see each other through BatchNorm. Cut into micro-batches they see fewer: the gradient is "
    "another one (by tens of percent in common networks), noisier the smaller the micro-batch, and with micro-batches "
    "of a few rows training suffers. Running statistics advance n times per update.",
    detection="The autograd graph of a micro-batch has a batch normalization with the batch's own statistics, in most "
    "windows.",
    limits="Layers inside of a compiled or reentrantly checkpointed region are not in the graph. Layers in eval mode, "
    "with frozen statistics, are left alone, and so is what gradfold runs.",
    wrong="""model = torchvision.models.resnet50()  # 53 BatchNorm layers
for i, (x, y) in enumerate(loader):
    (criterion(model(x), y) / 16).backward()
""",
    right="""accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, batch_norm="exact")
for batch in loader:
    accumulator.backward(batch)
""",
    check=_check,
)
