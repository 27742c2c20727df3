"""The loss graph: the means and sums that a loss consists of, and their divisors, as its autograd graph tells them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from gradfold.doctor.torch_private import read_number

_MARK = "gradfold.doctor"  # in a node's metadata: what the doctor knows about it from outside the graph
_MOST_NODES = 64
_SUMS = ("AddBackward0", "SubBackward0")
_SHAPES = ("View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Expand", "Permute", "T", "Transpose")
_COPIES = ("AsStrided", "ToCopy", "Clone", "Alias")
# Nodes of operators that change the shape, the dtype or the device of their input, and no value.
UNCHANGED_VALUES = {"CopyBackwards", "SqueezeBackward1", *(f"{name}Backward0" for name in _SHAPES + _COPIES)}


@dataclass(frozen=True)
class Divisor:
    """A number that a loss was divided by."""

    value: float | Tensor  # a tensor on a device is read later
    by_division: bool  # whether with `/`, and not by multiplying with its inverse
    num_terms: int = 1  # how many losses the dividend is the sum of


@dataclass(frozen=True)
class DividedTerm:
    """One mean or sum that a loss consists of."""

    kind: str  # name of the operator in the graph, without "Backward0"
    reduction: str  # "mean", "sum" or "unknown"
    count: float | Tensor | None = None  # what a mean divides by, or how many valid targets a sum has
    size: int = 0  # how many elements were reduced, valid or not; 0 where unknown
    rows: int = 0  # of the reduced tensor; 0 where unknown
    divisors: tuple[Divisor, ...] = ()  # what the term was divided by on its way to the loss, outermost first
    target: Tensor | None = field(default=None, compare=False)

    @property
    def scale(self) -> float:
        """The product of the inverse divisors."""
        product = 1.0
        for divisor in self.divisors:
            product /= float(divisor.value) or float("inf")
        return product


def mark(loss: Any, value: Any) -> None:
    """Attach a value to a loss, in its node."""
    if isinstance(loss, Tensor) and loss.grad_fn is not None:
        cast(dict[str, Any], loss.grad_fn.metadata)[_MARK] = value


def mark_of(loss: Tensor) -> Any:
    """The value attached to a loss, or None."""
    return None if loss.grad_fn is None else cast(dict[str, Any], loss.grad_fn.metadata).get(_MARK)


def walk(root: Any, most: int, stops_at: Callable[[Any], bool] = lambda node: False) -> Iterator[Any]:
    """The nodes of a graph, depth first, each once and at most so many; none below those where `stops_at` is true."""
    seen: set[Any] = set()
    stack = [root]
    while stack and len(seen) < most:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not stops_at(node):
            stack += [child for child, _ in node.next_functions]


def terms_of(loss: Tensor, grad_output: Tensor | None) -> tuple[DividedTerm, ...]:
    """The means and sums that a loss consists of.

    Example:
        >>> import torch
        >>> weight = torch.ones(3, requires_grad=True)
        >>> (term,) = terms_of((weight * 2).mean() / 4, None)
        >>> term.kind, term.reduction, term.size, term.scale
        ('Mean', 'mean', 3, 0.25)
    """
    divisors: tuple[Divisor, ...] = ()
    if grad_output is not None and grad_output.numel() == 1:
        divisors = (Divisor(_inverse(grad_output), by_division=False),)
    elif grad_output is not None:
        return (DividedTerm("grad_output", "unknown"),)
    found: list[DividedTerm] = []
    stack = [(loss.grad_fn, divisors)]
    for _ in range(_MOST_NODES):
        if not stack:
            return tuple(found)
        node, divisors = stack.pop()
        if node is not None:
            stack += _follow(node, divisors, found)
    return (*found, DividedTerm("deep", "unknown"))


def _num_terms(node: Any) -> int:
    """How many losses a node sums; 1 where it is not a sum."""
    is_loss: Callable[[Any], bool] = lambda one: one.name() not in _SUMS  # noqa: E731
    return max(sum(map(is_loss, walk(node, _MOST_NODES, is_loss))), 1)


def _follow(
    node: Any, divisors: tuple[Divisor, ...], found: list[DividedTerm]
) -> list[tuple[Any, tuple[Divisor, ...]]]:
    """The next nodes to visit; where the node is a term, none, and the term is added to `found`."""
    value = node.metadata.get(_MARK)
    children = [child for child, _ in node.next_functions]
    if value == "scaled":  # by a GradScaler, which unscales the gradients
        return [(child, divisors) for child in children if child is not None][:1]
    if isinstance(value, DividedTerm):
        found.append(replace(value, divisors=divisors))
        return []
    name = node.name().partition("Backward")[0]
    if node.name() in UNCHANGED_VALUES:
        return [(children[0], divisors)]
    if name in ("Add", "Sub") and getattr(node, "_saved_alpha", 1) == 1:
        signs = ((), (Divisor(-1.0, by_division=False),) if name == "Sub" else ())
        return [(child, (*divisors, *sign)) for child, sign in zip(children, signs, strict=False) if child is not None]
    if name == "Neg":
        return [(children[0], (*divisors, Divisor(-1.0, by_division=False)))]
    losses = [child for child in children if child is not None]
    if name in ("Div", "Mul") and len(losses) == 1 and (divisor := _divisor(node, name, losses[0])) is not None:
        return [(losses[0], (*divisors, divisor))]
    found.append(_term(node, name, divisors))
    return []


def _divisor(node: Any, name: str, loss: Any) -> Divisor | None:
    """The number of `loss / number`, `loss * number` or `number * loss`."""
    factor = getattr(node, "_saved_other", None)
    if factor is None and name == "Mul":
        factor = getattr(node, "_saved_self", None)
    if factor is None or (isinstance(factor, Tensor) and factor.numel() != 1):
        return None
    is_division, value = name == "Div", number(factor)
    return Divisor(value if is_division else _inverse(value), is_division, _num_terms(loss))


def _inverse(value: float | Tensor) -> float | Tensor:
    value = number(value) if isinstance(value, Tensor) else value
    return 1 / value if isinstance(value, Tensor) or value else float("inf")


def number(value: Any) -> float | Tensor:
    """A float; or a copy of a tensor on a device, since reading it would wait for the device."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().clone()
    return float(read_number(value) if isinstance(value, Tensor) else value)


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
    return DividedTerm(name, reduction, None if count is None else number(count), size, rows, divisors, target)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
