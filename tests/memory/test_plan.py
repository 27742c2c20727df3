"""Plans: what fits a budget, what would allow more, and what is said where nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import gradfold
from gradfold.cli import app
from gradfold.memory.budget import read_bytes, written

MIB = 2**20
ROWS = 512


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)]
        self.layers = nn.ModuleList(Residual(block) for block in blocks)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def build():
    model = Layers()
    batch = (torch.randn(ROWS, 256), torch.randint(0, 10, (ROWS,)))
    return gradfold.Accumulator(model, loss_fn), batch, torch.optim.Adam(model.parameters())


@pytest.fixture(scope="module")
def parts():
    return build()


@pytest.fixture(scope="module")
def short(parts):
    """A plan whose budget is short: what 200 rows need."""
    return gradfold.plan(*parts, memory="686MiB")


def test_the_choice_is_the_largest_that_fits(parts, short):
    assert 128 < short.micro_batch_size < 256
    constant = short.margin.constant_bytes
    assert short.choice.needed_bytes == int(short.choice.peak_bytes * 1.1) + constant <= 686 * MIB
    sizes = [row.micro_batch_size for row in short.rows if not row.saving]
    assert sizes == sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, short.micro_batch_size})
    assert all(row.fits == (row.needed_bytes <= 686 * MIB) for row in short.rows)
    assert [row.num_micro_batches for row in short.rows[:3]] == [512, 256, 128]
    assert str(short.micro_batch_size) in str(short) and "yes" in str(short)


def test_the_chosen_size_runs_within_the_budget_and_more_does_not(short):
    model = Layers()
    optimizer = torch.optim.Adam(model.parameters())
    for size, fits in ((short.micro_batch_size, True), (int(1.15 * short.micro_batch_size), False)):
        batch = torch.randn(2 * size, 256), torch.randint(0, 10, (2 * size,))
        peak = measured(model, optimizer, batch, size)
        peak_bytes = peak.peak_bytes - peak.breakdown.inputs + short.choice.breakdown.inputs
        assert (short.margin.with_margin(peak_bytes) <= short.budget_bytes) is fits


def measured(model, optimizer, batch, size):
    step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, micro_batch_size=size), optimizer)
    step(batch)
    return gradfold.measure_peak(lambda: step(batch), model=model, optimizer=optimizer)


def test_savings_are_shown_where_they_change_the_choice(short):
    savings = {row.saving: row for row in short.rows if row.saving}
    assert savings["checkpoint layers"].micro_batch_size > short.micro_batch_size
    assert savings["bf16 autocast"].micro_batch_size > short.micro_batch_size


def test_what_checkpointing_would_allow_is_what_it_takes(short):
    """The saving's prediction against the model changed by hand."""
    row = next(row for row in short.rows if row.saving == "checkpoint layers")
    accumulator, batch, optimizer = build()
    for layer in accumulator.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    peak = measured(accumulator.model, optimizer, batch, row.micro_batch_size)
    assert row.peak_bytes == pytest.approx(peak.peak_bytes, rel=0.01)


@pytest.mark.slow
def test_a_gpu_that_is_not_there(parts):
    all_of_it = gradfold.plan(*parts, memory="16GiB", device="cuda")
    assert all_of_it.micro_batch_size == ROWS and not any(row.saving for row in all_of_it.rows)
    budget = next(row for row in all_of_it.rows if row.micro_batch_size == 256).needed_bytes - 1
    plan = gradfold.plan(*parts, memory=budget, device="cuda")
    assert "offload saved tensors" in {row.saving for row in plan.rows}
    assert "not there" in " ".join(plan.notes) or torch.cuda.is_available()
    assert "fragmentation" in " ".join(plan.notes)


@pytest.mark.slow
def test_a_budget_that_not_even_one_row_fits(parts):
    with pytest.raises(gradfold.DoesNotFitError) as caught:
        gradfold.plan(*parts, memory="656MiB")
    message = str(caught.value)
    assert message.startswith("not even one row fits into 656.0 MiB: its tensors take ")
    assert "(optimizer state 16.1 MiB, " in message and "with the margin" in message
    assert "What would reduce it" in message and "SGD" in message
    assert caught.value.sizes == (1,)


