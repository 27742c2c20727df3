"""The program `gradfold`, also run by `python -m gradfold`."""

from __future__ import annotations

import sys
from collections.abc import Callable

_NEEDED = ("jinja2", "matplotlib", "numpy", "rich", "typer")


def main() -> None:
    """Run the command line; Ctrl-C while its modules are imported, which takes seconds, ends it with one line."""
    try:
        _import_run()()
    except KeyboardInterrupt:
        print("gradfold: interrupted", file=sys.stderr)
        sys.exit(130)


def _import_run() -> Callable[[], None]:
    """The command line, or an exit that says what to install where its extra is missing."""
    try:
        from gradfold.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDED:
            raise
        print(
            f'gradfold: the commands need {error.name}, which is not installed. Run: pip install "gradfold[cli]"',
            file=sys.stderr,
        )
        sys.exit(2)
    return run


if __name__ == "__main__":
    main()
