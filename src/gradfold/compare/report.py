"""The report of a comparison: a folder with results.json, the plots, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jinja2

from gradfold.compare import readable
from gradfold.compare.arms import REFERENCE
from gradfold.compare.plots import COLORS, draw_all
from gradfold.compare.results import Comparison
from gradfold.compare.verdict import verdict
from gradfold.errors import OptionError
from gradfold.memory.amount import written

__all__: list[str] = []

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
