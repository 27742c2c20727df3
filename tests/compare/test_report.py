"""The report, its figures, the tables and the footnotes: what is shown of a comparison."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from full_disk import largest_file
from matplotlib.figure import Figure
from PIL import Image

import gradfold.__main__
import gradfold.cli.compare
from gradfold.cli.tables import print_comparison
from gradfold.compare import summary
from gradfold.compare.arms import ARMS, DEFAULT_ARMS
from gradfold.compare.data import Sizes
from gradfold.compare.measure import MeasuredMemory, Seconds
from gradfold.compare.report import PANELS, draw_gradient_error, make_folder, render_page, write_page, write_results
from gradfold.compare.results import Comparison, Curve, Deviation, Deviations, Measured, Row, WorkloadFacts
from gradfold.compare.settings import Settings
from gradfold.compare.summary import footnotes
from gradfold.errors import OptionError
from gradfold.memory.measure import PeakMemory
from gradfold.memory.tracker import MemoryBreakdown

MIB = 2**20


def measured(scale: float = 1.0, **changes: Any) -> Measured:
    plain = Measured(
        num_updates=30,
        num_samples=2000,
        num_threads=1,
        device="cpu",
        seconds=Seconds(0.3 * scale, 0.5 * scale, 0.1 * scale, 0.1 * scale),
        memory=MeasuredMemory(300 * MIB, 300 * MIB + int(48 * MIB / scale), "process high-water mark"),
        tracked=PeakMemory(
            MemoryBreakdown(*[2 * MIB] * 3, int(20 * MIB / scale), 3 * MIB, MIB), {}, "tensor storage", 0
        ),
        final_loss=0.125,
        metrics={"accuracy": 0.974},
        curve=Curve((100.0, 900.0, 1800.0), (2.0, 0.5, 0.05 * scale)),
    )
    return replace(plain, **changes)


def deviations(float32: float, float64: float, last_window: float | None, weights: float) -> Deviations:
    note = "" if last_window is not None else "it has no windows"
    return Deviations(Deviation(float32), Deviation(float64), Deviation(last_window, note), Deviation(weights))


FAILED = Deviations(*[Deviation(None, "this arm failed")] * 4)


def row(arm: str, found: Measured | None, far: Deviations, failure: str | None = None) -> Row:
    return Row(arm, found, far, failure)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison(
        settings=Settings("tiny"),
        sizes=Sizes(num_samples=1000, global_batch_size=64, micro_batch_size=16, num_epochs=2),
        workload=WorkloadFacts("tiny", "a <small> network & its data", None, {"source": "drawn"}),
        rows=(
            row("full-batch", measured(), deviations(0.0, 0.0, 0.0, 0.0)),
            row("gradfold", measured(1.3), deviations(1.2e-7, 2.1e-16, 3.1e-16, 2e-5)),
            row("plain-loop", measured(1.2), deviations(1.2e-7, 2.2e-16, 0.25, 0.085)),
            row("small-batch", measured(2.0, num_updates=120), deviations(0.9, 0.9, None, 0.7)),
        ),
        versions={"gradfold": "1.2.3", "torch": "2.13.0", "python": "3.11.2"},
        machine={"cpu": "a processor", "cores": 2, "platform": "Linux x86_64"},
        command_line="gradfold compare tiny --out 'my out'",
    )


@pytest.fixture(scope="module")
def folder(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of the comparison."""
    made = tmp_path_factory.mktemp("report")
    write_results(comparison, made)
    write_page(comparison, made)
    return made


@pytest.fixture
def broken(comparison: Comparison) -> Comparison:
    """The full batch did not fit, and another arm diverged."""
    nan = measured(final_loss=math.nan, curve=Curve((100.0,), (math.nan,)), metrics={"accuracy": math.nan})
    note = Deviations(*[Deviation(None, "full-batch failed")] * 4)
    return replace(
        comparison,
        rows=(row("full-batch", None, FAILED, "out of memory: MemoryError"), row("gradfold", nan, note)),
    )


