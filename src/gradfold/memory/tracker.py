"""A memory tracker: traces the storage of every tensor that operators make, and what it turns out to be for.

A dispatch mode sees each operator, backward passes included, with its arguments and results, real or fake; not the
workspaces that kernels allocate inside an operator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradfold.errors import ModelError
from gradfold.memory import torch_private
from gradfold.self_check.torch_private import TorchDispatchMode, tree_leaves

# What memory is for, as in a `MemoryBreakdown`.
Kind: TypeAlias = Literal["parameters", "gradients", "optimizer_state", "saved_activations", "temporaries", "inputs"]

BACKWARD, UPDATE = "forward and backward", "update"
_UNSEEN = ("lazy", "xla")  # types of devices whose tensors stand for a program that has not run yet
_SHARDS = ("fsdp", "c10d")  # whose operators gather parameters and sum gradients

# These losses compute one value per element in their result, and shrink it to a number without freeing memory. Their
# fake on a CPU shows the number alone.
_REDUCED_IN_PLACE = (
    torch.ops.aten.mse_loss.default,
    torch.ops.aten.smooth_l1_loss.default,
    torch.ops.aten.binary_cross_entropy.default,
    torch.ops.aten.soft_margin_loss.default,
)


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes in use at one moment, by what they are for."""

    parameters: int = 0  # those of modules, and their buffers
    gradients: int = 0
    optimizer_state: int = 0  # what optimizers keep between updates
    saved_activations: int = 0  # what a forward pass left alive when its backward pass began
    temporaries: int = 0  # everything else
    inputs: int = 0  # batches, and what is computed from them without a parameter having a part in it

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


KINDS: tuple[str, ...] = tuple(field.name for field in fields(MemoryBreakdown))


def highest(breakdowns: Iterable[MemoryBreakdown]) -> MemoryBreakdown:
    """The breakdown with the largest total."""
    return max(breakdowns, key=lambda one: one.total)


@dataclass
class AllocationTrace:
    """Takes events, and says when most memory was in use and for what; equal are those of one program, of any size."""

    num_bytes: list[int] = field(default_factory=list, compare=False)  # of each storage, by its number
    kinds: list[Kind] = field(default_factory=list)  # of each from its allocation on, however late it was noted
    initial: list[int] = field(default_factory=list)  # storages that were there before the first event
    events: list[int] = field(default_factory=list)  # a storage's number where it is allocated, ~number where it ends
    phases: list[tuple[int, str]] = field(default_factory=list)  # where each stretch of events begins, and its name
    held_metrics: int = field(default=0, compare=False)  # bytes kept for one micro-batch until the window ends
    row_metrics: int = field(default=0, compare=False)  # of those with an entry per row, which are concatenated there

    def begin(self, phase: str) -> None:
        """The events from here on belong to this phase."""
        self.phases.append((len(self.events), phase))

    def add(self, num_bytes: int, kind: Kind, is_initial: bool = False) -> int:
        """A storage: a new one, or one that has been there from the start, though it is seen only now."""
        number = len(self.num_bytes)
        self.num_bytes.append(num_bytes)
        self.kinds.append(kind)
        (self.initial if is_initial else self.events).append(number)
        return number

    def free(self, number: int) -> None:
        """A storage is gone."""
        self.events.append(~number)

    def peaks(self, num_bytes: Sequence[int] | None = None) -> dict[str, MemoryBreakdown]:
        """The breakdown when most was in use, by phase, in order; `num_bytes` stands in for those noted."""
        sizes = self.num_bytes if num_bytes is None else num_bytes
        now = dict.fromkeys(KINDS, 0)
        for number in self.initial:
            now[self.kinds[number]] += sizes[number]
        total = sum(now.values())
        peaks: dict[str, tuple[int, dict[str, int]]] = {}
        stops = [*[start for start, _ in self.phases[1:]], len(self.events)]
        for (start, phase), stop in zip(self.phases, stops, strict=True):
            # What is in use when a stretch begins belongs to the one before, unless the phase is new.
            peaks.setdefault(phase, (total, dict(now)))
            for event in self.events[start:stop]:
                number, sign = (event, 1) if event >= 0 else (~event, -1)
                now[self.kinds[number]] += sign * sizes[number]
                total += sign * sizes[number]
                if event >= 0 and total > peaks[phase][0]:
                    peaks[phase] = total, dict(now)
        return {phase: MemoryBreakdown(**found) for phase, (_, found) in peaks.items()}


