"""The plots of a comparison: loss against samples, memory, time and gradient error, each alone and all in one.

The report of a comparison: a folder with results.json, the plots, and one HTML page that needs nothing else.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import jinja2
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from gradfold.compare import summary as readable
from gradfold.compare.arms import DEFAULT_ARMS, REFERENCE
from gradfold.compare.results import Comparison, Deviation, Measured, Row
from gradfold.compare.summary import FLOAT64_ROUNDING, verdict
from gradfold.errors import OptionError
from gradfold.memory.amount import written

__all__: list[str] = []

Draw = Callable[[Axes, Comparison], None]

# Okabe and Ito's palette, which color-blind readers can tell apart. Curves that should coincide are drawn from wide to
# narrow, so that a narrow line on top leaves the wide one visible on both sides.
COLORS = {
    "full-batch": "#8a8f98",
    "gradfold": "#0072b2",
    "batch-norm-exact": "#004a77",
    "batch-norm-per-micro": "#56b4e9",
    "token-budget": "#009e73",
    "plain-loop": "#e69f00",
    "small-batch": "#cc79a7",
    "reordered": "#5c9a3a",
    "group-norm-full-batch": "#f0b48a",
    "group-norm": "#d55e00",
    "full-batch-bf16": "#3f444b",
    "gradfold-bf16": "#7a4fa3",
    "full-batch-fp16": "#8c6d46",
    "gradfold-fp16": "#13807c",
}
_WIDTHS = {
    **{"full-batch": 8.0, "plain-loop": 4.4, "gradfold": 1.6, "small-batch": 1.6, "reordered": 2.8},
    **{"batch-norm-exact": 1.6, "batch-norm-per-micro": 1.6, "group-norm-full-batch": 8.0, "group-norm": 1.6},
    "token-budget": 2.8,
    **{"full-batch-bf16": 6.2, "gradfold-bf16": 3.0, "full-batch-fp16": 6.2, "gradfold-fp16": 3.0},
}
_ON_TOP = (
    *("small-batch", "group-norm-full-batch", "group-norm", "full-batch", "full-batch-bf16", "full-batch-fp16"),
    *("plain-loop", "gradfold-bf16", "gradfold-fp16", "reordered", "token-budget", "gradfold", "batch-norm-per-micro"),
    "batch-norm-exact",
)
_NUM_POINTS = 60
_PHASES = (("forward", 1.0), ("backward", 0.68), ("update", 0.4), ("other", 0.17))
_KINDS = (
    *(("parameters", 1.0), ("gradients", 0.8), ("optimizer_state", 0.62)),
    *(("saved_activations", 0.45), ("temporaries", 0.28), ("inputs", 0.13)),
)
_INK, _FAINT = "#22262b", "#6a7079"
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
}


def draw_all(comparison: Comparison) -> dict[str, bytes]:
    """Every plot as PNG, by file name."""
    more = max(len(comparison.rows) - len(DEFAULT_ARMS), 0)
    plots = {name: _render(comparison, [draw], (6.8, high + more * by)) for name, (draw, high, by) in PLOTS.items()}
    plots["overview.png"] = _render(comparison, [draw for draw, _, _ in PLOTS.values()], (14.0, 10.0 + more))
    return plots


def draw_loss(axes: Axes, comparison: Comparison) -> None:
    """Loss against samples seen, one curve per arm."""
    finished = [row for row in comparison.rows if row.measured is not None]
    losses = []
    for row in sorted(finished, key=lambda row: _ON_TOP.index(row.arm)):
        assert row.measured is not None
        curve = row.measured.curve.thinned(_NUM_POINTS)
        losses += [loss for loss in curve.loss if math.isfinite(loss)]
        axes.plot(
            curve.samples,
            curve.loss,
            color=COLORS[row.arm],
            linewidth=_WIDTHS[row.arm],
            solid_capstyle="round",
            marker="o" if len(curve.loss) == 1 else "",
        )
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
    handles = [Line2D([], [], color=COLORS[row.arm], linewidth=_WIDTHS[row.arm], label=row.arm) for row in finished]
    if handles:
        axes.legend(handles=handles, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), columnspacing=1.2)
    _title(axes, "Loss", "coinciding curves are drawn from wide to narrow")
    axes.set(xlabel="samples seen", ylabel="training loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")


def draw_memory(axes: Axes, comparison: Comparison) -> None:
    """Two bars per arm: the tensors alive at the peak, stacked by what they are for, and what the process took."""
    longest = 0.0
    for position, row in enumerate(comparison.rows):
        if row.measured is None:
            continue
        memory, tracked = row.measured.memory, row.measured.tracked
        if tracked is not None:
            left = 0.0
            for kind, strength in _KINDS:
                mib = tracked.make_up.to_json()[kind] / 2**20
                color = _mixed(COLORS[row.arm], strength)
                axes.barh(position - 0.19, mib, left=left, color=color, height=0.34)
                left += mib
            _beside(axes, left, position - 0.19, f"{written(tracked.peak_bytes)} of tensors")
            longest = max(longest, left)
        rise = memory.rise_bytes / 2**20
        axes.barh(position + 0.19, rise, facecolor="none", edgecolor=COLORS[row.arm], hatch="////", height=0.3)
        _beside(axes, rise, position + 0.19, f"{written(memory.rise_bytes)} added  ({_baseline(row.measured)})")
        longest = max(longest, rise)
    handles = [Patch(facecolor=_mixed("#4a4f57", strength), label=kind.replace("_", " ")) for kind, strength in _KINDS]
    handles.append(Patch(facecolor="none", edgecolor="#4a4f57", hatch="////", label="process: added by training"))
    axes.legend(handles=handles, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.16), columnspacing=1.2)
    _title(axes, "Memory", "tensors at their peak, and what training added to the process")
    axes.set(xlabel="MiB")
    _bars(axes, comparison.rows, longest, room=1.75)


def draw_time(axes: Axes, comparison: Comparison) -> None:
    """Seconds split into phases, one stacked bar per arm."""
    longest = 0.0
    for position, row in enumerate(comparison.rows):
        if row.measured is not None:
            left = 0.0
            for phase, strength in _PHASES:
                spent = getattr(row.measured.seconds, phase)
                axes.barh(position, spent, left=left, color=_mixed(COLORS[row.arm], strength), height=0.6)
                left += spent
            rate = readable.number(row.measured.samples_per_s)
            _beside(axes, left, position, f"{readable.seconds(left)}  ({rate} samples/s)")
            longest = max(longest, left)
    handles = [Patch(facecolor=_mixed("#4a4f57", strength), label=phase) for phase, strength in _PHASES]
    axes.legend(
        handles=handles, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 0.98), handlelength=1.0, columnspacing=1.2
    )
    axes.set(xlabel="seconds of training, evaluation left out")
    _title(axes, "Time")
    _bars(axes, comparison.rows, longest, room=1.65)


def draw_gradient_error(axes: Axes, comparison: Comparison) -> None:
    """How far gradients are from the full batch's, on a logarithmic axis."""
    axes.set_xscale("log")
    axes.axvspan(1e-18, FLOAT64_ROUNDING, color="#f1f3f5", zorder=0)
    axes.text(1.6e-18, -0.62, "rounding in float64", color=_FAINT, fontsize=9, va="center")
    for position, row in enumerate(comparison.rows):
        if row.is_reference and row.measured is not None:
            axes.text(1.6e-18, position, "reference", color=_FAINT, va="center")
            continue
        for marker, _, deviation, shift in _gradient_marks(row, comparison):
            if deviation.value is not None:
                at = min(max(deviation.value, 1e-17), 10.0)
                axes.plot(at, position + shift, marker, color=COLORS[row.arm], markersize=9, clip_on=False)
                label = readable.share(deviation.value)
                axes.annotate(
                    label, (at, position + shift), (9, 0), textcoords="offset points", va="center", fontsize=9.5
                )
        if row.measured is not None and row.deviations.gradient_float32.value is None:
            axes.text(1.6e-18, position, row.deviations.gradient_float32.note, color=_FAINT, va="center")
    marks = _gradient_marks(comparison.rows[0], comparison)[: 3 if comparison.sizes.last_window else 2]
    handles = [Line2D([], [], color=_FAINT, marker=mark, linestyle="", label=label) for mark, label, _, _ in marks]
    axes.legend(
        handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 0.98), handletextpad=0.2, columnspacing=1.2
    )
    axes.set(xlabel="relative distance from the gradient of the same model's full batch")
    _title(axes, "Gradient error")
    _bars(axes, comparison.rows, 0.0, room=1.0)
    axes.set_xlim(1e-18, 300.0)