@pytest.fixture
def normed(comparison: Comparison) -> Comparison:
    """A workload with BatchNorm by micro-batch, trained with GroupNorm too."""
    measured_otherwise = measured(metrics={"accuracy": 0.951, "loss": 0.4142}, memory=MeasuredMemory(0, 96 * MIB, ""))
    wrong = changed(comparison, "gradfold", measured(), deviations(0.39, 0.39, 0.42, 0.379))
    return replace(
        wrong,
        workload=replace(comparison.workload, batch_norm="per_micro_batch"),
        rows=(
            *wrong.rows,
            row("group-norm-full-batch", measured_otherwise, deviations(0.0, 0.0, 0.0, 0.0)),
            row("group-norm", measured(), deviations(4.8e-07, 2.8e-16, 1.7e-16, 7.7e-07)),
        ),
    )


class Sources(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_holds(plain: Any, value: Any) -> None:
    """Every field of a dataclass is there, however deep, with its value."""
    if is_dataclass(value):
        for field in fields(value):
            assert_holds(plain[field.name], getattr(value, field.name))
    elif isinstance(value, tuple):
        for one, expected in zip(plain, value, strict=True):
            assert_holds(one, expected)
    else:
        assert plain == value


def test_the_folder_holds_valid_images_and_valid_json(comparison: Comparison, folder: Path) -> None:
    for name in ("loss", "memory", "time", "gradient_error", "overview"):
        with Image.open(folder / f"{name}.png") as image:
            image.load()
            assert image.width > 1000 and image.height > 400
            assert len(image.convert("RGB").getcolors(2**24) or []) > 50  # something is drawn on it
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert_holds(results, comparison)
    assert results["schema_version"] == 1
    assert results["command_line"] == "gradfold compare tiny --out 'my out'"
    assert [one["arm"] for one in results["rows"]] == list(DEFAULT_ARMS)
    assert results["rows"][1]["deviations"]["gradient_float64"] == {"value": 2.1e-16, "note": ""}
    assert results["rows"][1]["measured"]["memory"]["rise_bytes"] == int(48 * MIB / 1.3)
    assert results["sizes"]["last_window"] == 1000 % 64


HALF = "\udcff"  # of a character: what a byte that is not UTF-8 becomes in a name or an argument
UNSAYABLE = f"$x_{{ \\frac$ {HALF} \x00 \x1b[31m <b>"  # neither Unicode, nor a formula, nor a mark


@pytest.fixture
def hostile(comparison: Comparison) -> Comparison:
    """Texts that the user's files and arguments may hold."""
    note = Deviations(*[Deviation(None, f"not in float64: ValueError: {UNSAYABLE}")] * 4)
    return replace(
        comparison,
        settings=replace(comparison.settings, workload=f"tiny{HALF}.py:tiny"),
        workload=WorkloadFacts(UNSAYABLE, UNSAYABLE, None, {UNSAYABLE: UNSAYABLE}),
        rows=(*comparison.rows[:2], row("plain-loop", measured(), note), row("small-batch", None, FAILED, UNSAYABLE)),
        command_line=f"gradfold compare --out {UNSAYABLE}",
    )


def test_a_report_may_hold_any_text(hostile: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / f"out{HALF}"
    make_folder(folder)
    write_results(hostile, folder)
    assert [path.name for path in write_page(hostile, folder)][-1] == "report.html"
    page = Sources((folder / "report.html").read_text("utf-8")).text
    assert page.count("$x_{ \\frac$ \\udcff") >= 4
    assert_holds(json.loads((folder / "results.json").read_text("utf-8")), hostile)
    for name in PANELS:
        with Image.open(folder / name) as image:
            image.verify()


def compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], comparison: Comparison, *arguments: str
) -> tuple[int, str, str]:
    """`gradfold compare tiny ARGUMENTS` after its training: exit code, output, errors."""
    monkeypatch.setattr(gradfold.cli.compare, "run_comparison", lambda *_, **__: comparison)
    monkeypatch.setattr("sys.argv", ["gradfold", "compare", "tiny", *arguments])
    with pytest.raises(SystemExit) as end:
        gradfold.__main__.main()
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_fault_in_rendering_loses_nothing(
    comparison: Comparison,
    tmp_path: Path,
    as_json: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such font\nat all")

    monkeypatch.setattr("gradfold.compare.report.draw_figures", fail)
    code, out, err = compared(monkeypatch, capsys, comparison, "--out", str(tmp_path), *as_json)
    assert code == 1
    assert err == f"gradfold: --out {tmp_path}: the report is incomplete: ValueError: no such font\n"
    assert_holds(json.loads((tmp_path / "results.json").read_text("utf-8")), comparison)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert_holds(json.loads(out), comparison) if as_json else re.search(r"^gradfold +1\.2e-07", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("room", "kept"), [(1000, set()), (20_000, {"results.json"}), (100_000, {"results.json", "*"})]
)
def test_a_full_disk_costs_files_but_no_results(
    comparison: Comparison,
    tmp_path: Path,
    room: int,
    kept: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with largest_file(room):
        code, out, err = compared(monkeypatch, capsys, comparison, "--out", str(tmp_path))
    assert code == 1
    assert re.fullmatch(rf"gradfold: --out {tmp_path}: the report is incomplete: OSError: .* '{tmp_path}/.*'\n", err)
    assert re.search(r"^gradfold +1\.2e-07 +2\.1e-16", out, re.MULTILINE)
    names = {path.name for path in tmp_path.iterdir()}
    assert names - set(PANELS) == kept - {"*"} and bool(names & set(PANELS)) == ("*" in kept)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    if "results.json" in kept:
        assert_holds(json.loads((tmp_path / "results.json").read_text("utf-8")), comparison)


def test_every_arm_has_its_color_in_the_plots(folder: Path) -> None:
    for name in ("memory.png", "loss.png"):
        with Image.open(folder / name) as image:
            colors = {color for _, color in image.convert("RGB").getcolors(2**24) or []}
        for arm in DEFAULT_ARMS:
            red, green, blue = (int(ARMS[arm].color[at : at + 2], 16) for at in (1, 3, 5))
            assert (red, green, blue) in colors, (name, arm)
    assert len({arm.color for arm in ARMS.values()}) == len(ARMS)


def test_the_page_needs_nothing_else_and_names_every_arm(comparison: Comparison, folder: Path) -> None:
    page = Sources((folder / "report.html").read_text("utf-8"))
    assert len(page.references) == 4
    for reference in page.references:
        kind, _, content = reference.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    for arm in DEFAULT_ARMS:
        assert page.text.count(arm) >= 3 and ARMS[arm].description in page.text
    for text in ("a <small> network & its data", "2.1e-16", "97.4 %", "48.0 MiB", "torch 2.13.0", "a processor"):
        assert text in page.text
    for sentence in footnotes(comparison):
        assert sentence in page.text


def test_a_second_model_is_shown_with_its_own_reference(
    normed: Comparison, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(normed, tmp_path)
    write_page(normed, tmp_path)
    with Image.open(folder / "gradient_error.png") as of_four, Image.open(tmp_path / "gradient_error.png") as of_six:
        assert of_six.height > of_four.height + 100  # else the labels of an arm lie upon each other
    page = Sources((tmp_path / "report.html").read_text("utf-8")).text
    assert page.count("reference\n") == 2 and "2.8e-16" in page and "95.1 %" in page
    assert "The full batch of group-norm, which trains another model, is group-norm-full-batch." in page
    assert "The same model (with BatchNorm, and again with GroupNorm), trained" in page
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    references = {one["arm"]: one["reference"] for one in results["rows"]}
    assert references["gradfold"] == "full-batch" and references["group-norm"] == "group-norm-full-batch"
    print_comparison(normed, [])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "…" not in printed
    assert len(re.findall(r"^(full-batch|group-norm-full-batch) +reference ", printed, re.MULTILINE)) == 2
    assert re.search(r"^group-norm +4\.8e-07 +2\.8e-16 +1\.7e-16 +7\.7e-07 ", printed, re.MULTILINE)


def test_the_plot_of_gradients_marks_both_references(normed: Comparison) -> None:
    axes = Figure().subplots()
    draw_gradient_error(axes, normed)
    assert [text.get_text() for text in axes.texts].count("reference") == 2


def test_a_page_of_one_model_does_not_speak_of_two(folder: Path) -> None:
    page = Sources((folder / "report.html").read_text("utf-8")).text
    assert "GroupNorm" not in page and "another model" not in page


@pytest.mark.parametrize("kind", ["comparison", "normed", "broken", "whole"])
def test_every_row_of_a_table_has_a_cell_for_every_heading(
    kind: str, request: pytest.FixtureRequest, comparison: Comparison
) -> None:
    shown = replace(comparison, sizes=Sizes(1024, 64, 16, 2)) if kind == "whole" else request.getfixturevalue(kind)
    page = render_page(shown, dict.fromkeys(PANELS, b""))
    tables = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    assert len(tables) == 2
    for table in tables:
        rows = [re.findall(r"<t[hd]([^>]*)>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
        spans = [sum(int((re.findall(r'colspan="(\d+)"', cell) or [1])[0]) for cell in row) for row in rows]
        assert len(spans) == 1 + len(shown.rows) and len(set(spans)) == 1


def test_a_failed_arm_is_shown_everywhere(
    broken: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(broken, tmp_path)
    write_page(broken, tmp_path)
    page = Sources((tmp_path / "report.html").read_text("utf-8"))
    assert page.text.count("failed: out of memory: MemoryError") >= 2
    assert "NaN" in page.text and "full-batch failed" in page.text
    assert '"final_loss": null' in (tmp_path / "results.json").read_text("utf-8")
    print_comparison(broken, [])
    printed = capsys.readouterr().out
    assert re.search(r"^full-batch +failed", printed, re.MULTILINE)
    assert "full-batch failed: out of memory: MemoryError." in printed


def test_a_page_without_a_partial_window_has_no_column_for_it(comparison: Comparison) -> None:
    plots = dict.fromkeys(PANELS, b"")
    assert "last window float64" in render_page(comparison, plots)
    whole = replace(comparison, sizes=Sizes(1024, 64, 16, 2))
    assert "last window float64" not in render_page(whole, plots)


def test_the_tables_fit_a_hundred_columns(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(comparison, [Path("out/results.json"), Path("out/report.html")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    for arm in DEFAULT_ARMS:
        assert len(re.findall(rf"^{arm} ", printed, re.MULTILINE)) == 2
    assert re.search(
        r"^gradfold +1\.2e-07 +2\.1e-16 +3\.1e-16 +2\.0e-05 +0\.125 +97\.4 % +30 *$", printed, re.MULTILINE
    )
    assert "Report: out/report.html" in printed


def test_no_figure_is_cut_in_a_terminal_of_eighty_columns(
    normed: Comparison, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    print_comparison(normed, [])
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    for one in normed.rows:
        assert len(re.findall(rf"^{one.arm} ", printed, re.MULTILINE)) == 4


# Footnotes


def said(comparison: Comparison) -> str:
    return " ".join(footnotes(comparison))


def changed(comparison: Comparison, arm: str, found: Measured | None, far: Deviations) -> Comparison:
    rows = [row(arm, found, far) if one.arm == arm else one for one in comparison.rows]
    return replace(comparison, rows=tuple(rows))


def test_footnotes_say_what_the_numbers_show(comparison: Comparison) -> None:
    notes = said(comparison)
    assert "gradfold: first gradient equal to full-batch to rounding (2.1e-16 in float64)" in notes
    assert "memory (36.9 MiB, full-batch 48.0 MiB), 0.77 times the speed" in notes
    assert "(40 samples) is divided by 4 with 3 micro-batches left: 25.0 % off" in notes
    assert "small-batch: 4.0 times as many updates" in notes
    assert "held-out" not in notes  # which the table shows


def test_footnotes_do_not_praise_a_wrong_gradient(comparison: Comparison) -> None:
    wrong = changed(comparison, "gradfold", measured(), deviations(0.4, 0.4, 0.4, 0.4))
    assert "first gradient 40.0 % off full-batch (float64)" in said(wrong)
    assert "more than rounding" in said(wrong)
    normed = replace(wrong, workload=replace(wrong.workload, batch_norm="per_micro_batch"))
    assert "BatchNorm normalizes by micro-batch" in said(normed) and "more than rounding" not in said(normed)
    small = changed(
        comparison, "gradfold", measured(memory=MeasuredMemory(0, 41 * MIB, "")), deviations(0.0, 0.0, 0.0, 0.0)
    )
    assert "about the same memory (41.0 MiB, full-batch 48.0 MiB)" in said(small)  # a process's noise
    assert "about the same memory" in said(wrong) and "about the same speed" in said(wrong)


def test_footnotes_measure_a_second_model_against_its_own_full_batch(normed: Comparison) -> None:
    notes = said(normed)
    assert "gradfold: first gradient 39.0 % off full-batch (float64); BatchNorm normalizes by micro-batch" in notes
    assert "group-norm: first gradient equal to group-norm-full-batch to rounding (2.8e-16 in float64)" in notes
    assert "; memory (48.0 MiB, group-norm-full-batch 96.0 MiB)" in notes
    assert "group-norm-full-batch:" not in notes  # it is a reference
    right = changed(normed, "gradfold", measured(), deviations(0.0, 1e-16, 1e-16, 0.0))
    assert "BatchNorm" not in said(right)
    off = changed(normed, "group-norm", measured(), deviations(0.2, 0.2, 0.2, 0.2))
    assert "group-norm: first gradient 20.0 % off group-norm-full-batch (float64); more than rounding" in said(off)
    assert "random layers draw differently" in said(off)  # and nothing of BatchNorm, which it does not have
    lost = changed(normed, "group-norm-full-batch", None, FAILED)
    assert "Without group-norm-full-batch there is no reference: gradients and weights of group-norm are" in said(lost)
    assert "Without full-batch" not in said(lost)


def test_footnotes_speak_of_growing_rounding_only_where_weights_diverge(comparison: Comparison) -> None:
    assert "rounding errors grow" not in said(comparison)
    apart = changed(comparison, "gradfold", measured(), deviations(1e-7, 1e-16, 1e-16, 0.2))
    assert "rounding errors grow" in said(apart)
    with_group_norm = row("group-norm", measured(), deviations(1e-7, 1e-16, 1e-16, 0.2))
    grown = said(replace(comparison, rows=(*comparison.rows, with_group_norm)))
    assert "rounding errors grow" in grown and "--arms" not in grown  # there is no control of that model
    control = row("row-order-control", measured(), deviations(1e-7, 1e-16, 1e-16, 0.19))
    assert "Rounding alone (row-order-control) moves the final weights by 19.0 %" in said(
        replace(apart, rows=(*apart.rows, control))
    )


def test_footnotes_warn_of_a_busy_machine(comparison: Comparison) -> None:
    def on(others: float, cores: int) -> Comparison:
        machine = {**comparison.machine, "cores": cores, "cores_busy_with_other_programs": others}
        return replace(comparison, machine=machine)

    assert "Times are not reliable" in said(on(1.4, 2))
    assert "Times are not reliable" not in said(on(0.9, 2))
    assert "Times are not reliable" not in said(on(1.4, 8))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (summary.share(0.0), "0"),
        (summary.share(2.14e-16), "2.1e-16"),
        (summary.share(0.00123), "0.123 %"),
        (summary.share(0.974), "97.4 %"),
        (summary.share(math.nan), "NaN"),
        (summary.share(None), summary.MISSING),
        (summary.seconds(0.0123), "12.3 ms"),
        (summary.seconds(1.234), "1.23 s"),
        (summary.seconds(12.34), "12.3 s"),
        (summary.seconds(1234.0), "1234 s"),
        (summary.number(12345.6), "12,346"),
        (summary.number(0.123456), "0.1235"),
        (summary.metric("accuracy", 0.5), "50.0 %"),
        (summary.metric("loss", 0.5), "0.5"),
    ],
)
def test_numbers_are_readable(written: str, text: str) -> None:
    assert written == text


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    make_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").write_text("")
    for cannot_be_made in ("file", "a\0b", "n" * 300, "half \ud800"):
        with pytest.raises(OptionError, match="--out"):
            make_folder(tmp_path / cannot_be_made)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OptionError, match=r"cannot write into this folder \(Permission denied\)"):
        make_folder(tmp_path)
