"""The command `gradfold doctor`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gradfold import __version__
from gradfold.cli.options import print_json
from gradfold.compare.output import write_whole
from gradfold.doctor.process import diagnose
from gradfold.doctor.report import exit_code, rules_page, sarif, text
from gradfold.errors import OptionError

EPILOG = """
**Examples**

`gradfold doctor train.py` — records eight updates, and says what is wrong

`gradfold doctor train.py --updates 50 --timeout 600 -- --lr 0.1 --epochs 2` — arguments after -- are the script's

`gradfold doctor train.py --json` — for programs; the script's own output goes to standard error

`gradfold doctor train.py --sarif doctor.sarif` — for editors and continuous integration

`gradfold doctor --rules` — every rule: why it matters, how it is found, the suggested fix

`loss_sum += loss.item()  # gradfold: ignore[GF012]` — in a script, ignores a rule on that line

Exit codes: 0 no findings, 1 findings, 2 wrong usage, 70 no diagnosis, since gradfold's doctor itself failed (the script
then runs on without it, to its own end), 124 the script ran past --timeout; the script's own where it fails by itself.
"""


def doctor(
    script: Annotated[Path | None, typer.Argument(help="The training script, unchanged.", show_default=False)] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, after --.", metavar="-- ARGS")
    ] = None,
    updates: Annotated[
        int,
        typer.Option(
            help="Record N optimizer updates, and on to the end of the epoch if that is near; then end the script.",
            metavar="N",
        ),
    ] = 8,
    timeout: Annotated[float, typer.Option(help="End the script after so many seconds.", metavar="S")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")] = False,
    sarif_file: Annotated[
        Path | None, typer.Option("--sarif", help="Write the findings as SARIF 2.1.0 into this file.", metavar="FILE")
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Where the doctor itself fails, print its traceback on standard error.")
    ] = False,
    rules: Annotated[bool, typer.Option("--rules", help="Print all rules as Markdown and exit.")] = False,
) -> None:
    """Run a PyTorch training script for a few updates, and say what is wrong with it.

    The script runs unchanged, with its own arguments and output, and need not use gradfold. Every backward pass, step,
    zeroing, clipping, scaling and schedule is traced to the line that made it. Each fault in accumulation is reported
    with that line, its effect in numbers, and a suggested fix. A healthy script gets no findings, and a summary: window
    length, effective batch, updates per epoch, memory, time.

    The script really trains: checkpoints that it saves during these updates are saved. It is ended from inside, so its
    `finally` blocks run.
    """
    if rules:
        typer.echo(rules_page(), nl=False)
        return
    if script is None:
        raise OptionError("missing script: gradfold doctor train.py -- ARGS")
    stdout = sys.stderr if as_json else None
    report = diagnose(script, arguments or [], num_updates=updates, timeout_s=timeout, stdout=stdout)
    if os.environ.get("RANK", "0") != "0":  # of several processes one prints
        raise typer.Exit(exit_code(report))
    if debug and report.failure is not None:
        print(f"\n{report.failure.traceback}", file=sys.stderr)
    if as_json:
        print_json(asdict(report))
    else:
        print(f"\n{text(report)}")
    if sarif_file is not None:  # after the report, which a full disk must not take away
        try:
            write_whole(sarif_file, json.dumps(sarif(report, __version__), indent=1).encode())
        except OSError as error:
            raise OptionError(f"--sarif {sarif_file}: {error.strerror}.") from error
    if code := exit_code(report):
        raise typer.Exit(code)
