"""The loss graph: how a loss was made, as its autograd graph tells: of which means or sums, divided by what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

__all__: list[str] = []

_MARK = "gradfold.doctor"  # in a node's metadata: what the doctor knows about it from outside the graph
_MOST_NODES = 64
_SHAPES = (
    "View",
    "ReshapeAlias",
    "UnsafeView",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Permute",
    "T",
    "Transpose",
    "AsStrided",
)
_COPIES = ("ToCopy", "Clone", "Alias")
_ALIKE = frozenset(f"{name}Backward0" for name in (*_SHAPES, *_COPIES)) | {"CopyBackwards", "SqueezeBackward1"}


@dataclass(frozen=True)
class Divisor:
    """A number that a loss was divided by.

    Attributes:
        value: the number; a tensor on a device is read later.
        by_division: whether with `/`, and not by multiplying with its inverse.
        num_terms: how many terms the dividend is the sum of, 1 for a loss that is no sum of losses.
    """

    value: float | Tensor
    by_division: bool
    num_terms: int = 1


@dataclass(frozen=True)
class DividedTerm:
    """One mean or sum that a loss consists of.

    Attributes:
        kind: name of the operator in the graph, without "Backward0".
        reduction: "mean", "sum" or "unknown".
        count: what a mean divides by, or how many valid targets a sum has; a tensor on a device is read later.
        size: how many elements were reduced, valid or not; 0 where it is not known.
        rows: rows of the reduced tensor; 0 where it is not known.
        divisors: what the term was divided by on its way to the loss, outermost first.
        target: the targets, where the operator keeps them.
    """

    kind: str
    reduction: str
    count: float | Tensor | None = None
    size: int = 0
    rows: int = 0
    divisors: tuple[Divisor, ...] = ()
    target: Tensor | None = field(default=None, compare=False)

    @property
    def scale(self) -> float:
        """The product of one over all divisors."""
        product = 1.0
        for divisor in self.divisors:
            product /= float(divisor.value) or float("inf")
        return product


def mark(loss: Any, what: Any) -> None:
    """Say something about a loss, in its node."""
    if isinstance(loss, Tensor) and loss.grad_fn is not None:
        cast(dict[str, Any], loss.grad_fn.metadata)[_MARK] = what


def mark_of(loss: Tensor) -> Any:
    """What was said about a loss; None for nothing."""
    return None if loss.grad_fn is None else cast(dict[str, Any], loss.grad_fn.metadata).get(_MARK)


def terms_of(loss: Tensor, seed: Tensor | None) -> tuple[DividedTerm, ...]:
    """The means and sums that a loss consists of.

    Example:
        >>> import torch
        >>> weight = torch.ones(3, requires_grad=True)
        >>> (term,) = terms_of((weight * 2).mean() / 4, None)
        >>> term.kind, term.reduction, term.size, term.scale
        ('Mean', 'mean', 3, 0.25)
    """
    divisors: tuple[Divisor, ...] = ()
    if seed is not None and seed.numel() == 1:
        divisors = (Divisor(_inverse(seed), by_division=False),)
    elif seed is not None:
        return (DividedTerm("seed", "unknown"),)
    found: list[DividedTerm] = []
    left = [(loss.grad_fn, divisors)]
    for _ in range(_MOST_NODES):
        if not left:
            return tuple(found)
        node, divisors = left.pop()
        if node is not None:
            left += _follow(node, divisors, found)
    return (*found, DividedTerm("deep", "unknown"))


def terms_below(node: Any) -> int:
    """How many losses a node adds up; 1 where it is no sum of several."""
    name, count, queue = node.name(), 0, [node]
    if name not in ("AddBackward0", "SubBackward0"):
        return 1
    for _ in range(_MOST_NODES):
        if not queue:
            break
        one = queue.pop()
        if one.name() in ("AddBackward0", "SubBackward0"):
            queue += [child for child, _ in one.next_functions if child is not None]
        else:
            count += 1
    return max(count, 1)


def _follow(
    node: Any, divisors: tuple[Divisor, ...], found: list[DividedTerm]
) -> list[tuple[Any, tuple[Divisor, ...]]]:
    """What is further down; a term is added to `found`."""
    said = node.metadata.get(_MARK)
    children = [child for child, _ in node.next_functions]
    if said == "scaled":  # by a GradScaler, which takes it back
        return [(child, divisors) for child in children if child is not None][:1]
    if isinstance(said, DividedTerm):
        found.append(replace(said, divisors=divisors))
        return []
    name = node.name().partition("Backward")[0]
    if node.name() in _ALIKE:
        return [(children[0], divisors)]
    if name in ("Add", "Sub") and getattr(node, "_saved_alpha", 1) == 1:
        sign = [Divisor(-1.0, by_division=False)] if name == "Sub" else []
        second = [(child, (*divisors, *sign)) for child in children[1:]]
        return [pair for pair in [(children[0], divisors), *second] if pair[0] is not None]
    if name == "Neg":
        return [(children[0], (*divisors, Divisor(-1.0, by_division=False)))]
    if name in ("Div", "Mul"):
        scaled = _scaled(node, name, children)
        if scaled is not None:
            child, divisor = scaled
            return [(child, (*divisors, divisor))]
    found.append(_term(node, name, divisors))
    return []


def _scaled(node: Any, name: str, children: list[Any]) -> tuple[Any, Divisor] | None:
    """The loss and the number of `loss / number`, `loss * number` or `number * loss`."""
    child = next((child for child in children if child is not None), None)
    if child is None or sum(one is not None for one in children) != 1:
        return None
    factor = getattr(node, "_saved_other", None)
    if factor is None and name == "Mul":
        factor = getattr(node, "_saved_self", None)
    if factor is None or (isinstance(factor, Tensor) and factor.numel() != 1):
        return None
    value = _number(factor)
    if name == "Mul":
        return child, Divisor(_inverse(value), by_division=False, num_terms=terms_below(child))
    return child, Divisor(value, by_division=True, num_terms=terms_below(child))


def _inverse(value: float | Tensor) -> float | Tensor:
    value = _number(value) if isinstance(value, Tensor) else value
    if isinstance(value, Tensor):
        return 1 / value
    return 1 / value if value else float("inf")


def _number(value: Any) -> float | Tensor:
    """A float, or a copy of a tensor that lives on a device, which reading would wait for."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().clone()
    return float(torch._C.TensorBase.item(value)) if isinstance(value, Tensor) else float(value)  # not the patched one


def _term(node: Any, name: str, divisors: tuple[Divisor, ...]) -> DividedTerm:
    read: Callable[[str], Any] = lambda field: getattr(node, f"_saved_{field}", None)  # noqa: E731
    if node.name() in ("MeanBackward0", "SumBackward0"):
        sizes = tuple(read("self_sym_sizes") or ())
        size = int(torch.Size(sizes).numel())
        reduction = "mean" if name == "Mean" else "sum"
        return DividedTerm(name, reduction, size if name == "Mean" else None, size, sizes[0] if sizes else 0, divisors)
    reduction = {1: "mean", 2: "sum"}.get(read("reduction") or 0, "unknown")
    if reduction == "unknown":
        return DividedTerm(name, "unknown", divisors=divisors)
    target, count, weight = read("target"), read("total_weight"), read("weight")
    size = target.numel() if isinstance(target, Tensor) else 0
    rows = len(target) if isinstance(target, Tensor) and target.dim() else 0
    if count is None:
        count = float(size)
    elif weight is not None and name.startswith("Nll"):
        count = None if target is None else (target != _signed(read("ignore_index"))).sum()
    number = None if count is None else _number(count)
    return DividedTerm(name, reduction, number, size, rows, divisors, target)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
