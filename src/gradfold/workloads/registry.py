"""The registry: workloads by name, and workloads of the user's own by module or file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from gradfold.errors import GradfoldError, WorkloadError
from gradfold.workloads.workload import Workload


@dataclass(frozen=True)
class Description:
    """A built-in workload: a line of `gradfold workloads`."""

    function: str  # that builds it, in a module of this package
    text: str  # which model it trains on what
    data: str  # where its data come from

    @property
    def name(self) -> str:
        """What to write on the command line."""
        return self.function.partition(":")[2].replace("_", "-")


_MULTI30K = "--data DIR with Multi30k"

BUILT_IN = {
    one.name: one
    for one in (
        Description(
            "images:digits",
            "perceptron 64-512-256-128-10 on the 8 x 8 digits of scikit-learn, cross-entropy, Adam",
            "embedded in scikit-learn",
        ),
        Description("regression:linear", "nn.Linear(10, 1) on synthetic data, mean squared error, SGD", "synthetic"),
        Description(
            "regression:scalar",
            "one weight that learns y = 2x from x = 4 and x = 2; small enough to check by hand",
            "synthetic",
        ),
        Description(
            "images:mnist",
            "perceptron 784-512-256-128-10 on MNIST, cross-entropy, Adam",
            "downloaded (12 MB), or --data DIR",
        ),
        Description(
            "images:cifar10",
            "LeNet (convolutions of 6 and 16 channels, linear 120-84-10) on CIFAR-10, cross-entropy, SGD",
            "downloaded (170 MB), or --data DIR",
        ),
        Description(
            "language:encoder",
            "Transformer encoder that fills in masked words of Python's docstrings; uneven lengths, mean over tokens",
            "in Python's standard library",
        ),
        Description(
            "images:resnet",
            "small ResNet with BatchNorm (normalized per micro-batch) on CIFAR-10, or on digits without data",
            "embedded in scikit-learn, or --data DIR",
        ),
        Description(
            "language:language_model",
            "Transformer decoder that predicts the next word; very uneven lengths, mean over tokens",
            "docstrings of Python's standard library, or --data DIR with WikiText-2",
        ),
        Description(
            "translation:translation",
            "Transformer encoder-decoder, German to English captions of Multi30k; two lengths a row, mean over tokens",
            f"{_MULTI30K} (train and val, .de.gz and .en.gz)",
        ),
        Description(
            "translation:matching",
            "two Transformer encoders that match English to German captions of Multi30k by InfoNCE, a TwoPhaseLoss",
            f"{_MULTI30K} (train and test_2016_flickr, .en.gz and .de.gz)",
        ),
    )
}

_HOW_TO_NAME = "Write the name of a built-in workload, module:callable or path.py:callable."


def load(spec: str, data: Path | None = None) -> Workload:
    """Build a workload: a built-in one by its name, or one of the user's own.

    Args:
        spec: a built-in name, or `module:callable` or `path.py:callable`, where the callable takes nothing or an
            argument `data` and returns a `Workload`. As for `python -m` and `python path.py`, modules are looked for
            in the current folder, or in the folder of the path.
        data: the folder of the user's data.

    Raises:
        WorkloadError: there is no such workload, or it cannot be built.
        DataError: its data are missing, damaged or of another data set, or cannot be downloaded.
    """
    path = f"gradfold.workloads.{BUILT_IN[spec].function}" if spec in BUILT_IN else spec
    module_name, colon, attribute = path.rpartition(":")
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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module raises, sys.exit included
        raise WorkloadError(f"{spec}: cannot import {module_name}: {describe_cause(error)}. {_HOW_TO_NAME}") from error


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
    except (GradfoldError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the user's callable raises, sys.exit included
        raise WorkloadError(f"{spec}: cannot be built: {describe_cause(error)}") from error


def describe_cause(error: BaseException) -> str:
    """The error, and the line of the user's that raised it or called what did."""
    ours = (str(Path(__file__).parents[1]), importlib.__file__, "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    users = [frame for frame in frames if not frame.filename.startswith(installed)] or frames
    where = f" ({users[-1].filename}, line {users[-1].lineno})" if users else ""
    return f"{type(error).__name__}{f': {error}' if str(error) else ''}{where}"