class _LiveStorage(NamedTuple):
    """A storage that is not freed: its number in the trace, and its size when last seen."""

    reference: weakref.ref[torch.UntypedStorage]
    number: int
    num_bytes: int


class MemoryTracker(TorchDispatchMode):
    """Traces live tensor storage while its `with` block runs. Steps of optimizers are phases of their own.

    What `ignored`, model (with its gradients) and optimizer hold is there before the block starts.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        ignored: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = AllocationTrace()
        self.trace.begin(BACKWARD)
        self._live: dict[int, _LiveStorage] = {}  # by address
        self._parameters: dict[int, nn.Parameter] = {}
        self._made_of_parameters: set[int] = set()  # numbers
        self._is_backward = False
        for storage in storages(ignored):
            self._number(storage, "inputs", is_initial=True, held=0)
        if model is not None:
            self.register([*model.parameters(), *model.buffers()], "parameters")
            self.register(tensors_in([one.grad for one in model.parameters()]), "gradients")
        if optimizer is not None:
            self.register(state_tensors(optimizer), "optimizer_state")

    def register(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Tensors that are there before the block starts, and what they are for."""
        for tensor in tensors:
            self._find(tensor, kind)

    def __enter__(self) -> MemoryTracker:
        self._fake_mode = torch_private.active_fake_mode()
        self._stack = ExitStack()
        self._stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        self._stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
        # Autograd's own threads, which accelerators have, would write into the trace beside this one.
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._stack.enter_context(torch_private.resizes_noted(self._note_size))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.close()
        self._note_gradients()
        self._live, self._parameters = {}, {}  # with the references, so that nothing more is traced

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it makes."""
        kwargs = kwargs or {}
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # a shard, whose operators come here one by one
        if torch_private.active_fake_mode() is not self._fake_mode:
            return function(*args, **kwargs)  # a shard that computes shapes
        if torch_private.is_in_backward() is not self._is_backward:
            self._turn()
        is_of_shards = function.namespace in _SHARDS
        is_of_parameters = self._is_backward or is_of_shards
        for tensor in tensors_in((args, kwargs)):
            number = self._find(tensor, "parameters" if isinstance(tensor, nn.Parameter) else "inputs")
            is_of_parameters |= number in self._made_of_parameters
            if is_of_shards and number >= 0 and self.trace.kinds[number] == "inputs":
                self.trace.kinds[number] = "temporaries"  # parameters are gathered in it, or gradients reduced
                self._made_of_parameters.add(number)
        made = function(*args, **kwargs)
        held = _held_bytes(function, args, made)
        kind: Kind = "temporaries" if is_of_parameters else "inputs"
        for storage in storages(tensors_in(made)):
            number = self._number(storage, kind, held=held)
            if is_of_parameters:
                self._made_of_parameters.add(number)
        return made

    def _find(self, tensor: Tensor, kind: Kind) -> int:
        """The number of a tensor that is there already; -1 where it has no memory of its own."""
        number = -1
        if kind == "parameters" and isinstance(tensor, nn.Parameter):
            self._parameters[id(tensor)] = tensor
        for storage in storages([tensor]):
            number = self._number(storage, kind, is_initial=True)
            if kind != "inputs":
                self._made_of_parameters.add(number)
        return number

    def _number(
        self, storage: torch.UntypedStorage, kind: Kind, is_initial: bool = False, held: int | None = None
    ) -> int:
        """The number of a storage, which gets one here if it is new or has another size than it had."""
        address, num_bytes = torch_private.address_of(storage), storage.nbytes()
        known = self._live.get(address)
        if known is not None and known.reference() is not storage:  # freed, though its thread has not reported it yet
            self._free(address, known.number)
            known = None
        if known is not None:
            if num_bytes == known.num_bytes:
                return known.number
            self.trace.free(known.number)
            is_initial, kind = False, self.trace.kinds[known.number]
        number = self.trace.add(num_bytes if held is None else held, kind, is_initial)
        reference = weakref.ref(storage, partial(self._free, address, number))
        self._live[address] = _LiveStorage(reference, number, num_bytes)
        return number

    def _free(self, address: int, number: int, _: object = None) -> None:
        """The storage of this number, at this address, is gone."""
        if address in self._live and self._live[address].number == number:
            del self._live[address]
            self.trace.free(number)

    def _note_size(self, storage: torch.UntypedStorage) -> None:
        """A storage is about to get another size, or has got it: whole parameters of shards come and go this way."""
        self._made_of_parameters.add(self._number(storage, "parameters", is_initial=storage.nbytes() > 0))

    def _turn(self) -> None:
        """A backward pass begins or has ended."""
        self._is_backward = not self._is_backward
        if not self._is_backward:
            self._note_gradients()
            return
        for live in self._live.values():
            if self.trace.kinds[live.number] == "temporaries":
                self.trace.kinds[live.number] = "saved_activations"

    def _note_gradients(self) -> None:
        self._note(tensors_in([one.grad for one in self._parameters.values()]), "gradients")

    def _note(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Say what tensors that are alive now are for."""
        for storage in storages(tensors):
            if (known := self._live.get(torch_private.address_of(storage))) is not None:
                self.trace.kinds[known.number] = kind

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._is_backward = False
        self._note_gradients()
        self.trace.begin(UPDATE)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._note(state_tensors(optimizer), "optimizer_state")
        self.trace.begin(BACKWARD)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer keeps between updates."""
    state = getattr(optimizer, "optimizer", optimizer).state  # Accelerate and Fabric wrap what they prepare
    return tensors_in(dict(state))


def refuse_unseen(tensors: Iterable[Tensor]) -> None:
    """Raise ModelError where the memory under a tensor is out of sight; torch crashes where it is looked for."""
    for tensor in tensors:
        if tensor.device.type in _UNSEEN:
            raise ModelError(
                f"memory on a {tensor.device.type!r} device cannot be predicted or measured: torch does not see what "
                "its tensors take. Pass micro_batch_size= a number of rows; an out-of-memory error halves it."
            )


def storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    """The memory under tensors, that of their parts where they are made of others."""
    for tensor in tensors:
        refuse_unseen([tensor])
        parts = _parts(tensor)
        yield from storages(parts)
        if not parts:
            with suppress(NotImplementedError, RuntimeError):  # a functorch wrapper has none of its own
                yield tensor.untyped_storage()


def storage_bytes(leaves: Iterable[Any]) -> int:
    """The memory under those that are tensors, each storage once."""
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
    return sum({torch_private.address_of(storage): storage.nbytes() for storage in storages(tensors)}.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    parts = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
    return [part for part in parts if isinstance(part, Tensor)]  # without a shard's device mesh


def tensors_in(nested: Any) -> list[Tensor]:
    """Those in containers, at any depth."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _held_bytes(function: Callable[..., Any], args: tuple[Any, ...], made: Any) -> int | None:
    """The memory under an operator's result, where its fake on a CPU shows less; else None."""
    if function not in _REDUCED_IN_PLACE or not isinstance(made, torch_private.FakeTensor) or made.device.type != "cpu":
        return None
    elements = torch.Size(max(sizes) for sizes in zip(*(arg.shape for arg in args[:2]), strict=True))
    return int(elements.numel() * made.element_size())
