"""Saved states: `load_state_dict` checks every value before it changes anything.

What is expected is written as plain data: the name of a kind, a dict by key (other keys are ignored), `{"*": of_each}`
for any keys, `[of_each]` for a list, or `(None, of_it)` where None is a value, too.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from gradfold.errors import OptionError
from gradfold.messages import first_line

Expected: TypeAlias = Any
"""A kind, or a dict, list or pair of such; see above."""


def _is_number(value: Any, kind: Any, least: int) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and bool(least <= value < math.inf)


_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a whole number of at least 0", lambda value: _is_number(value, int, 0)),
    "size": ("a whole number of at least 1", lambda value: _is_number(value, int, 1)),
    "number": ("a finite number of at least 0", lambda value: _is_number(value, (int, float), 0)),
    "flag": ("True or False", lambda value: isinstance(value, bool)),
    "text": ("text", lambda value: isinstance(value, str)),
    "list": ("a list", lambda value: isinstance(value, (list, tuple))),
    "dict": ("a dict", lambda value: isinstance(value, Mapping)),
}


def check_saved(state: Any, expected: Expected, name: str, place: str = "state") -> None:
    """Raise OptionError where a state (of a class of this name, reached so in Python) is not what is expected."""
    if isinstance(expected, tuple):
        if state is None:
            return
        expected = expected[1]
    what, fits = _KINDS[expected if isinstance(expected, str) else type(expected).__name__]
    if not fits(state):
        raise OptionError(f"not {name} state_dict: {place} is {reprlib.repr(state)}; expected {what}.")
    if isinstance(expected, list):
        for index, one in enumerate(state):
            check_saved(one, expected[0], name, f"{place}[{index}]")
    elif isinstance(expected, dict):
        by_key = dict.fromkeys(state, expected["*"]) if "*" in expected else expected
        missing = sorted(by_key.keys() - state.keys())
        if missing:
            where = "" if place == "state" else f" in {place}"
            raise OptionError(f"not {name} state_dict: missing keys {missing}{where}, found {sorted(map(str, state))}.")
        for key, of_it in by_key.items():
            check_saved(state[key], of_it, name, f"{place}[{key!r}]")


@contextmanager
def loaded(part: Any, state: Any, place: str) -> Iterator[None]:
    """Load the state of a part that checks it by itself, or of None; what it had comes back where anything fails."""
    if part is None:
        yield
        return
    before = part.state_dict()
    try:
        try:
            part.load_state_dict(state)
        except Exception as error:
            raise OptionError(
                f"{place} cannot be loaded: {type(part).__name__}.load_state_dict raised {first_line(error)}. Build "
                "it like the saved one."
            ) from error
        yield
    except BaseException:
        part.load_state_dict(before)
        raise
