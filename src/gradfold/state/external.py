"""The surroundings of functions and modules: what of the user's is within their reach, kept and put back.

A list that losses are appended to, a counter, a dict of masks, a generator, the moving average of a teacher: runs that
are to leave no trace change these as they change the model, and runs on fake tensors leave fake ones there, which fail
when something real meets them.

The reach of functions and modules: the objects of the user's that they hold and name.

Followed are closures, defaults, what methods are bound to, the globals that code names, attributes of modules and of
objects of the user's own classes, and what plain containers hold. What installed packages define is theirs, but for
modules (`nn.Module`), which everybody subclasses.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.state.attributes import ModuleAttributes
from gradfold.state.buffers import BufferKeeper
from gradfold.state.rng import HostRandomState, RandomState

__all__: list[str] = []

SEQUENCES = (list, deque, set)
MAPPINGS = (dict, defaultdict, OrderedDict, Counter)

_MOST = 20_000  # objects that are followed: more than anybody's functions need, and some milliseconds
_MOST_INSIDE = 1_000  # what has more in it holds data
_KEPT_ELSEWHERE = frozenset(vars(nn.Module()))  # parameters, buffers, children, hooks


def reach(*roots: Any) -> Iterator[Any]:
    """Everything that is reached from functions, callable objects and modules, each once; they come first."""
    ahead = deque(roots)
    seen: dict[int, Any] = {}  # with the objects, whose ids are theirs while they live
    num_roots = len(roots)
    while ahead and len(seen) < _MOST:
        one = ahead.popleft()
        is_root, num_roots = num_roots > 0, num_roots - 1
        if id(one) not in seen:
            seen[id(one)] = one
            yield one
            ahead += _parts(one, is_root)


def names_of(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    """The globals that code names, and those of the user's modules that it names; of its own also such as are none."""
    names = set(_names(function.__code__))
    own = function.__globals__
    yield from ((own, name) for name in names)
    bound = chain.from_iterable(map(contents, function.__closure__ or ()))
    for module in [*(own.get(name) for name in names), *bound]:
        if isinstance(module, types.ModuleType) and _is_the_user_s(vars(module)):
            yield from ((vars(module), other) for other in names if other in vars(module))


def contents(cell: types.CellType) -> tuple[Any, ...]:
    """What a variable of a closure is bound to; nothing before its first assignment."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def is_the_user_s_class(kind: type) -> bool:
    """Whether a class is of no installed package."""
    module = sys.modules.get(kind.__module__)
    return kind is types.SimpleNamespace or module is None or _is_the_user_s(vars(module))


def _is_the_user_s(module: Mapping[str, Any]) -> bool:
    name = str(module.get("__name__", "")).split(".")[0]
    if name in ("torch", "gradfold") or name in sys.stdlib_module_names:
        return False
    file = str(module.get("__file__"))
    return "site-packages" not in file and "dist-packages" not in file


def _parts(one: Any, is_root: bool) -> Iterable[Any]:
    """What to follow from one object."""
    if isinstance(one, types.FunctionType):
        return _parts_of_function(one) if is_root or _is_the_user_s(one.__globals__) else ()
    if isinstance(one, types.CellType):
        return contents(one)
    if isinstance(one, nn.Module):
        own = [value for name, value in vars(one).items() if name not in _KEPT_ELSEWHERE]
        return [*own, *one.children(), type(one)]
    if type(one) in (*SEQUENCES, *MAPPINGS, tuple):
        values = one.values() if isinstance(one, Mapping) else one
        return list(values) if len(one) <= _MOST_INSIDE else ()
    if isinstance(one, type):
        return [*vars(one).values(), *one.__bases__] if is_the_user_s_class(one) else ()
    wrapped = _wrapped(one)
    if not wrapped and (is_root or is_the_user_s_class(type(one))) and hasattr(one, "__dict__"):
        return [*vars(one).values(), type(one)]
    return wrapped


def _wrapped(one: Any) -> list[Any]:
    """What stands behind a thing that calls another."""
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, (staticmethod, classmethod, functools._lru_cache_wrapper)):
        return [one.__wrapped__]
    return [one.fget] if isinstance(one, property) else []


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    return [
        *(function.__closure__ or ()),
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
        *vars(function).values(),  # what it wraps
        *[space[name] for space, name in names_of(function) if name in space],
    ]


def _names(code: types.CodeType) -> Iterator[str]:
    """The names in code that are no locals, those of the functions inside it among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


Undo = Callable[[], object]

_MOST_BYTES = 2**20  # of a tensor that is copied: a larger one is data, or a weight
_NOTHING = object()


