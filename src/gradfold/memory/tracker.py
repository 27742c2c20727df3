"""A tracker: writes down the memory of every tensor that operators make, and what it turns out to be for.

A dispatch mode sees each operator with what it takes and gives, backward passes included, for real tensors as for fake
ones. What kernels take for themselves inside an operator it does not see.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial, partialmethod
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradfold.memory.trace import AllocationTrace, Kind, held_bytes

__all__: list[str] = []

BACKWARD, UPDATE = "forward and backward", "update"
_SHARDS = ("fsdp", "c10d")  # whose operators gather parameters and sum gradients


class MemoryTracker(TorchDispatchMode):
    """Keeps a ledger of live tensor storage while its `with` block runs.

    Steps of optimizers are phases of their own.

    Attributes:
        ledger: of the block.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = AllocationTrace()
        # By address of the storage: its number, and its size when last seen.
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, int]] = {}
        self._parameters: dict[int, nn.Parameter] = {}
        self._made_of_parameters: set[int] = set()  # numbers
        self._is_backward = False
        self._before: list[tuple[Iterable[Tensor], Kind]] = []

    def know(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Tensors that are there before the block starts, and what they are for."""
        self._before.append((tensors, kind))

    def know_model(self, model: nn.Module) -> None:
        """The model's parameters, buffers and gradients are there before the block starts."""
        parameters = list(model.parameters())
        self.know([*parameters, *model.buffers()], "parameters")
        self.know([parameter.grad for parameter in parameters if parameter.grad is not None], "gradients")

    def know_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's state is there before the block starts."""
        self.know(state_tensors(optimizer), "optimizer_state")

    def __enter__(self) -> MemoryTracker:
        self.ledger = AllocationTrace()
        self.ledger.begin(BACKWARD)
        self._live, self._parameters, self._made_of_parameters = {}, {}, set()
        while self._before:  # lets go of the tensors, or old gradients would live on
            tensors, kind = self._before.pop(0)
            for tensor in tensors:
                self._find(tensor, kind)
            del tensors
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        # Autograd's own threads, which accelerators have, would write into the ledger beside this one.
        self._threads = torch.autograd.set_multithreading_enabled(False)
        self._threads.__enter__()
        self._mode = active_fake_mode()
        self._resize = torch.UntypedStorage.resize_
        self._is_inherited = "resize_" not in vars(torch.UntypedStorage)
        torch.UntypedStorage.resize_ = partialmethod(_resize, self._resize, self._note_size)  # type: ignore[assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._threads.__exit__(kind, error, traceback)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        if self._is_inherited:
            del torch.UntypedStorage.resize_
        for hook in self._hooks:
            hook.remove()
        self._note_gradients()
        self._live = {}  # with the references, so that nothing is written down any more
        self._parameters = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it makes."""
        kwargs = kwargs or {}
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # a shard, whose operators come here one by one
        if active_fake_mode() is not self._mode:
            return function(*args, **kwargs)  # shards find out about shapes so
        is_backward = torch._C._current_graph_task_id() != -1
        if is_backward is not self._is_backward:
            self._turn(is_backward)
        is_of_parameters = is_backward or function.namespace in _SHARDS
        for tensor in _tensors((args, kwargs)):
            number = self._find(tensor, "parameters" if isinstance(tensor, nn.Parameter) else "inputs")
            is_of_parameters |= number in self._made_of_parameters
            if function.namespace in _SHARDS:
                self._note_shard(number)
        made = function(*args, **kwargs)
        held = held_bytes(function, args, made)
        for tensor in _tensors(made):
            self._make(tensor, is_of_parameters, held)
        return made

    def note(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Say what tensors that are alive now are for; it counts from when they were made."""
        for tensor in tensors:
            for storage in storages(tensor):
                known = self._live.get(storage._cdata)
                if known is not None:
                    self.ledger.kinds[known[1]] = kind

    def _find(self, tensor: Tensor, kind: Kind) -> int:
        """The number of a tensor that is there already; -1 where it has no memory of its own."""
        number = -1
        if kind == "parameters" and isinstance(tensor, nn.Parameter):
            self._parameters[id(tensor)] = tensor
        for storage in storages(tensor):
            number = self._number(storage, self.ledger.find, kind)
            if kind not in ("inputs", "ignored"):
                self._made_of_parameters.add(number)
        return number

    def _make(self, tensor: Tensor, is_of_parameters: bool, held: int | None) -> None:
        kind: Kind = "temporaries" if is_of_parameters else "inputs"
        for storage in storages(tensor):
            number = self._number(storage, self.ledger.take, kind, held)
            if is_of_parameters:
                self._made_of_parameters.add(number)

    def _number(
        self,
        storage: torch.UntypedStorage,
        enter: Callable[[int, Kind], int],
        kind: Kind,
        held: int | None = None,
    ) -> int:
        """The number of a storage, which gets one here if it is new or has another size than it had."""
        address, num_bytes = storage._cdata, storage.nbytes()
        known = self._live.get(address)
        if known is not None and known[0]() is not storage:  # gone, though a thread has not come round to say so
            self.free(address, known[1])
            known = None
        if known is not None:
            if num_bytes == known[2]:
                return known[1]
            self.ledger.give_back(known[1])
            enter, kind = self.ledger.take, self.ledger.kinds[known[1]]
        number = enter(num_bytes if held is None else held, kind)
        reference = weakref.ref(storage, partial(_on_free, weakref.ref(self), address, number))
        self._live[address] = reference, number, num_bytes
        return number

    def _note_size(self, storage: torch.UntypedStorage) -> None:
        """A storage is given another size, which no operator shows: whole parameters of shards come and go so."""
        number = self._number(storage, self.ledger.find if storage.nbytes() else self.ledger.take, "parameters")
        self._made_of_parameters.add(number)

    def _note_shard(self, number: int) -> None:
        """What is made to gather parameters in, or gradients, is no input."""
        if number >= 0 and self.ledger.kinds[number] == "inputs":
            self.ledger.kinds[number] = "temporaries"
            self._made_of_parameters.add(number)

    def free(self, address: int, number: int) -> None:
        """The storage of this number, at this address, is gone."""
        if address in self._live and self._live[address][1] == number:
            del self._live[address]
            self.ledger.give_back(number)

    def _turn(self, is_backward: bool) -> None:
        """A backward pass begins or has ended."""
        self._is_backward = is_backward
        if not is_backward:
            self._note_gradients()
            return
        for _, number, _ in self._live.values():
            if self.ledger.kinds[number] == "temporaries":
                self.ledger.kinds[number] = "saved_activations"

    def _note_gradients(self) -> None:
        self.note((one.grad for one in self._parameters.values() if one.grad is not None), "gradients")

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._is_backward = False
        self._note_gradients()
        self.ledger.begin(UPDATE)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.note(state_tensors(optimizer), "optimizer_state")
        self.ledger.begin(BACKWARD)


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer keeps between updates."""
    state = getattr(optimizer, "optimizer", optimizer).state  # Accelerate and Fabric wrap what they prepare
    return [leaf for leaf in tree_leaves(dict(state)) if isinstance(leaf, Tensor)]


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory under a tensor, that of its parts where it is made of others."""
    parts = _parts(tensor)
    for part in parts:
        yield from storages(part)
    if not parts:
        with suppress(NotImplementedError, RuntimeError):  # a functorch wrapper has none of its own
            yield tensor.untyped_storage()


def _parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    parts = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
    return [part for part in parts if isinstance(part, Tensor)]  # a shard's device mesh is none


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _resize(
    storage: torch.UntypedStorage,
    resize: Callable[[torch.UntypedStorage, int], object],
    note: Callable[[torch.UntypedStorage], None],
    size: int,
) -> object:
    note(storage)
    made = resize(storage, size)
    note(storage)
    return made


def _on_free(tracker: weakref.ref[MemoryTracker], address: int, number: int, _: object) -> None:
    # Through a weak reference: the storage must not keep the tracker, nor the tracker's end be missed.
    alive = tracker()
    if alive is not None:
        alive.free(address, number)
