"""What a proof leaves untouched: a user's model, and all else that a loss reaches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gradfold.accumulator import Accumulator
from gradfold.backward import BackPropagation
from gradfold.trial import Trial

__all__: list[str] = []


class Untouched:
    """A user's model, and all else that a loss reaches, is as it was when the `with` block ends."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._parameters = list(accumulator.model.parameters())
        self._trial = Trial(accumulator.model, accumulator.loss_fn, BackPropagation())
        self._found: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Untouched:
        self._stack.callback(self._put_back)
        self.set_aside(self._parameters)
        self._stack.enter_context(self._trial)  # buffers, attributes, random states
        self._stack.enter_context(torch.enable_grad())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def set_aside(self, tensors: Sequence[Tensor]) -> None:
        """Keep the gradients of tensors that backward passes are about to add to."""
        for tensor in tensors:
            if id(tensor) not in self._found:
                self._found[id(tensor)] = (tensor, tensor.grad)
                tensor.grad = None

    def rewind(self) -> None:
        """Set torch's, numpy's and Python's random states to where they were at the beginning."""
        self._trial.rewind()

    def _put_back(self) -> None:
        for tensor, gradient in self._found.values():
            tensor.grad = gradient