# How each is drawn, its height in inches, and how much higher it gets by every arm beyond the usual four.
PLOTS: dict[str, tuple[Draw, float, float]] = {
    "loss.png": (draw_loss, 4.6, 0.0),
    "gradient_error.png": (draw_gradient_error, 3.9, 0.65),
    "memory.png": (draw_memory, 4.9, 0.75),
    "time.png": (draw_time, 3.6, 0.45),
}


def _gradient_marks(row: Row, comparison: Comparison) -> list[tuple[str, str, Deviation, float]]:
    """Marker, label, value and shift from the middle of the row."""
    deviations = row.deviations
    return [
        ("o", f"first update, {comparison.first_gradients_in}", deviations.gradient_float32, -0.26),
        ("s", "float64", deviations.gradient_float64, 0.0),
        ("D", "last window, float64", deviations.last_window_float64, 0.26),
    ]


def _render(comparison: Comparison, draws: list[Draw], size: tuple[float, float]) -> bytes:
    with rc_context(_STYLE):  # type: ignore[arg-type]
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.06, hspace=0.08)
        figure = Figure(figsize=size, dpi=160, layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        columns = 1 if len(draws) == 1 else 2
        axes = figure.subplots(-(-len(draws) // columns), columns, squeeze=False)
        for one, draw in zip(axes.flat, draws, strict=True):
            draw(one, comparison)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        return image.getvalue()


def _bars(axes: Axes, rows: tuple[Row, ...], longest: float, room: float) -> None:
    """Name the arms on the vertical axis, first one on top, and leave room for the labels."""
    for position, row in enumerate(rows):
        if row.measured is None:
            axes.text(0.02, position, "failed", color=_FAINT, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [row.arm for row in rows], color=_INK)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    if longest:
        axes.set_xlim(0.0, longest * room)


def _title(axes: Axes, title: str, below: str = "") -> None:
    """A title, with a line below it where no legend stands there."""
    axes.set_title(title)
    axes.text(0.0, 1.045, below, transform=axes.transAxes, color=_FAINT)


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", fontsize=9.5)


def _baseline(measured: Measured) -> str:
    return f"peak {written(measured.memory.peak_bytes)}"


def _mixed(color: str, strength: float) -> tuple[float, float, float]:
    """A color on white."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(color))
    return red, green, blue


_CAPTIONS = {
    "loss.png": "Each point is a mean over a stretch of samples. A thin line on a wide one means the same loss.",
    "gradient_error.png": "How far an arm's gradient is from that of the full batch of the same model, relative to its "
    "length. The first update is measured as it ran and again in float64; the last, partial window of an epoch in "
    "float64.",
    "memory.png": "Upper bar: the tensors alive at the moment when most were, in the first two updates, run once more "
    "under a tracker; the data set is left out. Lower bar: peak memory of the process while it trained, above what it "
    "held with model and data loaded; a warm heap may serve small tensors from what it has.",
    "time.png": "Seconds of training by phase. “Other” is the rest: cutting batches, zeroing gradients, bookkeeping.",
}


def make_folder(folder: Path) -> None:
    """Make the folder for a report before the work starts.

    Raises:
        OptionError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {folder}: cannot make this folder ({error.strerror}).") from error


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write results.json, report.html and the plots; returns their paths."""
    plots = draw_all(comparison)
    files = {
        "results.json": (json.dumps(comparison.to_json(), indent=1, allow_nan=False) + "\n").encode(),
        "report.html": render_page(comparison, plots).encode(),
        **plots,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def render_page(comparison: Comparison, plots: Mapping[str, bytes]) -> str:
    """The HTML page, with the plots inside."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("gradfold.compare").joinpath("report.html.jinja").read_text("utf-8")
    )
    images = [(name, base64.b64encode(plots[name]).decode(), caption) for name, caption in _CAPTIONS.items()]
    return template.render(
        comparison=comparison,
        sizes=comparison.sizes,
        workload=comparison.workload,
        verdict=verdict(comparison),
        images=images,
        metrics=metric_names(comparison),
        colors=COLORS,
        readable=readable,
        written=written,
        usual_reference=REFERENCE,
    )


def metric_names(comparison: Comparison) -> list[str]:
    """The names of all metrics, in the order in which the arms gave them."""
    measured = [row.measured for row in comparison.rows if row.measured is not None]
    return list(dict.fromkeys(name for one in measured for name in one.metrics))
