"""The lock of a window that a loop body runs: only its own backward passes may change gradients until its end."""

from __future__ import annotations

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

    def __init__(self, model: nn.Module) -> None:
        self._trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._parameters = list(self._trained.values())
        self._gradients: list[Tensor | None] | None = None  # None: no backward pass yet
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
        self._gradients = list(map(_GRADIENT, self._parameters))
        self._versions = _versions(self._gradients)
        self._own_versions = list(map(_VERSION, self._parameters))

    def check(self, after_backward: bool = False) -> None:
        """Raise WindowError where gradients have changed since the last backward pass.

        Args:
            after_backward: whether no forward pass has come in between, which may change parameters (an embedding
                whose rows are renormalized).
        """
        if self._gradients is None:
            return
        gradients = list(map(_GRADIENT, self._parameters))
        if not all(map(is_, gradients, self._gradients)) or _versions(gradients) != self._versions:
            marks = zip(self._trained, gradients, self._gradients, strict=True)
            changed = [name for name, now, before in marks if now is not before] or list(self._trained)
            how = "zero_grad, clipping, a backward pass of another loss"
            raise WindowError(f"the gradient of {join_names(changed, 3)} was changed ({how}){_ADVICE}")
        if after_backward and list(map(_VERSION, self._parameters)) != self._own_versions:
            raise WindowError(f"parameters were changed{_ADVICE}")

    def _refuse_step(self, optimizer: Optimizer, *_: Any) -> None:
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        names = [name for name, one in self._trained.items() if id(one) in stepped]
        if names:
            raise WindowError(f"{type(optimizer).__name__}.step would move {join_names(names, 3)}{_ADVICE}")


def _versions(gradients: list[Tensor | None]) -> list[int]:
    return [gradient._version for gradient in gradients if gradient is not None]
