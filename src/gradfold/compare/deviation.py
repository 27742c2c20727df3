"""How far an arm is from its reference: distances between the tensors that both have left, computed in float64."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from gradfold.compare.arms import ARMS
from gradfold.compare.results import Deviation, Deviations, Measured
from gradfold.compare.settings import Sizes
from gradfold.compare.tensor_files import Tensors, difference, load, norm

__all__: list[str] = []


def deviations(arm: str, folder: Path, measured: dict[str, Measured], sizes: Sizes) -> Deviations:
    """The deviations of an arm.

    Args:
        arm: its name.
        folder: holds a folder per arm.
        measured: the arms that ran to their end.
        sizes: what was trained.
    """
    if reason := _incomparable(arm, folder, measured):
        return _none(reason)
    last_window = _of_tensors(arm, folder, measured, Tensors.LAST_WINDOW_FLOAT64)
    if not ARMS[arm].accumulates:
        last_window = Deviation(None, "it has no windows")
    elif not sizes.last_window:
        last_window = Deviation(None, "all windows are full")
    return Deviations(
        gradient_float32=_of_tensors(arm, folder, measured, Tensors.GRADIENT_FLOAT32),
        gradient_float64=_of_tensors(arm, folder, measured, Tensors.GRADIENT_FLOAT64),
        last_window_float64=last_window,
        weights=_of_weights(arm, folder),
    )


def _none(note: str) -> Deviations:
    nothing = Deviation(None, note)
    return Deviations(nothing, nothing, nothing, nothing)


def _incomparable(arm: str, folder: Path, measured: dict[str, Measured]) -> str:
    """Why nothing of an arm can be compared with its reference, or an empty text."""
    if arm not in measured:
        return "this arm failed"
    reference = ARMS[arm].reference
    if not (folder / reference).exists():
        return f"{reference} was not run"
    if reference not in measured:
        return f"{reference} failed"
    start, expected = load(folder / arm, Tensors.START), load(folder / reference, Tensors.START)
    if start is None or expected is None or norm(difference(start, expected)) != 0.0:
        return "it started from other weights: make_model draws random numbers that torch.manual_seed does not set"
    return ""


def _of_tensors(arm: str, folder: Path, measured: dict[str, Measured], name: str) -> Deviation:
    reference_arm = ARMS[arm].reference
    own, reference = load(folder / arm, name), load(folder / reference_arm, name)
    if own is None or reference is None:
        return Deviation(None, measured[arm].notes.get(name) or measured[reference_arm].notes.get(name, "not measured"))
    return _relative(difference(own, reference), norm(reference))


def _of_weights(arm: str, folder: Path) -> Deviation:
    reference_folder = folder / ARMS[arm].reference
    final, reference = load(folder / arm, Tensors.FINAL), load(reference_folder, Tensors.FINAL)
    start = load(reference_folder, Tensors.START)
    assert final is not None and reference is not None and start is not None  # both arms ran to their end
    return _relative(difference(final, reference), norm(difference(reference, start)))


def _relative(distance: dict[str, Tensor], size: float) -> Deviation:
    if size == 0.0:
        return Deviation(None, "the full batch's is zero")
    return Deviation(norm(distance) / size)
