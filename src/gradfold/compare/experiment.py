"""One arm trained and measured: its cost, its losses, and the tensors by which it is compared with the others."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gradfold.compare.arms import Arm
from gradfold.compare.data import Sizes, epoch_order, in_float64, take_own, tensors
from gradfold.compare.loops import ArmTraining, Update, mean_loss, num_samples
from gradfold.compare.measure import watch_memory
from gradfold.compare.results import Curve, Measured, Tensors, save_gradients, save_parameters
from gradfold.distributed.process_group import ProcessGroup
from gradfold.errors import is_out_of_memory
from gradfold.memory.auto import MicroBatchChoice
from gradfold.memory.measure import PeakMemory, measure_peak
from gradfold.messages import first_line
from gradfold.workloads.workload import Workload

_WARM_UP_SAMPLES = 2
_NUM_CURVE_POINTS = 400


@dataclass(frozen=True)
class Experiment:
    """One arm on one workload."""

    workload: Workload
    arm: Arm
    sizes: Sizes
    seed: int  # draws the first weights and the order of samples
    folder: Path  # where gradients and weights are left for the parent process
    group: ProcessGroup | None = None  # the processes that share each global batch; None: this one has all of it

    def orders(self) -> list[Tensor]:
        """The order of samples in each epoch."""
        sizes = self.sizes
        epochs = range(sizes.num_epochs)
        return [epoch_order(sizes.num_samples, self.seed, epoch, self.workload.shuffle) for epoch in epochs]

    def start(self, workload: Workload | None = None, **sizes: int) -> ArmTraining:
        """A training from the seeded start; of a version of the workload or in other sizes, where they are passed."""
        return ArmTraining(self.arm, workload or self.workload, replace(self.sizes, **sizes), self.seed, self.group)

    def run(self, on_update: Callable[[Sequence[Update]], None]) -> Measured:
        """Train the arm and measure it; `on_update` is called after each update with all so far.

        Time and memory are read before the model is evaluated, before gradients are computed in float64 and before
        tensors are tracked; none of these touches them.
        """
        orders = self.orders()
        self._warm_up()
        training = self.start()
        save_parameters(training.model, self.folder, Tensors.START)
        updates: list[Update] = []
        self._hook_optimizer(training, updates)

        peak_memory = watch_memory(training.device)
        torch.manual_seed(self.seed)
        training.clock.begin("total")
        for update in training.run(orders):
            updates.append(update)
            with training.clock.phase("excluded"):
                on_update(updates)
        training.clock.end("total")
        memory = peak_memory()

        notes: dict[str, str] = {}
        try:
            save_parameters(training.model, self.folder, Tensors.FINAL)
        except OSError as error:  # a full disk costs one distance, not what was trained
            notes[Tensors.FINAL] = describe(error)
        scores = {} if self.workload.evaluate is None else self.workload.evaluate(training.model)
        notes |= self._measure_float64(orders[0])
        tracked = self._track(orders[0])
        if not updates[0].applied:
            notes[Tensors.GRADIENT_FLOAT32] = (
                "its loss scaler skipped the first update, whose scaled gradient overflowed"
            )
        num_skipped = sum(not update.applied for update in updates)
        return Measured(
            num_updates=len(updates) - num_skipped,
            num_samples=num_samples(updates),
            num_threads=torch.get_num_threads(),
            device=training.device.type,
            seconds=training.clock.seconds(),
            memory=memory,
            final_loss=mean_loss_since(updates, self.sizes.num_samples * (self.sizes.num_epochs - 1)),
            metrics={name: float(score) for name, score in scores.items()},
            curve=loss_curve(updates, _NUM_CURVE_POINTS),
            notes=notes,
            num_skipped=num_skipped,
            tracked=tracked,
        )

    def tune(self) -> MicroBatchChoice:
        """The micro-batch size that the library finds for this arm, before anything is measured."""
        accumulator = self.workload.make_accumulator(
            self.start().model,
            micro_batch_size="auto",
            precision=self.arm.precision,
            distributed=False,
            self_check=False,
        )
        return accumulator.tune(take_own(self.workload, self.orders()[0][: self.sizes.global_batch_size], self.group))

    def _warm_up(self) -> None:
        """Run one tiny update on a model that is thrown away.

        The first forward pass, backward pass and step of a process import modules, start threads and allocate
        workspaces, which would count as time and memory of whichever arm is measured. An error here comes again in
        training, where it is reported.
        """
        num_ranks = 1 if self.group is None else self.group.size
        num = min(_WARM_UP_SAMPLES * num_ranks, self.sizes.num_samples)
        # Among several ranks an error must end this one at once, since the others wait for it.
        with contextlib.suppress(Exception) if self.group is None else contextlib.nullcontext():
            training = self.start(global_batch_size=num, micro_batch_size=-(-num // num_ranks))
            next(training.run([torch.arange(num)]))

    def _hook_optimizer(self, training: ArmTraining, updates: Sequence[Update]) -> None:
        """Time every `optimizer.step()`, and save the gradient that the first one finds: alike for all arms."""

        def before(*_: object) -> None:
            if not updates:  # else a loss scaler skipped the first step, and this gradient is of other samples
                with training.clock.phase("excluded"):
                    save_gradients(training.model, self.folder, Tensors.GRADIENT_FLOAT32)
            training.clock.begin("update")

        training.optimizer.register_step_pre_hook(before)
        training.optimizer.register_step_post_hook(lambda *_: training.clock.end("update"))

    def _measure_float64(self, order: Tensor) -> dict[str, str]:
        """Save, in float64 and at the first weights, the gradients of the first and of the last, partial window.

        Returns why a gradient could not be computed, by its name: not every loss runs in float64.
        """
        size, last_window = self.sizes.global_batch_size, self.sizes.last_window
        parts = {Tensors.GRADIENT_FLOAT64: order[:size]}
        if last_window and self.arm.accumulates:
            parts[Tensors.LAST_WINDOW_FLOAT64] = order[-last_window:]
        notes: dict[str, str] = {}
        for name, rows in parts.items():
            try:
                self._save_float64(name, rows)
            except Exception as error:
                notes[name] = f"not in float64: {describe(error)}"
        return notes

    def _save_float64(self, name: str, rows: Tensor) -> None:
        training = self.start(in_float64(self.workload))
        training.optimizer.register_step_pre_hook(lambda *_: save_gradients(training.model, self.folder, name))
        torch.manual_seed(self.seed)
        next(training.run([rows]))

    def _track(self, order: Tensor) -> PeakMemory | None:
        """The memory of tensors in the first updates, on a model of its own, since the tracker takes time.

        Two global batches: the second update finds gradients and optimizer state in place. The data set is left out,
        since it is the same for all arms and may be larger than all else. None where the arm fails, which it will
        have done in training.
        """
        training = self.start()
        updates = training.run([order[: 2 * self.sizes.global_batch_size]])
        data = [] if self.workload.collate is not None else tensors(self.workload.train_data)
        with contextlib.suppress(Exception):
            return measure_peak(lambda: list(updates), model=training.model, optimizer=training.optimizer, ignore=data)
        return None


def describe(error: BaseException) -> str:
    """An error in one line; out of memory is named first."""
    return f"{'out of memory: ' if is_out_of_memory(error) else ''}{first_line(error)}".rstrip(": ")


def mean_loss_since(updates: Sequence[Update], sample: int) -> float:
    """The mean loss of the updates that end after this many samples."""
    return mean_loss(update for update, end in zip(updates, _ends(updates), strict=True) if end > sample)


def loss_curve(updates: Sequence[Update], num_points: int) -> Curve:
    """Loss against samples: means over equal stretches of samples, each placed at its middle."""
    stretch = max(num_samples(updates) / num_points, 1.0)
    seen, samples, losses = 0, [], []
    pairs = zip(updates, _ends(updates), strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: int((pair[1] - 1) // stretch)):
        of_stretch = [update for update, _ in group]
        num = num_samples(of_stretch)
        samples.append(seen + num / 2)
        losses.append(mean_loss(of_stretch))
        seen += num
    return Curve(tuple(samples), tuple(losses))


def _ends(updates: Iterable[Update]) -> list[int]:
    """The number of samples up to the end of each update."""
    return list(itertools.accumulate(update.num_samples for update in updates))
