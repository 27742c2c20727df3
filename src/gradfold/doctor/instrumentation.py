"""A guard: stands between the doctor's own work and the script, so that where the doctor fails the script goes on.

A patch: an attribute of torch's, replaced while the script runs by a function that takes a look at each call.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

__all__: list[str] = []

T = TypeVar("T")


@dataclass(frozen=True)
class CallOutcome:
    """How a call of the script's ended.

    Attributes:
        result: what it returned.
        error: what it raised, None where it returned.
    """

    result: Any = None
    error: BaseException | None = None


# A look at one call: up to its only yield before the call, after it with the outcome. It yields the arguments to call
# with instead, or None for those given.
Look = Generator[tuple[tuple[Any, ...], dict[str, Any]] | None, CallOutcome, None]


@dataclass(frozen=True)
class Failure:
    """Where the doctor itself failed.

    Attributes:
        part: at what: a call that it looked at, or a rule.
        error: the last line of the traceback.
        traceback: the whole of it.
    """

    part: str
    error: str
    traceback: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Guard:
    """Runs the doctor's own work. After its first failure the doctor is blind: nothing of it runs any more.

    What is no `Exception` passes: Ctrl-C, and the stop that ends the script.

    Attributes:
        failure: the first one, None while all is well.

    Example:
        >>> guard = Guard()
        >>> guard.attempt("a sum", sum, [1, 2]), guard.is_blind
        (3, False)
        >>> guard.attempt("a sum", sum, [1, "2"]), guard.failure.error
        (None, "TypeError: unsupported operand type(s) for +: 'int' and 'str'")
        >>> guard.attempt("a sum", sum, [1, 2])
    """

    def __init__(self) -> None:
        self.failure: Failure | None = None

    @property
    def is_blind(self) -> bool:
        """Whether the doctor looks no more."""
        return self.failure is not None

    def attempt(self, part: str, action: Callable[..., T], *args: Any) -> T | None:
        """What an action returns; None where it fails, or the doctor is blind."""
        if self.failure is not None:
            return None
        try:
            return action(*args)
        except Exception as error:
            self.note(part, error)
            return None

    def note(self, part: str, error: Exception) -> None:
        """The doctor failed at a part of its work."""
        if self.failure is None:
            last = traceback.format_exception_only(type(error), error)[-1].strip()
            self.failure = Failure(part, last, "".join(traceback.format_exception(error)))

    def call(self, part: str, look: Callable[..., Look | None], original: Any, args: Any, options: Any) -> Any:
        """What a function returns or raises, with a look at it."""
        looking: Look | None = None
        try:
            looking = look(*args, **options)
            instead = None if looking is None else next(looking)
        except Exception as error:
            self.note(part, error)
            looking = instead = None
        if looking is None:  # outside of `except`, which the errors of the call would name as their context
            return original(*args, **options)
        if instead is not None:
            args, options = instead
        try:
            result = original(*args, **options)
        except BaseException as error:
            self._end(part, looking, CallOutcome(error=error))
            raise
        self._end(part, looking, CallOutcome(result))
        return result

    def _end(self, part: str, looking: Look, outcome: CallOutcome) -> None:
        try:
            if self.failure is not None:
                looking.close()
            else:
                looking.send(outcome)
        except StopIteration:
            return
        except Exception as error:
            self.note(part, error)


class Patches:
    """All patches of one run; `undo` takes them back.

    Args:
        guard: between looks and the script.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put torch's own functions back."""
        while self._undo:
            self._undo.pop()()

    def look_at(self, owner: Any, name: str, look: Callable[..., Look | None]) -> None:
        """Take a look at every call of a function or method.

        Args:
            owner: the module or class.
            name: of the attribute.
            look: gets the call's arguments; None where there is nothing to see.
        """
        is_own, original, guard = name in vars(owner), getattr(owner, name), self.guard

        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling() or guard.failure is not None:  # a compiler sees what torch has
                return original(*args, **options)
            return guard.call(name, look, original, args, options)

        call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined] # what torch.jit.script compiles
        call.gradfold_doctor = True  # type: ignore[attr-defined]
        setattr(owner, name, call)
        self._undo.append(lambda: setattr(owner, name, original) if is_own else delattr(owner, name))

    def on_undo(self, action: Callable[[], None]) -> None:
        """Do this when patches are taken back."""
        self._undo.append(action)
