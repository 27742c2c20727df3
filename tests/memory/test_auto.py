"""A micro-batch size that sets itself: the search on a clock of our own, then the accumulator that asks for it."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch import nn

import gradfold
from gradfold.memory.auto import MicroBatchChoice, SizeTiming, cache_file, read_cached, write_cached
from gradfold.memory.auto_tune import Search, choose
from gradfold.memory.budget import Budget, margin_for
from gradfold.memory.tracker import MemoryBreakdown
from gradfold.self_check.probe_run import ProbeRun


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("GRADFOLD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Machine:
    """A clock that micro-steps move on: a fixed cost per step, one per row, another one beyond the cache, and noise."""

    def __init__(self, per_step=1e-3, per_row=1e-4, rows_in_cache=1000, noise=0.0, seed=1, most=10**9):
        self.now = 0.0
        self.per_step, self.per_row, self.rows_in_cache, self.noise = per_step, per_row, rows_in_cache, noise
        self.random = random.Random(seed)
        self.most = most
        self.drift = 1.0

    def cost(self, size):
        return self.per_step + size * self.per_row * (1 if size <= self.rows_in_cache else 2)

    def step(self, size):
        if size > self.most:
            raise MemoryError
        self.drift *= 1 + 0.02 * self.random.uniform(-1, 1) * bool(self.noise)
        self.now += self.cost(size) * self.drift * (1 + self.noise * self.random.expovariate(1.0))

    def search(self, largest=512, seconds=4.0):
        sizes = [2**power for power in range(largest.bit_length())]
        return Search(self.step, sizes, seconds, lambda: self.now, lambda: self.now)

    def best_pace(self, largest=512):
        return max(size / self.cost(size) for size in range(1, largest + 1))


def test_the_smallest_size_within_three_percent_of_the_best_is_chosen():
    machine = Machine()  # size / (1 + size / 10) ms: 256 rows are within 1.9 % of 512, 128 are not
    timings = machine.search().run()
    assert choose(timings).micro_batch_size == 256
    assert {timing.micro_batch_size: timing.ratio for timing in timings}[256] == pytest.approx(0.981, abs=0.01)


def test_a_size_beyond_the_cache_is_left_alone():
    assert choose(Machine(rows_in_cache=64).search().run()).micro_batch_size == 64


@pytest.mark.parametrize("rows_in_cache", [16, 64, 1000])
def test_noise_and_drift_do_not_mislead(rows_in_cache):
    """The median of five searches on a machine whose steps take up to several times as long, and which drifts."""
    paces = []
    for seed in range(5):
        machine = Machine(rows_in_cache=rows_in_cache, noise=0.3, seed=seed)
        size = choose(machine.search().run()).micro_batch_size
        paces.append(size / machine.cost(size) / machine.best_pace())
    assert sorted(paces)[2] >= 0.9


def test_the_search_ends_in_time_and_drops_the_slow():
    machine = Machine(per_row=1e-2)  # 5 s for 512 rows
    timings = machine.search(seconds=4.0).run()
    assert machine.now < 10
    assert choose(timings).num_rounds == max(timing.num_rounds for timing in timings)
    quick = Machine().search().run()
    assert quick[0].num_rounds == 0 < quick[-1].num_rounds  # one row takes eleven times as long


def test_memory_that_runs_out_bounds_the_search():
    search = Machine(most=100).search()
    assert choose(search.run()).micro_batch_size == 64 == search.sizes[-1]
    with pytest.raises(MemoryError):
        Machine(most=0).search().run()


def network():
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 1))


def plain():
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def loss_fn(model, batch):
    return model(batch).square().mean()


QUICK = gradfold.Auto(seconds=1.0, cache=False)


def test_the_gradient_is_the_whole_batch_s():
    model, batch = plain().double(), torch.randn(50, 8, dtype=torch.float64) + 1e4
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=QUICK)
    assert accumulator.micro_batch_choice is None and accumulator.micro_batch_size is None
    accumulator.backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12
    choice = accumulator.micro_batch_choice
    assert accumulator.micro_batch_size == choice.micro_batch_size in {1, 2, 4, 8, 16, 32, 50}
    assert choice.largest_fitting == choice.num_rows == 50 and not choice.is_cached
    assert choice.reason and choice.timings and choice.peak_bytes > 0 and choice.elapsed_s > 0


def test_choosing_leaves_no_trace():
    model, batch = network(), torch.randn(24, 8)
    outside = torch.ones(1, requires_grad=True)
    outside.grad = torch.full((1,), 5.0)
    loss_fn(model, batch).backward()
    optimizer = torch.optim.Adam(model.parameters())
    before, optimizer_before = state(model), copy.deepcopy(optimizer.state_dict())
    accumulator = gradfold.Accumulator(
        model, lambda model, batch: loss_fn(model, batch) * outside.sum(), micro_batch_size=QUICK
    )
    accumulator.tune(batch)
    assert_same_state(state(model), before)
    assert torch.equal(outside.grad, torch.full((1,), 5.0))
    assert optimizer.state_dict() == optimizer_before


def test_a_window_that_chooses_is_one_that_does_not():
    """Bit for bit: the search takes nothing from the random numbers, buffers and gradients of the window after it."""
    batch = torch.randn(24, 8)

    def train(size):
        torch.manual_seed(3)
        model = network()
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, batch_norm="per_micro_batch")
        accumulator.backward(batch)
        return accumulator.micro_batch_size, state(model)

    chosen, found = train(QUICK)
    assert_same_state(found, train(chosen)[1])


def test_a_failed_search_rolls_back():
    model = plain()
    calls = []

    def fails(model, batch):
        calls.append(len(batch))
        if len(calls) > 12:
            raise KeyError
        return loss_fn(model, batch)

    batch = torch.randn(32, 8)
    before = state(model)
    with pytest.raises(KeyError):
        gradfold.Accumulator(model, fails, micro_batch_size=QUICK).backward(batch)
    assert_same_state(state(model), before)


def test_a_resumed_run_takes_the_choice_over(monkeypatch):
    """Another choice would cut batches otherwise, and end in other bits."""
    batches = torch.randn(4, 48, 8)

    def train(model, accumulator, batches):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for batch in batches:
            gradfold.TrainStep(accumulator, optimizer)(batch)

    model = plain()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=QUICK)
    train(model, accumulator, batches[:2])
    saved = copy.deepcopy(model.state_dict()), json.loads(json.dumps(accumulator.state_dict()["micro_batch_choice"]))
    kept = {**accumulator.state_dict(), "micro_batch_choice": saved[1]}
    train(model, accumulator, batches[2:])

    resumed = plain()
    resumed.load_state_dict(saved[0])
    again = gradfold.Accumulator(resumed, loss_fn, micro_batch_size=QUICK)
    again.load_state_dict(kept)
    monkeypatch.setattr(
        "gradfold.memory.auto_tune.AutoTuner.tune", lambda *_, **options: pytest.fail("it searched again")
    )
    train(resumed, again, batches[2:])
    assert again.micro_batch_choice == accumulator.micro_batch_choice
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_states_of_other_accumulators_go_together():
    batch = torch.randn(8, 8)
    fixed = gradfold.Accumulator(plain(), loss_fn, micro_batch_size=4)
    auto = gradfold.Accumulator(plain(), loss_fn, micro_batch_size=QUICK)
    auto.backward(batch)
    fixed.load_state_dict(auto.state_dict())
    assert fixed.micro_batch_size == 4 and fixed.micro_batch_choice is None
    auto.load_state_dict(fixed.state_dict())


def full_lengths(batch):
    return [batch.shape[1]] * len(batch)


OPTIONS = {
    "auto rows": {"micro_batch_size": QUICK},
    "auto tokens": {"batching": gradfold.TokenBudget("auto", lengths=full_lengths, cost=2)},
    "rows": {"micro_batch_size": 5},
    "tokens": {"batching": gradfold.TokenBudget(40, lengths=full_lengths, cost=2)},
}


@pytest.mark.parametrize("saved", OPTIONS)
@pytest.mark.parametrize("here", OPTIONS)
def test_a_run_may_be_resumed_with_another_option(saved, here, monkeypatch):
    """What was learned in rows says nothing of padded tokens, and a number that is given is what counts."""

    def tune(self, *_):
        self.choice = MicroBatchChoice(len(searched) + 2, "", (), 16, 16, 0, 0.0)
        searched.append(self.choice)
        return self.choice

    searched = []
    monkeypatch.setattr("gradfold.memory.auto_tune.AutoTuner.tune", tune)
    batch = torch.randn(16, 8)
    before, after = (gradfold.Accumulator(plain(), loss_fn, **OPTIONS[one]) for one in (saved, here))
    before.backward(batch)
    before._micro_batcher.fitting.shrink(16)  # two rows of eight tokens, or sixteen rows
    before.backward(batch)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.num_windows == 2
    same_unit = saved.split()[-1] == here.split()[-1]
    assert after._micro_batcher.fitting.rows == (16 if same_unit else None)
    after.backward(batch)
    taken_over = saved == here and here.startswith("auto")
    assert len(searched) == saved.startswith("auto") + (here.startswith("auto") and not taken_over)
    expected = {"rows": 5, "tokens": 40, "auto rows": len(searched) + 1, "auto tokens": 8 * (len(searched) + 1)}[here]
    assert after.micro_batch_size == expected


def test_a_larger_batch_asks_again_where_rows_were_the_bound(monkeypatch):
    model = plain()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=QUICK)
    asked = []

    def tune(self, dry_run, *_):
        rows = dry_run.probe_batch.num_rows
        asked.append(rows)
        self.choice = MicroBatchChoice(min(rows, 16), "", (), rows, rows, 0, 0.0)
        return self.choice

    monkeypatch.setattr("gradfold.memory.auto_tune.AutoTuner.tune", tune)
    for rows in (4, 6, 8, 3, 64, 256):
        accumulator.backward(torch.randn(rows, 8))
    assert asked == [4, 8, 64]


def test_the_second_start_is_instant(folder, monkeypatch):
    auto = gradfold.Auto(seconds=1.0)
    batch = torch.randn(32, 8)
    first = gradfold.Accumulator(plain(), loss_fn, micro_batch_size=auto).tune(batch)
    (file,) = folder.iterdir()
    monkeypatch.setattr("gradfold.memory.auto_tune.AutoTuner._search", lambda *_: pytest.fail("it searched again"))
    second = gradfold.Accumulator(plain(), loss_fn, micro_batch_size=auto).tune(batch)
    assert second.is_cached and not first.is_cached
    assert (second.micro_batch_size, second.timings) == (first.micro_batch_size, first.timings)

    searched = []
    monkeypatch.setattr(
        "gradfold.memory.auto_tune.AutoTuner._search",
        lambda *_: searched.append(1) or MicroBatchChoice(1, "", (), 32, 32, 0, 0.0),
    )
    others = (
        *((nn.Linear(8, 2), loss_fn, batch), (plain(), lambda model, batch: model(batch).mean(), batch)),
        *((plain(), loss_fn, torch.randn(64, 8)), (plain().double(), loss_fn, batch.double())),
        (plain().eval(), loss_fn, batch),
        (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)), loss_fn, batch),
    )
    for model, other, of in others:
        gradfold.Accumulator(model, other, micro_batch_size=auto).tune(of)
    assert len(searched) == len(others)
    kept = json.loads(file.read_text())
    damaged = [{"choice": first.to_json() | {"micro_batch_size": 0}}, {"choice": {}}, {"breakdown": {"other": 1}}]
    for content in ("{broken", *[json.dumps(kept | change) for change in damaged]):
        file.write_text(content)
        gradfold.Accumulator(plain(), loss_fn, micro_batch_size=auto).tune(batch)
    assert len(searched) == len(others) + 4


def test_the_cache_can_be_switched_off(folder, monkeypatch):
    batch = torch.randn(8, 8)
    gradfold.Accumulator(plain(), loss_fn, micro_batch_size=QUICK).tune(batch)
    assert not folder.exists()
    monkeypatch.setenv("GRADFOLD_CACHE_DIR", "")
    gradfold.Accumulator(plain(), loss_fn, micro_batch_size=gradfold.Auto(seconds=1.0)).tune(batch)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        cache_file("key")
    monkeypatch.delenv("GRADFOLD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    assert cache_file("key").parent == folder / "gradfold" / "micro_batch"


def chosen_again(monkeypatch, choice, budget_bytes, free_bytes, change=None):
    """Whether a size is searched for once more, under a key that an earlier start has left."""
    searched = []
    monkeypatch.setattr("gradfold.memory.auto_tune.AutoTuner._search", lambda *_: searched.append(1) or choice)
    monkeypatch.setattr("gradfold.memory.budget.free_bytes", lambda _: budget_bytes)
    choose = partial(gradfold.Accumulator, loss_fn=loss_fn, micro_batch_size=gradfold.Auto(seconds=1.0))
    batch = torch.randn(32, 8)
    choose(plain()).tune(batch)
    assert len(searched) == 1
    if change is not None:
        change()
    monkeypatch.setattr("gradfold.memory.budget.free_bytes", lambda _: free_bytes)
    choose(plain()).tune(batch)
    return len(searched) == 2


@pytest.mark.parametrize(
    ("size", "largest", "budget_bytes", "free_bytes", "is_due"),
    [
        *[(32, 32, 2**30, 2**30, False), (32, 32, 2**30, 17_000, False), (32, 32, None, 2**30, False)],
        *[(32, 32, 2**30, 16_000, True), (1, 32, 2**30, 16_000, False), (32, 32, None, 16_000, True)],
        (8, 8, 2**20, 2**21 - 1, False),  # bound by memory
        *[(8, 8, 2**20, 2**21, True), (4, 8, 2**20, 2**30, False), (32, 32, 2**20, 2**30, False)],
        *[(8, 8, None, 2**30, False), (8, 8, 2**20, None, False)],
    ],
)
def test_what_is_remembered_is_held_against_memory(monkeypatch, size, largest, budget_bytes, free_bytes, is_due):
    """One row takes 5 654 bytes beside the weights, with a state that is still to come, and 32 take 16 495."""
    choice = MicroBatchChoice(size, "", (), 32, largest, 0, 0.0)
    assert chosen_again(monkeypatch, choice, budget_bytes, free_bytes) is is_due


def test_the_choice_of_another_version_is_not_used(monkeypatch):
    choice = MicroBatchChoice(32, "", (), 32, 32, 0, 0.0)
    again = partial(chosen_again, monkeypatch, choice, 2**30, 2**30)
    assert not again()
    monkeypatch.setenv("GRADFOLD_CACHE_DIR", os.environ["GRADFOLD_CACHE_DIR"] + "_")  # another, empty
    assert again(lambda: monkeypatch.setattr("gradfold.memory.auto.__version__", "0.0.1"))


PLENTY = Budget(2**30, margin_for(torch.device("cpu"), None, is_process_there=False))


def cached(size=4, reason=""):
    return MicroBatchChoice(size, reason, (SizeTiming(size, 100.0, 1.0, 8),), 16, 16, 1000, 2.5)


def test_a_choice_is_read_as_it_was_written():
    assert read_cached("key", PLENTY) is None
    for breakdown, budget in ((MemoryBreakdown(parameters=3), PLENTY), (None, replace(PLENTY, num_bytes=None))):
        write_cached("key", cached(), breakdown, budget)
        assert read_cached("key", PLENTY) == replace(cached(), is_cached=True)
    assert read_cached("other", PLENTY) is None


def _write_many(number):
    for turn in range(1, 51):
        write_cached("key", cached(turn, "x" * 5000), None, PLENTY)
        found = read_cached("key", PLENTY)
        assert found is None or len(found.reason) == 5000
    return True


def test_processes_write_at_once(folder):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(_write_many, range(3)))
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize("content", ["", "[]", "null", '{"key": "other", "value": {}}', '{"key": "key"}', "\x00\xff"])
def test_what_cannot_be_read_counts_as_missing(folder, content):
    write_cached("key", cached(), None, PLENTY)
    (file,) = folder.iterdir()
    file.write_text(content)
    assert read_cached("key", PLENTY) is None
    file.unlink()
    file.mkdir()  # nor written
    write_cached("key", cached(), None, PLENTY)
    assert read_cached("key", PLENTY) is None


def test_memory_bounds_the_choice():
    model = nn.Sequential(nn.Linear(256, 4096), nn.Tanh(), nn.Linear(4096, 1))
    batch = torch.randn(512, 256)
    auto = gradfold.Auto(memory="671MiB", seconds=1.0, cache=False)
    choice = gradfold.Accumulator(model, loss_fn, micro_batch_size=auto).tune(batch)
    assert choice.largest_fitting < 512 and choice.micro_batch_size <= choice.largest_fitting
    assert "fits into memory" in choice.reason
    with pytest.raises(gradfold.DoesNotFitError, match=r"not even one row fits into 300\.0 MiB.*gradfold\.plan"):
        auto = gradfold.Auto(memory="300MiB", cache=False)
        gradfold.Accumulator(model, loss_fn, micro_batch_size=auto).backward(batch)


def coupled(memory=None, batch_norm="exact", cache=False):
    model = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 1))
    auto = gradfold.Auto(memory=memory, seconds=0.5, cache=cache)
    return gradfold.Accumulator(model, loss_fn, micro_batch_size=auto, batch_norm=batch_norm)


def test_where_samples_are_coupled_a_limit_is_kept_for_the_whole_batch_or_refused():
    """ "auto" took 1,186 MiB of 900."""
    batch = torch.randn(512, 256)
    assert coupled("900MiB").tune(batch).largest_fitting == 512
    with pytest.raises(gradfold.ModelError, match=r'cannot be predicted with batch_norm="exact".*All 512 rows'):
        coupled("648MiB").tune(batch)
    assert coupled("648MiB", batch_norm=None).tune(batch).largest_fitting < 512


def test_where_samples_are_coupled_and_memory_is_short_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr("gradfold.memory.budget.free_bytes", lambda device: 7 * 2**20)
    batch = torch.randn(512, 256)
    choice = coupled().tune(batch)
    assert 1 < choice.largest_fitting < 512 and choice.peak_bytes == 0
    assert choice.largest_fitting == coupled(batch_norm=None).tune(batch).largest_fitting
    two_phase = gradfold.TwoPhaseLoss(lambda model, batch: model(batch), lambda _, found: found.square().mean())
    accumulator = coupled(batch_norm=None)
    accumulator = gradfold.Accumulator(accumulator.model, two_phase, micro_batch_size=gradfold.Auto(cache=False))
    assert accumulator.tune(batch).peak_bytes == 0


def test_a_choice_for_windows_that_are_not_coupled_is_not_one_for_those_that_are():
    batch = torch.randn(512, 256)
    coupled("648MiB", batch_norm=None, cache=True).tune(batch)
    assert coupled("648MiB", batch_norm=None, cache=True).tune(batch).is_cached
    with pytest.raises(gradfold.ModelError, match="cannot be predicted"):
        coupled("648MiB", cache=True).tune(batch)


@pytest.mark.parametrize("seconds", [1e-6, 0.3, 0.8, 4.0])
def test_the_reason_names_no_size_that_was_not_run_as_one_that_was(seconds):
    """It was the fastest of those up to 128, of which 16 to 128 had never run."""
    ran = set()

    class Run:  # on a class, since the tuner puts lists in closures back
        sizes = ran

    def recorded(model, batch):
        Run.sizes |= {len(batch)}
        return loss_fn(model, batch)

    auto = gradfold.Auto(seconds=seconds, cache=False)
    choice = gradfold.Accumulator(plain(), recorded, micro_batch_size=auto).tune(torch.randn(128, 8))
    timed = {timing.micro_batch_size for timing in choice.timings}
    assert timed <= ran
    claimed, _, rest = choice.reason.partition(", which were timed; ")
    sizes = {int(found) for found in re.findall(r"\d+(?! %)\b", claimed.partition(" of ")[2])}
    assert sizes <= timed and (not rest or sizes)
    assert ("128 is all rows of the batch, and was not timed" in rest) == (128 not in timed)
    assert 128 not in timed or seconds > 0.1


@pytest.mark.parametrize(
    ("error", "says"),
    [(MemoryError, "8 is the most that fits into memory"), (ValueError, "8 is the most that the model takes")],
)
def test_the_reason_names_what_bounds_the_sizes(error, says):
    def limited(model, batch):
        if len(batch) > 8 and type(batch) is torch.Tensor:  # not in a dry run
            raise error("too many rows")
        return loss_fn(model, batch)

    choice = gradfold.Accumulator(plain(), limited, micro_batch_size=QUICK).tune(torch.randn(32, 8))
    assert choice.largest_fitting == 8
    assert says in choice.reason or choice.reason == f"the fastest, and the largest: {says[5:]}"


def test_out_of_memory_recovery_stays_on_behind_it():
    """A size that fitted when it was tried, and later does not."""
    limit = [64]

    def limited(model, batch):
        if len(batch) > limit[0]:
            raise MemoryError
        return loss_fn(model, batch)

    model, batch = plain(), torch.randn(64, 8)
    accumulator = gradfold.Accumulator(model, limited, micro_batch_size=QUICK)
    accumulator.backward(batch)
    limit[0] = max(accumulator.micro_batch_size // 2, 1)
    if accumulator.micro_batch_size > 1:
        assert accumulator.backward(batch).recoveries


def test_collated_samples_and_windows():
    samples = [torch.randn(length, 8) for length in (3, 9, 1, 4, 2, 7, 5, 6)]

    def collate(samples):
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    accumulator = gradfold.Accumulator(plain(), loss_fn, micro_batch_size=QUICK, collate=collate, self_check=False)
    accumulator.backward(samples)
    assert accumulator.micro_batch_choice.num_rows == 8
    accumulator = gradfold.Accumulator(plain(), loss_fn, micro_batch_size=QUICK)
    for window in gradfold.windows(torch.randn(3, 16, 8), 3):
        accumulator.backward(window)
    assert accumulator.micro_batch_choice.num_rows == 16


@pytest.mark.parametrize("option", ["automatic", ""])
def test_wrong_options(option):
    with pytest.raises(gradfold.OptionError, match=r'expected .*"auto"'):
        gradfold.Accumulator(plain(), loss_fn, micro_batch_size=option)
    with pytest.raises(gradfold.OptionError, match="seconds"):
        gradfold.Auto(seconds=0)
    with pytest.raises(gradfold.OptionError, match="memory"):
        gradfold.Auto(memory="lots")
    with pytest.raises(gradfold.OptionError, match='expected "auto"'):
        gradfold.Accumulator(plain(), loss_fn, micro_batch_size=4).tune(torch.randn(8, 8))


def lazy():
    return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(affine=False), nn.ModuleDict({"last": nn.LazyLinear(1)}))


def last(model, batch):
    return model[2]["last"](model[:2](batch)).square().mean()


def test_lazy_layers_are_named_with_what_to_do():
    """A number works, since the first window makes the layers; a size cannot be looked for without them."""
    batch = torch.randn(32, 8)
    model = lazy()
    accumulator = gradfold.Accumulator(model, last, micro_batch_size=QUICK, batch_norm="per_micro_batch")
    before = torch.get_rng_state()
    for ask in (accumulator.backward, accumulator.tune):
        with pytest.raises(
            gradfold.ModelError, match=r"lazy.*: '0', '1' and '2\.last'\. Run one.*model\(inputs\[:2\]\)"
        ):
            ask(batch)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        last(model, batch[:2])
    assert accumulator.backward(batch).num_micro_batches >= 1
    for size in (5, 1, None):
        model = lazy() if size != 1 else nn.Sequential(nn.LazyLinear(2))
        run = last if size != 1 else loss_fn
        found = gradfold.Accumulator(model, run, micro_batch_size=size, batch_norm="per_micro_batch").backward(batch)
        assert found.num_micro_batches == (1 if size is None else -(-32 // size))


class WithBuffers(nn.Module):
    """A counter, a table, and an average that the first forward pass makes; none of them changes the output."""

    def __init__(self):
        super().__init__()
        self.inner = plain()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.register_buffer("average", None)

    def forward(self, x):
        self.count += 1
        mean = x.detach().mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        return self.inner(x + self.table)


def samples(num):
    return [{"x": torch.randn(8, dtype=torch.float64), "y": number % 2} for number in range(num)]


def dicts(num):
    found = torch.utils.data.default_collate(samples(num))
    return found | {"temperature": 2.0, "name": "train"}


def likelihood(model, batch):
    return nn.functional.binary_cross_entropy_with_logits(model(batch["x"])[:, 0], batch["y"].double())


def with_metrics(model, batch):
    outputs = model(batch["x"])[:, 0]
    loss = nn.functional.binary_cross_entropy_with_logits(outputs, batch["y"].double())
    return loss, {"outputs": outputs, "hits": (outputs > 0).double().mean(), "rows": len(batch["y"])}


USES = {
    "dict batches": (plain, likelihood, [dicts(19)], {}),
    "samples to collate": (plain, likelihood, [samples(19)], {"collate": torch.utils.data.default_collate}),
    "metrics": (plain, with_metrics, [dicts(19)], {}),
    "buffers": (WithBuffers, likelihood, [dicts(19)], {"self_check": False}),
    "one row": (plain, likelihood, [dicts(1)], {}),
    "batches of many sizes": (plain, likelihood, [dicts(num) for num in (1, 19, 4, 40, 2)], {}),
    "a weight": (plain, likelihood, [dicts(19)], {"weight": lambda batch: len(batch["y"])}),
}


@pytest.mark.parametrize("name", USES)
def test_what_people_train(name, monkeypatch):
    """Whatever size is found, the gradient is the whole batch's."""
    make, own_loss, batches, options = USES[name]
    monkeypatch.setattr(
        "gradfold.memory.auto_tune.choose", lambda timings: replace(timings[0], micro_batch_size=min(3, len(timings)))
    )
    model = make().double()
    accumulator = gradfold.Accumulator(model, own_loss, micro_batch_size=QUICK, **options)
    for batch in batches:
        whole = torch.utils.data.default_collate(batch) if isinstance(batch, list) else batch

        def plain_loss(model, whole=whole):
            output = own_loss(model, whole)
            return output[0] if isinstance(output, tuple) else output

        expected = full_batch_gradient(copy.deepcopy(model), plain_loss)
        model.zero_grad()
        result = accumulator.backward(batch)
        assert relative_error(gradients(model), expected) <= 1e-12
        if isinstance(model, WithBuffers):
            assert model.count == result.num_micro_batches > 1
        if name == "metrics":
            assert result.metrics["outputs"].shape == (19,) and result.metrics["rows"] > 1


