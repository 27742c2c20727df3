"""The lock of a window that a loop body runs: only its own backward passes may change gradients until its end."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from gradfold.errors import WindowError
from gradfold.messages import join_names

_ADVICE = (
    " inside the loop over a window, where the gradient is that of a part of the batch. Move it behind the loop: zero, "
    "clip and step once per window."
)


class WindowLock:
    """Notes gradients at the end of each backward pass; a torch optimizer that steps in the `with` block is refused."""

    def __init__(self, model: nn.Module) -> None:
        self._trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._gradients: list[tuple[Tensor | None, int]] | None = None  # None: no backward pass yet
        self._versions: list[int] = []

    def __enter__(self) -> WindowLock:
        self._handle = register_optimizer_step_pre_hook(self._refuse_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()

    def close(self) -> None:
        """A backward pass has ended."""
        self._gradients = [_mark(one) for one in self._trained.values()]
        self._versions = [one._version for one in self._trained.values()]

    def check(self, after_backward: bool = False) -> None:
        """Raise WindowError where gradients have changed since the last backward pass.

        Args:
            after_backward: whether no forward pass has come in between, which may change parameters (an embedding
                whose rows are renormalized).
        """
        if self._gradients is None:
            return
        pairs = zip(self._trained.items(), self._gradients, self._versions, strict=True)
        for (name, one), (gradient, version), own_version in pairs:
            if one.grad is not gradient or _mark(one)[1] != version:
                how = "zero_grad, clipping, a backward pass of another loss"
                raise WindowError(f"the gradient of {name} was changed ({how}){_ADVICE}")
            if after_backward and one._version != own_version:
                raise WindowError(f"{name} was changed{_ADVICE}")

    def _refuse_step(self, optimizer: Optimizer, *_: Any) -> None:
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        names = [name for name, one in self._trained.items() if id(one) in stepped]
        if names:
            raise WindowError(f"{type(optimizer).__name__}.step would move {join_names(names, 3)}{_ADVICE}")


def _mark(parameter: nn.Parameter) -> tuple[Tensor | None, int]:
    gradient = parameter.grad
    return gradient, 0 if gradient is None else gradient._version
