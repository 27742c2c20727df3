"""Hooks on torch's functions while a script runs, and the guard that keeps the doctor's failures from the script."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class CallOutcome:
    """How a call by the script ended: what it returned, or what it raised."""

    result: Any = None
    error: BaseException | None = None


# A hook on one call: it runs up to its only yield before the call, and after it with the outcome. It yields the
# arguments to call with instead, or None for those passed; it returns at once where there is nothing to record.
Hook = Generator[tuple[tuple[Any, ...], dict[str, Any]] | None, CallOutcome, None]


@dataclass(frozen=True)
class Failure:
    """Where the doctor itself failed."""

    part: str  # the call that was hooked, or the rule
    error: str  # the last line of the traceback
    traceback: str


class Guard:
    """Runs the doctor's own work. After its first `failure` none of it runs any more, and the script goes on.

    What is not an `Exception` passes: Ctrl-C, and the stop that ends the script.
    """

    def __init__(self) -> None:
        self.failure: Failure | None = None

    def attempt(self, part: str, action: Callable[..., T], *args: Any) -> T | None:
        """What an action returns; None where it fails, or the doctor has failed before."""
        if self.failure is not None:
            return None
        try:
            return action(*args)
        except Exception as error:
            self.note(part, error)
            return None

    def note(self, part: str, error: Exception) -> None:
        """Keep the first failure."""
        if self.failure is None:
            last = traceback.format_exception_only(type(error), error)[-1].strip()
            self.failure = Failure(part, last, "".join(traceback.format_exception(error)))

    def call(self, part: str, hook: Callable[..., Hook], original: Any, args: Any, options: Any) -> Any:
        """What a function returns or raises, with a hook around it."""
        hooked: Hook | None = None
        try:
            hooked = hook(*args, **options)
            instead = next(hooked, None)
        except Exception as error:
            self.note(part, error)
            hooked = instead = None
        if hooked is None:  # outside of `except`, which the errors of the call would name as their context
            return original(*args, **options)
        if instead is not None:
            args, options = instead
        try:
            result = original(*args, **options)
        except BaseException as error:
            self._finish(part, hooked, CallOutcome(error=error))
            raise
        self._finish(part, hooked, CallOutcome(result))
        return result

    def _finish(self, part: str, hooked: Hook, outcome: CallOutcome) -> None:
        try:
            if self.failure is not None:
                hooked.close()
            else:
                hooked.send(outcome)
        except StopIteration:
            return
        except Exception as error:
            self.note(part, error)


class Patches(ExitStack):
    """All functions of torch that are replaced during one run; `close` puts them back."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def hook(self, owner: Any, name: str, hook: Callable[..., Hook]) -> None:
        """Hook every call of a module's function or a class's method; the hook takes the call's arguments."""
        is_own, original, guard = name in vars(owner), getattr(owner, name), self.guard

        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling() or guard.failure is not None:  # a compiler sees torch's own function
                return original(*args, **options)
            return guard.call(name, hook, original, args, options)

        call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined] # what torch.jit.script compiles
        call.gradfold_doctor = True  # type: ignore[attr-defined]
        setattr(owner, name, call)
        self.callback(lambda: setattr(owner, name, original) if is_own else delattr(owner, name))
