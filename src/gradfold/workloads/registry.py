"""The registry: workloads by name, and workloads of the user's own by module or file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gradfold.errors import GradfoldError, WorkloadError
from gradfold.workloads.workload import Workload

__all__: list[str] = []

# A name stands for what a user would write for a workload of their own. Each module has a DESCRIPTION too.
BUILT_IN = {
    "digits": "gradfold.workloads.images:digits",
    "linear": "gradfold.workloads.regression:linear",
    "scalar": "gradfold.workloads.regression:scalar",
    "mnist": "gradfold.workloads.images:mnist",
    "cifar10": "gradfold.workloads.images:cifar10",
    "encoder": "gradfold.workloads.language:encoder",
    "resnet": "gradfold.workloads.images:resnet",
    "language-model": "gradfold.workloads.language:language_model",
    "translation": "gradfold.workloads.translation:translation",
    "matching": "gradfold.workloads.translation:matching",
}

_HOW_TO_NAME = "Write the name of a built-in workload, module:callable or path.py:callable."


@dataclass(frozen=True)
class Description:
    """A line of `gradfold workloads`.

    Args:
        name: what to write on the command line.
        text: what it trains, on what.
        data: where its data come from.
    """

    name: str
    text: str
    data: str


def names() -> tuple[str, ...]:
    """The names of the built-in workloads, the default first."""
    return tuple(BUILT_IN)


def describe() -> tuple[Description, ...]:
    """What there is, without building any of it."""
    modules = {name: importlib.import_module(spec.partition(":")[0]) for name, spec in BUILT_IN.items()}
    return tuple(Description(name, module.DESCRIPTION, module.DATA) for name, module in modules.items())


def load(spec: str, data: Path | None = None) -> Workload:
    """Builds a workload.

    Args:
        spec: a built-in name, or `module:callable` or `path.py:callable`, where the callable takes nothing or an
            argument `data` and returns a `Workload`. As for `python -m` and `python path.py`, modules are looked for
            in the current folder, or in the folder of the path.
        data: the folder of the user's data.

    Raises:
        WorkloadError: there is no such workload, or it cannot be built.
        DataError: its data are missing, damaged or foreign, or cannot be downloaded.
    """
    module_name, colon, attribute = BUILT_IN.get(spec, spec).rpartition(":")
    if not (colon and module_name and attribute):
        raise WorkloadError(_unknown(spec))
    module = _import(spec, module_name)
    make = getattr(module, attribute, None)
    if not callable(make):
        found = "no such name" if make is None else f"a {type(make).__name__}"
        raise WorkloadError(
            f"{spec}: expected {attribute!r} in {module_name} to be a callable that returns a Workload, found {found}"
        )
    workload = _call(spec, make, data)
    if not isinstance(workload, Workload):
        raise WorkloadError(
            f"{spec}: expected {attribute}() to return a gradfold.Workload, it returned a {type(workload).__name__}"
        )
    return workload


def _unknown(spec: str) -> str:
    if spec.endswith(".py"):
        return f"{spec}: which callable in it? Write {spec}:callable"
    close = difflib.get_close_matches(spec, BUILT_IN, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no workload {spec!r}.{meant} Built in: {', '.join(BUILT_IN)}. {_HOW_TO_NAME}"


def _import(spec: str, module_name: str) -> ModuleType:
    is_file = module_name.endswith(".py")
    if is_file and not Path(module_name).is_file():
        raise WorkloadError(f"{spec}: there is no file {module_name}")
    try:
        if is_file:
            return _import_file(Path(module_name).resolve())
        if spec not in BUILT_IN:
            _search_first(Path.cwd())
        return importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise WorkloadError(f"{spec}: cannot import {module_name}: {_cause(error)}. {_HOW_TO_NAME}") from error


def _import_file(path: Path) -> ModuleType:
    # The name is not the file's own, which may be that of an installed package.
    spec = importlib.util.spec_from_file_location(f"gradfold_workload_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _search_first(path.parent)
    sys.modules[spec.name] = module  # dataclasses and pickle look it up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _call(spec: str, make: Callable[..., object], data: Path | None) -> object:
    try:
        signature = inspect.signature(make)
        arguments = {"data": data} if "data" in signature.parameters else {}
        signature.bind(**arguments)
    except (TypeError, ValueError) as error:
        raise WorkloadError(f"{spec}: expected a callable that takes nothing or an argument `data`: {error}") from error
    if data is not None and not arguments:
        raise WorkloadError(f"{spec} takes no data, but was given {data}: leave out --data")
    try:
        return make(**arguments)
    except GradfoldError:
        raise
    except Exception as error:  # whatever the user's callable raises
        raise WorkloadError(f"{spec}: cannot be built: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """The error, and the line of the user's that raised it."""
    ours = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in ours and not frame.filename.startswith("<frozen")
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
