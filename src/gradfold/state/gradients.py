"""The gradients: the `.grad` fields of a model's parameters as one value, set aside while a window fills new ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from gradfold.torch_private import check_and_unscale, foreach_add

_LARGE = 2**16  # elements, of which one more call costs less than writing them
_DTYPE, _ITEMSIZE = attrgetter("dtype"), attrgetter("itemsize")

FROZEN, DENSE, SPARSE, FOUND = 1, 2, 4, 8
"""What processes tell each other of a parameter: it is frozen, its new gradient is dense or sparse, one was found."""


@dataclass(frozen=True)
class SumDtype:
    """What gradients of parameters in a smaller dtype are summed in.

    Attributes:
        dtype: that dtype (`Tensor.grad_dtype`); None: each parameter's own, where a sum over many micro-batches loses
            what is small.
        is_kept: leave the sums in that dtype; else they are rounded once, to the dtype of each parameter.
    """

    dtype: torch.dtype | None = None
    is_kept: bool = False


class GradientBuffer:
    """The gradients found in `.grad` when a window began, set aside by `open`; the fields are empty until it closes.

    Several losses may be back-propagated into one `.grad`: their sum is there when the window closes, in the *same*
    tensors as before, since flat buffers and optimizers may refer to them.

    Without `sums` each gradient is summed in its own dtype.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sums: SumDtype | None = None) -> None:
        self.parameters = parameters
        self._found: list[tuple[Tensor, Tensor]] = []
        for parameter in parameters:
            if parameter.grad is not None:
                self._found.append((parameter, parameter.grad))
        self.outside: Any = ()  # other tensors whose gradients are set aside, while they exist
        self._replaced: list[tuple[Tensor, Tensor]] = []  # sparse ones that were found, and what they held
        self._sums = sums or SumDtype()
        self._narrow: Sequence[nn.Parameter] = ()
        self._sum: tuple[Tensor, int] | None = None  # the last one that the new gradients are added to; its version

    def open(self) -> GradientBuffer:
        """Set the gradients found aside; `put_back` undoes that, also after an interrupt in here."""
        wide = self._sums.dtype
        if wide is not None and min(map(_ITEMSIZE, set(map(_DTYPE, self.parameters))), default=8) < wide.itemsize:
            self._narrow = _narrow(self.parameters, wide)
        for parameter, _ in self._found:
            parameter.grad = None
        if self._narrow:
            self._widen()
        return self

    def is_added(self) -> bool:
        """Whether the new gradients are in those found, which cannot be undone."""
        return self._sum is not None and self._sum[0]._version != self._sum[1]

    def layouts(self) -> bytes:
        """One byte per parameter: `FROZEN`, the layout of its new gradient if it has one, and whether it was found."""
        found = {id(parameter) for parameter, _ in self._found}
        return bytes(_layout(parameter) | (FOUND if id(parameter) in found else 0) for parameter in self.parameters)

    def fill(self) -> None:
        """Zeros where a parameter has no new gradient, for the case that another process has one.

        Repeated entries of sparse ones are merged, too: what takes memory is done before processes wait for each other.
        """
        for parameter in self.parameters:
            new = parameter.grad
            if new is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            elif new is not None and new.is_sparse:
                parameter.grad = new.coalesce()

    def in_layouts(self, layouts: bytes) -> list[Tensor]:
        """The new gradients, filled, sparse where `layouts` says so; those that no process has are dropped."""
        found = []
        for parameter, layout in zip(self.parameters, layouts, strict=True):
            gradient = parameter.grad
            if not layout & (DENSE | SPARSE) or gradient is None:
                parameter.grad = None
                continue
            if not layout & DENSE:
                gradient = gradient.coalesce() if gradient.is_sparse else gradient.to_sparse(1)  # as an embedding's
            elif gradient.is_sparse:
                gradient = gradient.to_dense()
            parameter.grad = gradient
            found.append(gradient)
        return found

    def settle(self) -> None:
        """The last micro-batch is done: round sums to the parameters' dtype, and merge repeated entries of sparse ones.

        One gradient after another, so that no two copies of all are alive.
        """
        for parameter in self.parameters:
            new = parameter.grad
            if new is not None and new.is_sparse:
                parameter.grad = new.coalesce()  # accumulation only concatenates
        if self._narrow and not self._sums.is_kept:
            self._round()

    def add_back(self) -> None:
        """Close: add what was found to the new gradients."""
        if self._found:
            self._add_found()

    @torch.no_grad()
    def _add_found(self) -> None:
        """Whatever may fail comes first, so that a failure finds nothing half added."""
        dense: list[tuple[Tensor, Tensor]] = []
        sparse: list[tuple[Tensor, Tensor]] = []
        sums: list[tuple[Tensor, Tensor]] = []
        for parameter, found in self._found:
            new = parameter.grad
            if new is None:
                sums.append((parameter, found))
            elif found.dtype != new.dtype or (found.is_sparse and not new.is_sparse):
                sums.append((parameter, new.add_(found)))  # a sparse tensor cannot take in a dense one
            elif not found.is_sparse and 0 in found.stride():
                sums.append((parameter, found + new))  # an expanded one cannot be written to
            elif found.is_sparse:
                sparse.append((found, found + new))
                sums.append((parameter, found))
            else:
                dense.append((found, new.to_dense() if new.is_sparse else new))
                sums.append((parameter, found))
        for parameter, total in sums:
            parameter.grad = total
        self._replaced = [(found, found.data) for found, _ in sparse]
        for found, total in sparse:
            found.data = total
        if dense:  # last, since it cannot be undone
            founds, news = [found for found, _ in dense], [new for _, new in dense]
            self._sum = founds[-1], founds[-1]._version
            foreach_add(founds, news)

    def empty(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop the new gradients, also of `parameters` (there may be more by now), to begin again."""
        for tensor in chain[Tensor](parameters, self.outside):
            tensor.grad = None
        self._widen()

    def put_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """Roll back: drop the new gradients, also of `parameters`, and leave those found."""
        for tensor in chain[Tensor](parameters, self.outside):
            tensor.grad = None
        for parameter in self._narrow:
            parameter.grad_dtype = parameter.dtype
        for found, held in self._replaced:
            found.data = held
        for holder, found in self._found:
            holder.grad = found

    def set_aside(self, tensors: Iterable[Tensor], only_empty: bool = False) -> Tensor | None:
        """Set aside the gradients of other tensors, too; with `only_empty` the first that has one is returned instead.

        What `loss_fn` makes for one micro-batch is not kept alive for it.
        """
        own = set(map(id, self.parameters))
        self.outside = self.outside or WeakTensorKeyDictionary()
        for tensor in tensors:
            if id(tensor) in own or tensor in self.outside:
                continue
            if tensor.grad is not None:
                if only_empty:
                    return tensor
                self._found.append((tensor, tensor.grad))
            self.outside[tensor] = None
            tensor.grad = None
        return None

    def discard(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave no gradient, neither the new ones of `parameters` nor those found."""
        self.put_back(parameters)
        for parameter, _ in self._found:
            parameter.grad = None

    def _widen(self) -> None:
        for parameter in self._narrow:
            parameter.grad_dtype = self._sums.dtype

    def _round(self) -> None:
        for parameter in self._narrow:
            new, parameter.grad = parameter.grad, None
            parameter.grad_dtype = parameter.dtype
            if new is not None:
                parameter.grad = new.to(parameter.dtype)


def _narrow(parameters: Iterable[nn.Parameter], accumulate_dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of a smaller floating point dtype; not those whose `grad_dtype` their owner has set."""
    return [
        parameter
        for parameter in parameters
        if parameter.dtype.itemsize < accumulate_dtype.itemsize
        and parameter.is_floating_point()
        and not is_lazy(parameter)
        and not hasattr(parameter, "full_tensor")  # a shard, whose gradient fully_shard puts there
        and parameter.grad_dtype == parameter.dtype
    ]


def non_finite_flags(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """0-d tensors of which one is not 0 where some gradient holds NaN or infinity; the host reads nothing here."""
    unknown: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and not (gradient.is_cpu and gradient.numel() >= _LARGE and has_finite_sum(gradient)):
            unknown.append(gradient)
    if not unknown:
        return []
    device = unknown[0].device
    flag = torch.zeros((), dtype=torch.float32, device=device)
    try:
        # The kernel of torch.amp.GradScaler.unscale_, with a scale of 1: one launch for all gradients, and a tenth of
        # the time that norms take on a CPU.
        check_and_unscale(unknown, flag, _one(device))
        return [flag]
    except RuntimeError:  # sparse or complex ones, or several devices
        return [_is_non_finite(gradient).float() for gradient in unknown]


def has_finite_sum(gradient: Tensor) -> bool:
    """Whether a large gradient on the host is known to be finite by its sum, for which it is read and not written.

    A sum that is not finite may have overflowed, and says nothing.
    """
    is_plain = type(gradient) is Tensor and gradient.layout is torch.strided  # a shard would ask other ranks
    return is_plain and gradient.is_floating_point() and math.isfinite(gradient.sum().item())


def _layout(parameter: nn.Parameter) -> int:
    if parameter.grad is None:
        return 0 if parameter.requires_grad else FROZEN
    return SPARSE if parameter.grad.is_sparse else DENSE


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)  # whatever the default dtype is at the first call


def non_finite_names(model: nn.Module) -> tuple[str, ...]:
    """The parameters whose gradient holds NaN or infinity, by name."""
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(_is_non_finite(parameter.grad))
    )


def _is_non_finite(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return ~values.isfinite().all()


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of these modules, each once: `model.parameters()` without another walk through the model."""
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
    return list(found.values())


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that several hold together (DTensor), as a view; of others all."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole_of(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a part; then all processes that hold one have to call this."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def clip_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a joint 2-norm of at most `max_norm`; gives the norm before, 0-d.

    As `torch.nn.utils.clip_grad_norm_`, which refuses sparse gradients.
    """
    values = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            parameter.grad = gradient = gradient.coalesce()
            gradient = gradient.values()
        if gradient is not None:
            values.append(gradient)
    norm = whole_of(torch.nn.utils.get_total_norm(values))
    if math.isinf(max_norm):
        return norm
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for value in values:
        value.mul_(factor.to(value.device))
    return norm
