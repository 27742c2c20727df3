"""Normalized rows: whether a BatchNorm normalizes rows of the batch, and nothing that each micro-batch brings anew.

The statistics of a window are those of the whole batch where the values that micro-batches bring add up to those that
the batch would bring. Prototypes do not: every micro-batch brings them, the batch once. Nor does padding, where the
micro-batch decides how much there is of it. How many values a call gets tells them apart:

    rows          as many for a micro-batch as for its two parts together
    one thing     as many for each part as for the whole; it is counted once, and must be the same everywhere
    a mixture     anything else: refused, since the statistics would be others

Leftovers: what a waiting forward pass has left on the modules, where those of other micro-batches would find it.

In lock-step the forward passes of all micro-batches are under way at once, on one model. What one of them has put there
and comes back for (a loss that a layer keeps, a list of features, a parameter in the place of another) the next one
overwrites.

A loss uncoupled: with fixed statistics in every BatchNorm, so that all else in it can be tried out on parts.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from gradfold.batch.nesting import Batch, in_own_containers, rows_if_any, structure
from gradfold.batch.split import MicroBatch
from gradfold.batchnorm.intercept import UNNAMED, BatchNormCall, BatchNormMode, by_fixed_statistics
from gradfold.batchnorm.moments import Moments
from gradfold.engine.loss_terms import LossFn, LossOutput, read_pair, read_terms
from gradfold.engine.window import Window
from gradfold.errors import BatchNormError
from gradfold.messages import warn
from gradfold.self_check.experiment import Observations

__all__: list[str] = []

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_FILLED = (list, dict, deque, set)
_PLAIN = (int, float, complex, str, bytes, type(None), Enum, type, range, slice, torch.dtype, torch.device)


class ModuleMutations:
    """The modules as they are before any forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (name, module, dict(vars(module)), dict(module._parameters), _buffers_of(module))
            for name, module in model.named_modules()
        ]
        self._contents = [
            (name, key, value, list(_inside(value)))
            for name, _, attributes, _, _ in self._modules
            for key, value in attributes.items()
            if key not in _OF_EVERY_MODULE and (isinstance(value, _FILLED) or not _is_plain(value))
        ]
        self._are_trained = [(name, one, one.requires_grad) for name, one in model.named_parameters()]
        self._values: list[_Value] = []

    def refuse(self, number: int, layer: str) -> None:
        """Look at what the forward pass of this number has left, which waits at this layer.

        Raises:
            BatchNormError: the first has left something; or another one, and these are numbers or text, others than
                the first. A count of calls is let pass, which is one more each time: it is the user's.
        """
        if number:
            self._refuse_other_values(number, layer)
            return
        self._values = []
        found = next(self._find(), None)
        if found is not None:
            raise _refused(layer, f"{found} is not what it was before")

    def _refuse_other_values(self, number: int, layer: str) -> None:
        for one in self._values:
            value = vars(one.module).get(one.key)
            if value != one.value and not one.is_count(value, number):
                where = f"the attribute {one.key!r} of {_named(one.name)}"
                raise _refused(layer, f"{where} is {one.value!r} in one micro-batch and {value!r} in another")

    def _find(self) -> Iterator[str]:
        for name, module, attributes, parameters, buffers in self._modules:
            yield from self._changed(name, module, attributes)
            if any(parameters.get(key) is not value for key, value in module._parameters.items()):
                yield f"a parameter of {_named(name)}"
            for key, value in buffers.items():
                if module._buffers.get(key) is not value:
                    yield f"the buffer {key!r} of {_named(name)}"
        for name, key, value, content in self._contents:
            inside = list(_inside(value))
            if len(inside) != len(content) or any(a is not b for a, b in zip(inside, content, strict=True)):
                yield f"what is in the attribute {key!r} of {_named(name)}"
        for name, parameter, is_trained in self._are_trained:
            if parameter.requires_grad != is_trained:
                yield f"whether {name} requires grad"

    def _changed(self, name: str, module: nn.Module, attributes: dict[str, Any]) -> Iterator[str]:
        for key, value in vars(module).items():
            if value is attributes.get(key) or key in _OF_EVERY_MODULE:
                continue
            if key == "training":
                yield f"the mode of {_named(name)} (training or not)"
            elif _is_plain(value):
                self._values.append(_Value(name, module, key, attributes.get(key), value))
            else:
                yield f"the attribute {key!r} of {_named(name)}"


@dataclass(frozen=True, slots=True)
class _Value:
    """A number or text, or some of them, that the first forward pass has left."""

    name: str
    module: nn.Module
    key: str
    before: Any
    value: Any

    def is_count(self, now: Any, number: int) -> bool:
        """Whether it goes on by as much in each micro-batch, of which this one is so many after the first."""
        before = 0 if self.before is None else self.before
        if not {type(before), type(self.value), type(now)} <= {int}:
            return False
        return bool(now - self.value == number * (self.value - before))


