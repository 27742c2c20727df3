"""External state: what a user's functions hold in closures and globals and may change, saved and put back.

Followed are closures, defaults, the globals that code names, `functools.partial`, bound methods, attributes and hooks
of modules, attributes of objects of the user's own classes, and what plain containers hold. Not followed: classes,
properties, iterators, files, and what installed packages keep (but for modules, whose state is in their attributes).
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.state.attributes import CONTAINERS, OF_EVERY_MODULE, ModuleAttributes, keep_contents
from gradfold.state.buffers import BufferKeeper
from gradfold.state.rng import RandomStates

_MAX_OBJECTS = 20_000  # to follow, which takes some milliseconds
_MAX_INSIDE = 1_000  # a container of more holds data
_MAX_BYTES = 2**20  # of a tensor to copy: a larger one is data, or a weight
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MISSING = object()


RUNNING: set[ExternalState] = set()  # those whose blocks are entered


class ExternalState(AbstractContextManager["ExternalState"]):
    """Saves what functions and modules reach, and puts back what has changed at the end of a `with` block.

    Modules are saved with attributes and buffers, and all generators with their states. A `functools` cache that grew
    is cleared.

    Args:
        roots: functions, callable objects and modules; kept all, however many there are.

    Attributes:
        attributes: of the modules.
        random_states: at the beginning.
    """

    def __init__(self, *roots: Any) -> None:
        reached = list(reach(*roots))
        modules = [one for one in reached if isinstance(one, nn.Module)]
        parameters = chain.from_iterable(one.parameters(recurse=False) for one in modules)
        self.random_states = RandomStates.record(parameters)
        self.attributes, buffers = ModuleAttributes(modules), BufferKeeper()
        buffers.open(modules)
        undo = [undo for one in reached for undo in _undo(one)]
        self._steps = [*undo, self.attributes.restore, buffers.restore, self.random_states.restore]

    def __enter__(self) -> ExternalState:
        RUNNING.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        RUNNING.discard(self)
        self.restore()

    def restore(self) -> None:
        """Put back what has changed; a step that fails keeps none of the others from running."""
        with ExitStack() as stack:
            for step in reversed(self._steps):
                stack.callback(step)


def reach(*roots: Any) -> Iterator[Any]:
    """Everything that functions, callable objects and modules hold and name, each once."""
    ahead, own = deque(roots), set(map(id, roots))
    seen: dict[int, Any] = {}  # with the objects, whose ids are theirs while they live
    while ahead and len(seen) < max(_MAX_OBJECTS, len(roots)):
        one = ahead.popleft()
        if id(one) not in seen:
            seen[id(one)] = one
            yield one
            ahead += _parts(one, is_root=id(one) in own)


def _parts(one: Any, is_root: bool) -> Iterable[Any]:
    """What to follow from one object; roots may be of an installed package."""
    if isinstance(one, types.FunctionType):
        if not is_root and not _is_users(one):
            return ()
        defaults = *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()
        return [*(one.__closure__ or ()), *defaults, vars(one), *(value for *_, value in _named(one))]
    if isinstance(one, types.CellType):
        return _contents(one)
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, functools._lru_cache_wrapper):
        return [one.__wrapped__]
    if isinstance(one, partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, nn.Module):
        own = (value for name, value in vars(one).items() if name not in OF_EVERY_MODULE)
        return [*own, *chain.from_iterable(vars(one)[name].values() for name in _HOOKS), *one.children()]
    if type(one) in (*CONTAINERS, tuple):
        return list(one.values() if isinstance(one, Mapping) else one) if len(one) <= _MAX_INSIDE else ()
    is_object = hasattr(one, "__dict__") and not isinstance(one, (type, types.ModuleType))
    if is_object and (isinstance(one, types.SimpleNamespace) or _is_users(type(one))):
        return [vars(one)]
    return vars(one).values() if is_root and hasattr(one, "__dict__") else ()


def _undo(one: Any) -> Iterator[Callable[[], object]]:
    """What puts an object back into its present state."""
    numpy = sys.modules.get("numpy")
    if type(one) in CONTAINERS or (isinstance(one, Tensor) and one.nbytes <= _MAX_BYTES):
        contents = keep_contents(one)
        yield from [] if contents is None else [contents.restore]
    elif isinstance(one, types.CellType):
        yield partial(_put_back_cell, one, _contents(one))
    elif isinstance(one, types.FunctionType) and _is_users(one):
        yield from (partial(_put_back_name, *each) for each in _named(one))
    elif isinstance(one, functools._lru_cache_wrapper):
        yield partial(_clear_if_grown, one, one.cache_info().misses)
    elif isinstance(one, torch.Generator) or (numpy is not None and isinstance(one, numpy.random.RandomState)):
        yield partial(one.set_state, one.get_state())
    elif isinstance(one, random.Random) and not isinstance(one, random.SystemRandom):
        yield partial(one.setstate, one.getstate())
    elif numpy is not None and isinstance(one, numpy.random.Generator):
        yield partial(setattr, one.bit_generator, "state", one.bit_generator.state)


def _named(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The globals that code names, and the attributes of the user's modules, as namespace, name and value."""
    names, own = set(_names(function.__code__)), function.__globals__
    yield from ((own, name, own.get(name, _MISSING)) for name in names)
    for module in [own.get(name) for name in names]:
        if isinstance(module, types.ModuleType) and _is_users(module):
            yield from ((vars(module), name, vars(module)[name]) for name in names & vars(module).keys())


def _names(code: types.CodeType) -> Iterator[str]:
    """The names in code that are not locals, those of the functions inside it among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _contents(cell: types.CellType) -> list[Any]:
    """What a variable of a closure is bound to; nothing before its first assignment."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _is_users(one: types.ModuleType | types.FunctionType | type) -> bool:
    """Whether a module, or that of a function or class, is not of an installed package."""
    module = str(one.__name__ if isinstance(one, types.ModuleType) else one.__module__)
    file = str(getattr(sys.modules.get(module), "__file__", None))
    is_ours = module.split(".")[0] in ("torch", "gradfold", *sys.stdlib_module_names)
    return not is_ours and "site-packages" not in file and "dist-packages" not in file


def _put_back_name(namespace: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        namespace.pop(name, None)
    elif namespace.get(name, _MISSING) is not value:
        namespace[name] = value


def _put_back_cell(cell: types.CellType, found: list[Any]) -> None:
    if found:
        cell.cell_contents = found[0]
    elif _contents(cell):
        del cell.cell_contents


def _clear_if_grown(cached: functools._lru_cache_wrapper[Any], misses: int) -> None:
    if cached.cache_info().misses != misses:
        cached.cache_clear()
