"""The state of gradients: which backward passes they come from, what else changed them, and what rounding took away.

torch does not report changes to `.grad`. So at each event tensors and their version counters are compared with those
remembered at the event before; of large optimizers, a sample of the parameters.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfold.doctor.instrumentation import Guard

_MOST_PARAMETERS = 64  # watched per optimizer, evenly spread
_MOST_SAMPLED = 4  # ... of which some elements are kept, to tell scaling from rewriting
_ELEMENTS = 4096
_FEW_ELEMENTS = 16  # kept of a parameter, to see whether it was changed by hand
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_MOST_ELEMENTS_SUMMED = 1_000_000

Version = tuple[int, int] | None  # of a gradient: its tensor's id and version; None where there is no gradient


# What gradients were multiplied by, where that is not a number in between.
UNCHANGED, CLEARED, REWRITTEN = 1.0, 0.0, math.nan


@dataclass
class GradientProvenance:
    """The backward passes that the gradients of one optimizer come from."""

    optimizer: weakref.ref[Optimizer]
    name: str  # of the optimizer's class
    number: int  # of the optimizer, in order of making
    backwards: list[int] = field(default_factory=list)  # those whose sum is in `.grad`, oldest first
    num_stepped: int = 0  # how many of the first of them a step has used already
    ratio: float = 1.0  # what the gradients were multiplied by, outside of backward passes, since they were empty
    is_rewritten: bool = False  # whether they were changed in another way
    _watched: list[Tensor] = field(default_factory=list)
    _num_parameters: int = -1
    _versions: list[Version] = field(default_factory=list)
    _samples: dict[int, Tensor] = field(default_factory=dict)
    _values: list[tuple[Tensor, int, Tensor]] = field(default_factory=list)

    @property
    def unused(self) -> tuple[int, ...]:
        """The backward passes in `.grad` that no step has used."""
        return tuple(self.backwards[self.num_stepped :])

    def watched(self) -> list[Tensor]:
        """Some of the optimizer's parameters."""
        optimizer = self.optimizer()
        if optimizer is None:
            return []
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if count != self._num_parameters:
            tensors = [one for group in optimizer.param_groups for one in group["params"] if isinstance(one, Tensor)]
            stride = max(1, -(-len(tensors) // _MOST_PARAMETERS))
            self._watched, self._num_parameters = tensors[::stride], count
            self._versions = [None] * len(self._watched)
        return self._watched

    def versions(self) -> list[Version]:
        """Of each watched parameter's gradient."""
        return [None if (grad := one.grad) is None else (id(grad), grad._version) for one in self.watched()]

    def change(self) -> float:
        """What the gradients were multiplied by since `remember`; where nothing happened, no device is read."""
        if self.optimizer() is None:
            return UNCHANGED
        now = self.versions()
        pairs = [(index, old, new) for index, (old, new) in enumerate(zip(self._versions, now, strict=True)) if old]
        changed = [(index, new) for index, old, new in pairs if old != new]
        if not changed:
            return UNCHANGED
        all_changed = len(changed) == len(pairs)
        if all(new is None for _, new in changed):
            return CLEARED if all_changed else REWRITTEN
        kept = [grad for index, new in changed if new is not None and (grad := self._watched[index].grad) is not None]
        if all_changed and not any(bool(grad.any()) for grad in map(_dense, kept)):
            return CLEARED
        return self._rescaling()

    def _rescaling(self) -> float:
        grads = [self._watched[index].grad for index in self._samples]
        if not grads or any(grad is None for grad in grads):
            return REWRITTEN
        old = _concatenate(self._samples.values())
        new = _concatenate(_sample(grad) for grad in grads if grad is not None)
        ratio, off = _scaling(old, new)
        if not off <= 1e-2 * float(new.norm()) or not ratio:
            return REWRITTEN
        return UNCHANGED if abs(ratio - 1) < 1e-4 else ratio

    def remember(self) -> None:
        """Compare later changes with the gradients as they are now."""
        self._versions = self.versions()
        grads = [(index, grad) for index, one in enumerate(self._watched) if (grad := one.grad) is not None]
        strided = [(index, grad) for index, grad in grads if grad.layout == torch.strided]
        self._samples = {index: _sample(grad).clone() for index, grad in strided[:_MOST_SAMPLED]}

    def remember_parameters(self) -> None:
        """Compare later changes with the parameters as they are now."""
        some = [one for one in self.watched() if one.requires_grad and one.layout == torch.strided]
        self._values = [(one, one._version, _sample(one, _FEW_ELEMENTS).clone()) for one in some[:2] + some[-1:]]

    def parameters_changed(self) -> bool:
        """Whether the parameters changed since then: by hand, if no step was made."""
        return any(one._version != version for one, version, _ in self._values) or any(
            not torch.equal(_sample(one, _FEW_ELEMENTS), values) for one, _, values in self._values
        )

    def found_by_step(self) -> tuple[tuple[int, ...], int, str]:
        """What a step finds in `.grad`, as the fields `backwards`, `num_reused` and `gradients` of `Step`."""
        grads = [one.grad for one in self.watched() if one.grad is not None]
        kind = "none"
        if grads and (self.unused or self.is_rewritten):
            kind = "new"
        elif grads:
            is_zero = all(grad.layout == torch.strided and not bool(grad.any()) for grad in grads)
            kind = "zero" if is_zero else "stale" if self.backwards else "new"
        return tuple(self.backwards), self.num_stepped, kind

    def dtypes(self) -> set[str]:
        """Of the gradients."""
        return {str(one.grad.dtype).removeprefix("torch.") for one in self.watched() if one.grad is not None}

    def shares_with(self, other: GradientProvenance) -> bool:
        """Whether both have a parameter in common."""
        return other is self or not {id(one) for one in self._watched}.isdisjoint(map(id, other._watched))

    def has_hooks(self) -> bool:
        """Whether the user's hooks see the gradients of parameters, and may change them."""
        return any(
            not hasattr(hook, "gradfold_doctor")
            for one in self.watched()
            for hooks in (one._backward_hooks, getattr(one, "_post_accumulate_grad_hooks", None))
            for hook in (hooks or {}).values()
        )

    def clear(self) -> None:
        """Nothing is in `.grad` any more."""
        self.backwards, self.num_stepped, self.ratio, self.is_rewritten = [], 0, 1.0, False


def _dense(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def _sample(tensor: Tensor, most: int = _ELEMENTS) -> Tensor:
    return tensor.detach().reshape(-1)[:most]


def _concatenate(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([one.detach().flatten().double() for one in tensors])


def _scaling(old: Tensor, new: Tensor) -> tuple[float, float]:
    """The factor that is nearest to making the old numbers the new ones, and how far off the norm then is."""
    square = float(old.dot(old))
    ratio = float(old.dot(new)) / square if square else 0.0
    return ratio, float((new - ratio * old).norm()) if square else float("nan")


class PreciseSums:
    """Gradients in bfloat16 or float16, summed in float32 beside `.grad` to measure the rounding of `.grad`."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._sums: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # by optimizer and parameter: it, and its sum
        self._size = 0

    def start(self, provenances: list[GradientProvenance]) -> None:
        """Begin to sum the gradients of parameters in low precision, up to a number of elements."""
        for provenance in provenances:
            sums = self._sums.setdefault(provenance.number, {})
            for one in provenance.watched():
                if one.dtype not in _LOW_PRECISION or not one.requires_grad or id(one) in sums:
                    continue
                if self._size + one.numel() > _MOST_ELEMENTS_SUMMED:
                    break
                self._size += one.numel()
                total = torch.zeros_like(one, dtype=torch.float32, requires_grad=False)
                sums[id(one)] = one, total
                hook = partial(self._guard.attempt, "a gradient", partial(_add, total))
                hook.gradfold_doctor = True  # type: ignore[attr-defined]
                one.register_hook(hook)  # type: ignore[no-untyped-call]

    def clear(self, optimizer: int) -> None:
        """The gradients of an optimizer were zeroed."""
        for _, total in self._sums.get(optimizer, {}).values():
            total.zero_()

    def error(self, optimizer: int) -> float | None:
        """The relative error of an optimizer's gradients, up to a factor (from clipping); None where not measured."""
        pairs = [(one.grad, total) for one, total in self._sums.get(optimizer, {}).values() if one.grad is not None]
        if not pairs or any(grad.dtype not in _LOW_PRECISION for grad, _ in pairs):
            return None
        sums = _concatenate(total for _, total in pairs)
        ratio, off = _scaling(sums, _concatenate(grad for grad, _ in pairs))
        return off / (abs(ratio) * float(sums.norm())) if ratio else None


def _add(total: Tensor, grad: Tensor) -> None:
    total.add_(grad.detach())


class UnoptimizedParameters:
    """The parameters that got a gradient and were in no optimizer then, each with the backward passes; kept alive."""

    def __init__(self) -> None:
        self.backwards: dict[Tensor, list[int]] = {}
        self._values: dict[Tensor, Tensor] = {}

    def record(self, leaves: Iterable[Tensor], optimized: set[int], index: int) -> None:
        """A backward pass reaches leaves, of which those with `optimized` ids are in an optimizer."""
        for leaf in leaves:
            if isinstance(leaf, nn.Parameter) and id(leaf) not in optimized:
                if leaf not in self.backwards:
                    self._values[leaf] = _sample(leaf, _FEW_ELEMENTS).clone()
                self.backwards.setdefault(leaf, []).append(index)

    def backwards_of(self, parameters: Iterable[Tensor]) -> list[int]:
        """The backward passes whose gradients are in parameters that have just been given to an optimizer."""
        some = [one for one in parameters if one.grad is not None and bool(one.grad.any())]
        return sorted({index for one in some for index in self.backwards.get(one, ())})

    def unchanged(self, optimized: set[int]) -> dict[Tensor, list[int]]:
        """Those that are in no optimizer now either, and that nothing changed by hand; with their backward passes."""
        some = {one: backwards for one, backwards in self.backwards.items() if id(one) not in optimized}
        return {one: some[one] for one in some if torch.equal(_sample(one, _FEW_ELEMENTS), self._values[one])}
