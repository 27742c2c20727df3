"""GF013: gradients reduced in every micro-batch (warning).

Under DistributedDataParallel every micro-batch of a window runs outside `no_sync`, or only the backward pass runs
inside.

Why: Gradients are reduced over the network n times per update where once is enough; between machines that can more than
double the time of a step. Around the backward pass alone `no_sync` has no effect, since the reduction is prepared in
forward.
Detection: `require_backward_grad_sync` is read in each forward and backward pass of the wrapped model.
Limits: Sharded models (`fully_shard`) are not judged: reducing in every micro-batch saves memory there. A single
process is judged as one of many would be.

Fix:
- loss = criterion(ddp_model(x), y) / 4
- with ddp_model.no_sync():
+ with nullcontext() if is_last else ddp_model.no_sync():
+     loss = criterion(ddp_model(x), y) / 4
      loss.backward()
"""

from __future__ import annotations

from gradfold.doctor.history import RunRecord, UpdateWindow
from gradfold.doctor.rule import Violation, Violations


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        windows = [one for one in history.accumulating if all(micro.ddp for micro in one.micro_batches)]
        said = _diagnosis(windows[0]) if windows else None
        if said is not None:
            yield Violation(windows[0].micro_batches[0].location, *said)


def _diagnosis(window: UpdateWindow) -> tuple[str, str] | None:
    """What is wrong with the reductions of a window, and the fix."""
    n = len(window)
    prepared = [all(sync.is_prepared for sync in micro.ddp) for micro in window.micro_batches]
    if not any(prepared):
        return (
            f"all {n} micro-batches of an update run inside `no_sync`: gradients are never reduced, and every rank "
            "trains a different model.",
            "Run forward and backward of the last micro-batch outside `no_sync`.",
        )
    if not prepared[-1]:
        return (
            "the last micro-batch of an update runs inside `no_sync`, and an earlier one outside: gradients added "
            "after the reduction stay on their rank, and ranks step with different gradients.",
            "Run forward and backward of the *last* micro-batch outside `no_sync`, and no other.",
        )
    if not all(prepared):
        return None
    num_bytes = sum(sync.num_bytes for sync in window.micro_batches[0].ddp)
    are_outside = all(sync.is_allowed for micro in window.micro_batches for sync in micro.ddp)
    cause = "`no_sync` is around backward only, but DistributedDataParallel prepares its reduction in forward: "
    return (
        f"{'' if are_outside else cause}gradients ({num_bytes / 1e6:.3g} MB) are reduced in each of {n} micro-batches "
        f"instead of once per update: {n} times the communication.",
        "`with model.no_sync():` around forward *and* backward of all but the window's last micro-batch.",
    )
