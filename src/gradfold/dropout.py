"""Counter-based dropout: a mask is a hash of (seed, update, layer, call, row of the global batch, element in the row).

As in stateless generators (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3": Random123; JAX), no split
of the batch, order of its parts or second run changes it. The hash takes integers alone: every device has the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from gradfold.batch.rows import Rows, shift_rows
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.model_checks import seems_to_drop
from gradfold.engine.window import PassListener
from gradfold.errors import ModelError, OptionError
from gradfold.messages import join_names, warn

__all__ = ["convert_dropout", "counter_based_dropout"]

# Of `lowbias32` (C. Wellons 2018, "Prospecting for Hash Functions", nullprogram.com), found by search for least bias.
# In 64-bit integers its products of 32-bit words cannot overflow.
_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - 2**32  # the second as a negative number, which is the same modulo 2^32
_GOLDEN = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: spreads consecutive numbers

# alpha dropout: what stands for a dropped value, -scale * alpha of selu (Klambauer et al. 2017, arXiv 1706.02515)
_DROPPED = -1.7580993408473766

TorchDropout: TypeAlias = (
    nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout | nn.FeatureAlphaDropout
)

# Of torch's own layers: how many dimensions after the rows' are dropped independently (None: all; 1: whole channels),
# and whether dropped elements are set to selu's lower end, with mean and variance kept.
_KINDS: dict[type[nn.Module], tuple[int | None, bool]] = {
    nn.Dropout: (None, False),
    nn.Dropout1d: (1, False),
    nn.Dropout2d: (1, False),
    nn.Dropout3d: (1, False),
    nn.AlphaDropout: (None, True),
    nn.FeatureAlphaDropout: (1, True),
}


def convert_dropout(
    model: nn.Module, seed: int = 0, row_dim: int = 0, padding_side: Literal["right", "left"] = "right"
) -> nn.Module:
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
        padding_side: where sequences have their padding, of which micro-batches may hold less than the batch: the other
            side is where the elements of a row are counted from.

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
    if padding_side not in ("right", "left"):
        raise OptionError(f'padding_side={padding_side!r}; expected "right" or "left".')
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is a {type(model).__name__}; expected an nn.Module.")
    for name, value in (("seed", seed), ("row_dim", row_dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise OptionError(f"{name}={value!r}; expected a whole number of at least 0.")
    _refuse_internal_dropout(model)
    new: dict[nn.Module, nn.Module] = {
        module: _converted(module, name, seed, row_dim, padding_side)
        for name, module in model.named_modules()
        if isinstance(module, TorchDropout) and type(module) is not CounterBasedDropout
    }
    _warn_of_others(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in new:
            model.set_submodule(name, new[module])
    return new.get(model, model)


def _converted(module: TorchDropout, name: str, seed: int, row_dim: int, padding_side: str) -> CounterBasedDropout:
    if type(module) not in _KINDS:
        raise ModelError(
            f"{name or 'the model itself'} is a {type(module).__name__}, a custom dropout. Replace it by "
            "torch.nn.Dropout, or leave it out."
        )
    held = [key.strip("_") for key, value in vars(module).items() if key.endswith("_hooks") and value]
    if module.inplace or held:
        what = "works in place" if module.inplace else f"carries hooks ({', '.join(held)})"
        fix = "Write h = dropout(h), and inplace=False" if module.inplace else "Remove them, and register them again"
        raise ModelError(
            f"{name or 'the model itself'} ({type(module).__name__}) {what}, which the new layer would not. {fix}."
        )
    if _KINDS[type(module)][0] is not None and row_dim:
        raise OptionError(
            f"row_dim={row_dim} is not supported with {type(module).__name__} ({name!r}), whose inputs are (N, C, ...)."
        )
    return CounterBasedDropout(module.p, name, seed, row_dim, padding_side, type(module)).train(module.training)


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
    others = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if seems_to_drop(module) and not isinstance(module, TorchDropout)
    ]
    if others:
        warn(
            f"these modules seem to drop by themselves, with masks that depend on the split: {join_names(others, 3)}. "
            "Only layers of torch.nn were converted; set their rates to 0, or call an nn.Dropout in them."
        )


@final
class DropoutKeys(PassListener):
    """Where a forward pass is: the update, and the rows of the global batch that it runs. Its layers share it."""

    def __init__(
        self, layers: Sequence[CounterBasedDropout], update: int, device: torch.device, coordinator: Coordinator
    ) -> None:
        self._layers = layers
        self._uncalled = [layer for layer in layers if layer.training and layer.p > 0]
        self._is_idle = not self._uncalled
        self._of_update = _hash("update", update)
        self._device = device
        self._coordinator = coordinator  # knows where the rows of this process begin in the batch of all
        self.words = torch.empty(2, 0, dtype=torch.int64)  # (2, rows): two 32-bit words per row, from update and row
        self.is_forward = False  # else activations are computed again for a backward pass

    def begin(self, rows: Rows) -> None:
        """The forward pass of these rows of this process."""
        rows = shift_rows(rows, self._coordinator.first_row())
        if isinstance(rows, range):
            numbers = torch.arange(rows.start, rows.stop, device=self._device)
        else:
            numbers = torch.tensor(rows, dtype=torch.int64, device=self._device)
        self.words = torch.stack([_mix(_mix(numbers * _GOLDEN & _WORD) ^ word) for word in self._of_update])
        for layer in self._layers:
            layer.num_calls = 0
        self.is_forward = True

    def end(self) -> None:
        """Layers that run from here on compute activations again."""
        self.is_forward = False
        if self._uncalled:
            self._uncalled = [layer for layer in self._uncalled if not layer.num_calls]

    def warn_of_torchs_own(self, has_drawn: bool) -> bool:
        """The window is done: warn where torch's random numbers were drawn in it; False where no layer was to drop."""
        if has_drawn and self._uncalled:
            names = [repr(layer.name) for layer in self._uncalled]
            warn(
                f"these layers of convert_dropout were not called, and random numbers of torch's own were drawn: "
                f"{join_names(names, 4)}. A model that passes their p to a function of torch "
                "(scaled_dot_product_attention, F.dropout) drops there, with masks that depend on the split. Set it to "
                f"0: model.get_submodule({names[0]}).p = 0.0. (Said once.)"
            )
        elif has_drawn and not self._is_idle:
            warn(
                "loss_fn draws random numbers of torch's own (F.dropout, noise) beside the layers of convert_dropout: "
                "they depend on the split. Set its rates to 0, or call an nn.Dropout there. (Said once.)"
            )
        return not self._is_idle