def _refused(layer: str, found: str) -> BatchNormError:
    return BatchNormError(
        f'while a forward pass waits at BatchNorm in {layer}, {found}. In batch_norm="exact" the forward passes of all '
        "micro-batches wait there at once, so that the next one would overwrite it. Hand values on as arguments and "
        "return them (to the loss, too), set modes before the loss, and leave torch.func.functional_call out; or use "
        'batch_norm="per_micro_batch".',
        (layer,),
    )


def _buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """But for counters, which go by themselves, and those of lazy layers, which the first forward pass makes."""
    if not module._buffers or isinstance(module, LazyModuleMixin):
        return {}
    if isinstance(module, _BatchNorm):
        return {key: value for key, value in module._buffers.items() if key != "num_batches_tracked"}
    return dict(module._buffers)


def _is_plain(value: Any) -> bool:
    """Numbers, text and the like, and whatever holds nothing else."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _inside(value: Any, depth: int = 3) -> Iterator[Any]:
    """What is in a container or an object, at any depth that is likely; nothing in anything else."""
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple, deque)):
        inside = value
    elif not isinstance(value, (Tensor, nn.Module, type)) and not callable(value):
        inside = getattr(value, "__dict__", {}).values()
    for one in inside:
        if not _is_plain(one):
            yield one
            if depth > 1:
                yield from _inside(one, depth - 1)


def _named(name: str) -> str:
    return name or "the model itself"


Key: TypeAlias = "tuple[Hashable, int, str]"
"""A call of batch_norm: the structure of the batch, its number in the forward pass, and the name of its layer."""


@dataclass(frozen=True)
class _Known:
    """What the guard has seen of a call.

    Attributes:
        kind: see above.
        is_even: whether every row brings as many values.
    """

    kind: Literal["rows", "one thing"]
    is_even: bool


class InputCounter:
    """Counts the values of each call in one run."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names  # by the id of the running mean
        self.counts: list[tuple[str, int]] = []

    def concerns(self, call: BatchNormCall) -> bool:
        """Whether it is one that a window would normalize by the batch; layers are held in evaluation mode here."""
        return call.is_training or id(call.running_mean) in self._names

    def count(self, call: BatchNormCall) -> Tensor:
        """Note a call; gives its result with fixed statistics, which couple no rows."""
        count = call.values.numel() // max(1, call.values.shape[1])
        self.counts.append((self._names.get(id(call.running_mean), UNNAMED), count))
        return by_fixed_statistics(call)