def test_without_an_optimizer_it_says_so(parts):
    accumulator, batch, _ = parts
    plan = gradfold.plan(accumulator, batch, memory="16GiB")
    assert set(plan.choice.by_phase) == {"forward and backward"}
    assert "Without optimizer=" in plan.notes[0]


def test_probes_are_named():
    model = nn.LSTM(8, 8, batch_first=True)
    accumulator = gradfold.Accumulator(model, lambda model, x: model(x)[0].square().mean())
    plan = gradfold.plan(accumulator, torch.randn(16, 5, 8), memory="16GiB")
    assert plan.source == "probes" and "recurrent" in plan.notes[0]


WRONG = [
    *({"memory": "16 parsec"}, {"memory": 0}, {"memory": True}, {"memory": "1GiB", "device": "abacus"}),
    *({"memory": "1GiB", "device": "mps"}, {"memory": "1GiB", "margin": -1}, {"memory": "1GiB", "margin": "much"}),
]


@pytest.mark.parametrize("options", WRONG)
def test_wrong_arguments(parts, options):
    with pytest.raises(gradfold.OptionError, match=r"expected|is not a device|are for"):
        gradfold.plan(*parts, **options)


def test_lazy_layers_are_named_with_what_to_do():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(10))
    accumulator, batch = gradfold.Accumulator(model, loss_fn), (torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    with pytest.raises(gradfold.ModelError, match=r"gradfold.plan needs .*: '0' and '1'. Run one"):
        gradfold.plan(accumulator, batch, memory="2GiB")
    model(batch[0][:2])
    assert gradfold.plan(accumulator, batch, memory="2GiB").micro_batch_size == 8
    with pytest.raises(gradfold.ModelError, match="'LazyLinear'"):
        gradfold.plan(gradfold.Accumulator(nn.LazyLinear(1), loss_fn), batch, memory="2GiB")


def test_amounts():
    assert read_bytes("16GiB") == read_bytes("16g") == 2**34
    assert read_bytes("16 GB") == 16 * 10**9
    assert read_bytes("0.5 KiB") == read_bytes("512") == read_bytes(512) == 512
    assert [written(size) for size in (2048, 12_900_000, 3 * 2**30)] == ["2 KiB", "12.3 MiB", "3.00 GiB"]


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_a_table():
    found = run("digits", "--memory", "647MiB", "--global-batch", "1433")
    assert found.exit_code == 0, found.output
    assert "…" not in found.output and max(map(len, found.output.splitlines())) <= 100
    assert "to an update" in found.output and "with\n" in found.output.replace("  ", "\n")


def test_the_command_as_json():
    found = run("digits", "--memory", "1GiB", "--json")
    plan = json.loads(found.output)
    assert plan["workload"] == "digits" and plan["micro_batch_size"] == 64 == plan["choice"]["micro_batch_size"]
    assert {row["micro_batch_size"] for row in plan["rows"]} == {1, 2, 4, 8, 16, 32, 64}
    assert plan["choice"]["peak_bytes"] == sum(plan["choice"]["breakdown"].values())


def test_the_command_refuses():
    assert isinstance(run("digits", "--memory", "1MiB").exception, gradfold.DoesNotFitError)
    assert isinstance(run("digits", "--memory", "much").exception, gradfold.OptionError)
    assert isinstance(run("digits", "--memory", "1GiB", "--global-batch", "99999").exception, gradfold.OptionError)


@pytest.mark.slow
def test_the_command_for_one_of_many_processes():
    """In a process of its own: a process group is for a whole process."""
    program = [sys.executable, "-m", "gradfold", "plan", "encoder", "--memory", "660MiB", "--global-batch", "1024"]
    found = subprocess.run([*program, "--fully-shard", "8", "--json"], capture_output=True, text=True, check=True)
    assert not found.stderr
    one = json.loads(found.stdout)
    alone = json.loads(run("encoder", "--memory", "700MiB", "--global-batch", "128", "--json").output)
    assert one["num_processes"] == 8 and one["num_rows"] == alone["num_rows"] == 128
    state, whole = (plan["rows"][0]["breakdown"]["optimizer_state"] for plan in (one, alone))
    assert state == pytest.approx(whole / 8, rel=0.01)
    rows = {row["saving"]: row["micro_batch_size"] for row in one["rows"] if row["saving"]}
    assert rows["reduce once"] < one["micro_batch_size"] < rows["checkpoint layers.layers"]


def normed(layer):
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), layer(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def towers():
    return nn.ModuleList([nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 16)), nn.Linear(64, 16)])


