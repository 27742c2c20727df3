"""A precision: the dtype that forward passes compute in, the loss scaler, and the dtype that gradients are summed in.

Sources: Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740, section 3.2 on loss scaling;
`torch.autocast` and `torch.amp.GradScaler`, https://docs.pytorch.org/docs/stable/amp.html; `torch.Tensor.grad_dtype`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gradfold.engine.loss_terms import LossFn, LossOutput
from gradfold.errors import OptionError
from gradfold.state.gradients import SumDtype
from gradfold.torch_private import has_unscaled

__all__ = ["Precision"]

SAVED_SCALER: Mapping[str, str] = {  # what torch's scaler saves, for `state.saved`
    **{"scale": "number", "growth_factor": "number", "backoff_factor": "number"},
    **{"growth_interval": "count", "_growth_tracker": "count"},
}


@dataclass(frozen=True)
class Precision:
    """What is computed in which precision.

    Attributes:
        compute: autocast's dtype around `loss_fn` (the model and the loss; batch and parameters are unchanged); None
            leaves autocast to the user.
        grad_scaler: scales the loss, so that small gradients survive in float16. It is part of the `grad_output` of the
            backward pass; `.grad` is scaled until `grad_scaler.unscale_(optimizer)`.
        accumulate_dtype: what gradients of parameters in a smaller dtype are summed in, at the cost of a gradient of
            that size: for bfloat16 parameters 4 bytes for each instead of 2, until the window closes. None: in the
            parameter's own dtype, where a sum over 128 micro-batches is off by 1 %.
        keep_accumulate_dtype: leave `.grad` in that dtype, for optimizers that take it (SGD does, Adam does not; it
            refuses other gradients than its parameters'). Else the sum is rounded once to the parameter's dtype.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(10, 1, dtype=torch.bfloat16)
    >>> def loss_fn(model, batch):
    ...     return model(batch).float().square().mean()
    >>> keep = gradfold.Precision(keep_accumulate_dtype=True)
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, precision=keep)
    >>> _ = accumulator.backward(torch.randn(32, 10, dtype=torch.bfloat16))
    >>> model.weight.grad.dtype
    torch.float32
    """

    compute: torch.dtype | None = None
    grad_scaler: torch.amp.GradScaler | None = None
    accumulate_dtype: torch.dtype | None = torch.float32
    keep_accumulate_dtype: bool = False

    def __post_init__(self) -> None:
        for name, dtype in (("compute", self.compute), ("accumulate_dtype", self.accumulate_dtype)):
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise OptionError(f"{name}={dtype!r}; expected a floating point dtype such as torch.bfloat16, or None.")
        if self.compute not in (None, torch.bfloat16, torch.float16):
            raise OptionError(f"compute={self.compute}; autocast takes torch.bfloat16 or torch.float16.")
        if self.grad_scaler is not None and not isinstance(self.grad_scaler, torch.amp.GradScaler):
            raise OptionError(
                f"grad_scaler is a {type(self.grad_scaler).__name__}; expected a torch.amp.GradScaler(device)."
            )
        if self.keep_accumulate_dtype and self.accumulate_dtype is None:
            raise OptionError("keep_accumulate_dtype=True needs an accumulate_dtype to keep, such as torch.float32.")

    def around(self, loss_fn: LossFn) -> LossFn:
        """`loss_fn` under autocast, on the device of the model's first parameter; itself where `compute` is None."""
        if self.compute is None:
            return loss_fn
        dtype = self.compute

        def run(model: nn.Module, batch: Any) -> LossOutput:
            with torch.autocast(next(model.parameters()).device.type, dtype):
                return loss_fn(model, batch)

        return run

    @property
    def sums(self) -> SumDtype:
        """What gradients are summed in."""
        return SumDtype(self.accumulate_dtype, self.keep_accumulate_dtype)

    @property
    def is_scaled(self) -> bool:
        """Whether a loss scaler is at work, which decides about gradients that are not finite."""
        return self.grad_scaler is not None and self.grad_scaler.is_enabled()


class LeftGradients:
    """The gradients that windows have left in `.grad`, each with the loss scaler that has scaled it, if any."""

    def __init__(self) -> None:
        self.is_used = False  # whether this process has a loss scaler; before that nothing has to be noted
        self._left: MutableMapping[Tensor, tuple[torch.amp.GradScaler | None, int]] = WeakTensorKeyDictionary()

    def note(self, parameters: Iterable[nn.Parameter], precision: Precision) -> None:
        """A window has left the gradients of these."""
        scaler = precision.grad_scaler if precision.is_scaled else None
        for parameter in parameters:
            if parameter.grad is not None:
                self._left[parameter.grad] = scaler, parameter.grad._version

    def check(self, model: nn.Module, precision: Precision) -> None:
        """Raise OptionError where a window finds gradients that are certain to have another scale than its own.

        What was written to since (zeroed, clipped, added to) may have any; so may what this library did not leave.
        """
        own = precision.grad_scaler if precision.is_scaled else None
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is None or gradient not in self._left:
                continue
            scaler, version = self._left[gradient]
            if scaler is own or version != gradient._version:
                continue
            if own is None and scaler is not None and has_unscaled(scaler):  # perhaps this one: then it has no scale
                continue
            if gradient.layout is torch.strided and not gradient.any():  # `.data.zero_()`
                continue
            before = "scaled by another loss scaler" if scaler is not None else "without a loss scale"
            here = "has none" if own is None else "has its own"
            also = "" if own is not None else ", or call grad_scaler.unscale_(optimizer) before this window"
            raise OptionError(
                f"{name}.grad holds a gradient {before}, from another Accumulator, and this Accumulator {here}, so "
                "their sum would have two scales. Share one loss scaler: write precision = "
                "gradfold.Precision(compute=torch.float16, grad_scaler=torch.amp.GradScaler("
                f'"{gradient.device.type}")) once, and pass precision=precision to both{also}. Zero gradients that are '
                "from an earlier update."
            )


LEFT_GRADIENTS = LeftGradients()

PrecisionOption: TypeAlias = Precision | Literal["bf16", "fp16"] | None


def read_option(option: PrecisionOption, model: nn.Module) -> Precision:
    """The precision that an option means; "fp16" makes a scaler for the device of the model's first parameter.

    Raises:
        OptionError: it is none, or torch's scaler would refuse the gradients that it makes.
    """
    if option == "fp16":
        device = next((parameter.device.type for parameter in model.parameters()), "cpu")
        option = Precision(compute=torch.float16, grad_scaler=torch.amp.GradScaler(device))
    elif option == "bf16":
        option = Precision(compute=torch.bfloat16)
    precision = Precision() if option is None else option
    if not isinstance(precision, Precision):
        raise OptionError(
            f'precision={option!r}; expected None (autocast is yours), "bf16", "fp16" or a gradfold.Precision.'
        )
    LEFT_GRADIENTS.is_used |= precision.is_scaled
    half = [name for name, one in model.named_parameters() if one.requires_grad and one.dtype == torch.float16]
    is_torch_s = precision.is_scaled and type(precision.grad_scaler) is torch.amp.GradScaler  # others may take float16
    if half and is_torch_s and not precision.keep_accumulate_dtype:
        raise OptionError(
            f"{half[0]} is float16, and GradScaler.unscale_ refuses float16 gradients. Leave the parameters in float32 "
            '(model.float()), which precision="fp16" computes in float16 anyway, or keep the sums in float32: '
            "Precision(..., keep_accumulate_dtype=True)."
        )
    return precision