class CounterBasedDropout(nn.Dropout):
    """The layer by which `convert_dropout` replaces torch's; without `keys` it draws its masks as these do."""

    def __init__(
        self, p: float, name: str, seed: int, row_dim: int, padding_side: str = "right", kind: type = nn.Dropout
    ) -> None:
        super().__init__(p)
        self.name = name
        self.seed = seed
        self.row_dim = row_dim  # the dimension of inputs that counts the rows
        self.padding_side = padding_side  # elements are counted from the other one
        self.feature_dims, self.is_alpha = _KINDS[kind]
        self.keys: DropoutKeys | None = None
        self.num_calls = 0  # so far in this forward pass
        self._words = _hash(seed, name)

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training mode, as `torch.nn.Dropout`."""
        if not self.training or self.p == 0.0:
            return input
        shape = list(input.shape)
        if self.feature_dims is not None:
            shape[1 + self.feature_dims :] = [1] * (len(shape) - 1 - self.feature_dims)
        if self.keys is None:
            keep = torch.rand(shape, device=input.device) >= self.p
        else:
            keep = self._keep(self.keys, input, shape)
        if self.is_alpha:
            return _alpha_dropped(input, keep, self.p)
        # where() keeps the mask for the backward pass, one byte for each element; a product would keep a float.
        return torch.where(keep, input * (0.0 if self.p == 1.0 else 1 / (1 - self.p)), 0.0)

    def extra_repr(self) -> str:
        """What a printed model shows."""
        return f"p={self.p}, name={self.name!r}, seed={self.seed}"

    def _keep(self, keys: DropoutKeys, input: Tensor, shape: list[int]) -> Tensor:
        words = keys.words
        if input.dim() <= self.row_dim or input.shape[self.row_dim] != words.shape[1]:
            raise ModelError(
                f"dropout in {self.name!r} got an input of shape {tuple(input.shape)} for a micro-batch of "
                f"{words.shape[1]} rows; expected them in dimension {self.row_dim}, for every row to have its own "
                "mask. Where rows are in another dimension write convert_dropout(model, row_dim=...); where they are "
                "folded into a longer one, drop before that, or leave this layer as torch.nn.Dropout and set its p to "
                "0."
            )
        call = 0
        if keys.is_forward:
            call, self.num_calls = self.num_calls, self.num_calls + 1
        elif self.num_calls > 1:
            raise ModelError(
                f"dropout in {self.name!r} is called {self.num_calls} times in a forward pass and again in the "
                "backward pass (activation checkpointing), where it cannot know which of them is recomputed. Use one "
                "layer for each place."
            )
        first, second = ((word + call * _GOLDEN) & _WORD for word in self._words)
        words = words.to(input.device)
        return _keep(words[0] ^ first, words[1] ^ second, shape, self.row_dim, self.p, self.padding_side == "left")


@contextmanager
def counter_based_dropout(model: nn.Module, update: int, first_row: int = 0, num_rows: int = 1) -> Iterator[None]:
    """In this block the layers of `convert_dropout` have the masks of some rows of an update, as in a window.

    For custom loops, and to reproduce a window: `accumulator.backward(batch)` has those of update
    `accumulator.num_windows`, as it was before the call.

    Args:
        model: holds the layers.
        update: the number of the update.
        first_row: the first of these rows in the global batch.
        num_rows: how many rows every input has.

    >>> import torch, gradfold
    >>> model = gradfold.convert_dropout(torch.nn.Sequential(torch.nn.Dropout(0.5)))
    >>> with gradfold.counter_based_dropout(model, update=0, num_rows=2):
    ...     whole = model(torch.ones(2, 6))
    >>> with gradfold.counter_based_dropout(model, update=0, first_row=1, num_rows=1):
    ...     torch.equal(model(torch.ones(1, 6)), whole[1:])
    True
    """
    layers = counter_based_layers(model.modules())
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    keys = DropoutKeys(layers, update, device, Coordinator())
    keys.begin(range(first_row, first_row + num_rows))
    with keyed(layers, keys):
        yield


def refuse_options(
    layers: Sequence[CounterBasedDropout], batch_norm: str | None, is_sharded: bool, padding_side: str | None
) -> None:
    """Raise OptionError where the layers would have other masks: `padding_side` is that of a TokenBudget."""
    other = next((layer for layer in layers if padding_side not in (None, layer.padding_side)), None)
    if other is not None:
        raise OptionError(
            f"the dropout in {other.name!r} counts elements from the side of the padding, where the TokenBudget trims. "
            f'Write convert_dropout(model, padding_side="{padding_side}").'
        )
    if layers and batch_norm not in (None, "per_micro_batch"):
        raise OptionError(
            f'batch_norm="{batch_norm}" is not supported with the layers of convert_dropout: micro-batches run in '
            "turns, and the layers would not know which one runs. Use torch's dropout."
        )
    if len({(layer.seed, layer.name) for layer in layers}) < len(layers):
        raise OptionError(
            "two layers of convert_dropout have the same name and seed, and so the same masks: parts of the model were "
            "converted one by one. Convert the whole model, or pass each part a different seed."
        )
    if layers and is_sharded:
        raise OptionError(
            "fully_shard is not supported with the layers of convert_dropout, which have no masks for the no-op steps "
            "of a rank. Use torch's dropout, or DistributedDataParallel."
        )


def counter_based_layers(modules: Iterable[nn.Module]) -> list[CounterBasedDropout]:
    """The layers of `convert_dropout` among some modules."""
    return [module for module in modules if isinstance(module, CounterBasedDropout)]


@contextmanager
def keyed(layers: Sequence[CounterBasedDropout], keys: DropoutKeys | None) -> Iterator[None]:
    """In this block the layers have the masks of these keys; with None they draw as torch's do."""
    before = [layer.keys for layer in layers]
    for layer in layers:
        layer.keys = keys
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.keys = own


