"""Checks of a model: hooks on parameters, layers that draw random numbers or depend on the split, lazy layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import nn
from torch.nn.parameter import is_lazy

from gradfold.errors import HookError, ModelError, NotDecomposableError
from gradfold.messages import join_names, warn


def dropping_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules in training mode that seem to drop, by name."""
    return {name: module for name, module in model.named_modules() if module.training and seems_to_drop(module)}


def seems_to_drop(module: nn.Module) -> bool:
    """Whether a module is called like dropout, or has a rate of it (attention, recurrent layers)."""
    kind = type(module).__name__.lower()
    return any(word in kind for word in ("dropout", "droppath", "stochasticdepth")) or any(
        "drop" in key and isinstance(rate, float) and rate > 0 for key, rate in vars(module).items()
    )


def check_hooks(model: nn.Module, parameters: Sequence[nn.Parameter], warned_of: set[str]) -> None:
    """Warn of hooks that see the gradient of each micro-batch; HookError where one would act after each.

    `warned_of`: the names that were warned of before, to which new ones are added.
    """
    for attribute, text in _ACTING.items():
        acting = {id(one) for one in parameters if attribute in vars(one) or getattr(one, attribute, None)}
        if acting:
            names = tuple(name for name, parameter in model.named_parameters() if id(parameter) in acting)
            raise HookError(f"{join_names(names, 3)}: {text}", names)
    new = [name for name in parameters_with_hooks(model, parameters) if name not in warned_of]
    if new:
        warned_of.update(new)
        warn(
            f"hooks on {join_names(new, 3)} (Tensor.register_hook) run on the gradient of each micro-batch, not of the "
            "batch: linear ones (scaling, masking, logging) are fine, clipping is not the same.",
        )


_ACTING = {  # attributes of parameters whose owner acts after each micro-batch
    "_post_accumulate_grad_hooks": "a hook registered with register_post_accumulate_grad_hook would run after every "
    "micro-batch, on a part of the gradient (an optimizer in the backward pass steps many times). Remove the hook and "
    "act once after accumulator.backward(batch).",
    "_in_backward_optimizers": "an optimizer in the backward pass (_apply_optimizer_in_backward) would step after "
    "every micro-batch, on a part of the gradient. Make an optimizer of its own, and step it once after "
    "accumulator.backward(batch).",
    "grad_sample": "gradients per sample (grad_sample, of Opacus) would be multiplied by the weight of their "
    "micro-batch before they are clipped. Leave gradfold out, and split the batch with "
    "opacus.utils.batch_memory_manager.BatchMemoryManager.",
}


def parameters_with_hooks(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """Names of the parameters whose gradient a hook sees (`Tensor.register_hook`)."""
    if not [parameter for parameter in parameters if parameter._backward_hooks]:
        return []
    return [name for name, parameter in model.named_parameters() if parameter._backward_hooks]


def refuse_split_dependent_layers(model: nn.Module) -> None:
    """Raise NotDecomposableError where a layer is known to depend on how the batch is split."""
    for kind, (cause, text) in _SPLIT_DEPENDENT.items():
        names = [name or "the model itself" for name, module in model.named_modules() if kind(module)]
        if names:
            raise NotDecomposableError(f"{join_names(names, 3)}: {text} self_check=False accepts it.", cause, "loss")


def _counts_frequencies(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    return module.scale_grad_by_freq and module.weight.requires_grad


def _iterates_on_norm(module: nn.Module) -> bool:
    kinds = map(type, (module, *module._forward_pre_hooks.values()))
    return module.training and any(kind.__name__ in ("_SpectralNorm", "SpectralNorm") for kind in kinds)


def _observes(module: nn.Module) -> bool:
    return all(bool(getattr(module, flag, False)) for flag in ("observer_enabled", "fake_quant_enabled"))


_SPLIT_DEPENDENT = {
    _counts_frequencies: (
        "coupled",
        "scale_grad_by_freq=True divides gradients by how often a word occurs in the micro-batch, not in the batch. "
        "Leave it out, or count the words of the whole batch before the split.",
    ),
    _iterates_on_norm: (
        "state",
        "spectral norm in training mode refines its estimate of the norm in every forward pass, so each micro-batch is "
        "divided by another number. Call .eval() on its parametrization for the window, and let it take one step per "
        "update.",
    ),
    _observes: (
        "state",
        "the observer of a fake quantization moves its range in every forward pass, so each micro-batch is rounded to "
        "another grid. Freeze it for the window: model.apply(torch.ao.quantization.disable_observer).",
    ),
}


def refuse_lazy(model: nn.Module, asking: str) -> None:
    """Raise ModelError where layers have no sizes yet; `asking`: who needs them."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    names = sorted({name.rpartition(".")[0] or type(model).__name__ for name, one in tensors if is_lazy(one)})
    if names:
        shown = join_names(list(map(repr, names)), 3)
        raise ModelError(
            f"{asking} needs to know the sizes of all layers, and lazy ones have none before their first forward pass: "
            f"{shown}. Run one, on a row or two, before the optimizer is made: model(inputs[:2])."
        )
