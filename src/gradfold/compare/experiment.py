"""One arm trained and measured: its cost, its losses, and the tensors by which it is compared with the others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gradfold.accumulator import Accumulator
from gradfold.compare.arms import Arm, ArmTraining, Update
from gradfold.compare.data import epoch_order, in_float64, num_samples, share, take, tensors
from gradfold.compare.measure import Clock, MemoryMeter
from gradfold.compare.results import Curve, Measured, Tensors, save_gradients, save_parameters
from gradfold.distributed.process_group import ProcessGroup
from gradfold.memory.auto import MicroBatchChoice
from gradfold.memory.measure import PeakMemory, measure_peak
from gradfold.workloads.workload import Workload

__all__: list[str] = []

_REHEARSAL_SAMPLES = 2
_NUM_CURVE_POINTS = 400


def measure_arm(
    workload: Workload,
    arm: Arm,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    num_epochs: int,
    seed: int,
    folder: Path,
    on_update: Callable[[int, int, float], None],
    ranks: ProcessGroup | None = None,
    chooses_micro_batch: bool = False,
) -> Measured:
    """Train an arm from the seeded start and measure it; leaves its tensors in the folder.

    The measurements of time and memory end before the model is evaluated, before gradients are computed in float64 and
    before tensors are tracked, so that none of these touches them.
    """
    make_model = functools.partial(_seeded_model, workload, arm, seed)
    num = num_samples(workload)
    orders = [epoch_order(num, seed, epoch, workload.shuffle) for epoch in range(num_epochs)]
    choice = None
    if chooses_micro_batch:
        first = orders[0][:global_batch_size]
        choice = _choose(workload, arm, make_model(), first if ranks is None else share(first, ranks.rank, ranks.size))
        micro_batch_size = choice.micro_batch_size
    _rehearse(workload, arm, make_model(), ranks)
    model = make_model()
    save_parameters(model, folder, Tensors.START)
    training = ArmTraining(
        workload,
        model,
        workload.make_optimizer(model.parameters()),
        global_batch_size,
        micro_batch_size,
        Clock(next(model.parameters()).device),
        ranks,
    )
    log = LossLog(num * num_epochs)
    _watch_updates(training, folder, log)

    meter = MemoryMeter(training.device)
    torch.manual_seed(seed)
    training.clock.start()
    for update in arm.train(training, _in_training_mode(model, orders)):
        log.add(update)
        with training.clock.phase("excluded"):
            on_update(log.num_updates, log.num_samples, update.loss)
    training.clock.stop()
    memory = meter.read()

    save_parameters(model, folder, Tensors.FINAL)
    metrics = {} if workload.evaluate is None else {name: float(v) for name, v in workload.evaluate(model).items()}
    notes = _measure_float64(training, arm, make_model, orders[0], seed, folder)
    tracked = _track(training, arm, make_model(), orders[0])
    if not log.is_first_applied:
        notes[Tensors.GRADIENT_FLOAT32] = "its loss scaler skipped the first update, whose scaled gradient overflowed"
    return Measured(
        num_updates=log.num_updates,
        num_samples=log.num_samples,
        num_threads=torch.get_num_threads(),
        device=training.device.type,
        seconds=training.clock.seconds(),
        memory=memory,
        final_loss=log.mean_since(num * (num_epochs - 1)),
        metrics=metrics,
        curve=log.curve(_NUM_CURVE_POINTS),
        notes=notes,
        num_skipped=log.num_skipped,
        tracked=tracked,
        choice=choice,
    )


class LossLog:
    """The loss of every update, those left out by a loss scaler included."""

    def __init__(self, total_samples: int) -> None:
        self._updates: list[Update] = []
        self._total_samples = total_samples
        self.num_samples = 0
        self.num_skipped = 0

    @property
    def num_updates(self) -> int:
        """Updates of the weights so far."""
        return len(self._updates) - self.num_skipped

    @property
    def is_first_applied(self) -> bool:
        """Whether the first update was made, and its gradient seen."""
        return self._updates[0].applied

    def add(self, update: Update) -> None:
        """Note an update."""
        self._updates.append(update)
        self.num_samples += update.num_samples
        self.num_skipped += not update.applied

    def mean_since(self, sample: int) -> float:
        """The weighted mean loss of the updates that came after this many samples."""
        seen = itertools.accumulate(update.num_samples for update in self._updates)
        return _mean([update for update, end in zip(self._updates, seen, strict=True) if end > sample])

    def curve(self, num_points: int) -> Curve:
        """Loss against samples: means over equal stretches of samples, each placed at its middle."""
        stretch = max(self._total_samples / num_points, 1.0)
        seen, samples, losses = 0, [], []
        for _, group in itertools.groupby(self._ends(), key=lambda pair: int((pair[1] - 1) // stretch)):
            updates = [update for update, _ in group]
            num = sum(update.num_samples for update in updates)
            samples.append(seen + num / 2)
            losses.append(_mean(updates))
            seen += num
        return Curve(tuple(samples), tuple(losses))

    def _ends(self) -> Iterator[tuple[Update, int]]:
        seen = itertools.accumulate(update.num_samples for update in self._updates)
        return zip(self._updates, seen, strict=True)


def _mean(updates: list[Update]) -> float:
    # An update of weight 0 (no token to predict) has no mean loss: NaN, which must not spread.
    counting = [update for update in updates if update.weight]
    weight = sum(update.weight for update in counting)
    return sum(update.loss * update.weight for update in counting) / weight if weight else float("nan")


def _seeded_model(workload: Workload, arm: Arm, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return arm.prepare(workload.make_model())


def _choose(workload: Workload, arm: Arm, model: nn.Module, order: Tensor) -> MicroBatchChoice:
    """The micro-batch that the library finds for an arm, before anything is timed, on a model to be thrown away."""
    accumulator = Accumulator(
        model,
        workload.loss_fn,
        micro_batch_size="auto",
        weight=workload.weight,
        collate=workload.collate,
        precision=arm.precision,
        batch_norm=workload.batch_norm,
        ranks="alone",
        self_check=False,
    )
    return accumulator.choose_micro_batch(take(workload, order))


def _rehearse(workload: Workload, arm: Arm, model: nn.Module, ranks: ProcessGroup | None) -> None:
    """Run one tiny update of an arm on a model to be thrown away.

    The first forward, backward and step of a process import modules, start threads and allocate workspaces, which
    would count as time and memory of whichever arm is measured. What fails here fails again in training, audibly.
    """
    # Not so among several ranks: one that fails must end, since the others wait for it.
    with contextlib.suppress(Exception) if ranks is None else contextlib.nullcontext():
        num_ranks = 1 if ranks is None else ranks.size
        num = min(_REHEARSAL_SAMPLES * num_ranks, num_samples(workload))
        clock = Clock(next(model.parameters()).device)
        optimizer = workload.make_optimizer(model.parameters())
        training = ArmTraining(workload, model, optimizer, num, -(-num // num_ranks), clock, ranks)
        next(arm.train(training, [torch.arange(num)]))


def _watch_updates(training: ArmTraining, folder: Path, log: LossLog) -> None:
    """Time every `optimizer.step()`, and save the gradient that the first one finds: the same way for all arms."""

    def before(*_: object) -> None:
        if not log.num_samples:  # else a loss scaler has left out the first, and this gradient is of other samples
            with training.clock.phase("excluded"):
                save_gradients(training.model, folder, Tensors.GRADIENT_FLOAT32)
        training.clock.begin_update()

    def after(*_: object) -> None:
        training.clock.end_update()

    training.optimizer.register_step_pre_hook(before)
    training.optimizer.register_step_post_hook(after)


def _in_training_mode(model: nn.Module, orders: list[Tensor]) -> Iterator[Tensor]:
    for order in orders:
        model.train()
        yield order


def _track(training: ArmTraining, arm: Arm, model: nn.Module, order: Tensor) -> PeakMemory | None:
    """The memory of tensors in the first updates, on a model of its own: the tracker would take time in the training.

    Two global batches, so that a second update finds gradients and optimizer state in place. The data set is left out:
    it is the same for all, and may be larger than all the rest. None where the arm failed, which it will have shown.
    """
    fresh = dataclasses.replace(
        training,
        model=model,
        optimizer=training.workload.make_optimizer(model.parameters()),
        clock=Clock(training.device),
    )
    updates = arm.train(fresh, _in_training_mode(model, [order[: 2 * training.global_batch_size]]))
    data: list[Tensor] = []
    if training.workload.collate is None:
        data = tensors(training.workload.train_data)
    with contextlib.suppress(Exception):
        return measure_peak(lambda: list(updates), model=model, optimizer=fresh.optimizer, ignore=data)
    return None


def _measure_float64(
    training: ArmTraining, arm: Arm, make_model: Callable[[], nn.Module], order: Tensor, seed: int, folder: Path
) -> dict[str, str]:
    """Save, in float64 and from the start, the gradient of the first update and of the epoch's last, partial window.

    Returns what could not be computed, by the name of the tensors: not every loss can run in float64.
    """
    size = training.global_batch_size
    parts = {Tensors.GRADIENT_FLOAT64: order[:size]}
    if len(order) % size and arm.accumulates:
        parts[Tensors.LAST_WINDOW_FLOAT64] = order[len(order) - len(order) % size :]
    notes: dict[str, str] = {}
    for name, rows in parts.items():
        try:
            model = make_model().double()
            double = ArmTraining(
                in_float64(training.workload),
                model,
                torch.optim.SGD(model.parameters(), lr=0.0),
                size,
                training.micro_batch_size,
                Clock(training.device),
                training.ranks,
            )
            double.optimizer.register_step_pre_hook(_saver(model, folder, name))
            torch.manual_seed(seed)
            next(arm.train(double, _in_training_mode(model, [rows])))
        except Exception as error:
            notes[name] = f"not in float64: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return notes


def _saver(model: nn.Module, folder: Path, name: str) -> Callable[..., None]:
    def save(*_: object) -> None:
        save_gradients(model, folder, name)

    return save