def _keep(
    first: Tensor, second: Tensor, shape: Sequence[int], row_dim: int, p: float, from_end: bool = False
) -> Tensor:
    """The mask of a layer, from two words per row: the hash of every element, above the fraction to be dropped."""
    rest = [1 if dim == row_dim else size for dim, size in enumerate(shape)]
    column = [-1 if dim == row_dim else 1 for dim in range(len(shape))]
    hashed = _multiplied(_places(rest, first.device, from_end) ^ first.view(column), second.view(column))
    return hashed >= round(p * 2**32)


def _places(shape: Sequence[int], device: torch.device, from_end: bool) -> Tensor:
    """A word for every element, from its coordinates alone: padding at the other end of a dimension changes none."""
    places = torch.zeros([1] * len(shape), dtype=torch.int64, device=device)
    for dim, size in enumerate(shape):
        if size > 1:
            steps = torch.arange(size, device=device)
            steps = (steps.flip(0) if from_end else steps) * _OF_DIMS[dim % len(_OF_DIMS)]
            places = places + steps.view([-1 if dim == other else 1 for other in range(len(shape))])
    return places.expand(shape) & _WORD


def _mix(words: Tensor) -> Tensor:
    """32-bit words into others, one to one, such that each bit of the input moves half of those of the output."""
    words = _multiplied(words, 0)
    return words ^ (words >> 16)


def _multiplied(words: Tensor, key: Tensor | int) -> Tensor:
    """Both products of the hash, with a key between them; in place, which takes no further memory and half the time."""
    words ^= words >> 16
    words *= _FIRST
    words &= _WORD
    words ^= key
    words ^= words >> 15
    words *= _SECOND
    words &= _WORD
    return words


def _hash(*parts: object) -> tuple[int, int]:
    """Two 32-bit words from anything with a repr."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _alpha_dropped(input: Tensor, keep: Tensor, p: float) -> Tensor:
    """As `torch.nn.functional.alpha_dropout`: a lower end for what is dropped, and all scaled to mean and variance."""
    scale = 0.0 if p == 1.0 else ((1 - p) * (1 + p * _DROPPED**2)) ** -0.5
    shift = -scale * p * _DROPPED
    return torch.where(keep, input, _DROPPED) * scale + shift


_OF_DIMS = tuple(_hash("dimension", dim)[0] | 1 for dim in range(8))
