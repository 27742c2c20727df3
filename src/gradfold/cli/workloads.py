"""The command `gradfold workloads`."""

from __future__ import annotations

from gradfold.cli.options import JsonOption, print_json
from gradfold.cli.tables import output_console, print_words
from gradfold.workloads import registry


def workloads(as_json: JsonOption = False) -> None:
    """List the built-in workloads: what `gradfold compare` can train.

    A custom workload is a function that returns a `gradfold.Workload`; name it as `module:callable` or
    `path.py:callable`.
    """
    descriptions = registry.BUILT_IN.values()
    if as_json:
        print_json([{"name": one.name, "description": one.text, "data": one.data} for one in descriptions])
        return
    console = output_console()
    rows = [(one.name, one.text, one.data) for one in descriptions]
    print_words(console, "Built-in workloads", ["workload", "what it trains", "data"], rows, blank_lines=1)
    console.print("\nCustom: a function that returns a gradfold.Workload, as module:callable or path.py:callable.")
