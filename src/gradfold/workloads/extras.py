"""An extra: a package that only the commands need, imported when a workload asks for it."""

from __future__ import annotations

import importlib
from types import ModuleType

from gradfold.errors import WorkloadError

__all__: list[str] = []


def import_extra(package: str, purpose: str) -> ModuleType:
    """Imports a package of `gradfold[cli]`.

    Args:
        package: the name to import.
        purpose: what needs it, as the subject of the message.

    Raises:
        WorkloadError: it is not installed; the message has the line that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise WorkloadError(
            f"{purpose} needs {package.partition('.')[0]!r}, which is not installed ({error}). "
            'Install what the commands use: pip install "gradfold[cli]"'
        ) from error