class InputDependence:
    """Knows the calls of one accumulator.

    Args:
        is_collated: whether micro-batches are collated one by one.
    """

    def __init__(self, is_collated: bool) -> None:
        self._runs: Observations[list[tuple[str, int]]] = Observations()
        self._structure: Hashable = None  # of the batch in these runs
        self.names: dict[int, str] = {}
        self._is_collated = is_collated
        self._known: dict[Key, _Known] = {}
        self._seen_to_differ: set[Key] = set()
        self._warned_of: set[str] = set()

    def note(self, batch: Batch, counts: list[tuple[str, int]]) -> None:
        """What a run of the guard has counted."""
        self._structure = structure(batch)
        self._runs.note(rows_if_any(batch), counts)

    def judge(self, is_content: bool) -> None:
        """Learn from the guard's runs, where it was content.

        Raises:
            BatchNormError: something besides rows is in the statistics of a call.
        """
        found = self._runs.take()
        if found is None or not is_content:
            return
        if len({tuple(name for name, _ in run.seen) for run in (found.whole, *found.parts)}) > 1:
            return
        first, second = found.parts
        for number, (name, count) in enumerate(found.whole.seen):
            counts = first.seen[number][1], second.seen[number][1]
            if sum(counts) == count:
                is_even = counts[0] * second.num_rows == counts[1] * first.num_rows
                self._known[self._structure, number, name] = _Known("rows", is_even)
            elif counts == (count, count):
                self._known[self._structure, number, name] = _Known("one thing", False)
            else:
                raise _refused_mixture(name, found.whole.num_rows, count, counts)

    def is_one_thing(self, key: Key, parts: Sequence[Moments], micro_batches: Sequence[MicroBatch]) -> bool:
        """Whether all micro-batches bring the very same to a call, which the whole batch would bring once.

        Raises:
            BatchNormError: it should be the same, and is not.
        """
        known = self._known.get(key)
        if known is not None and known.kind == "one thing":
            if not _are_same(parts):
                raise _refused_differing(key[-1], parts[0].count)
            return True
        if self._is_collated and not (known is not None and not known.is_even):
            self._look_for_padding(key[-1], [part.count for part in parts], micro_batches)
        return known is None and self._seems_one_thing(key, parts, micro_batches)

    def _seems_one_thing(self, key: Key, parts: Sequence[Moments], micro_batches: Sequence[MicroBatch]) -> bool:
        """The same where the guard has not looked."""
        if len(parts) == 1 or key in self._seen_to_differ or len({part.count for part in parts}) > 1:
            return False
        if not _are_same(parts) or not bool(parts[0].variance.any()):
            self._seen_to_differ.add(key)
            return False
        if len({len(part.rows) for part in micro_batches}) > 1:
            return True
        self._warn_once(
            "one thing",
            f"BatchNorm in {key[-1]} got the same mean and variance in every micro-batch, all of which have as many "
            "rows. If what it normalizes does not come from the batch (prototypes, class embeddings), its running "
            "variance takes it for several: leave self_check on, which tells.",
        )
        return False

    def _look_for_padding(self, layer: str, counts: Sequence[int], micro_batches: Sequence[MicroBatch]) -> None:
        rows = [len(part.rows) for part in micro_batches]
        if not all(rows) or any(count % number for count, number in zip(counts, rows, strict=True)):
            return
        per_row = sorted({count // number for count, number in zip(counts, rows, strict=True)})
        if len(per_row) > 1:
            self._warn_once(
                "padding",
                f"BatchNorm in {layer} normalizes {per_row[0]} values per channel for each row of one micro-batch, and "
                f"{per_row[-1]} for each of another. If rows are padded to the longest of their micro-batch, the "
                "padding is in the statistics, and the batch collated as a whole would have more of it: have collate= "
                "pad to one length, or normalize x[mask]. If this is what a mask leaves, or every row is a set of its "
                "own size (a graph's nodes), all is well.",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned_of:
            self._warned_of.add(what)
            warn(message)


def _are_same(parts: Collection[Moments]) -> bool:
    """Bit by bit: the same kernel ran over them."""
    first = next(iter(parts))
    return all(
        part.count == first.count and torch.equal(part.mean, first.mean) and torch.equal(part.variance, first.variance)
        for part in parts
    )


def _refused_mixture(layer: str, num_rows: int, count: int, counts: tuple[int, int]) -> BatchNormError:
    return BatchNormError(
        f"BatchNorm in {layer} normalizes {count} values per channel of {num_rows} rows, and {counts[0]} and "
        f"{counts[1]} when these run in two parts: more than rows is in its statistics, which would not be those of "
        "the whole batch. Where prototypes or queries are put beside the rows, give them a BatchNorm (or a call of it) "
        "of their own. Where rows are padded to the longest that runs with them, have collate= pad to one length, or "
        "normalize x[mask]. GroupNorm does not mind: gradfold.convert_batch_norm(model).",
        (layer,),
    )


def _refused_differing(layer: str, count: int) -> BatchNormError:
    return BatchNormError(
        f"BatchNorm in {layer} normalizes {count} values per channel however many rows there are, and they are not the "
        "same in every micro-batch (a mean over rows, dropout on prototypes), so that the whole batch would have "
        "others. Normalize before rows are put together, or use GroupNorm: gradfold.convert_batch_norm(model).",
        (layer,),
    )


def with_frozen_statistics(loss_fn: LossFn) -> LossFn:
    """`loss_fn` with fixed statistics."""

    def run(model: nn.Module, batch: Any) -> LossOutput:
        return _run(loss_fn, model, batch, BatchNormMode(by_fixed_statistics))

    return run


def watched(loss_fn: LossFn, normalized: InputDependence) -> LossFn:
    """The same, which also counts what each BatchNorm normalizes."""

    def run(model: nn.Module, batch: Any) -> LossOutput:
        census = InputCounter(normalized.names)
        output = _run(loss_fn, model, batch, BatchNormMode(census.count, concerns=census.concerns))
        normalized.note(batch, census.counts)
        return output

    return run


def _run(loss_fn: LossFn, model: nn.Module, batch: Any, interception: BatchNormMode) -> LossOutput:
    try:
        with eagerly(), interception:
            return loss_fn(model, batch)
    finally:
        interception.count_back()


@torch.no_grad()
def find_offender(window: Window) -> int | None:
    """The first micro-batch whose loss is not finite though no other is in its statistics; None where there is none.

    A single NaN is in the statistics of all, and so in every loss.
    """
    loss_fn = with_frozen_statistics(window.loss_fn)
    for index in sorted(window.losses.non_finite()):
        output = loss_fn(window.model, in_own_containers(window.take(index)))
        terms = read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)
        names = window.weights.names_at(index)
        if not all(bool(term.isfinite()) for name, term in terms.items() if names is None or name in names):
            return index
    return None


def eagerly() -> AbstractContextManager[Any]:
    """What was compiled runs as it was written, where BatchNorm can be met."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
