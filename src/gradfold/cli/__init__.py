"""The command line: one file per command, registered here. `options` and `tables` hold what they share."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from gradfold import __version__
from gradfold.cli import compare, doctor, plan, verify, workloads
from gradfold.cli.options import ending_by_name
from gradfold.compare.output import lasting_streams
from gradfold.distributed.launch import is_first
from gradfold.errors import GradfoldError

app = typer.Typer(
    name="gradfold",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(help=compare.HELP, epilog=compare.EPILOG)(ending_by_name()(compare.compare))
app.command(epilog=verify.EPILOG)(ending_by_name()(verify.verify))
app.command(epilog=plan.EPILOG)(ending_by_name()(plan.plan))
app.command(epilog=doctor.EPILOG)(ending_by_name()(doctor.doctor))
app.command()(ending_by_name()(workloads.workloads))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gradfold {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 fine, 1 a finding or a failure, 2 wrong usage.")
def gradfold(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The gradient of a batch that does not fit in memory, exactly, for PyTorch.

    Start with **gradfold compare**: it trains a small network on real data with and without accumulation, and shows
    what stays the same and what it costs. **gradfold verify** proves a workload's gradient right, or names the cause.
    **gradfold plan** says which micro-batch fits into memory, before anything is run.
    **gradfold doctor** runs an existing training script for a few updates, and says what is wrong with it.
    """


def run() -> None:
    """Run the command line and exit; an error of gradfold's own becomes one message and an exit code."""
    with lasting_streams() as output_failure:
        try:
            code = app()
        except GradfoldError as error:
            if is_first():
                print(f"gradfold: {error}", file=sys.stderr)
            code = error.exit_code
        except SystemExit as end:
            code = end.code
        failure = output_failure()
        if failure is not None and failure.errno != errno.EPIPE:  # a reader that has gone (| head -1) changes nothing
            print(f"gradfold: standard output could not be written: {failure.strerror}.", file=sys.stderr)
            code = code or 1
        sys.exit(code)
