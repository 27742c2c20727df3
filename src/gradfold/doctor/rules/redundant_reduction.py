"""GF013: DistributedDataParallel reduces gradients in every micro-batch, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import WARNING, Observation
from gradfold.doctor.history import RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        windows = [one for one in training.accumulating if all(micro.syncs for micro in one.micro_batches)]
        for window in windows[:1]:
            prepared = [all(sync[0] for sync in micro.syncs) for micro in window.micro_batches]
            allowed = [all(sync[1] for sync in micro.syncs) for micro in window.micro_batches]
            size = sum(sync[2] for sync in window.micro_batches[0].syncs)
            place = window.micro_batches[0].place
            n = len(window)
            if not any(prepared):
                yield Observation(
                    place,
                    f"none of the {n} micro-batches of an update runs outside `no_sync`: gradients are never reduced, "
                    "and every rank trains a model of its own.",
                    "Run forward and backward of the last micro-batch outside of `no_sync`.",
                )
            elif not prepared[-1]:
                yield Observation(
                    place,
                    "the last micro-batch of an update runs inside `no_sync`, and an earlier one outside: what is "
                    "added after the reduction stays on its rank, and ranks step with gradients that differ.",
                    "Run forward and backward of the *last* micro-batch outside of `no_sync`, and no other.",
                )
            elif all(prepared):
                only = not all(allowed)
                cause = (
                    "`no_sync` is around the backward pass only, but DistributedDataParallel prepares its reduction in "
                    "forward: " * only
                )
                yield Observation(
                    place,
                    f"{cause}gradients ({size / 1e6:.3g} MB) are reduced in each of {n} micro-batches instead of once "
                    f"per update: {n} times the communication.",
                    "`with model.no_sync():` around forward *and* backward of all but the window's last micro-batch.",
                )


RULE = Rule(
    code="GF013",
    name="gradients reduced in every micro-batch",
    severity=WARNING,
    what="Under DistributedDataParallel every micro-batch of a window runs outside `no_sync`, or only the backward "
    "pass runs inside.",
    why="Gradients are reduced over the network n times per update where once is enough; between machines that doubles "
    "the time of a step and more. Around the backward pass alone `no_sync` does nothing, since the reduction is "
    "prepared in forward.",
    detection="`require_backward_grad_sync` is read in each forward and backward pass of the wrapped model.",
    limits="Sharded models (`fully_shard`) are not judged: there, reducing in every micro-batch saves memory. A "
    "process alone is judged as one of many would be.",
    wrong="""loss = criterion(ddp_model(x), y) / 4
with ddp_model.no_sync():
    loss.backward()
""",
    right="""with nullcontext() if is_last else ddp_model.no_sync():
    loss = criterion(ddp_model(x), y) / 4
    loss.backward()
""",
    check=_check,
)
