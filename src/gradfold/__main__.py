"""The program `gradfold`, also run by `python -m gradfold`."""

from __future__ import annotations

import sys

_NEEDED = ("jinja2", "matplotlib", "numpy", "rich", "typer")


def main() -> None:
    """Run the command line, or say what to install where its extra is missing."""
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
    run()


if __name__ == "__main__":
    main()
