"""The loss graph: the means and sums that a loss consists of, their divisors, and rows that it compares."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from gradfold.engine.graph import walk
from gradfold.torch_private import ACCUMULATE_GRAD, read_number

_MARK = "gradfold"  # in a node's metadata: what is known about it from outside the graph
_MOST_NODES = 64
_SUMS = ("AddBackward0", "SubBackward0")
_SHAPES = ("View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Expand", "Permute", "T", "Transpose")
_COPIES = ("AsStrided", "ToCopy", "Clone", "Alias")
# Nodes of operators that change the shape, the dtype or the device of their input, and no value.
UNCHANGED_VALUES = {"CopyBackwards", "SqueezeBackward1", *(f"{name}Backward0" for name in _SHAPES + _COPIES)}

_MOST_NODES_OF_LOSS = 2_000
_MOST_NODES_OF_PARAMETER = 8  # between a parameter and the operator that uses it
_PRODUCTS = ("MmBackward0", "BmmBackward0", "CdistBackward0", "EuclideanDistBackward0", "AddmmBackward0")
_TRANSPOSING = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
# Where an operator keeps its input; an input that needs no gradient is the model's.
INPUTS = ("mat1", "self", "input", "indices", "x1", "x2")


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
    has_class_weights: bool = False  # then a mean divides by the sum of these

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


def terms_of(loss: Tensor, grad_output: Tensor | None = None) -> tuple[DividedTerm, ...]:
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
        divisors = (Divisor(_inverse(number(grad_output)), by_division=False),)
    elif grad_output is not None:
        return (DividedTerm("grad_output", "unknown"),)
    return tuple(term for _, term in _nodes_of_terms(loss, divisors))


def denominators_of(loss: Tensor) -> dict[Any, float]:
    """The last operators of the means that a loss is the sum of, with what each divides by; empty where one is none."""
    found: dict[Any, float] = {}
    for node, term in _nodes_of_terms(loss, ()):
        divides = [one.value for one in term.divisors if float(one.value) > 0]
        count = term.count if term.reduction == "mean" else divides[-1] if term.reduction == "sum" and divides else None
        if count is None or not float(count) > 0:
            return {}
        found[node] = float(count)
    return found


def _nodes_of_terms(loss: Tensor, divisors: tuple[Divisor, ...]) -> list[tuple[Any, DividedTerm]]:
    """The terms of a loss, each with the operator that it ends in."""
    found: list[tuple[Any, DividedTerm]] = []
    stack = [(loss.grad_fn, divisors)]
    for _ in range(_MOST_NODES):
        if not stack:
            return found
        node, divisors = stack.pop()
        if node is not None:
            terms: list[DividedTerm] = []
            stack += _follow(node, divisors, terms)
            found += [(node, term) for term in terms]
    return [*found, (None, DividedTerm("deep", "unknown"))]


def _num_terms(node: Any) -> int:
    """How many losses a node sums; 1 where it is not a sum."""
    is_loss: Callable[[Any], bool] = lambda one: one.name() not in _SUMS  # noqa: E731
    return max(sum(map(is_loss, walk([node], _MOST_NODES, is_loss))), 1)


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
    return 1 / value if isinstance(value, Tensor) or value else float("inf")


def _saved(node: Any, name: str) -> Any:
    """What an operator keeps; not where a hook packed it, since unpacking may run a checkpoint again."""
    hook = getattr(getattr(node, f"_raw_saved_{name}", None), "unpack_hook", None)
    return None if hook is not None else getattr(node, f"_saved_{name}", None)


def number(value: Any) -> float | Tensor:
    """A float; or a copy of a tensor on a device, since reading it would wait for the device."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().clone()
    return float(read_number(value) if isinstance(value, Tensor) else value)


def _term(node: Any, name: str, divisors: tuple[Divisor, ...]) -> DividedTerm:
    read = partial(_saved, node)
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
        ignored = ctypes.c_int64(read("ignore_index")).value  # which the node keeps without a sign
        count = None if target is None else (target != ignored).sum()
    counted = None if count is None else number(count)
    return DividedTerm(name, reduction, counted, size, rows, divisors, target, weight is not None)


def compared_rows(loss: Tensor) -> list[int]:
    """Rows of the square matrices that compare samples with each other, and of products summed over samples.

    Of the graph between the loss and the model's last layers: attention inside the model does not count.
    """
    found: list[int] = []
    rows: list[int] = []  # of the node visited last

    def is_last_layer(node: Any) -> bool:
        return bool(rows) or any(_is_parameter(child) for child, _ in node.next_functions)

    for node in walk([loss.grad_fn], _MOST_NODES_OF_LOSS, is_last_layer):
        rows = _compared_rows(node)
        found += rows
    return found


def _compared_rows(node: Any) -> list[int]:
    """Rows of a square matrix of products or distances between samples, or rows that a product is summed over."""
    name = node.name()
    if name not in _PRODUCTS or not all(_depends_on_data(child) for child, _ in node.next_functions[:2]):
        return []
    first, second = _sizes(node, ("self", "x1", "mat1")), _sizes(node, ("mat2", "x2"))
    if name == "BmmBackward0":  # an einsum over two matrices is one product of a stack of one
        if first[:1] != (1,) or second[:1] != (1,):
            return []
        first, second = first[1:], second[1:]
    if len(first) < 2 or len(second) < 2:
        return []
    if name in ("CdistBackward0", "EuclideanDistBackward0"):
        found = [first[-2]] if first[-2] == second[-2] else []
    else:
        child = node.next_functions[0][0]
        is_transposed = child is not None and child.name() in _TRANSPOSING  # z.T @ z sums over the rows of z
        found = [first[-2]] if first[-2] == second[-1] else []
        found += [first[-1]] if is_transposed and first[-1] == second[-2] else []
    return [rows for rows in found if rows > 1]


def _sizes(node: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    for name in names:
        saved = _saved(node, name)
        sizes = getattr(node, f"_saved_{name}_sym_sizes", saved.shape if isinstance(saved, Tensor) else None)
        if sizes is not None:
            return tuple(sizes)
    return ()


def _depends_on_data(root: Any) -> bool:
    """Whether a tensor that needs no gradient goes into a product or a look-up below: not weights alone."""
    kept = (_saved(node, name) for node in walk([root], _MOST_NODES_OF_LOSS) for name in INPUTS)
    return any(isinstance(one, Tensor) and not one.requires_grad and one.numel() > 1 for one in kept)


def _is_parameter(node: Any) -> bool:
    """Whether this is a parameter of more than one number, in its own or in another shape."""
    for _ in range(_MOST_NODES_OF_PARAMETER - 1):
        if node is not None and node.name() in UNCHANGED_VALUES:
            node = node.next_functions[0][0]
    return node is not None and node.name() == ACCUMULATE_GRAD and bool(node.variable.numel() > 1)
