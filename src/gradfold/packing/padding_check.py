"""A padding check: whether the gradient of some rows depends on how far they are padded.

Under a token budget rows are padded less than in the whole batch. That changes nothing where a model masks its padding
and a loss leaves it out, and is wrong in silence where they do not. So some short rows run once with the padding of the
batch and once without, leaving no trace, dropout switched off. Where the gradients differ by more than rounding, the
first layer is named whose output does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradfold.batch.split import MicroBatch
from gradfold.engine.backward import BackPropagation
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.model_checks import dropping_modules
from gradfold.engine.prefetch import prefetch
from gradfold.engine.window import Window
from gradfold.errors import BatchError, PaddingError, is_out_of_memory
from gradfold.messages import warn
from gradfold.packing.padding import PaddingProbe
from gradfold.packing.token_batcher import TokenBatcher
from gradfold.self_check.comparison import GradientComparison, Perturbation, tolerance_of
from gradfold.self_check.rng_replay import OwnGenerators
from gradfold.self_check.trial import ProbeResult, Shares, Trial
from gradfold.weights import WeightOption, WindowWeights, weigh

__all__: list[str] = []

_PROOF = 4  # how many times what rounding explains a difference must be
_NOISE = 30  # how many times the effect of a rounding error in every parameter a difference must be
_ROUNDINGS = 1000  # by how many of them an output must differ in order to count as changed


def check_once(
    token_split: TokenBatcher,
    model: nn.Module,
    loss_fn: LossFn,
    weight: WeightOption,
    back_propagate: BackPropagation,
    window: Window,
    is_possible: bool,
) -> None:
    """See once that padding does not change the gradient, by rows of the batch that a window has just begun with.

    Raises:
        PaddingError, BatchError: as `PaddingCheck.run`.
        OptionError: padding is on the left, where it easily does, and this is not possible.
    """
    if token_split.is_checked:
        return
    if not is_possible:
        token_split.require_position_ids()
        return
    rows = token_split.padded_rows()
    if rows is not None:
        window.weights.arrive()  # another rank may have failed, which is not for the check to see
        side = token_split.budget.padding_side
        check = PaddingCheck(model, loss_fn, weight, back_propagate, rows, side, window.device)
        token_split.is_checked = check.run()


class PaddingCheck:
    """Checks rows of one batch.

    Args:
        model, loss_fn, weight, back_propagate: those of the accumulator.
        padded_rows: the rows.
        side: where the padding is.
        device: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        weight: WeightOption,
        back_propagate: BackPropagation,
        padded_rows: PaddingProbe,
        side: str,
        device: torch.device,
    ) -> None:
        self._model = model
        self._weight = weight
        self._rows = padded_rows
        self._side = side
        self._trial = Trial(model, loss_fn, back_propagate, dropping_modules(model).values())
        self._loss_fn = loss_fn
        self._take = prefetch([_uncounted(part) for part in (padded_rows.whole, *padded_rows.parts)], device)
        self._dtypes = {parameter.dtype for parameter in self._trial.parameters}

    def run(self) -> bool:
        """Whether these rows have told; False where others may.

        Raises:
            PaddingError: the gradient depends on the padding, which is proved.
            BatchError: `loss_fn` takes the rows with their padding, but not without.
        """
        parts = weigh(self._weight, self._rows.parts)
        self._check_weights(weigh(self._weight, [self._rows.whole]), parts)
        if len(parts.idle()) == len(self._rows.parts):
            return False
        with self._trial:
            try:
                return self._compare(parts)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._cannot_know("memory runs out on rows with the padding of the batch")
                return True

    def _check_weights(self, whole: WindowWeights, parts: WindowWeights) -> None:
        for of_whole, of_parts in zip(whole.own_totals(), parts.own_totals(), strict=True):
            if not math.isclose(of_whole, of_parts, rel_tol=1e-6):
                raise PaddingError(
                    f"weight= gives {of_whole:g} for some rows with the padding of the batch, and {of_parts:g} without "
                    "it, so it counts padding. Count what the loss is a mean over without it: "
                    "gradfold.token_count(...) with labels of -100 at the padding, or mask.sum().",
                    None,
                )

    def _compare(self, weights: WindowWeights) -> bool:
        whole = self._run_whole()
        if whole is None:
            return True
        parts = [self._run_part(number, weights) for number in range(len(self._rows.parts))]
        first, second = (*parts, None)[:2]
        assert first is not None
        nothing: list[Tensor | None] = [None] * len(whole.gradients)
        mixture = GradientComparison.of(
            whole.gradients, first.gradients, nothing if second is None else second.gradients, 0.5
        )
        if mixture is None or not bool(mixture.errors.isfinite().all()):
            return False
        tolerance = tolerance_of(self._dtypes)
        error = float(mixture.errors.max())
        if error <= tolerance:
            return True
        if error <= _PROOF * tolerance or error <= _NOISE * self._noise(mixture):
            return False
        if self._trial.has_drawn():
            return self._cannot_know("loss_fn draws random numbers, other ones where there is less padding")
        raise self._accuse(error)

    def _run_whole(self) -> ProbeResult | None:
        try:
            return self._run(0, lambda name: 1.0)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._cannot_know(f"loss_fn fails on rows with the padding of the batch ({_first_line(error)})")
            return None

    def _run_part(self, number: int, weights: WindowWeights) -> ProbeResult:
        try:
            return self._run(number + 1, lambda name: weights.of_term(name).parts[number])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise BatchError(
                f"loss_fn takes some rows with the padding of the batch, but not without it: {_first_line(error)}. If "
                "a tensor of the batch goes with the tokens and was not found to, name it: "
                'TokenBudget(..., trim=("position_ids",)).'
            ) from error

    def _run(self, number: int, shares: Shares) -> ProbeResult:
        self._trial.rewind()
        mode = OwnGenerators()
        try:
            return self._trial.run(self._take(number), shares, mode)
        finally:
            mode.restore_generators()
            self._dtypes |= mode.dtypes

    def _noise(self, mixture: GradientComparison) -> float:
        """What rounding moves in the gradient of the whole."""
        noise = 0.0
        for seed in range(2):
            with Perturbation(self._model.parameters(), seed):
                jittered = self._run(0, lambda name: 1.0)
            noise = max(noise, float(mixture.differences(jittered.gradients).max()))
        return noise

    def _cannot_know(self, reason: str) -> bool:
        warn(
            f"it could not be checked whether the gradient depends on how far the rows are padded: {reason}. If the "
            "model masks its padding and the loss leaves it out, all is well, and self_check=False says that you know."
        )
        return True

    def _accuse(self, error: float) -> PaddingError:
        try:
            where, layer = self._find_layer()
        except Exception:  # a model that does not bear it: the accusation stands without the place
            where, layer = "the loss", None
        remedy = "Mask the padding there"
        if self._side == "left":
            remedy += ", and give position_ids with the batch"
        other = "keep the padding: micro_batch_size=8."
        if len(self._rows.parts) > 1:
            other = "pad all samples to one length in collate."
        return PaddingError(
            f"{where} depends on how far rows are padded: without the padding that they do not need, which a "
            f"TokenBudget cuts off, the gradient of some is {error:.1%} off. {remedy}, or {other}",
            layer,
        )

    def _find_layer(self) -> tuple[str, str | None]:
        """What first differs at a token, in words, and the name of the layer where it is one."""
        padded, trimmed = (self._passages(number) for number in (0, 1))
        for one, other in zip(padded, trimmed, strict=False):
            if one.name != other.name or one.is_output != other.is_output:
                break
            if any(map(self._differ, one.tensors, other.tensors)):
                quoted = f"{one.name!r} ({one.kind})" if one.name else one.kind
                if one.is_output:
                    return f"the output of {quoted}", one.name or None
                return f"what is given to {quoted}", None
        return "the loss itself, in what loss_fn does with the model's outputs,", None

    def _passages(self, number: int) -> list[_LayerCall]:
        """Every module's inputs and outputs, in order."""
        found: list[_LayerCall] = []
        self._trial.rewind()
        with ExitStack() as stack, torch.no_grad():
            for name, module in self._model.named_modules():
                for handle in _watch(name, module, found):
                    stack.callback(handle.remove)
            self._loss_fn(self._model, self._take(number))
        return found

    def _differ(self, padded: Tensor, trimmed: Tensor) -> bool:
        """Whether values of the first part differ, where they belong to tokens; False where that cannot be told."""
        num = len(self._rows.parts[0].rows)
        if padded.dim() != trimmed.dim() or trimmed.dim() == 0 or len(trimmed) != num or len(padded) < num:
            return False
        for dim, size in enumerate(trimmed.shape):
            if padded.shape[dim] < size:
                return False
            from_end = dim > 0 and self._side == "left"
            padded = padded.narrow(dim, padded.shape[dim] - size if from_end else 0, size)
        if not trimmed.is_floating_point():
            return False
        bound = _ROUNDINGS * torch.finfo(trimmed.dtype).eps * float(trimmed.abs().max()) if trimmed.numel() else 0.0
        changed = ~((padded - trimmed).abs() <= bound)
        if trimmed.dim() > 1:
            changed = changed.flatten(2).any(2) if trimmed.dim() > 2 else changed
            is_token = self._is_token(changed.shape[1], changed.device)
            changed = changed & is_token if is_token is not None else changed
        return bool(changed.any())

    def _is_token(self, size: int, device: torch.device) -> Tensor | None:
        """Where the first part has tokens, if a dimension of this size is that of its tokens."""
        for lengths in self._rows.lengths.values():
            if 0 <= size - int(lengths.max()) <= 1:
                places = torch.arange(size)
                ends = lengths[:, None]
                return (places >= size - ends if self._side == "left" else places < ends).to(device)
        return None


@dataclass(frozen=True)
class _LayerCall:
    """Tensors on their way into a module or out of it."""

    name: str
    kind: str
    is_output: bool
    tensors: list[Tensor]


def _watch(name: str, module: nn.Module, found: list[_LayerCall]) -> Sequence[Any]:
    kind = type(module).__name__

    def enter(_: nn.Module, arguments: Any, keywords: Any) -> None:
        found.append(_LayerCall(name, kind, False, _copies((arguments, keywords))))

    def leave(_: nn.Module, __: Any, outputs: Any) -> None:
        found.append(_LayerCall(name, kind, True, _copies(outputs)))

    return module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)


def _copies(values: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_sparse]


def _uncounted(part: MicroBatch) -> MicroBatch:
    return MicroBatch(part.data, range(0))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
