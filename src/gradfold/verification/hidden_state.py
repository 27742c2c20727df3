"""A hidden state: what a model keeps outside of its buffers, and changes whenever it runs."""

from __future__ import annotations

from torch import nn

from gradfold.verification.reference import relative_error
from gradfold.verification.runs import run_whole
from gradfold.verification.specimen import Specimen
from gradfold.verification.verdict import listed

__all__: list[str] = []

_PLAIN = (bool, int, float, str, list, dict, tuple, set)


def find_hidden_state(specimen: Specimen) -> str | None:
    """The attributes that one run of a copy changed, as " (module.name)", if its second run gives another gradient."""
    model = specimen.fresh_model()
    first, second = run_whole(specimen, model), run_whole(specimen, model)
    if relative_error(second.gradients, first.gradients) < 1e-9:
        return None
    names = _changed(specimen.fresh_model(), model)
    return f" ({listed(names)})" if names else ""


def _changed(before: nn.Module, after: nn.Module) -> list[str]:
    modules = dict(before.named_modules())
    return [
        f"{path}.{name}" if path else name
        for path, module in after.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and _differs(vars(modules[path]).get(name), value)
    ]


def _differs(one: object, other: object) -> bool:
    try:
        return bool(one != other)
    except Exception:  # tensors in a list
        return False
