"""The report of a comparison: a folder with results.json, the figures, and one HTML page that needs nothing else.

results.json is written before anything is drawn, and every file is whole or not there. The user's texts may hold
anything: what UTF-8 lacks is escaped, and no text is read as a formula. A figure has one panel (loss, gradient error,
memory or time); the overview has them all.
"""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradfold.compare import summary
from gradfold.compare.arms import ARMS, REFERENCE
from gradfold.compare.output import write_whole
from gradfold.compare.results import Comparison, Row
from gradfold.errors import OptionError
from gradfold.memory.budget import written
from gradfold.memory.tracker import MemoryBreakdown

_NUM_POINTS = 60
# Parts of a stacked bar, from dark to light.
_PHASES = {"forward": 1.0, "backward": 0.68, "update": 0.4, "other": 0.17}
_KINDS = dict(zip([one.name for one in fields(MemoryBreakdown)], (1.0, 0.8, 0.62, 0.45, 0.28, 0.13), strict=True))
_INK, _FAINT, _LEGEND = "#22262b", "#6a7079", "#4a4f57"
_STYLE = {
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": "#b9bec5",
    "axes.labelcolor": _INK,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 30,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "legend.frameon": False,
    "text.parse_math": False,
}


def draw_loss(axes: Axes, comparison: Comparison) -> None:
    """Loss against samples seen, one curve per arm."""
    finished = [(ARMS[row.arm], row.measured) for row in comparison.rows if row.measured is not None]
    losses: list[float] = []
    for arm, measured in sorted(finished, key=lambda pair: -pair[0].line_width):
        curve = measured.curve.thinned(_NUM_POINTS)
        losses += filter(math.isfinite, curve.loss)
        (line,) = axes.plot(curve.samples, curve.loss, color=arm.color, linewidth=arm.line_width)
        line.set_solid_capstyle("round")
        line.set_marker("o" if len(curve.loss) == 1 else "")
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")
    handles = [Line2D([], [], color=arm.color, linewidth=arm.line_width, label=arm.name) for arm, _ in finished]
    _describe(axes, "Loss", "coinciding curves are drawn from wide to narrow", "samples seen", handles)


def draw_gradient_error(axes: Axes, comparison: Comparison) -> None:
    """How far gradients are from the full batch's, on a logarithmic axis."""
    axes.set_xscale("log")
    axes.axvspan(1e-18, summary.FLOAT64_ROUNDING, color="#f1f3f5", zorder=0)
    axes.text(1.6e-18, -0.62, "rounding in float64", color=_FAINT, fontsize=9, va="center")
    marks = {
        "gradient_float32": ("o", -0.26, f"first update, {comparison.first_gradients_in}"),
        "gradient_float64": ("s", 0.0, "first update, float64"),
        "last_window_float64": ("D", 0.26, "last window, float64"),
    }
    for position, row in enumerate(comparison.rows):
        text = "reference" if row.is_reference else row.deviations.gradient_float32.note
        if row.measured is not None and text:
            axes.text(1.6e-18, position, _encoded(text).decode(), color=_FAINT, va="center")
        for name, (marker, shift, _) in marks.items():
            value = getattr(row.deviations, name).value
            if value is not None and not row.is_reference:
                at = min(max(value, 1e-17), 10.0)
                axes.plot(at, position + shift, marker, color=ARMS[row.arm].color, markersize=9, clip_on=False)
                _label(axes, at, position + shift, summary.share(value), gap=9)
    if not comparison.sizes.last_window:
        del marks["last_window_float64"]
    _name_arms(axes, comparison.rows)
    axes.set_xlim(1e-18, 300.0)
    handles = [Line2D([], [], color=_FAINT, marker=one, linestyle="", label=text) for one, _, text in marks.values()]
    _describe(axes, "Gradient error", "distance from the full batch of the same model", "relative distance", handles)


def draw_memory(axes: Axes, comparison: Comparison) -> None:
    """Two bars per arm: the tensors alive at the peak, stacked by what they are for, and what the process took."""
    for position, row in enumerate(comparison.rows):
        if row.measured is None:
            continue
        color, memory, tracked = ARMS[row.arm].color, row.measured.memory, row.measured.tracked
        if tracked is not None:
            text = f"{written(tracked.peak_bytes)} of tensors"
            _draw_stacked(axes, position - 0.19, tracked.breakdown, _KINDS, color, text, height=0.34, unit=2**20)
        rise = memory.rise_bytes / 2**20
        axes.barh(position + 0.19, rise, facecolor="none", edgecolor=color, hatch="////", height=0.3)
        _label(axes, rise, position + 0.19, f"{written(memory.rise_bytes)} added  (peak {written(memory.peak_bytes)})")
    _name_arms(axes, comparison.rows, room=1.75)
    process = Patch(facecolor="none", edgecolor=_LEGEND, hatch="////", label="process: added by training")
    subtitle = "tensors at their peak, and what training added to the process"
    _describe(axes, "Memory", subtitle, "MiB", [*_patches(_KINDS), process])


def draw_time(axes: Axes, comparison: Comparison) -> None:
    """Seconds split into phases, one stacked bar per arm."""
    for position, row in enumerate(comparison.rows):
        if row.measured is None:
            continue
        spent, rate = row.measured.seconds, summary.number(row.measured.samples_per_s)
        text = f"{summary.seconds(spent.total)}  ({rate} samples/s)"
        _draw_stacked(axes, position, spent, _PHASES, ARMS[row.arm].color, text, height=0.6)
    _name_arms(axes, comparison.rows, room=1.65)
    _describe(axes, "Time", "training by phase, evaluation left out", "seconds", _patches(_PHASES))