def test_windows_of_a_loader_in_float64():
    model, loader = plain().double(), torch.utils.data.DataLoader(samples(22), batch_size=8)
    accumulator = gradfold.Accumulator(model, likelihood, micro_batch_size=QUICK)
    (window,) = gradfold.windows(loader, 3)
    expected = full_batch_gradient(
        copy.deepcopy(model), lambda model: likelihood(model, torch.utils.data.default_collate(loader.dataset))
    )
    accumulator.backward(window)
    assert relative_error(gradients(model), expected) <= 1e-12


def test_lower_precision():
    accumulator = gradfold.Accumulator(plain(), loss_fn, micro_batch_size=QUICK, precision="bf16")
    batch = torch.randn(32, 8)
    accumulator.backward(batch)
    found = gradients(accumulator.model)
    size = accumulator.micro_batch_size
    twin = gradfold.Accumulator(
        copy.deepcopy(accumulator.model), loss_fn, micro_batch_size=size, precision="bf16", self_check=False
    )
    twin.model.zero_grad()
    twin.backward(batch)
    for name, one in gradients(twin.model).items():
        assert torch.equal(one, found[name])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_models():
    first = torch.jit.script(plain())
    gradfold.Accumulator(first, loss_fn, micro_batch_size=gradfold.Auto(seconds=1.0)).backward(torch.randn(32, 8))
    other = torch.jit.script(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)))
    auto = gradfold.Auto(seconds=1.0)
    for model, is_cached in ((first, True), (other, False)):
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=auto)
        assert accumulator.tune(torch.randn(32, 8)).is_cached is is_cached


def test_the_choice_as_json():
    choice = MicroBatchChoice(4, "fast", (SizeTiming(4, 100.0, 1.0, 8),), 16, 16, 1000, 2.5)
    assert MicroBatchChoice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


def test_sizes_are_timed_as_in_windows(monkeypatch):
    """A batch at once finds no gradient to add to; of two halves the second does."""
    seen = {32: [], 16: []}
    model = plain()

    class Searched:
        """No clock: what a search runs."""

        def __init__(self, step, sizes, seconds, clock, stopwatch):
            self.step, self.sizes = step, sizes

        def run(self):
            for size in (32, 32, 16, 16, 16, 16):
                self.step(size)
            return (SizeTiming(16, 1.0, 1.0, 1),)

    step = ProbeRun.step

    def watching(self, batch, shares):
        seen[len(batch)].append(model[0].weight.grad is None)
        step(self, batch, shares)

    monkeypatch.setattr("gradfold.memory.auto_tune.Search", Searched)
    monkeypatch.setattr(ProbeRun, "step", watching)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=QUICK).tune(torch.randn(32, 8))
    assert seen == {32: [True, True], 16: [True, False, True, False]}
