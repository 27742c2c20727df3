"""The lock of a window that a loop body runs: only its own backward passes may change gradients until its end."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter, is_
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from gradfold.errors import WindowError
from gradfold.messages import join_names

_GRADIENT, _VERSION = attrgetter("grad"), attrgetter("_version")
_ADVICE = (
    " inside the loop over a window, where the gradient is that of a part of the batch. Move it behind the loop: zero, "
    "clip and step once per window."
)


class WindowLock:
    """Notes gradients at the end of each backward pass; a torch optimizer that steps in the `with` block is refused."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self._model = model
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._gradients: list[Tensor | None] = []  # empty: no backward pass yet
        self._held: list[Tensor] = []  # those of them that are there
        self._versions: list[int] = []
        self._own_versions: list[int] = []

    def __enter__(self) -> WindowLock:
        self._handle = register_optimizer_step_pre_hook(self._refuse_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()

    def close(self) -> None:
        """A backward pass has ended."""
        gradients = list(map(_GRADIENT, self._parameters))
        if not self._gradients or not all(map(is_, gradients, self._gradients)):
            self._gradients = gradients
            self._held = [gradient for gradient in gradients if gradient is not None]
        self._versions = list(map(_VERSION, self._held))
        self._own_versions = list(map(_VERSION, self._parameters))

    def check_gradients(self) -> None:
        """Raise WindowError where gradients have changed since the last backward pass."""
        if not self._gradients:
            return
        are_same = list(map(is_, map(_GRADIENT, self._parameters), self._gradients))
        if not all(are_same) or list(map(_VERSION, self._held)) != self._versions:
            names = self._names(one for one, is_same in zip(self._parameters, are_same, strict=True) if not is_same)
            names = names or self._names(self._parameters)
            how = "zero_grad, clipping, a backward pass of another loss"
            raise WindowError(f"the gradient of {join_names(names, 3)} was changed ({how}){_ADVICE}")

    def check_parameters(self) -> None:
        """Raise WindowError where parameters have; a forward pass may change some (embeddings with a `max_norm`)."""
        if self._gradients and list(map(_VERSION, self._parameters)) != self._own_versions:
            raise WindowError(f"parameters were changed{_ADVICE}")

    def _refuse_step(self, optimizer: Optimizer, *_: Any) -> None:
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        names = self._names(one for one in self._parameters if id(one) in stepped)
        if names:
            raise WindowError(f"{type(optimizer).__name__}.step would move {join_names(names, 3)}{_ADVICE}")

    def _names(self, parameters: Iterable[nn.Parameter]) -> list[str]:
        chosen = set(map(id, parameters))
        return [name for name, parameter in self._model.named_parameters() if id(parameter) in chosen]
