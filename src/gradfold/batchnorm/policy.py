"""The option batch_norm=, the layers that it is about and hooks on them, and the refusal where it was not given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, TypeAlias

from torch import nn

from gradfold.batchnorm.torch_private import BatchNorm
from gradfold.errors import BatchNormError, OptionError
from gradfold.messages import join_names

BatchNormOption: TypeAlias = Literal["per_micro_batch", "exact"] | None
_Hook: TypeAlias = Callable[..., None]

SHARDS_REFUSED = (
    "batch_norm= is not supported with fully_shard: no-op steps of ranks with fewer micro-batches would move the "
    "statistics. Use DistributedDataParallel."
)


def check_batch_norm(batch_norm: str | None) -> None:
    """Raise OptionError unless the option is known."""
    if batch_norm not in (None, "per_micro_batch", "exact"):
        raise OptionError(f'batch_norm={batch_norm!r}; expected None, "exact" or "per_micro_batch".')


def batch_statistics_layers(model: nn.Module) -> dict[str, BatchNorm]:
    """The BatchNorm layers that normalize by the statistics of their input, by name.

    SyncBatchNorm and subclasses are included; layers in evaluation mode are not, unless they keep no statistics.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
        and (module.training or (module.running_mean is None and module.running_var is None))
    }


def refuse_batch_statistics(layers: Mapping[str, nn.Module], at_once: int, num_rows: int) -> None:
    """Raise BatchNormError that names these layers, which would normalize by micro-batch without permission.

    Args:
        layers: by name.
        at_once: the rows of a micro-batch; 0 where they are not counted.
        num_rows: those of the batch, of all ranks.
    """
    if not layers:
        return
    noun = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    seen = f"{at_once} rows at a time, not the {num_rows} of the batch"
    raise BatchNormError(
        f"BatchNorm in {noun} ({layer_names(layers)}) would see "
        f"{seen if at_once else 'one micro-batch at a time, not the batch'}, so the gradient would not be that of the "
        'batch. Write batch_norm="exact" to normalize by the whole batch, batch_norm="per_micro_batch" to accept '
        "statistics per micro-batch, put the layers into evaluation mode (layer.eval()) to use their running "
        "statistics, or replace them by GroupNorm: gradfold.convert_batch_norm(model).",
        tuple(layers),
    )


def layer_names(names: Iterable[str]) -> str:
    """At most three layers, for a message; a layer that is itself the model has no name."""
    return join_names([name or "the model itself" for name in names], 3)


def layer_error(names: Collection[str], text: str) -> BatchNormError:
    """A refusal of some layers, as the subject of the text."""
    return BatchNormError(f"BatchNorm in {layer_names(names)} {text}", tuple(names))


class LayerHooks:
    """Hooks around the forward of BatchNorm layers, for the length of a `with` block."""

    def __init__(self, layers: Mapping[str, BatchNorm], before: _Hook, after: _Hook) -> None:
        self.names = {layer: name for name, layer in layers.items()}
        self._hooks = before, after

    def __enter__(self) -> None:
        before, after = self._hooks
        self._versions = {layer: _counter_version(layer) for layer in self.names}
        for layer in self.names:
            layer.register_forward_pre_hook(before, with_kwargs=True)
            layer.register_forward_hook(after, with_kwargs=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks, by themselves: an interrupt may come before a handle of them is known."""
        for layer in self.names:
            for kind in "_forward_pre_hooks", "_forward_hooks":
                hooks = getattr(layer, kind)
                for key in [key for key, hook in hooks.items() if hook in self._hooks]:
                    del hooks[key]
                    getattr(layer, f"{kind}_with_kwargs").pop(key, None)

    def refuse_unseen(self, seen: Collection[nn.Module], text: str) -> None:
        """Raise BatchNormError for layers that have counted a batch, but are not among those that hooks have seen."""
        silent = {layer: name for layer, name in self.names.items() if layer not in seen}
        if names := [name for layer, name in silent.items() if _counter_version(layer) != self._versions[layer]]:
            raise layer_error(names, text)


def _counter_version(layer: BatchNorm) -> int:
    """A number that grows with every batch that a layer counts, with or without its hooks."""
    tracked = layer.num_batches_tracked
    return 0 if tracked is None else tracked._version