IMAGES = torch.zeros(64, 3, 16, 16), torch.arange(64) % 10
PAIRS = torch.randn(256, 64), torch.randn(256, 64)
CONTRAST = gradfold.TwoPhaseLoss(
    lambda model, batch: (model[0](batch[0]), model[1](batch[1])), lambda _, pairs: gradfold.losses.info_nce(*pairs)
)
MOMENTS = gradfold.TwoPhaseLoss(
    lambda model, batch: {"sum": model[0](batch[0]).sum(0), "rows": len(batch[0])},
    lambda _, moments: (moments["sum"] / moments["rows"]).square().mean(),
    combine="sum",
)
COUPLED = {
    "exact BatchNorm": (lambda: normed(nn.BatchNorm2d), loss_fn, IMAGES, "exact"),
    "exact without BatchNorm": (lambda: normed(partial(nn.GroupNorm, 4)), loss_fn, IMAGES, "exact"),
    "rows compared": (towers, CONTRAST, PAIRS, None),
    "sums": (towers, MOMENTS, PAIRS, None),
}


@pytest.mark.parametrize("case", COUPLED)
def test_where_samples_are_coupled_a_plan_is_for_the_whole_batch_or_refused(case):
    """It was for windows that share no memory: 7 MiB planned, 146 measured."""
    make, loss, batch, batch_norm = COUPLED[case]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"batch_norm": batch_norm, "self_check": False}
    found = gradfold.plan(gradfold.Accumulator(model, loss, **options), batch, optimizer, memory="1GiB")
    rows = len(batch[0])
    assert [row.micro_batch_size for row in found.rows if not row.saving] == [rows] == [found.micro_batch_size]
    words = 'batch_norm="exact"' if batch_norm else "a TwoPhaseLoss"
    assert f"Only the whole batch at once can be predicted with {words}." in found.notes
    for size in (rows, rows // 8):
        step = gradfold.TrainStep(gradfold.Accumulator(model, loss, micro_batch_size=size, **options), optimizer)
        step(batch)
        measured = gradfold.measure_peak(lambda step=step: step(batch), model=model, optimizer=optimizer).peak_bytes
        assert measured <= 1.1 * found.choice.peak_bytes
        assert size < rows or measured == pytest.approx(found.choice.peak_bytes, rel=0.1)
    with pytest.raises(gradfold.ModelError, match=rf"cannot be predicted with {words}: .*All {rows} rows at once take"):
        gradfold.plan(gradfold.Accumulator(model, loss, **options), batch, optimizer, memory="640MiB")


LAZY = """
import torch, torch._lazy, torch._lazy.ts_backend, gradfold
from torch import nn
torch._lazy.ts_backend.init()
model, batch = nn.Linear(4, 2).to("lazy"), (torch.randn(8, 4), torch.arange(8) % 2)
loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
moved = tuple(one.to("lazy") for one in batch)
auto = gradfold.Accumulator(model, loss_fn, micro_batch_size=gradfold.Auto(cache=False))
for ask in (
    lambda: gradfold.plan(gradfold.Accumulator(model, loss_fn), batch, memory="1GiB"),
    lambda: auto.backward(batch),
    lambda: gradfold.measure_peak(lambda: None, model=model),
    lambda: gradfold.measure_peak(lambda: moved[0] + 1),
):
    try:
        ask()
    except gradfold.ModelError as error:
        print(error)
sizes = []
def short(model, batch):
    sizes.append(len(batch[0]))
    if len(batch[0]) > 4:
        raise MemoryError
    return loss_fn(model, batch)
result = gradfold.Accumulator(model, short, self_check=False).backward(batch)
print(sizes, result.num_micro_batches)
"""


def test_a_device_whose_memory_torch_does_not_see_is_refused():
    """Looking for it ended the process, and a recovery failed where it freed memory."""
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    *refusals, recovered = done.stdout.splitlines() or [""]
    assert len(refusals) == 4, done.stderr
    assert all("memory on a 'lazy' device cannot be predicted or measured" in one for one in refusals)
    assert recovered == "[8, 4, 4] 2"
