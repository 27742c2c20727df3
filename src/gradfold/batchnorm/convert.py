"""Conversion of a model: BatchNorm layers into GroupNorm, which normalizes each sample by itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.jit import ScriptModule

from gradfold.batchnorm.policy import batch_statistics_layers, layer_error
from gradfold.batchnorm.torch_private import BATCH_NORM_FORWARDS, BatchNorm
from gradfold.errors import OptionError

__all__ = ["convert_batch_norm"]

# What a group must hold. Normalizing n values leaves n - 2 degrees of freedom: of one value nothing, of two the sign of
# their difference, whose gradient is zero. Images have many values in a channel, and two channels keep a group from
# being instance norm, which trains worse (Wu and He 2018). In (N, C) a channel is one value: 16, as in the paper.
_LEAST_OF_IMAGES = 2
_LEAST_OF_ROWS = 16
_LEAST_VALUES = 3

_HELD = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def convert_batch_norm(model: nn.Module, num_groups: int = 32) -> nn.Module:
    """Replace the BatchNorm layers of a model by GroupNorm, for which accumulation is exact.

    The model is changed in place, as by `torch.nn.SyncBatchNorm.convert_sync_batchnorm`. The new layers hold the very
    parameters of the old ones (and their eps and mode), so optimizers made before stay valid; a layer that is used
    in several places stays one layer. `copy.deepcopy(model)` first keeps the original.

    The result is another model: running statistics are gone, outputs change, and it must be trained or fine-tuned.
    Checkpoints of the original load with `strict=False`. Layers in evaluation mode (`layer.eval()`), which normalize by
    constants, and everything that is not a BatchNorm are unchanged.

    Args:
        model: holds BatchNorm1d, 2d, 3d or SyncBatchNorm layers at any depth, or is one.
        num_groups: the largest number of groups of channels. A layer gets the largest divisor of its channels that is
            at most this and leaves at least 2 channels in each group (16 in BatchNorm1d and SyncBatchNorm, whose inputs
            may be (N, C), where a channel is a single value): 48 channels get 24 groups in BatchNorm2d and 3 in
            BatchNorm1d, and 7 channels get one.

    Returns:
        The model; or the new layer, where the model is itself a BatchNorm layer.

    Raises:
        OptionError: an argument cannot work.
        BatchNormError: the model is in evaluation mode, or a layer has a forward, hooks or parameters that the new one
            would not have, does not know its channels yet (lazy), has too few of them, or is scripted or compiled by
            itself. The model is unchanged then.

    Source: Wu and He 2018, Group Normalization, arXiv 1803.08494.

    >>> import torch, gradfold
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 3, bias=False), torch.nn.BatchNorm2d(48), torch.nn.ReLU())
    >>> gradfold.convert_batch_norm(model)[1]
    GroupNorm(24, 48, eps=1e-05, affine=True, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1:
        raise OptionError(f"num_groups={num_groups!r}; expected a whole number of at least 1.")
    layers = batch_statistics_layers(model)
    _check_convertible(model, layers)
    new: dict[nn.Module, nn.Module] = {layer: _group_norm(layer, num_groups) for layer in layers.values()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in new:
            model.set_submodule(name, new[module])
    return new.get(model, model)


def _group_norm(layer: BatchNorm, num_groups: int) -> nn.GroupNorm:
    """The layer that replaces this one, with its very parameters."""
    channels = layer.num_features
    most = max(min(num_groups, channels // (_LEAST_OF_IMAGES if _takes_images(layer) else _LEAST_OF_ROWS)), 1)
    groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
    new = nn.GroupNorm(groups, channels, layer.eps, affine=False)
    new.affine, new.weight, new.bias = layer.affine, layer.weight, layer.bias
    return new.train(layer.training)


def _takes_images(layer: BatchNorm) -> bool:
    return isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d)


def _check_convertible(model: nn.Module, layers: Mapping[str, BatchNorm]) -> None:
    """Raise BatchNormError where a layer cannot be converted, or the mode of the model hides which are frozen."""
    modules = dict(model.named_modules())
    left = [name for name, module in modules.items() if isinstance(module, BatchNorm) and name not in layers]
    if left and not model.training:
        raise layer_error(
            left,
            "would be left as frozen, since the model is in evaluation mode. Call model.train() first; layers to be "
            "left alone can be put into evaluation mode after that (layer.eval()).",
        )
    obstacles = {name: _graph_obstacle(module) for name, module in modules.items()}
    obstacles |= {name: _obstacle(layer) for name, layer in layers.items() if not any(obstacles.values())}
    first = next(filter(None, obstacles.values()), None)
    if first is not None:
        raise layer_error([name for name, obstacle in obstacles.items() if obstacle == first], first)


def _graph_obstacle(module: nn.Module) -> str:
    """Why a module would run on unchanged: it was scripted or compiled before; or an empty text."""
    is_scripted = isinstance(module, ScriptModule) and "BatchNorm" in str(module.original_name)
    if not is_scripted and not isinstance(getattr(module, "_orig_mod", None), BatchNorm):
        return ""
    how = "scripted" if is_scripted else "compiled by itself"
    return f"was {how}, and its graph would run on. Convert the model before that."


def _obstacle(layer: BatchNorm) -> str:
    """Why a layer cannot be converted, and what to do; or an empty text."""
    kind = type(layer).__name__
    if not layer.num_features:  # a lazy layer, or one that was and has no tensors
        return f"({kind}) does not know its number of channels yet. Run one forward pass first."
    if getattr(layer.forward, "__func__", None) not in BATCH_NORM_FORWARDS:
        return (
            f"({kind}) has a custom forward, which nn.GroupNorm would leave out. Replace it by a layer that does the "
            "same around nn.GroupNorm, or put it into evaluation mode to leave it unchanged."
        )
    if held := {*layer._parameters, *layer._buffers, *layer._modules} - _HELD:
        return (
            f"({kind}) holds {', '.join(sorted(held))}, which nn.GroupNorm would not have (from pruning or "
            "parametrization, for example). Remove that first."
        )
    if hooks := [name.strip("_") for name, value in vars(layer).items() if name.endswith("_hooks") and value]:
        return (
            f"({kind}) carries hooks ({', '.join(hooks)}), which were written for BatchNorm. Remove them, convert, and "
            "register what is still needed on the new layer."
        )
    if layer.num_features < _LEAST_VALUES and not _takes_images(layer):
        return (
            f"({kind}) has {layer.num_features} channel{'s' * (layer.num_features > 1)}: normalized within one row of "
            "an (N, C) input, nothing but signs would be left. Take the layer out, or replace it by "
            f"nn.GroupNorm(1, {layer.num_features}) where its inputs are (N, C, L)."
        )
    return ""
