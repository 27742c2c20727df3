"""A ledger: which backward passes what stands in an optimizer's `.grad` comes from, and who cleared or changed it.

A precise sum: gradients of low precision added up in float32 beside `.grad`, to measure what rounding takes away.

A stray: a parameter that gets gradients and is in no optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfold.doctor.instrumentation import Guard

__all__: list[str] = []

_MOST_WATCHED = 64  # parameters per optimizer, evenly spread
_MOST_SAMPLED = 4  # ... of which some elements are kept, to tell scaling from rewriting
_ELEMENTS = 4096

State = tuple[int, int] | None  # of a gradient: its tensor and version; None for none


@dataclass(frozen=True)
class Change:
    """What happened to gradients outside of backward passes.

    Attributes:
        kind: "none", "cleared", "rescaled" or "rewritten".
        ratio: what they were multiplied by, where they were rescaled.
    """

    kind: str
    ratio: float = 1.0


UNCHANGED = Change("none")


@dataclass
class GradientProvenance:
    """The gradients of one optimizer.

    Attributes:
        optimizer: whose parameters these are.
        number: of the optimizer, in order of making.
        entries: indices of the backward passes whose sum stands in `.grad`, oldest first.
        stepped: how many of the first entries a step has used already.
        ratio: what the gradients were multiplied by hand since they were empty.
        is_rewritten: whether they were changed by hand in another way.
    """

    optimizer: weakref.ref[Optimizer]
    number: int
    entries: list[int] = field(default_factory=list)
    stepped: int = 0
    ratio: float = 1.0
    is_rewritten: bool = False
    _watched: list[Tensor] = field(default_factory=list)
    _num_parameters: int = -1
    _states: list[State] = field(default_factory=list)
    _samples: dict[int, Tensor] = field(default_factory=dict)
    _values: list[tuple[Tensor, int, Tensor]] = field(default_factory=list)

    def watched(self) -> list[Tensor]:
        """Some of the optimizer's parameters that need gradients."""
        optimizer = self.optimizer()
        if optimizer is None:
            return []
        count = 0
        for group in optimizer.param_groups:
            count += len(group["params"])
        if count != self._num_parameters:
            everything = [one for group in optimizer.param_groups for one in group["params"]]
            needed = [one for one in everything if isinstance(one, Tensor)]
            stride = max(1, -(-len(needed) // _MOST_WATCHED))
            self._watched, self._num_parameters = needed[::stride], count
            self._states = [None] * len(self._watched)
        return self._watched

    def states(self) -> list[State]:
        """Of each watched parameter's gradient."""
        return [None if (grad := one.grad) is None else (id(grad), grad._version) for one in self.watched()]

    def change(self) -> Change:
        """What happened since `remember`, by comparing; without reading a device where nothing did."""
        if self.optimizer() is None:
            return UNCHANGED
        now = self.states()
        pairs = [(index, old, new) for index, (old, new) in enumerate(zip(self._states, now, strict=True)) if old]
        if not pairs or all(old == new for _, old, new in pairs):
            return UNCHANGED
        changed = [(index, new) for index, old, new in pairs if old != new]
        if all(new is None for _, new in changed):
            return Change("cleared") if len(changed) == len(pairs) else Change("rewritten")
        kept = [grad for index, new in changed if new is not None and (grad := self._watched[index].grad) is not None]
        if len(changed) == len(pairs) and not any(bool(grad.any()) for grad in map(_dense, kept)):
            return Change("cleared")
        return self._scaling()

    def _scaling(self) -> Change:
        old_parts, new_parts = [], []
        for index, old in self._samples.items():
            grad = self._watched[index].grad
            if grad is None:
                return Change("rewritten")
            new_parts.append(_sample(grad).double())
            old_parts.append(old.double())
        if not old_parts:
            return Change("rewritten")
        old, new = torch.cat(old_parts), torch.cat(new_parts)
        square = float(old.dot(old))
        if square == 0 or not torch.isfinite(new).all():
            return Change("rewritten")
        ratio = float(old.dot(new)) / square
        off = float((new - ratio * old).norm()) / max(float(new.norm()), 1e-300)
        if off > 1e-2:
            return Change("rewritten")
        return UNCHANGED if abs(ratio - 1) < 1e-4 else Change("rescaled", ratio)

    def remember(self) -> None:
        """Take the gradients as they are now for known."""
        self._states = self.states()
        self._samples = {}
        for index, parameter in enumerate(self._watched):
            if len(self._samples) == _MOST_SAMPLED:
                break
            if parameter.grad is not None and parameter.grad.layout == torch.strided:
                self._samples[index] = _sample(parameter.grad).clone()

    def remember_parameters(self) -> None:
        """Take the parameters as they are now for known."""
        some = [one for one in self.watched() if one.requires_grad and one.layout == torch.strided]
        self._values = [(one, one._version, _sample(one, 16).clone()) for one in some[:2] + some[-1:]]

    def parameters_moved(self) -> bool:
        """Whether the parameters changed since then: by hand, if no step was made."""
        return any(one._version != version for one, version, _ in self._values) or any(
            not torch.equal(_sample(one, 16), values) for one, _, values in self._values
        )

    def what_a_step_finds(self) -> str:
        """In `.grad`: "new" gradients, "none" (no parameter has one), "zero" (all are) or "stale" (a step's before)."""
        grads = [one.grad for one in self.watched() if one.grad is not None]
        if not grads:
            return "none"
        if len(self.entries) > self.stepped or self.is_rewritten:
            return "new"
        if all(grad.layout == torch.strided and not bool(grad.any()) for grad in grads):
            return "zero"
        return "stale" if self.entries else "new"

    def dtypes(self) -> set[str]:
        """Of the gradients."""
        return {str(one.grad.dtype).removeprefix("torch.") for one in self.watched() if one.grad is not None}

    def shares_with(self, other: GradientProvenance) -> bool:
        """Whether both have a parameter in common."""
        if not self._watched or not other._watched:  # of an optimizer that is gone they are still known
            return other is self
        return other is self or not {id(one) for one in self._watched}.isdisjoint(map(id, other._watched))

    def has_hooks(self) -> bool:
        """Whether hooks of the user's see the gradients of parameters, and may change them."""
        return any(
            not hasattr(hook, "gradfold_doctor")
            for one in self.watched()
            for hooks in (one._backward_hooks, getattr(one, "_post_accumulate_grad_hooks", None))
            for hook in (hooks or {}).values()
        )

    def empty(self) -> None:
        """Nothing stands in `.grad` any more."""
        self.entries, self.stepped, self.ratio, self.is_rewritten = [], 0, 1.0, False


def _dense(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def _sample(tensor: Tensor, most: int = _ELEMENTS) -> Tensor:
    flat = tensor.detach()
    if flat.dim() != 1:
        flat = flat.reshape(-1)
    return flat if flat.numel() <= most else flat.narrow(0, 0, most)


_LOW = (torch.bfloat16, torch.float16)
_MOST_ELEMENTS = 1_000_000


class PreciseSums:
    """Sums of the gradients of some parameters in bfloat16 or float16, by optimizer.

    Args:
        guard: between what adds up and the script's backward passes.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._sums: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # by optimizer and parameter: it, and its sum
        self._size = 0

    def prepare(self, ledgers: list[GradientProvenance]) -> None:
        """Begin to add up the parameters of low precision that are not added up yet, as far as they are few."""
        for ledger in ledgers:
            sums = self._sums.setdefault(ledger.number, {})
            for one in ledger.watched():
                if one.dtype not in _LOW or not one.requires_grad or id(one) in sums:
                    continue
                if self._size + one.numel() > _MOST_ELEMENTS:
                    break
                self._size += one.numel()
                total = torch.zeros_like(one, dtype=torch.float32, requires_grad=False)
                sums[id(one)] = one, total
                hook = partial(self._guard.attempt, "a gradient", partial(_add, total))
                hook.gradfold_doctor = True  # type: ignore[attr-defined]
                one.register_hook(hook)  # type: ignore[no-untyped-call]

    def empty(self, ledger: int) -> None:
        """The gradients of an optimizer were zeroed."""
        for _, total in self._sums.get(ledger, {}).values():
            total.zero_()

    def error(self, ledger: int) -> float | None:
        """How far an optimizer's gradients are from the precise sums, relative to them; None where nothing is summed.

        A factor common to all (from clipping) is no error.
        """
        pairs = [(one.grad, total) for one, total in self._sums.get(ledger, {}).values() if one.grad is not None]
        if not pairs or any(grad.dtype not in _LOW for grad, _ in pairs):
            return None
        grads = torch.cat([grad.detach().flatten().double() for grad, _ in pairs])
        sums = torch.cat([total.flatten().double() for _, total in pairs])
        square = float(sums.dot(sums))
        if not square:
            return None
        ratio = float(grads.dot(sums)) / square
        return float((grads - ratio * sums).norm()) / (abs(ratio) * square**0.5) if ratio else None


def _add(total: Tensor, grad: Tensor) -> None:
    total.add_(grad.detach())


_KEPT_ELEMENTS = 16  # kept of each, to see whether it was changed by hand


class UnoptimizedParameters:
    """All strays met so far.

    Attributes:
        parameters: by id; kept alive, so that ids stay theirs.
        backwards: by id, the numbers of the backward passes that gave it a gradient.
    """

    def __init__(self) -> None:
        self.parameters: dict[int, Tensor] = {}
        self.backwards: dict[int, list[int]] = {}
        self._values: dict[int, Tensor] = {}

    def note(self, leaves: Iterable[Tensor], known: set[int], index: int) -> None:
        """A backward pass reaches leaves, of which those with known ids have an optimizer."""
        for leaf in leaves:
            if not isinstance(leaf, nn.Parameter) or id(leaf) in known:
                continue
            if id(leaf) not in self.parameters:
                self.parameters[id(leaf)] = leaf
                self._values[id(leaf)] = _some(leaf).clone()
            self.backwards.setdefault(id(leaf), []).append(index)

    def entries(self, parameters: Iterable[Tensor]) -> list[int]:
        """The backward passes whose gradients stand in parameters that have just got an optimizer."""
        found: set[int] = set()
        for one in parameters:
            if one.grad is not None and bool(one.grad.any()):
                found.update(self.backwards.get(id(one), ()))
        return sorted(found)

    def unmoved(self, known: set[int]) -> dict[int, Tensor]:
        """Those that have got no optimizer since, and that nothing changed by hand."""
        return {
            key: one
            for key, one in self.parameters.items()
            if key not in known and torch.equal(_some(one), self._values[key])
        }


def _some(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten()[:_KEPT_ELEMENTS]
