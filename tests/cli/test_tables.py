"""Wide tables: whatever the width, every figure is there, whole, beside its name."""

import re

import pytest
from rich.console import Console

from gradfold.cli.tables import print_wide
from gradfold.compare.summary import Column

NAMES = [Column("arm", ["full-batch", "gradfold"], "left")]
GROUPS = [
    [Column("first\ngradient", ["1.2e-16", "0"]), Column("last\nwindow", ["25.0 %", "1.0e-16"])],
    [Column("samples/s", ["21,159", "3"]), Column("update", ["67.7 ms", "0.14 s"])],
]


def printed(width: int, styles: list[str] | None = None) -> list[str]:
    console = Console(width=width, force_terminal=styles is not None, highlight=False)
    with console.capture() as captured:
        print_wide(console, "Distance", NAMES, GROUPS, styles)
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize(
    ("width", "names_per_table"),
    [
        (80, [["1.2e-16 25.0 % 21,159 67.7 ms"]]),
        (46, [["1.2e-16 25.0 % 21,159 67.7 ms"]]),  # with narrower gaps
        (40, [["1.2e-16 25.0 %"], ["21,159 67.7 ms"]]),  # between the groups
        (25, [["1.2e-16"], ["25.0 %"], ["21,159"], ["67.7 ms"]]),  # within them
    ],
)
def test_a_table_is_cut_between_columns_and_nowhere_else(width: int, names_per_table: list[list[str]]) -> None:
    lines = printed(width)
    assert lines[0] == "Distance"
    assert max(map(len, lines)) <= width
    found = [" ".join(line.split()[1:]) for line in lines if line.startswith("full-batch")]
    assert [[cells] for cells in found] == names_per_table
    assert sum(line.startswith("gradfold") for line in lines) == len(names_per_table)
    text = "\n".join(lines)
    assert all(cell in text for group in GROUPS for column in group for cell in column.cells)
    assert "…" not in text and text.count("\n\n") == len(names_per_table) - 1


def test_rows_have_their_styles_in_every_table() -> None:
    lines = printed(40, ["", "bold"])
    assert [bool(re.search(r"\x1b\[1m", line)) for line in lines if "gradfold" in line] == [True, True]
    assert not any("\x1b" in line for line in lines if "full-batch" in line)