PANELS: dict[str, Callable[[Axes, Comparison], None]] = {
    "loss.png": draw_loss,
    "gradient_error.png": draw_gradient_error,
    "memory.png": draw_memory,
    "time.png": draw_time,
}


def draw_figures(comparison: Comparison) -> dict[str, bytes]:
    """A figure of each panel and an overview of all, as PNG, by file name."""
    figures = {name: [draw] for name, draw in PANELS.items()} | {"overview.png": list(PANELS.values())}
    return {name: _render(comparison, panels) for name, panels in figures.items()}


def _render(comparison: Comparison, panels: Sequence[Callable[[Axes, Comparison], None]]) -> bytes:
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    height = 2.6 + 0.6 * max(len(comparison.rows), 4)
    with rc_context(_STYLE), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # which is drawn as a box
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.06, hspace=0.08)
        figure = Figure(figsize=(7.0 * columns, height * rows), dpi=160, layout=layout, facecolor="white")
        for axes, draw in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
            draw(axes, comparison)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        return image.getvalue()


def _draw_stacked(
    axes: Axes, y: float, of: object, shades: Mapping[str, float], color: str, text: str, height: float, unit: int = 1
) -> None:
    """A stacked bar of the attributes that have a shade, with a text beside it."""
    left = 0.0
    for name, shade in shades.items():
        length = getattr(of, name) / unit
        axes.barh(y, length, left=left, color=_mixed(color, shade), height=height)
        left += length
    _label(axes, left, y, text)


def _name_arms(axes: Axes, rows: Sequence[Row], room: float = 0.0) -> None:
    """Name the arms on the vertical axis, the first one on top; the other axis is `room` times as long as the bars."""
    for position, row in enumerate(rows):
        if row.measured is None:
            axes.text(0.02, position, "failed", color=_FAINT, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [row.arm for row in rows], color=_INK)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    if room and axes.dataLim.x1 > 0.0:
        axes.set_xlim(0.0, room * axes.dataLim.x1)


def _describe(axes: Axes, title: str, subtitle: str, xlabel: str, handles: Sequence[Artist]) -> None:
    """What stands around a panel: title, a line below it, the name of the horizontal axis, and a legend below that."""
    axes.set_title(title)
    axes.annotate(subtitle, (0.0, 1.0), (0, 12), xycoords="axes fraction", textcoords="offset points", color=_FAINT)
    axes.set_xlabel(xlabel)
    if handles:
        axes.legend(handles=handles, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.13), columnspacing=1.2)


def _patches(shades: Mapping[str, float]) -> list[Artist]:
    return [Patch(facecolor=_mixed(_LEGEND, shade), label=name.replace("_", " ")) for name, shade in shades.items()]


def _label(axes: Axes, x: float, y: float, text: str, gap: int = 6) -> None:
    axes.annotate(text, (x, y), (gap, 0), textcoords="offset points", va="center", fontsize=9.5)


def _mixed(color: str, shade: float) -> tuple[float, float, float]:
    """A color on white."""
    red, green, blue = (1 - shade * (1 - channel) for channel in to_rgb(color))
    return red, green, blue


def make_folder(folder: Path) -> None:
    """Make the folder for a report before the work starts, or raise an `OptionError` if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(f"--out {folder}: cannot write into this folder ({error.strerror}).") from error
    except ValueError as error:  # a name with a NUL, or that the locale cannot encode
        raise OptionError(f"--out {str(folder)!r}: not the name of a folder ({error}).") from error


def results_json(comparison: Comparison) -> str:
    """The comparison as JSON: what `--json` prints and results.json holds, without the folder of data files."""
    shown = replace(comparison, settings=replace(comparison.settings, data=None))
    return json.dumps(to_plain(shown), indent=1, allow_nan=False)


def to_plain(value: Any) -> Any:
    """The value in dicts, lists and scalars; a number that is not finite is null."""
    if is_dataclass(value):
        properties = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        names = [field.name for field in fields(value)] + properties
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(comparison: Comparison, folder: Path) -> list[Path]:
    """Write results.json; returns its path. An `OSError` names what cannot be written."""
    return _write(folder, {"results.json": f"{results_json(comparison)}\n".encode()})


def write_page(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the figures and report.html; returns their paths, the page last. An `OSError` names what cannot be."""
    figures = draw_figures(comparison)
    return _write(folder, {**figures, "report.html": _encoded(render_page(comparison, figures))})


def _write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def _encoded(text: str) -> bytes:
    """The text in UTF-8; halves of characters, as in names of files that are not UTF-8, are escaped."""
    return text.encode("utf-8", "backslashreplace")


def render_page(comparison: Comparison, figures: Mapping[str, bytes]) -> str:
    """The HTML page, with the figures inside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradfold.compare", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        distances=summary.distance_table(comparison),
        costs=summary.cost_table(comparison),
        footnotes=summary.footnotes(comparison),
        images={name: base64.b64encode(image).decode() for name, image in figures.items()},
        arms=ARMS,
        usual_reference=REFERENCE,
    )
