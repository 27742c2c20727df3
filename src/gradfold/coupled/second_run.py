"""The second run of a two-phase loss's micro-batches: what has arrived at their statistics goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradfold.backward import Weighed
from gradfold.coupled.statistics import Statistics
from gradfold.coupled.two_phase import Statistic
from gradfold.errors import LossError
from gradfold.loss import Loss, LossOutput
from gradfold.random_state import HostRandomState, RandomState
from gradfold.window import Forward, OpenWindow

__all__: list[str] = []


@dataclass(frozen=True)
class WholeLoss:
    """What the loss of the whole batch gave: its terms, detached, and metrics.

    Attributes:
        reaches_parameters: whether some parameter got a gradient from it by itself.
        has_graph: whether it depends on anything that has a gradient.
    """

    loss: Loss
    metrics: Mapping[str, Any]
    reaches_parameters: bool
    has_graph: bool


@dataclass(frozen=True)
class States:
    """The random states of torch, numpy and Python."""

    torch: RandomState
    host: HostRandomState

    @classmethod
    def record(cls, parameters: Iterable[Tensor]) -> States:
        """The states now, of the devices of some tensors."""
        return cls(RandomState.record(parameters), HostRandomState.record())

    def restore(self) -> None:
        """Set the generators back."""
        self.torch.restore()
        self.host.restore()


class SecondRun:
    """The third phase, run by any schedule of plain windows.

    In its `with` block `loss_fn` of the window gives each micro-batch its part of what is known.

    Attributes:
        deviations: by micro-batch, how far its statistics are from what they were.
    """

    def __init__(
        self,
        window: OpenWindow,
        statistic: Statistic,
        statistics: Statistics,
        states: Mapping[int, States],
        whole: WholeLoss,
        forward: Forward,
    ) -> None:
        self.deviations: dict[int, Tensor] = {}
        self._window = window
        self._statistic = statistic
        self._statistics = statistics
        self._states = states
        self._whole = whole
        self._forward = forward
        self._reaches_parameters = whole.reaches_parameters
        self._weighed: Weighed = []
        self._stack = ExitStack()

    def __enter__(self) -> SecondRun:
        self._stack.enter_context(calling(self._window, self._run))
        self._end = States.record(self._window.model.parameters())
        return self

    def __exit__(self, *error: object) -> None:
        self._end.restore()
        self._stack.close()

    def forward(self, index: int) -> Weighed:
        """Run a micro-batch again; gives its statistics, each with the gradient that has arrived at it."""
        self._window.check_unchanged(index)
        self._states[index].restore()
        self._forward(index)
        weighed, self._weighed = self._weighed, []
        self._reaches_parameters |= bool(weighed)
        return weighed

    def check_reach(self) -> None:
        """Raise LossError where neither the loss nor the statistics of any micro-batch led to a parameter."""
        if not self._reaches_parameters:
            raise LossError(
                "no statistic requires grad: nothing connects the loss to the model's parameters. Look for "
                "torch.no_grad(), .detach() or an argmax in statistic(model, micro_batch), and for frozen parameters."
            )

    def _run(self, model: nn.Module, batch: Any) -> LossOutput:
        index = self._window.current
        output = self._statistic(model, batch)
        self._weighed = self._statistics.weigh(index, output)
        self.deviations[index] = self._statistics.deviation(index, output)
        metrics = {name: self._of_rows(name, value, index) for name, value in self._whole.metrics.items()}
        return (self._whole.loss, metrics) if metrics else self._whole.loss

    def _of_rows(self, name: str, value: Any, index: int) -> Any:
        """A metric of the whole batch, or its rows for a micro-batch."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        total = self._statistics.num_samples
        if len(value) != total:
            raise LossError(
                f"the metric {name!r} has shape {tuple(value.shape)} for a batch of {total} rows; expected a 0-d "
                "tensor or one entry per row in dim 0."
            )
        before = sum(len(part.rows) for part in self._window.micro_batches[:index])
        return value.narrow(0, self._statistics.first_sample + before, len(self._window.micro_batches[index].rows))


@contextmanager
def calling(window: OpenWindow, loss_fn: Callable[[Any, Any], Any]) -> Iterator[None]:
    """The window calls another `loss_fn`."""
    before, window.loss_fn = window.loss_fn, loss_fn
    try:
        yield
    finally:
        window.loss_fn = before
