"""The hooks on what consumes gradients: optimizer steps, zeroing, clipping, loss scaling, learning-rate schedules."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradfold.doctor.backward_hooks import as_list
from gradfold.doctor.events import Clip, ScalerCall, SchedulerStep, Step
from gradfold.doctor.instrumentation import Hook, Patches
from gradfold.doctor.recorder import Recorder
from gradfold.engine.loss_graph import mark


class OptimizerHooks:
    """Records steps, each with the backward passes whose gradients it used, and what else is done to gradients."""

    def __init__(self, recorder: Recorder, patches: Patches) -> None:
        self._recorder, self._patches = recorder, patches
        self._start_s = 0.0  # of the outermost step that is running
        self._found: tuple[tuple[int, ...], int, str] = (), 0, "none"  # in `.grad`, when it began
        self._num_scaler_steps = 0  # `GradScaler.step` that are running
        self._num_scheduler_calls = 0  # steps and constructions of schedulers that are running
        step = partial(patches.guard.attempt, "step")
        patches.callback(register_optimizer_step_pre_hook(partial(step, self._begin_step)).remove)
        patches.callback(register_optimizer_step_post_hook(partial(step, self._end_step)).remove)
        patches.hook(Optimizer, "__init__", self._at_init)
        patches.hook(Optimizer, "zero_grad", self._at_zero_grad)
        patches.hook(nn.Module, "zero_grad", self._at_zero_grad)
        for owner in (clip_grad, nn.utils):
            patches.hook(owner, "clip_grad_norm_", partial(self._at_clip, "norm", "max_norm"))
            patches.hook(owner, "clip_grad_value_", partial(self._at_clip, "value", "clip_value"))
        patches.hook(torch.amp.GradScaler, "scale", self._at_scale)
        for call in ("unscale_", "step", "update"):
            patches.hook(torch.amp.GradScaler, call, partial(self._at_scaler_call, call))
        for kind in [one for one in vars(lr_scheduler).values() if isinstance(one, type)]:
            if issubclass(kind, lr_scheduler.LRScheduler) and "__init__" in vars(kind):
                patches.hook(kind, "__init__", self._at_scheduler_init)

    def _at_init(self, optimizer: Optimizer, *_args: Any, **_options: Any) -> Hook:
        outcome = yield None
        if outcome.error is None:
            self._recorder.provenance_of(optimizer)

    def _at_zero_grad(self, *_args: Any, **_options: Any) -> Hook:
        recorder = self._recorder
        if recorder.is_paused:
            return
        with recorder.paused():
            recorder.detect_changes()
            yield None
            recorder.detect_changes(recorder.source.here())

    def _begin_step(self, optimizer: Optimizer, *_args: Any) -> None:
        recorder, steps = self._recorder, self._recorder.open_steps
        provenance = recorder.provenance_of(optimizer)
        same = [index for index, (one, _) in enumerate(steps) if one is provenance]
        del steps[same[0] if same else len(steps) :]  # a step that raised has no end
        if not steps:
            recorder.detect_changes()
            self._start_s = time.perf_counter()
            self._found = provenance.found_by_step()
        steps.append((provenance, len(recorder.log.backwards)))

    def _end_step(self, optimizer: Optimizer, *_args: Any) -> None:
        recorder, log, steps = self._recorder, self._recorder.log, self._recorder.open_steps
        if not steps:
            return
        provenance, num_backwards = steps.pop()
        if steps or provenance.optimizer() is not optimizer:
            return  # steps inside a step are its own
        seconds = time.perf_counter() - self._start_s
        has_closure = len(log.backwards) > num_backwards
        backwards, num_reused, gradients = provenance.found_by_step() if has_closure else self._found
        if not has_closure and gradients == "new" and not provenance.parameters_changed():
            return  # an optimizer that counts micro-batches by itself, and has not come to its update
        log.add(
            Step,
            recorder.source.here(),
            optimizer=provenance.number,
            seconds=seconds,
            backwards=backwards,
            num_reused=num_reused,
            ratio=provenance.ratio,
            is_rewritten=provenance.is_rewritten or backwards != tuple(provenance.backwards),
            gradients=gradients,
            through_scaler=self._num_scaler_steps > 0,
            has_closure=has_closure,
            rounding=recorder.precise_sums.error(provenance.number),
        )
        for one in recorder.provenances:  # optimizers that share parameters with this one: their gradients are used too
            one.remember_parameters()
            if one.shares_with(provenance):
                one.num_stepped = len(one.backwards)
        provenance.remember()
        recorder.stopwatch.start(len(log.events))

    def _at_clip(self, kind: str, limit_name: str, /, *args: Any, **options: Any) -> Hook:
        recorder, log = self._recorder, self._recorder.log
        if recorder.is_paused:
            return
        parameters, passed_on = _duplicate(args[0] if args else options["parameters"])
        limit = float(args[1] if len(args) > 1 else options[limit_name])
        with recorder.paused():
            recorder.detect_changes()
            outcome = yield ((passed_on, *args[1:]), options) if args else ((), {**options, "parameters": passed_on})
            if outcome.error is not None:
                return
            ids, clipped, scaled = set(map(id, parameters)), {}, set()
            for one in recorder.provenances:
                one.remember()
                if one.unused and any(id(parameter) in ids for parameter in one.watched()):
                    clipped[one.number] = one.unused
                    if one.number not in recorder.unscaled and any(log.backwards[i].is_scaled for i in one.unused):
                        scaled.add(one.number)
            log.add(Clip, recorder.source.here(), kind, limit, outcome.result, clipped, frozenset(scaled))

    def _at_scale(self, scaler: Any, *_args: Any, **_options: Any) -> Hook:
        outcome = yield None
        if outcome.error is None and scaler.is_enabled():
            for one in as_list(outcome.result):
                mark(one, "scaled")

    def _at_scaler_call(self, call: str, scaler: Any, /, *args: Any, **options: Any) -> Hook:
        recorder = self._recorder
        if recorder.is_paused or not scaler.is_enabled():
            return
        optimizer = args[0] if args else options.get("optimizer")
        recorder.detect_changes()
        provenance = recorder.provenance_of(optimizer) if isinstance(optimizer, Optimizer) else None
        backwards = {one.number: one.unused for one in recorder.provenances if one.unused}
        if provenance is not None:
            backwards = {provenance.number: provenance.unused}
        location = recorder.source.here()
        self._num_scaler_steps += call == "step"
        outcome = yield None
        self._num_scaler_steps -= call == "step"
        error = "" if outcome.error is None else str(outcome.error)
        recorder.log.add(ScalerCall, location, call, id(scaler), backwards, error)
        if call == "unscale_" and provenance is not None and not error:
            recorder.unscaled.add(provenance.number)
            provenance.remember()

    def _at_scheduler_init(self, scheduler: Any, /, *_args: Any, **_options: Any) -> Hook:
        for kind in type(scheduler).__mro__:  # subclasses of the user's may have been made at any time
            if "step" in vars(kind) and not hasattr(vars(kind)["step"], "gradfold_doctor"):
                self._patches.hook(kind, "step", self._at_scheduler_step)
        self._num_scheduler_calls += 1  # the step that construction makes does not count
        yield None
        self._num_scheduler_calls -= 1

    def _at_scheduler_step(self, scheduler: Any, *_args: Any, **_options: Any) -> Hook:
        recorder, optimizer = self._recorder, getattr(scheduler, "optimizer", None)
        before = _learning_rate(optimizer)
        self._num_scheduler_calls += 1
        outcome = yield None
        self._num_scheduler_calls -= 1
        if self._num_scheduler_calls or outcome.error is not None:
            return
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # what a framework has wrapped
        lengths = [getattr(scheduler, name, None) for name in ("T_max", "total_steps")]
        recorder.log.add(
            SchedulerStep,
            recorder.source.here(),
            scheduler=id(scheduler),
            name=type(scheduler).__name__,
            optimizer=recorder.provenance_of(optimizer).number if isinstance(optimizer, Optimizer) else None,
            horizon=next((length for length in lengths if isinstance(length, int)), None),
            before=before,
            after=_learning_rate(optimizer),
        )


def _duplicate(parameters: Any) -> tuple[Iterable[Tensor], Any]:
    """Parameters to look at once the call has ended, and those for the call: an iterator can be read only once."""
    if isinstance(parameters, Tensor):
        return [parameters], parameters
    if not isinstance(parameters, Iterator):
        return (list(parameters) if isinstance(parameters, Collection) else []), parameters
    for_us, for_torch = itertools.tee(parameters)
    if isinstance(parameters, GeneratorType):  # torch asks for that type
        return for_us, (one for one in for_torch)
    return for_us, for_torch


def _learning_rate(optimizer: Any) -> float:
    """Of an optimizer's first group; 0 for anything else."""
    return float(optimizer.param_groups[0]["lr"]) if isinstance(optimizer, Optimizer) else 0.0
