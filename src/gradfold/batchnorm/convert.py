"""The conversion of a model: BatchNorm layers into layers that look at one sample at a time.

GroupNorm normalizes each sample by the mean and variance of its own groups of channels, so the gradient of a batch is
the mean of the gradients of its parts again, and accumulation is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm

from gradfold.batchnorm.per_micro_batch import batch_statistics_layers
from gradfold.errors import BatchNormError, OptionError

__all__ = ["convert_batch_norm"]

# What a group must hold. Normalizing n values leaves n - 2 degrees of freedom: of one value nothing, of two the sign of
# their difference, whose gradient is zero. Images have many values in a channel, and two channels keep a group from
# being instance norm, which trains worse (Wu and He 2018). Layers that also take (N, C) may have one value in
# a channel; 16 channels in a group is the paper's other setting.
_LEAST_CHANNELS_OF_IMAGES = 2
_LEAST_CHANNELS_OF_ROWS = 16
_LEAST_VALUES = 3

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_HELD = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def convert_batch_norm(model: nn.Module, to: str = "group_norm", num_groups: int = 32) -> nn.Module:
    """Replace the BatchNorm layers of a model by GroupNorm, for which accumulation is exact.

    The model is changed in place, as by `torch.nn.SyncBatchNorm.convert_sync_batchnorm`. The new layers hold the very
    parameters of the old ones (and their eps and mode), so that optimizers made before stay valid; a layer that is used
    in several places stays one layer. `copy.deepcopy(model)` first keeps the original.

    The result is another model: running statistics are gone, outputs change, and it must be trained or fine-tuned.
    Checkpoints of the original load with `strict=False`.

    The number of groups is the largest divisor of the number of channels that is at most `num_groups` and leaves at
    least 2 channels in each group (16 in BatchNorm1d and SyncBatchNorm, whose inputs may be (N, C), where a channel is
    a single value); one group where there is no such divisor. So 48 channels get 24 groups in BatchNorm2d and 3 in
    BatchNorm1d, and 7 channels get one.

    Left as they are: layers in evaluation mode (`layer.eval()`), which normalize by constants and couple no samples,
    and everything that is no BatchNorm (instance norm among it). A model without BatchNorm comes back unchanged.

    Args:
        model: holds BatchNorm1d, 2d, 3d or SyncBatchNorm layers at any depth, or is one.
        to: "group_norm", which is all that this version knows.
        num_groups: groups of channels, at most.

    Returns:
        The model that was given; the new layer, where it is itself a BatchNorm layer.

    Raises:
        OptionError: an argument cannot work.
        BatchNormError: the model is in evaluation mode, or a layer has a forward, hooks or parameters that the new one
            would not have, does not know its channels yet (lazy), has too few of them, or is scripted or compiled by
            itself. Nothing has been changed then.

    Source: Wu and He 2018, Group Normalization, arXiv 1803.08494.

    >>> import torch, gradfold
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 3, bias=False), torch.nn.BatchNorm2d(48), torch.nn.ReLU())
    >>> gradfold.convert_batch_norm(model)[1]
    GroupNorm(24, 48, eps=1e-05, affine=True, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
    if to != "group_norm":
        raise OptionError(f'to={to!r}; expected "group_norm".')
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
        raise OptionError(f"num_groups={num_groups!r}; expected a whole number of at least 1.")
    layers = batch_statistics_layers(model)
    _refuse_evaluation_mode(model, layers)
    _refuse_graphs(model)
    _refuse_obstacles(layers)
    new = {layer: _group_norm(layer, num_groups) for layer in layers.values()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm) and child in new:
                parent.register_module(name, new[child])
    return new[model] if isinstance(model, _BatchNorm) and model in new else model


def _group_norm(layer: _BatchNorm, num_groups: int) -> nn.GroupNorm:
    """A layer that stands for this one, with its very parameters."""
    channels = layer.num_features
    new = nn.GroupNorm(_num_groups(channels, num_groups, _least_channels(layer)), channels, layer.eps, affine=False)
    new.affine = layer.affine
    new.weight, new.bias = layer.weight, layer.bias
    return new.train(layer.training)


def _num_groups(channels: int, at_most: int, least_channels: int) -> int:
    """The largest divisor of `channels` within these bounds, or 1."""
    largest = max(min(at_most, channels // least_channels), 1)
    return next(groups for groups in range(largest, 0, -1) if channels % groups == 0)


def _least_channels(layer: _BatchNorm) -> int:
    return _LEAST_CHANNELS_OF_IMAGES if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d) else _LEAST_CHANNELS_OF_ROWS


def _refuse_evaluation_mode(model: nn.Module, layers: Mapping[str, _BatchNorm]) -> None:
    """Raise if the mode of the whole model hides which layers are frozen on purpose."""
    left = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and name not in layers]
    if left and not model.training:
        raise BatchNormError(
            f"the model is in evaluation mode, and {_named(left)} would be left as frozen. Call model.train() first; "
            "layers to be left alone can be put into evaluation mode after that (layer.eval()).",
            tuple(left),
        )


def _refuse_graphs(model: nn.Module) -> None:
    """Raise if layers are within what was compiled or scripted before, and would run on unchanged."""
    scripted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ScriptModule) and "BatchNorm" in str(module.original_name)
    ]
    compiled = [
        name for name, module in model.named_modules() if isinstance(getattr(module, "_orig_mod", None), _BatchNorm)
    ]
    if scripted or compiled:
        how = "scripted" if scripted else "compiled by itself"
        raise BatchNormError(
            f"{_named(scripted or compiled)} was {how}, and its graph would run on. Convert the model before that.",
            tuple(scripted or compiled),
        )


