"""A training step: one update from one global batch, each part of it once and in the right order."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gradfold.accumulator import Accumulator
from gradfold.batch.nesting import Batch
from gradfold.engine.result import WindowResult
from gradfold.errors import OptionError, TrainStepError
from gradfold.self_check.torch_private import tree_leaves
from gradfold.state.gradients import clip_norm
from gradfold.state.saved import check_saved, loaded

__all__ = ["StepResult", "TrainStep"]


class Scheduler(Protocol):
    """A learning-rate scheduler that is stepped once per update."""

    def step(self) -> object: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


@dataclass(frozen=True)
class StepResult(WindowResult):
    """What one update did: the result of the window (see `WindowResult`; the loss is that before the update), and this.

    Attributes:
        grad_norm: 2-norm of the gradient before clipping, 0-d; None without `max_grad_norm`.
        applied: whether the parameters were updated. They are not for a batch of weight 0, for one that was skipped
            since its gradient was not finite, and for one whose scaled gradient overflowed.
    """

    grad_norm: Tensor | None = None
    applied: bool = False


class TrainStep:
    """Zero, backward, unscale, clip, step, update the loss scale, schedule: one update per global batch.

    Gradients are zeroed *first*, those of the accumulator's model and of the optimizer's parameters: what another loss
    left there (a GAN's generator in its discriminator) does not leak in, and gradients can be looked at afterwards.

    Args:
        accumulator: makes the gradient.
        optimizer: any torch optimizer whose `step()` needs no closure. It may hold weights of its own (float32 ones of
            a bfloat16 model), if it keeps the model's parameters, too; then these gradients are clipped.
        scheduler: stepped once per applied update. Step a schedule that counts epochs yourself, once per epoch.
        max_grad_norm: clip the gradient of the whole batch to this 2-norm, over all the optimizer's parameters;
            `math.inf` measures it without clipping.

    Attributes:
        updates: updates applied so far.
        skipped: batches that were not applied.
        samples: rows of all batches of all ranks so far, skipped ones included: the position in the data.

    Raises:
        TrainStepError: the optimizer needs a closure, or the scheduler's `step` needs an argument; the message has the
            lines to write instead.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(10, 1)
    >>> def loss_fn(model, batch):
    ...     return torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8)
    >>> step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.1), max_grad_norm=1.0)
    >>> result = step({"x": torch.randn(33, 10), "y": torch.randn(33, 1)})
    >>> result.applied, step.updates, step.samples
    (True, 1, 33)
    """

    def __init__(
        self,
        accumulator: Accumulator,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self._has_masters = _has_masters(accumulator, optimizer)
        _refuse_closure(getattr(optimizer, "optimizer", optimizer))  # Accelerate and Fabric wrap what they prepare
        if scheduler is not None:
            _check_scheduler(getattr(scheduler, "scheduler", scheduler))
        is_limit = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool) and max_grad_norm > 0
        if max_grad_norm is not None and not is_limit:
            raise OptionError(f"max_grad_norm={max_grad_norm!r}; expected a positive number or None.")
        self.accumulator = accumulator
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.max_grad_norm = max_grad_norm
        self.updates = self.skipped = self.samples = 0

    def __call__(self, batch: Batch) -> StepResult:
        """Train on one global batch; takes and raises what `Accumulator.backward` does."""
        self.optimizer.zero_grad()
        self.accumulator.model.zero_grad()
        window = self.accumulator.backward(batch)
        self.samples += self.accumulator._context.coordinator.count_rows(window.num_samples)
        grad_norm, applied = (None, False) if window.is_empty or window.is_skipped else self._update()
        self.updates += applied
        self.skipped += not applied
        return StepResult(**vars(window), grad_norm=grad_norm, applied=applied)

    def _update(self) -> tuple[Tensor | None, bool]:
        """Unscale, clip, step, update the scale, schedule; the norm of the gradient, and whether the step was made."""
        scaler = self.accumulator.grad_scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        grad_norm = None
        if self.max_grad_norm is not None:
            stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            model = self.accumulator.model
            grad_norm = clip_norm(model.parameters() if self._has_masters else stepped, self.max_grad_norm)
        if scaler is None:
            self.optimizer.step()
            applied = True
        else:
            scale = scaler.get_scale()
            scaler.step(self.optimizer)
            scaler.update()
            # What torch documents nowhere: step() says nothing of a step that it left out, but then the scale falls; to
            # 0 where every gradient is NaN, and no step is made from there.
            applied = 0 < scale <= scaler.get_scale()
        if applied and self.scheduler is not None:
            self.scheduler.step()
        return grad_norm, applied

    def state_dict(self) -> dict[str, Any]:
        """Counters, scheduler and accumulator; save the model, the optimizer and the loader beside it."""
        return {
            "updates": self.updates,
            "skipped": self.skipped,
            "samples": self.samples,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "accumulator": self.accumulator.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Everything is checked before anything changes.

        Raises:
            OptionError: it is not a state of a TrainStep, with the place where it is not; or it has a scheduler or a
                loss scaler and this step has none, or the other way round.
        """
        counts = {"updates": "count", "skipped": "count", "samples": "count"}
        is_torch_s = isinstance(self.scheduler, LRScheduler) and hasattr(self.scheduler, "last_epoch")
        schedule = {"last_epoch": "count"} if is_torch_s else {}  # torch's take any other dict for theirs
        check_saved(state, {**counts, "scheduler": (None, schedule), "accumulator": {}}, "a TrainStep")
        self.accumulator.check_state(state["accumulator"], "state['accumulator']")
        if (state["scheduler"] is None) != (self.scheduler is None):
            there, here = ("no", "one") if state["scheduler"] is None else ("a", "none")
            raise OptionError(
                f"the saved state has {there} scheduler, and this TrainStep has {here}: build it like the saved one."
            )
        with loaded(self.scheduler, state["scheduler"], "state['scheduler']"):
            self.accumulator.load_state_dict(state["accumulator"])
            self.updates, self.skipped, self.samples = (state[name] for name in counts)


