"""Conversion of a model: torch's dropout layers into ones whose masks do not depend on the split."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from gradfold.dropout.layer import CounterBasedDropout
from gradfold.errors import ModelError, OptionError
from gradfold.messages import warn

__all__ = ["convert_dropout"]

TorchDropout: TypeAlias = (
    nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout
)

# Of torch's own layers: how many dimensions after the rows' are dropped independently (None: all), and if it is alpha.
_KINDS: dict[type[nn.Module], tuple[int | None, bool]] = {
    nn.Dropout: (None, False),
    nn.Dropout1d: (1, False),
    nn.Dropout2d: (1, False),
    nn.Dropout3d: (1, False),
    nn.AlphaDropout: (None, True),
    nn.FeatureAlphaDropout: (1, True),
}


def convert_dropout(model: nn.Module, seed: int = 0, row_dim: int = 0) -> nn.Module:
    """Replace the dropout layers of a model by ones whose masks do not depend on the split.

    With torch's dropout every split of a batch, and every number of ranks, trains with other masks. With these, windows
    have the masks of the full batch, so its gradient is reproduced to rounding whatever the split. The update is the
    accumulator's `num_windows`, which its `state_dict()` holds. Outside of `accumulator.backward` they draw as torch's.

    The model is changed in place, as by `gradfold.convert_batch_norm`. Dropout, Dropout1d, Dropout2d, Dropout3d,
    AlphaDropout and FeatureAlphaDropout are replaced; each keeps its probability and mode. Nothing is added to
    checkpoints.

    Args:
        model: holds dropout layers at any depth, or is one.
        seed: the seed of the masks, which must be the same on all ranks.
        row_dim: the dimension of the layers' inputs that counts the rows of the batch: 1 for inputs (T, B, d).

    Returns:
        The model; or the new layer, where the model is itself a dropout layer.

    Raises:
        OptionError: an argument is not supported.
        ModelError: a layer draws masks inside of torch (attention weights, recurrent layers), or is a custom dropout.
            The model is unchanged then.

    >>> import torch, gradfold
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2))
    >>> gradfold.convert_dropout(model)[2]
    CounterBasedDropout(p=0.2, name='2', seed=0)
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
    for name, value in (("seed", seed), ("row_dim", row_dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(f"{name}={value!r}; expected a whole number of at least 0.")
    _refuse_internal_dropout(model)
    new: dict[nn.Module, nn.Module] = {
        module: _converted(module, name, seed, row_dim)
        for name, module in model.named_modules()
        if isinstance(module, TorchDropout) and type(module) is not CounterBasedDropout
    }
    _warn_of_others(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent.register_module(name, new[child])
    return new.get(model, model)


def _converted(module: TorchDropout, name: str, seed: int, row_dim: int) -> CounterBasedDropout:
    if type(module) not in _KINDS:
        raise ModelError(
            f"{name or 'the model itself'} is a {type(module).__name__}, a custom dropout. Replace it by "
            "torch.nn.Dropout, or leave it out."
        )
    feature_dims, is_alpha = _KINDS[type(module)]
    held = [key.strip("_") for key, value in vars(module).items() if key.endswith("_hooks") and value]
    if module.inplace or held:
        what = "works in place" if module.inplace else f"carries hooks ({', '.join(held)})"
        fix = "Write h = dropout(h), and inplace=False" if module.inplace else "Remove them, and register them again"
        raise ModelError(
            f"{name or 'the model itself'} ({type(module).__name__}) {what}, which the new layer would not. {fix}."
        )
    if feature_dims is not None and row_dim:
        raise OptionError(
            f"row_dim={row_dim} is not supported with {type(module).__name__} ({name!r}), whose inputs are (N, C, ...)."
        )
    return CounterBasedDropout(module.p, name, seed, row_dim, feature_dims, is_alpha).train(module.training)


def _refuse_internal_dropout(model: nn.Module) -> None:
    """Raise ModelError where a kernel of torch drops by itself."""
    for name, module in model.named_modules():
        rate = getattr(module, "dropout", 0.0)
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and isinstance(rate, float) and rate > 0:
            what = "attention weights" if isinstance(module, nn.MultiheadAttention) else "outputs between its layers"
            raise ModelError(
                f"{name or 'the model itself'} ({type(module).__name__}) drops {what} inside of torch, with masks that "
                f"depend on the split. Switch that off, model.get_submodule({name!r}).dropout = 0.0, and convert the "
                "layers around it."
            )


def _warn_of_others(model: nn.Module) -> None:
    """Warn of modules that seem to drop by themselves."""
    others = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, TorchDropout)
        and (
            any(word in type(module).__name__.lower() for word in ("droppath", "stochasticdepth"))
            or any("drop" in key and isinstance(rate, float) and rate > 0 for key, rate in vars(module).items())
        )
    ]
    if others:
        warn(
            f"these modules seem to drop by themselves, with masks that depend on the split: "
            f"{', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}. Only layers of "
            "torch.nn were converted; set their rates to 0, or call an nn.Dropout in them."
        )