def _refuse_obstacles(layers: Mapping[str, _BatchNorm]) -> None:
    """Raise if a layer has something that the new one would not have."""
    found = {name: _obstacle(layer) for name, layer in layers.items()}
    first = next(filter(None, found.values()), None)
    if first is not None:
        names = [name for name, obstacle in found.items() if obstacle == first]
        raise BatchNormError(f"{_named(names)} {first}", tuple(names))


def _obstacle(layer: _BatchNorm) -> str:
    """Why a layer cannot be converted, and what to do; or an empty text."""
    kind = type(layer).__name__
    if not layer.num_features:  # a lazy layer, or one that was and has no tensors
        return f"({kind}) does not know its number of channels yet. Run one forward pass first."
    if getattr(layer.forward, "__func__", None) not in _FORWARDS:
        return (
            f"({kind}) has a forward of its own, and nn.GroupNorm would leave out what it does. Replace it by a layer "
            "that does the same around nn.GroupNorm, or put it into evaluation mode to leave it as it is."
        )
    if held := {*layer._parameters, *layer._buffers, *layer._modules} - _HELD:
        return (
            f"({kind}) holds {', '.join(sorted(held))}, which nn.GroupNorm would not have (pruned or parametrized "
            "weights are such). Remove that first."
        )
    if hooks := [name.strip("_") for name, value in vars(layer).items() if name.endswith("_hooks") and value]:
        return (
            f"({kind}) carries hooks ({', '.join(hooks)}), which were written for BatchNorm. Remove them, convert, and "
            "register what is still wanted on the new layer."
        )
    if layer.num_features < _LEAST_VALUES and not isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
        return (
            f"({kind}) has {layer.num_features} channel{'s' * (layer.num_features > 1)}: normalized within one row of "
            "an (N, C) input, nothing but signs would be left. Take the layer out, or replace it by "
            f"nn.GroupNorm(1, {layer.num_features}) where its inputs are (N, C, L)."
        )
    return ""


def _named(names: Sequence[str]) -> str:
    """The layers in words; a layer that is itself the model has no name."""
    shown = ", ".join(name or "the model itself" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"BatchNorm in {shown}"