def _has_masters(accumulator: object, optimizer: object) -> bool:
    """Whether the optimizer steps with weights of its own; TrainStepError where it knows nothing of the model."""
    if not isinstance(accumulator, Accumulator):
        raise TrainStepError(
            f"accumulator is a {type(accumulator).__name__}; expected a gradfold.Accumulator: "
            "TrainStep(Accumulator(model, loss_fn, ...), optimizer)."
        )
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise TrainStepError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
    own = {id(parameter) for parameter in accumulator.model.parameters()}
    if any(id(parameter) in own for group in groups for parameter in group["params"]):
        return False
    held = tree_leaves(vars(getattr(optimizer, "optimizer", optimizer)))
    modules = [one for one in held if isinstance(one, nn.Module)]
    if own.isdisjoint(map(id, chain(held, *[module.parameters() for module in modules]))):
        raise TrainStepError(
            f"no parameter of the optimizer belongs to the accumulator's {type(accumulator.model).__name__}: its steps "
            "would train nothing. Build the optimizer from accumulator.model.parameters(), after the model is final."
        )
    if accumulator.grad_scaler is not None:
        raise TrainStepError(
            "a loss scaler is not supported with an optimizer that holds weights of its own: it looks for gradients "
            "that are not finite in these. Train in bfloat16, or in a loop of your own."
        )
    return True


def _refuse_closure(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):  # SAM and its kin
        raise TrainStepError(
            f"{name} makes two gradients per update, which TrainStep does not. Write\n"
            "    accumulator.backward(batch)\n"
            "    optimizer.first_step(zero_grad=True)\n"
            "    accumulator.backward(batch)\n"
            "    optimizer.second_step(zero_grad=True)"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TrainStepError(
            f"{name}.step needs a closure and calls it as often as it likes, which TrainStep does not. Write\n"
            "    def closure():\n"
            "        optimizer.zero_grad()\n"
            "        return accumulator.backward(batch).loss\n"
            "    optimizer.step(closure)"
        )


def _check_scheduler(scheduler: Any) -> None:
    """Raise TrainStepError unless it is stepped without arguments."""
    step = getattr(scheduler, "step", None)
    if not callable(step):
        raise TrainStepError(f"scheduler is {scheduler!r}; expected a learning-rate scheduler or None.")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TrainStepError(
            "ReduceLROnPlateau needs a metric, usually once per epoch, which TrainStep does not know. Leave it out of "
            "TrainStep and write, after each epoch,\n"
            "    scheduler.step(validation_loss)"
        )
    try:
        inspect.signature(step).bind()
    except TypeError as error:
        raise TrainStepError(
            f"{type(scheduler).__name__}.step cannot be called as step(): {error}. Leave it out of TrainStep, and step "
            "it after each update or epoch with what it needs: scheduler.step(epoch)."
        ) from None
    except ValueError:  # a builtin without a signature
        return