class ExternalState:
    """Keeps what is around functions and modules while a `with` block runs, and puts back what has changed.

    Modules are kept with their attributes and buffers, generators with their states, and the global random states are
    part of it. What is out of reach: iterators, files, and what installed packages keep.

    Args:
        roots: functions, callable objects and modules.
    """

    def __init__(self, *roots: Any) -> None:
        self._roots = roots

    def __enter__(self) -> ExternalState:
        reached = list(reach(*self._roots))
        modules = [one for one in reached if isinstance(one, nn.Module)]
        parameters = chain.from_iterable(module.parameters(recurse=False) for module in modules)
        self._random_states = RandomState.record(parameters), HostRandomState.record()
        self._attributes = ModuleAttributes(modules)
        self._buffers = BufferKeeper()
        self._buffers.open(modules)
        self._undo = [undo for undo in map(_keep, reached) if undo is not None]
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()
        self._attributes.restore()
        self._buffers.restore()
        for state in self._random_states:
            state.restore()


def _keep(one: Any) -> Undo | None:
    """What puts an object back as it is now; None where nothing can change, or others keep it."""
    if isinstance(one, nn.Module):
        return None
    if type(one) in SEQUENCES:
        return partial(_put_back_elements, one, list(one))
    if type(one) in MAPPINGS:
        return partial(_put_back_entries, one, dict(one))
    if isinstance(one, types.CellType):
        return partial(_put_back_cell, one, contents(one))
    if isinstance(one, types.FunctionType):
        return _keep_function(one)
    if isinstance(one, type):
        return partial(_put_back_class, one, dict(vars(one))) if is_the_user_s_class(one) else None
    if isinstance(one, Tensor):
        return _keep_tensor(one)
    return _keep_generator(one) or _keep_object(one)


def _keep_function(function: types.FunctionType) -> Undo:
    bound = [(space, name, space.get(name, _NOTHING)) for space, name in names_of(function)]
    entries = dict(vars(function))

    def undo() -> None:
        _put_back_entries(vars(function), entries)
        for space, name, value in bound:
            if value is _NOTHING:
                space.pop(name, None)
            elif space.get(name, _NOTHING) is not value:
                space[name] = value

    return undo


def _keep_tensor(tensor: Tensor) -> Undo | None:
    if tensor.layout is not torch.strided or tensor.is_inference() or tensor.nbytes > _MOST_BYTES:
        return None
    if 0 in tensor.stride():  # an expanded one cannot be written to; what it is a view of can
        return None
    return partial(_put_back_tensor, tensor, tensor._version, tensor.detach().clone())


def _keep_generator(one: Any) -> Undo | None:
    numpy = sys.modules.get("numpy")
    if isinstance(one, torch.Generator):
        return partial(one.set_state, one.get_state())
    if isinstance(one, random.Random) and not isinstance(one, random.SystemRandom):
        return partial(one.setstate, one.getstate())
    if numpy is not None and isinstance(one, numpy.random.RandomState):
        return partial(one.set_state, one.get_state())
    if numpy is not None and isinstance(one, numpy.random.Generator):
        return partial(setattr, one.bit_generator, "state", one.bit_generator.state)
    return None


def _keep_object(one: Any) -> Undo | None:
    if is_the_user_s_class(type(one)) and hasattr(one, "__dict__"):
        return partial(_put_back_entries, vars(one), dict(vars(one)))
    return None


def _put_back_elements(container: Any, elements: list[Any]) -> None:
    if not _are_same(list(container), elements):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(elements)


def _put_back_entries(mapping: dict[Any, Any], entries: dict[Any, Any]) -> None:
    if not _are_same(list(mapping), list(entries)) or not _are_same(list(mapping.values()), list(entries.values())):
        mapping.clear()
        mapping.update(entries)


def _are_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(_is, now, before))


def _is(one: object, other: object) -> bool:
    return one is other


def _put_back_cell(cell: types.CellType, found: tuple[Any, ...]) -> None:
    if not _are_same(list(contents(cell)), list(found)):
        if found:
            cell.cell_contents = found[0]
        else:
            del cell.cell_contents


def _put_back_class(kind: type, attributes: dict[str, Any]) -> None:
    now = dict(vars(kind))
    for name in {*now, *attributes}:
        if name.startswith("__") or now.get(name, _NOTHING) is attributes.get(name, _NOTHING):
            continue
        if name in attributes:
            setattr(kind, name, attributes[name])
        else:
            delattr(kind, name)


@torch.no_grad()
def _put_back_tensor(tensor: Tensor, version: int, content: Tensor) -> None:
    if tensor._version != version:
        tensor.copy_(content)
