"""The reach of functions and modules: the objects of the user's that they hold and name.

Followed are closures, defaults, what methods are bound to, the globals that code names, attributes of modules and of
objects of the user's own classes, and what plain containers hold. What installed packages define is theirs, but for
modules (`nn.Module`), which everybody subclasses.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import nn

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
