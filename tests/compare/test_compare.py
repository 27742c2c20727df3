"""The comparison: what its arms do, how far they are from the full batch, and what becomes of an arm that fails.

`tiny`, `normed`, `uneven` and `faulty` below are workloads that the tests name as `test_compare.py:tiny`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfold import Accumulator, TrainStep, TwoPhaseLoss, Workload
from gradfold.cli.tables import print_comparison
from gradfold.compare import ArmProgress, Comparison, Settings, compare, experiment, runner
from gradfold.compare.arms import ARMS, DEFAULT_ARMS
from gradfold.compare.data import Sizes, epoch_order, num_samples
from gradfold.compare.data import load as load_batch
from gradfold.compare.experiment import Experiment, describe, loss_curve, mean_loss_since
from gradfold.compare.loops import ArmTraining, Update
from gradfold.compare.measure import Clock, Seconds, watch_memory
from gradfold.compare.report import PANELS, draw_figures, render_page, results_json, to_plain
from gradfold.compare.results import (
    Deviation,
    Deviations,
    Measured,
    Row,
    Tensors,
    WorkloadFacts,
    deviations,
    distance,
    load,
    save_parameters,
)
from gradfold.compare.runner import describe_machine, watch_other_programs
from gradfold.compare.summary import footnotes
from gradfold.errors import DataError, GradfoldError, OptionError, WorkloadError
from gradfold.packing.token_budget import TokenBudget

HERE = Path(__file__)
ROWS, GLOBAL_BATCH, MICRO_BATCH = 22, 8, 2  # windows of 8, 8 and 6 rows: the last one has 3 micro-batches, not 4


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def squared_error(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def score(model: nn.Module) -> dict[str, float]:
    return {"accuracy": 0.5}


def tiny() -> Workload:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 3, generator=generator)
    return Workload(
        name="tiny",
        description="a tiny network",
        make_model=network,
        loss_fn=squared_error,
        make_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        train_data={"x": x, "y": x.square().sum(1, keepdim=True)},
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        num_epochs=2,
        evaluate=score,
        facts={"source": "drawn"},
    )


def normed_network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 1))


def normed() -> Workload:
    """BatchNorm, which sees micro-batches; the arms with GroupNorm train another model."""
    return dataclasses.replace(tiny(), make_model=normed_network, batch_norm="per_micro_batch")


def masked_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x, counts = batch
    errors = (model(x).squeeze(1) - 1.0).square() * counts
    return {"error": errors.sum() / counts.sum()}, {}


def stack(samples: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in samples]), torch.tensor([count for _, count in samples])


def count(batch: tuple[Tensor, Tensor]) -> Tensor:
    return batch[1].sum()


def uneven() -> Workload:
    """Samples to collate, with a loss averaged over counts that differ."""
    x = tiny().train_data["x"]
    samples = [(row, float(1 + 7 * (index % 3 == 0))) for index, row in enumerate(x)]
    return dataclasses.replace(tiny(), train_data=samples, collate=stack, weight=count, loss_fn=masked_error)


def spread(model: nn.Module, guesses: Tensor) -> Tensor:
    return guesses.std() + guesses.mean().square()


def coupled() -> Workload:
    """A loss of the whole batch: its spread is not the mean of spreads."""
    loss_fn = TwoPhaseLoss(lambda model, batch: model(batch["x"]), spread)
    return dataclasses.replace(tiny(), loss_fn=loss_fn)


def fail_by_arm(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    arm = Path(sys.argv[1]).parent.name
    if arm == "full-batch" and len(batch["x"]) > MICRO_BATCH:
        torch.empty(2**52)
    if arm == "plain-loop":
        raise LookupError("the first line\nthe second line")
    if arm == "small-batch":
        os.kill(os.getpid(), signal.SIGKILL)
    return squared_error(model, batch)


def faulty() -> Workload:
    print("a workload may print")  # on standard output, where the child talks to its parent
    return dataclasses.replace(tiny(), loss_fn=fail_by_arm)


def endless() -> Workload:
    def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
        time.sleep(60)
        return squared_error(model, batch)

    return dataclasses.replace(tiny(), loss_fn=loss_fn)


def train_all(make: Callable[[], Workload], folder: Path, seed: int = 0) -> dict[str, tuple[Measured, Deviations]]:
    """All arms in this process, which is what the children do in theirs."""
    measured = {}
    sizes = Sizes(ROWS, GLOBAL_BATCH, MICRO_BATCH, 2)
    left_out = {"token-budget"}  # these rows have no lengths
    if isinstance(make().loss_fn, TwoPhaseLoss):
        left_out.add("batch-norm-exact")  # which is not supported with it
    runnable = {name: arm for name, arm in ARMS.items() if name not in left_out}
    for name, arm in runnable.items():
        (folder / name).mkdir()
        measured[name] = Experiment(make(), arm, sizes, seed, folder / name).run(lambda *_: None)
    return {name: (measured[name], deviations(name, folder, measured, sizes)) for name in runnable}


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Measured, Deviations]]:
    return train_all(tiny, tmp_path_factory.mktemp("arms"))


@pytest.fixture(scope="module")
def uneven_arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Measured, Deviations]]:
    return train_all(uneven, tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def normed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("normed")


@pytest.fixture(scope="module")
def normed_arms(normed_folder: Path) -> dict[str, tuple[Measured, Deviations]]:
    return train_all(normed, normed_folder)


@pytest.fixture(scope="module")
def events() -> list[ArmProgress]:
    return []


@pytest.fixture(scope="module")
def faults(events: list[ArmProgress]) -> Comparison:
    return compare(Settings(f"{HERE}:faulty", num_threads=1, num_epochs=1), on_progress=events.append)


@pytest.fixture(scope="module")
def mild_arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Measured, Deviations]]:
    """The same training, with gradients that float16 holds though they are scaled by 65536; those of `tiny` it does
    not."""
    mild = dataclasses.replace(
        tiny(),
        loss_fn=lambda model, batch: squared_error(model, batch) / 128,
        make_optimizer=partial(torch.optim.SGD, lr=0.05 * 128, momentum=0.9, nesterov=True),
    )
    return train_all(lambda: mild, tmp_path_factory.mktemp("mild"))


def value(number: float | None) -> float:
    assert number is not None
    return number


# The arms


@pytest.mark.parametrize("make", ["arms", "uneven_arms"])
def test_gradfold_is_the_full_batch(make: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(make)
    full, _ = found["full-batch"]
    own, far = found["gradfold"]
    assert value(far.gradient_float64.value) < 1e-12
    assert value(far.last_window_float64.value) < 1e-12
    assert value(far.gradient_float32.value) < 2e-6
    assert value(far.weights.value) < 1e-4
    assert own.num_updates == full.num_updates == 6
    assert own.final_loss == pytest.approx(full.final_loss, rel=1e-5)
    assert own.curve.loss == pytest.approx(full.curve.loss, rel=1e-4)


def test_plain_loop_divides_the_last_window_by_the_wrong_number(
    arms: dict[str, tuple[Measured, Deviations]],
) -> None:
    own, far = arms["plain-loop"]
    assert value(far.gradient_float64.value) < 1e-12  # a full window is right
    assert far.last_window_float64.value == pytest.approx(1 - 3 / 4)  # three micro-batches, divided by four
    assert value(far.weights.value) > 1e-2
    assert own.num_updates == 6


def test_plain_loop_weighs_uneven_micro_batches_alike(uneven_arms: dict[str, tuple[Measured, Deviations]]) -> None:
    _, far = uneven_arms["plain-loop"]
    assert value(far.gradient_float64.value) > 1e-2
    assert value(far.gradient_float32.value) == pytest.approx(value(far.gradient_float64.value), rel=1e-4)


def test_small_batch_updates_more_often_and_goes_elsewhere(arms: dict[str, tuple[Measured, Deviations]]) -> None:
    own, far = arms["small-batch"]
    assert own.num_updates == 2 * 11
    assert value(far.gradient_float64.value) > 1e-2
    assert value(far.weights.value) > 1e-2
    assert far.last_window_float64.value is None and far.last_window_float64.note == "it has no windows"


def test_overlapping_forward_passes_count_once() -> None:
    clock = Clock(torch.device("cpu"))
    clock.begin("total")
    with clock.phase("forward"), clock.phase("forward"):
        time.sleep(0.01)
    clock.end("total")
    assert 0.01 <= clock.seconds().forward <= clock.seconds().total


def test_exact_batch_norm_is_the_full_batch(normed_arms: dict[str, tuple[Measured, Deviations]]) -> None:
    own, far = normed_arms["batch-norm-exact"]
    assert value(far.gradient_float64.value) < 1e-12
    assert value(far.last_window_float64.value) < 1e-12
    assert value(far.gradient_float32.value) < 2e-6
    assert value(far.weights.value) < 1e-4
    assert own.curve.loss == pytest.approx(normed_arms["full-batch"][0].curve.loss, rel=1e-4)
    assert own.seconds.forward < own.seconds.total


def test_batch_norm_by_micro_batch_is_not_the_full_batch_and_group_norm_is(
    normed_arms: dict[str, tuple[Measured, Deviations]],
) -> None:
    _, with_batch_norm = normed_arms["gradfold"]
    assert value(with_batch_norm.gradient_float64.value) > 0.1
    own, far = normed_arms["group-norm"]
    assert value(far.gradient_float64.value) < 1e-12
    assert value(far.last_window_float64.value) < 1e-12
    assert value(far.gradient_float32.value) < 2e-6
    assert value(far.weights.value) < 1e-4
    reference, none = normed_arms["group-norm-full-batch"]
    assert none.gradient_float64.value == none.weights.value == 0.0
    assert own.num_updates == reference.num_updates == 6
    assert own.final_loss == pytest.approx(reference.final_loss, rel=1e-5)
    assert reference.final_loss != pytest.approx(normed_arms["full-batch"][0].final_loss, rel=1e-2)


def test_the_model_with_group_norm_starts_from_the_same_weights_and_is_another(
    normed_arms: dict[str, tuple[Measured, Deviations]], normed_folder: Path
) -> None:
    def apart(name: str) -> float:
        left, right = load(normed_folder / "group-norm-full-batch", name), load(normed_folder / "full-batch", name)
        assert left is not None and right is not None
        return distance(left, right) / distance(right, {})

    assert apart(Tensors.START) == 0.0
    assert apart(Tensors.GRADIENT_FLOAT64) > 0.1


def test_the_full_batch_with_group_norm_does_what_plain_torch_does(
    normed_arms: dict[str, tuple[Measured, Deviations]],
) -> None:
    workload, losses = normed(), []
    torch.manual_seed(0)
    model = normed_network()
    model[1] = nn.GroupNorm(2, 32)  # type: ignore[index, operator]
    optimizer = workload.make_optimizer(model.parameters())
    for epoch in range(2):
        for rows in torch.split(epoch_order(ROWS, 0, epoch, shuffle=True), GLOBAL_BATCH):
            optimizer.zero_grad()
            loss = F.mse_loss(model(workload.train_data["x"][rows]), workload.train_data["y"][rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    assert normed_arms["group-norm-full-batch"][0].curve.loss == pytest.approx(losses)


def test_arms_with_group_norm_are_compared_with_their_own_full_batch(
    normed_arms: dict[str, tuple[Measured, Deviations]], normed_folder: Path
) -> None:
    sizes = Sizes(ROWS, GLOBAL_BATCH, MICRO_BATCH, 2)
    failed = {name: measured for name, (measured, _) in normed_arms.items() if name != "group-norm-full-batch"}
    assert deviations("group-norm", normed_folder, failed, sizes).weights.note == "group-norm-full-batch failed"
    assert deviations("gradfold", normed_folder, failed, sizes).weights.value is not None
    failed = {name: measured for name, (measured, _) in normed_arms.items() if name != "full-batch"}
    assert deviations("group-norm", normed_folder, failed, sizes).weights.value is not None


def test_a_two_phase_loss_is_the_full_batch_and_a_plain_loop_is_not(tmp_path: Path) -> None:
    found = train_all(coupled, tmp_path)
    assert value(found["gradfold"][1].gradient_float64.value) < 1e-12
    assert value(found["gradfold"][1].last_window_float64.value) < 1e-12
    assert value(found["plain-loop"][1].gradient_float64.value) > 0.1
    assert found["gradfold"][0].seconds.forward > 0


def test_the_row_order_changes_rounding_alone(arms: dict[str, tuple[Measured, Deviations]]) -> None:
    _, far = arms["row-order-control"]
    assert value(far.gradient_float64.value) < 1e-12
    assert value(far.weights.value) < 1e-4


@pytest.mark.parametrize("arm", ["full-batch-bf16", "gradfold-bf16", "full-batch-fp16", "gradfold-fp16"])
def test_lower_precision_is_off_by_its_rounding_and_right_in_float64(
    arm: str, mild_arms: dict[str, tuple[Measured, Deviations]]
) -> None:
    own, far = mild_arms[arm]
    assert 1e-5 < value(far.gradient_float32.value) < 0.05
    assert value(far.gradient_float64.value) < 1e-12  # which autocast leaves alone
    assert value(far.last_window_float64.value) < 1e-12
    assert 1e-5 < value(far.weights.value) < 0.1
    assert (own.num_updates, own.num_skipped) == (6, 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_full_batch_in_lower_precision_does_what_plain_torch_does(
    precision: str, arms: dict[str, tuple[Measured, Deviations]]
) -> None:
    workload, losses = tiny(), []
    torch.manual_seed(0)
    model = network()
    optimizer = workload.make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    for epoch in range(2):
        for rows in torch.split(epoch_order(ROWS, 0, epoch, shuffle=True), GLOBAL_BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16):
                loss = F.mse_loss(model(workload.train_data["x"][rows]), workload.train_data["y"][rows])
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    measured = arms[f"full-batch-{precision}"][0]
    assert measured.curve.loss == pytest.approx(losses, rel=1e-6)
    num_skipped = round(math.log2(65536 / scaler.get_scale())) if precision == "fp16" else 0
    assert (measured.num_updates, measured.num_skipped) == (6 - num_skipped, num_skipped)
    assert (num_skipped > 0) == (precision == "fp16")


@pytest.mark.parametrize("arm", ["full-batch-fp16", "gradfold-fp16"])
def test_updates_that_overflow_are_counted_and_their_gradient_is_not_compared(
    arm: str, arms: dict[str, tuple[Measured, Deviations]]
) -> None:
    own, far = arms[arm]
    assert own.num_skipped >= 1 and own.num_updates + own.num_skipped == 6
    assert far.gradient_float32 == Deviation(
        None, "its loss scaler skipped the first update, whose scaled gradient overflowed"
    )
    assert value(far.gradient_float64.value) < 1e-12
    assert own.num_samples == 2 * ROWS and math.isfinite(own.final_loss)


def test_gradfold_in_lower_precision_trains_as_its_accumulator_does(
    arms: dict[str, tuple[Measured, Deviations]],
) -> None:
    workload, losses = tiny(), []
    torch.manual_seed(0)
    model = network()
    accumulator = Accumulator(model, squared_error, micro_batch_size=MICRO_BATCH, precision="bf16")
    step = TrainStep(accumulator, workload.make_optimizer(model.parameters()))
    for epoch in range(2):
        for rows in torch.split(epoch_order(ROWS, 0, epoch, shuffle=True), GLOBAL_BATCH):
            losses.append(step({name: one[rows] for name, one in workload.train_data.items()}).loss.item())
    assert arms["gradfold-bf16"][0].curve.loss == pytest.approx(losses, rel=1e-6)
    assert arms["gradfold"][0].curve.loss != pytest.approx(losses, rel=1e-6)


def test_the_full_batch_does_what_plain_torch_does(arms: dict[str, tuple[Measured, Deviations]]) -> None:
    workload, losses = tiny(), []
    torch.manual_seed(0)
    model = network()
    optimizer = workload.make_optimizer(model.parameters())
    for epoch in range(2):
        for rows in torch.split(epoch_order(ROWS, 0, epoch, shuffle=True), GLOBAL_BATCH):
            optimizer.zero_grad()
            loss = F.mse_loss(model(workload.train_data["x"][rows]), workload.train_data["y"][rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    measured, far = arms["full-batch"]
    assert measured.curve.loss == pytest.approx(losses)
    assert measured.final_loss == pytest.approx((8 * losses[3] + 8 * losses[4] + 6 * losses[5]) / 22)
    assert far.gradient_float64.value == far.weights.value == 0.0


def test_seconds_are_split_and_memory_is_read(arms: dict[str, tuple[Measured, Deviations]]) -> None:
    for measured, _ in arms.values():
        spent = measured.seconds
        assert min(spent.forward, spent.backward, spent.update, spent.other) > 0
        assert measured.samples_per_s == pytest.approx(44 / spent.total)
        assert measured.memory.peak_bytes >= measured.memory.baseline_bytes > 2**20
        tracked = measured.tracked
        assert tracked is not None and tracked.measured_by == "tensor storage"
        assert tracked.breakdown.parameters == 26 * 4  # of the tiny network
        update = tracked.by_phase.get("update")  # a loss scaler may have left it out
        assert update is None or update.gradients == update.optimizer_state == 26 * 4  # with momentum
        assert (
            8 * 4 * 4 <= tracked.breakdown.inputs < ROWS * 4 * 4 + 100
        )  # a global batch, and not the data set as well
        assert measured.metrics == {"accuracy": 0.5}


@pytest.mark.slow
def test_arms_of_the_library_choose_their_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADFOLD_CACHE_DIR", str(tmp_path))
    found = compare(
        Settings(f"{HERE}:tiny", arms=("full-batch", "gradfold", "plain-loop"), num_threads=1, tunes_micro_batch=True)
    )
    measured = found.measured("gradfold")
    assert measured is not None and measured.choice is not None
    assert 1 <= measured.choice.micro_batch_size <= GLOBAL_BATCH == measured.choice.num_rows
    others = [found.measured(arm) for arm in ("full-batch", "plain-loop")]
    assert all(other is not None and other.choice is None for other in others)
    row = found.row("gradfold")
    assert row is not None and row.deviations.gradient_float64.value is not None
    assert row.deviations.gradient_float64.value <= 1e-12
    notes = " ".join(footnotes(found))
    assert f"micro-batch {measured.choice.micro_batch_size} tuned in " in notes
    assert "the speed of plain-loop with micro-batches of 2." in notes
    assert to_plain(measured)["choice"]["micro_batch_size"] == measured.choice.micro_batch_size


def test_measurements_survive_the_way_to_the_parent(arms: dict[str, tuple[Measured, Deviations]]) -> None:
    for measured, _ in arms.values():
        assert pickle.loads(pickle.dumps(measured)) == measured


def test_a_loss_that_cannot_run_in_float64_is_a_note(tmp_path: Path) -> None:
    target = torch.zeros(1, 1)

    def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        # Hard-wired to float32, as class weights and look-up tables of losses often are.
        return torch.addmm(target, model(batch["x"]), target).float().mean()

    found = train_all(lambda: dataclasses.replace(tiny(), loss_fn=loss_fn), tmp_path)
    far = found["gradfold"][1].gradient_float64
    assert far.value is None and far.note.startswith("not in float64: RuntimeError")


def test_another_start_is_found_out(tmp_path: Path) -> None:
    starts = iter(range(100))

    def make_model() -> nn.Module:
        model = network()
        nn.init.constant_(next(model.parameters()), float(next(starts)))
        return model

    found = train_all(lambda: dataclasses.replace(tiny(), make_model=make_model), tmp_path)
    far = found["gradfold"][1]
    assert far.gradient_float32.value is None and "started from other weights" in far.gradient_float32.note


def test_deviations_are_relative(tmp_path: Path, arms: dict[str, tuple[Measured, Deviations]]) -> None:
    def leave(arm: str, **saved: dict[str, Tensor]) -> None:
        (tmp_path / arm).mkdir()
        for name, tensors in {"start": {"w": torch.tensor([10.0, 10.0])}, **saved}.items():
            torch.save(tensors, tmp_path / arm / f"{name}.pt")

    gradient = {"w": torch.tensor([0.0, 2.0]), "b": torch.tensor([1.0])}
    leave("full-batch", final={"w": torch.tensor([13.0, 14.0])}, gradient_float32=gradient)  # went 5 away
    leave("gradfold", final={"w": torch.tensor([13.0, 14.5])}, gradient_float32={"w": gradient["w"]})
    measured = {name: arms[name][0] for name in ("full-batch", "gradfold")}
    far = deviations("gradfold", tmp_path, measured, Sizes(8, 4, 2, 1))
    assert far.weights.value == pytest.approx(0.5 / 5)
    assert far.gradient_float32.value == pytest.approx(1 / math.sqrt(5))  # a missing gradient is zero
    assert (far.gradient_float64.value, far.gradient_float64.note) == (None, "not measured")
    assert far.last_window_float64.note == "all windows are full"


# Samples and settings


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(50, seed=3, epoch=1, shuffle=True)
    torch.manual_seed(99)
    assert torch.equal(order, epoch_order(50, seed=3, epoch=1, shuffle=True))
    assert sorted(order.tolist()) == list(range(50))
    assert not torch.equal(order, epoch_order(50, seed=3, epoch=2, shuffle=True))
    assert not torch.equal(order, epoch_order(50, seed=4, epoch=1, shuffle=True))
    assert epoch_order(5, seed=3, epoch=1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_all_arms_see_the_same_samples_in_the_same_order() -> None:
    workload = dataclasses.replace(tiny(), train_data={"x": torch.eye(3).repeat(8, 1)[:ROWS], "y": torch.arange(22.0)})
    orders = [epoch_order(ROWS, 7, epoch, shuffle=True) for epoch in range(2)]

    def seen(name: str) -> list[float]:
        rows: list[float] = []

        def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            rows.extend(batch["y"].tolist())
            loss: Tensor = model(batch["x"]).mean()
            return loss

        spied = dataclasses.replace(workload, loss_fn=loss_fn, make_optimizer=partial(torch.optim.SGD, lr=0.0))
        training = ArmTraining(ARMS[name], spied, Sizes(ROWS, GLOBAL_BATCH, MICRO_BATCH, 2), seed=0)
        assert sum(update.num_samples for update in training.run(orders)) == 2 * ROWS
        return rows

    expected = [float(row) for order in orders for row in order]
    for name in DEFAULT_ARMS:
        assert seen(name) == expected


def test_batches_are_loaded_from_nestings_and_from_samples() -> None:
    indices, device = torch.tensor([4, 0]), torch.device("cpu")
    nested = dataclasses.replace(tiny(), train_data=(torch.arange(5), [torch.arange(10).view(5, 2), "constant"]))
    numbers, (pairs, constant) = load_batch(nested, indices, device)
    assert numbers.tolist() == [4, 0]
    assert pairs.tolist() == [[8, 9], [0, 1]]
    assert constant == "constant"
    listed = dataclasses.replace(tiny(), train_data=list("abcde"), collate="".join)
    assert load_batch(listed, indices, device) == "ea"


def test_training_data_that_disagree_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[3, 4\] rows"):
        num_samples(dataclasses.replace(tiny(), train_data=(torch.zeros(3), torch.zeros(4))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("gradfold", "spiral")}, "unknown arms: 'spiral'"),
        ({"arms": ()}, "unknown arms: none"),
        ({"arms": ("gradfold", "gradfold")}, "named twice"),
        ({"arms": ("gradfold", "group-norm")}, "--arms group-norm: workload 'tiny' has no BatchNorm .* Leave it out"),
        ({"num_epochs": 0}, "--epochs 0: expected at least 1"),
        ({"global_batch_size": 0}, "--global-batch 0"),
        ({"micro_batch_size": -1}, "--micro-batch -1"),
        ({"num_threads": 0}, "--threads 0"),
        ({"seed": -1}, "--seed -1"),
        ({"precision": "half"}, "--precision half: expected bf16 or fp16"),
        ({"seed": 2**32}, "less than"),
        ({"global_batch_size": 23}, "a global batch of 23 is larger than the data: .* 22 training samples"),
        ({"micro_batch_size": 9}, "a micro-batch of 9 is larger than the global batch of 8"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        compare(Settings(f"{HERE}:tiny", **options))


def test_settings_are_completed_from_the_workload() -> None:
    Settings().check()
    assert Settings().sizes_for(tiny()) == Sizes(22, 8, 2, 2)
    assert Settings().sizes_for(tiny()).last_window == 6
    assert Settings(global_batch_size=11, num_epochs=5).sizes_for(tiny()) == Sizes(22, 11, 2, 5)
    assert Settings(global_batch_size=11).sizes_for(tiny()).last_window == 0
    assert Settings(global_batch_size=1).sizes_for(tiny()).micro_batch_size == 1


def test_arms_are_chosen_for_the_workload_where_none_are_named() -> None:
    assert Settings().arms_for(tiny()) == DEFAULT_ARMS == ("full-batch", "gradfold", "plain-loop", "small-batch")
    by_default = Settings().arms_for(normed())
    assert by_default[1:3] == ("batch-norm-exact", "batch-norm-per-micro") and "gradfold" not in by_default
    assert by_default[-2:] == ("group-norm-full-batch", "group-norm") and len(by_default) == len(DEFAULT_ARMS) + 3
    assert Settings(arms=("group-norm",)).arms_for(normed()) == ("group-norm",)
    lower = ("full-batch-fp16", "gradfold-fp16")
    assert Settings(precision="fp16").arms_for(tiny()) == (*DEFAULT_ARMS, *lower)
    assert Settings(precision="fp16").arms_for(normed()) == (*by_default, *lower)
    assert Settings(arms=("gradfold-fp16", "gradfold"), precision="fp16").arms_for(tiny()) == (
        "gradfold-fp16",
        "gradfold",
        "full-batch-fp16",  # no arm twice
    )
    assert Settings(arms=("gradfold-bf16",)).arms_for(tiny()) == ("gradfold-bf16",)


def of_texts() -> Workload:
    """Rows of 1 to 9 tokens, whose sums a linear map knows."""
    samples = [torch.arange(1.0, 2 + number % 9) for number in range(ROWS)]

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch[..., None]).square().sum() / (batch > 0).sum()
        return loss

    return dataclasses.replace(
        tiny(),
        make_model=lambda: nn.Linear(1, 2, bias=False),
        loss_fn=loss_fn,
        train_data=samples,
        weight=lambda batch: (batch > 0).sum(),
        collate=lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True),
        token_budget=TokenBudget(18, lengths=lambda rows: list(map(len, rows)), cost=1),
        evaluate=None,
    )


def test_texts_are_trained_under_their_token_budget_too() -> None:
    workload = of_texts()
    assert Settings().arms_for(workload) == ("full-batch", "gradfold", "token-budget", "plain-loop", "small-batch")
    with pytest.raises(OptionError, match="--arms token-budget: workload 'tiny' has no lengths"):
        Settings(arms=("token-budget",)).arms_for(tiny())
    at_rest = dataclasses.replace(workload, make_optimizer=partial(torch.optim.SGD, lr=0.0))
    losses = {}
    for name in ("full-batch", "gradfold", "token-budget"):
        training = ArmTraining(ARMS[name], at_rest, Sizes(ROWS, GLOBAL_BATCH, 6, 2), seed=0)
        assert training.token_budget().max_tokens == 18 * 6 // workload.micro_batch_size
        updates = training.run(orders_of_rows())
        losses[name] = [(update.num_samples, update.loss, update.weight) for update in updates]
    for found, expected in zip(losses["token-budget"], losses["full-batch"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def orders_of_rows() -> list[Tensor]:
    return [epoch_order(ROWS, 7, epoch, shuffle=True) for epoch in range(2)]


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(WorkloadError):
        compare(Settings("digitz"))


# Measurement


def test_the_clock_leaves_out_what_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run(clock: Clock, phase: str, seconds: float) -> None:
        nonlocal now
        with clock.phase(phase):
            now += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock(torch.device("cpu"))
    clock.begin("total")
    run(clock, "forward", 2.0)
    run(clock, "backward", 4.0)
    run(clock, "excluded", 8.0)
    clock.begin("update")
    now += 16.0
    clock.end("update")
    now += 32.0
    clock.end("total")
    spent = clock.seconds()
    assert (spent.forward, spent.backward, spent.update, spent.other) == (2.0, 4.0, 16.0, 32.0)
    assert spent.total == 54.0


def test_peak_memory_has_what_is_allocated() -> None:
    peak_memory = watch_memory(torch.device("cpu"))
    block = torch.ones(64, 2**20 // 4)  # 64 MiB
    del block
    assert 56 * 2**20 < peak_memory().rise_bytes < 96 * 2**20


def test_losses_are_averaged_by_weight_and_drawn_in_a_bounded_number_of_points() -> None:
    updates = [Update(num_samples=3, loss=float(number), weight=float(number % 2)) for number in range(1000)]
    assert mean_loss_since(updates, 2988) == pytest.approx(998.0)  # 996 to 999, of which 997 and 999 weigh anything
    curve = loss_curve(updates, 400)
    assert 300 <= len(curve.loss) <= 400
    assert list(curve.samples) == sorted(curve.samples) and curve.samples[-1] < 3000
    finite = [loss for loss in curve.loss if not math.isnan(loss)]
    assert finite == sorted(finite)
    thin = curve.thinned(50)
    assert len(thin.loss) == len(thin.samples) <= 50


def test_updates_of_no_weight_have_no_loss() -> None:
    updates = [Update(2, math.nan, 0.0), Update(2, 3.0, 1.0)]
    assert mean_loss_since(updates, 0) == 3.0
    curve = loss_curve(updates, 2)
    assert math.isnan(curve.loss[0]) and curve.loss[1] == 3.0
    assert to_plain(curve)["loss"] == [None, 3.0]


def test_the_machine_is_described_without_names() -> None:
    text = json.dumps(describe_machine())
    assert os.uname().nodename not in text and str(Path.home()) not in text
    num_busy_cores = watch_other_programs()
    time.sleep(0.05)
    assert 0.0 <= num_busy_cores() <= (os.cpu_count() or 1) * 1.5


# Failing arms


@pytest.mark.slow
def test_the_other_arms_still_run(faults: Comparison) -> None:
    assert [row.arm for row in faults.rows] == list(DEFAULT_ARMS)
    assert faults.has_failures
    own = faults.measured("gradfold")
    assert own is not None and own.num_updates == 3


@pytest.mark.slow
def test_a_crash_is_a_row_with_the_error(faults: Comparison) -> None:
    row = faults.row("plain-loop")
    assert row is not None and row.measured is None
    assert row.failure == "LookupError: the first line"
    assert to_plain(row)["status"] == "failed"


@pytest.mark.slow
def test_a_killed_child_is_a_row(faults: Comparison) -> None:
    row = faults.row("small-batch")
    assert row is not None and row.measured is None
    assert row.failure is not None and row.failure.startswith("killed by SIGKILL")


@pytest.mark.slow
def test_an_arm_that_does_not_fit_is_a_row(faults: Comparison) -> None:
    row = faults.row("full-batch")
    assert row is not None and row.measured is None
    assert row.failure is not None and row.failure.startswith("out of memory: RuntimeError")


@pytest.mark.slow
def test_without_a_reference_the_cells_say_so(faults: Comparison) -> None:
    row = faults.row("gradfold")
    assert row is not None
    assert row.deviations.gradient_float32.note == row.deviations.weights.note == "full-batch failed"
    missing = "Without full-batch there is no reference: gradients and weights of gradfold are not compared."
    assert missing in footnotes(faults)


@pytest.mark.slow
def test_progress_is_told_for_every_arm(faults: Comparison, events: list[ArmProgress]) -> None:
    states = {arm: [event.state for event in events if event.arm == arm] for arm in DEFAULT_ARMS}
    assert all(seen[:2] == ["waiting", "starting"] for seen in states.values())
    assert [event.state for event in events[:5]] == [*["waiting"] * 4, "starting"]  # all are known at once
    assert states["gradfold"][-1] == "finished"
    assert {states[arm][-1] for arm in ("full-batch", "plain-loop", "small-batch")} == {"failed"}
    assert [event.samples for event in events if event.arm == "gradfold"][-1] == ROWS


def test_errors_are_described_in_one_line() -> None:
    assert describe(ValueError("a\nb")) == "ValueError: a"
    assert describe(KeyError()) == "KeyError"
    assert describe(MemoryError()) == "out of memory: MemoryError"
    assert describe(torch.OutOfMemoryError("CUDA out of memory")).startswith("out of memory: OutOfMemoryError")


# Footnotes about lower precision


@pytest.fixture
def precisions(arms: dict[str, tuple[Measured, Deviations]]) -> Callable[..., Comparison]:
    """A comparison of full-batch, gradfold and the two in bf16, which took so many seconds, half of them backward."""

    def make(gradfold: float | None, lower: float, both: float | None, busy: float = 0.0, **changes: Any) -> Comparison:
        spent = {"full-batch": 1.0, "gradfold": gradfold, "full-batch-bf16": lower, "gradfold-bf16": both}
        rows = tuple(
            Row(
                name,
                dataclasses.replace(arms[name][0], seconds=Seconds(s / 2, s / 2, 0.0, 0.0), **changes),
                arms[name][1],
            )
            for name, s in spent.items()
            if s is not None
        )
        machine = {"cores": 2, "cores_busy_with_other_programs": busy}
        facts = WorkloadFacts("tiny", "a tiny network", None, {})
        return Comparison(Settings("tiny"), Sizes(ROWS, GLOBAL_BATCH, MICRO_BATCH, 2), facts, rows, {}, machine, "")

    return make


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        ((1.1, 2.0, 2.2), ["accumulation 1.10 (1.10), bf16 2.00 (2.00), both 2.20 (2.20); "
                           "not faster beyond noise (10 %)."]),
        ((1.1, 0.5, 0.6), ["bf16 0.50 (0.50), both 0.60 (0.60); faster: bf16."]),
        ((0.5, 2.0, 0.52), ["faster: accumulation or both."]),
        ((0.95, 0.91, 0.97), ["not faster beyond noise (10 %)."]),
        ((0.8, 0.6, 0.7, 1.9), ["not faster beyond noise (50 %).", "Times are not reliable"]),
        ((0.8, 0.3, 0.7, 1.9), ["faster: bf16."]),
        ((None, 0.5, 0.4), ["(its backward passes): bf16 0.50 (0.50), both 0.40 (0.40); faster: both."]),
        ((None, 2.0, None), ["(its backward passes): bf16 2.00 (2.00); not faster"]),
    ],
)  # fmt: skip
def test_footnotes_say_what_is_faster(
    seconds: tuple[Any, ...], told: list[str], precisions: Callable[..., Comparison]
) -> None:
    notes = " ".join(footnotes(precisions(*seconds)))
    assert all(one in notes for one in told), notes
    assert notes.count("Time relative to full-batch") == 1


def test_nothing_is_said_of_what_is_faster_without_a_lower_precision_or_a_reference(
    precisions: Callable[..., Comparison],
) -> None:
    comparison = precisions(1.0, 1.0, 1.0)
    assert "Time relative" not in " ".join(footnotes(dataclasses.replace(comparison, rows=comparison.rows[:2])))
    without = dataclasses.replace(comparison, rows=comparison.rows[1:])
    notes = " ".join(footnotes(without))
    assert "Time relative" not in notes and "Without full-batch there is no reference" in notes


def test_footnotes_say_what_lower_precision_does(precisions: Callable[..., Comparison]) -> None:
    comparison = precisions(1.0, 1.0, 1.0)
    gradient, weights = Deviation(0.0123), Deviation(0.045)
    far = dataclasses.replace(comparison.rows[3].deviations, gradient_float32=gradient, weights=weights)

    def said(**changes: Any) -> str:
        row = dataclasses.replace(comparison.rows[3], **changes)
        return " ".join(footnotes(dataclasses.replace(comparison, rows=(*comparison.rows[:3], row))))

    notes = said(deviations=far)
    assert "gradfold-bf16: first gradient 1.2 % off full-batch (bf16); " in notes
    assert "loss scaler" not in notes and "not all of it" not in notes
    coupled = dataclasses.replace(far, gradient_float64=Deviation(0.3))
    assert "not all of it is precision: 30.0 % off in float64" in said(deviations=coupled)
    measured = dataclasses.replace(value_of(comparison.rows[3].measured), num_updates=190, num_skipped=5, metrics={})
    skipped = dataclasses.replace(far, gradient_float32=Deviation(None, "skipped"))
    notes = said(measured=measured, deviations=skipped)
    assert "gradfold-bf16: its loss scaler skipped 5 of 195 updates" in notes


def value_of(measured: Measured | None) -> Measured:
    assert measured is not None
    return measured


def test_lower_precision_is_shown_beside_the_others(
    precisions: Callable[..., Comparison], capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = precisions(1.1, 2.0, 2.2)
    usual = dataclasses.replace(comparison, rows=comparison.rows[:2])
    assert comparison.first_gradients_in == "as run" and usual.first_gradients_in == "float32"
    page = render_page(comparison, dict.fromkeys(PANELS, b""))
    assert "first gradient as run" in page and "Autocast leaves float64" in page
    assert "Autocast" not in render_page(usual, dict.fromkeys(PANELS, b""))
    images = draw_figures(comparison)
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    print_comparison(comparison, [])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "as run" in printed
    assert re.search(r"^full-batch-bf16 +22 +2\.00 s +1\.00 s +1\.00 s ", printed, re.MULTILINE)
    results = json.loads(results_json(comparison))
    assert [one["measured"]["num_skipped"] for one in results["rows"]] == [0] * 4
    assert results["settings"]["precision"] is None
    elsewhere = dataclasses.replace(comparison.settings, data=Path("/a/folder/of/this/machine"))
    assert "this/machine" not in results_json(dataclasses.replace(comparison, settings=elsewhere))


def test_an_arm_whose_last_weights_cannot_be_saved_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: nn.Module, folder: Path, name: str) -> None:
        if name == Tensors.FINAL and folder.name == "gradfold":
            raise OSError("no room")
        save_parameters(model, folder, name)

    monkeypatch.setattr(experiment, "save_parameters", save)
    sizes = Sizes(ROWS, GLOBAL_BATCH, MICRO_BATCH, 1)
    measured = {}
    for name in ("full-batch", "gradfold"):
        (tmp_path / name).mkdir()
        measured[name] = Experiment(tiny(), ARMS[name], sizes, 0, tmp_path / name).run(lambda *_: None)
    far = deviations("gradfold", tmp_path, measured, sizes)
    assert far.weights.value is None and far.weights.note == "OSError: no room"
    assert far.gradient_float64.value is not None and far.gradient_float64.value < 1e-12
    assert measured["gradfold"].final_loss == pytest.approx(measured["full-batch"].final_loss)


def test_without_a_temporary_folder_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(runner.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(GradfoldError, match=r"No usable temporary directory found .* Set TMPDIR") as caught:
        compare(Settings(f"{HERE}:tiny"))
    assert caught.value.exit_code == 1


def test_an_arm_that_cannot_be_started_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runner.subprocess, "Popen", refuse)
    states = []
    found = compare(
        Settings(f"{HERE}:tiny", arms=("full-batch", "gradfold")),
        on_progress=lambda one: states.append((one.arm, one.state)),
    )
    assert [row.failure for row in found.rows] == ["cannot be started: OSError: [Errno 28] No space left on device"] * 2
    assert states[-1] == ("gradfold", "failed")
