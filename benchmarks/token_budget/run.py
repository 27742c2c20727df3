"""What does a token budget save, at the same gradient and no more memory?

python -m benchmarks.token_budget.run --wikitext2 DIR --multi30k DIR
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradfold
from benchmarks.paired import ratio, time_rounds, write
from gradfold.compare.measure import watch_memory
from gradfold.packing.packer import StepCost, plan
from gradfold.workloads import Workload, load

QUESTION = "What does a token budget save, at the same gradient and no more memory?"
RESULT = Path(__file__).parent / "results" / "cpu.json"
GLOBAL_BATCH_SIZE, NUM_WARMUP = 256, 2  # a token budget measures its second window
ROWS_IN_FLOAT64 = 48
FIXED, SORTED, GREEDY = "fixed count", "sorted, fixed count", "greedy budget"
BUDGET, LIMIT = "TokenBudget", "no padding"
ARMS = (FIXED, SORTED, GREEDY, BUDGET, LIMIT)

Sample = Any
Lengths = list[int]


def main() -> None:
    """Measure every text that is there, print and write."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--wikitext2", type=Path, help="folder with WikiText-2")
    parser.add_argument("--multi30k", type=Path, help="folder with Multi30k")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    texts: dict[str, tuple[str, Path | None]] = {"docstrings": ("language-model", None)}
    if arguments.wikitext2 is not None:
        texts["WikiText-2 paragraphs"] = ("language-model", arguments.wikitext2)
    if arguments.multi30k is not None:
        texts["Multi30k pairs"] = ("translation", arguments.multi30k)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"planning": planning()}
    print(f"planning {results['planning']}")
    for name, (spec, data) in texts.items():
        results[name] = measure(spec, data, arguments.rounds)
        print(name)
        for key, value in results[name].items():
            print(f"    {key:28s} {value}")
    settings = {"global_batch": GLOBAL_BATCH_SIZE, "rounds": arguments.rounds, "dtype": "float32"}
    write(RESULT, QUESTION, settings, results)


def measure(spec: str, data: Path | None, num_rounds: int) -> dict[str, Any]:
    """Times in turn, and beside them gradient errors and peak memory."""
    workload = load(spec, data)
    ways = Ways(workload)
    arms = {name: ways.windows(name) for name in ARMS}
    random.seed(0)
    elapsed_s = time_rounds({name: arm.__next__ for name, arm in arms.items()}, num_rounds, NUM_WARMUP)
    real = ways.count(num_rounds)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
        memory = dict(zip(ARMS, fresh.map(peak_memory, ARMS, [spec] * 5, [data] * 5), strict=True))
    results: dict[str, Any] = {
        "samples at once": ways.num_at_once,
        "max_tokens": ways.max_tokens,
        "overhead of a micro-step, tokens": ways.overhead(),
    }
    for name in ARMS:
        per_s = [tokens / seconds for tokens, seconds in zip(real, elapsed_s[name], strict=True)]
        results[name] = {
            "real_tokens_per_s": round(statistics.median(per_s)),
            "computed_per_real_token": round(ways.computed[name] / ways.computed[LIMIT], 3),
            "micro_batches": ways.num_micro_batches[name],
            "largest_micro_batch_tokens": ways.largest[name],
            "peak_memory_added_mib": round(memory[name] / 2**20),
        }
        if name != LIMIT:
            results[name]["gradient_error_float64"] = ways.gradient_error(name)
    for name in (FIXED, SORTED, GREEDY):
        results[f"speed: {BUDGET} / {name}"] = ratio(elapsed_s, name, BUDGET)
    results[f"time: {BUDGET} / {LIMIT}"] = ratio(elapsed_s, BUDGET, LIMIT)
    return results


def peak_memory(name: str, spec: str, data: Path | None) -> int:
    """Bytes that a few windows add, in a process of their own."""
    torch.set_num_threads(1)
    windows = Ways(load(spec, data)).windows(name)
    peak_memory = watch_memory(torch.device("cpu"))
    for _ in range(2):
        next(windows)
    return peak_memory().rise_bytes


def planning() -> dict[str, Any]:
    """Milliseconds to plan lognormal lengths, and the padding that is left of 256 rows."""
    found: dict[str, Any] = {}
    for sigma in (0.6, 1.0):
        lengths = [lognormal(num, sigma, seed=0) for num in (256, 4096)]
        for column in lengths:
            elapsed_s = []
            for _ in range(21):
                start = time.thread_time()  # of this thread: other programs take the cores for longer than a plan
                plan([column], 8192, StepCost(64))
                elapsed_s.append(time.thread_time() - start)
            found[f"milliseconds, {len(column)} rows, sigma {sigma}"] = round(1e3 * statistics.median(elapsed_s), 2)
        padding = []
        for seed in range(50):
            column = lognormal(256, sigma, seed)
            padded = sum(len(rows) * int(column[list(rows)].max()) for rows in plan([column], 8192, StepCost(64)))
            padding.append(1 - float(column.sum()) / padded)
        found[f"padding, 256 rows, sigma {sigma}"] = {
            "mean": round(statistics.mean(padding), 4),
            "max": round(max(padding), 4),
        }
    return found


def lognormal(num: int, sigma: float, seed: int) -> Tensor:
    """Lengths with a median of 150, at most 2048."""
    generator = torch.Generator().manual_seed(seed)
    return (150 * (sigma * torch.randn(num, generator=generator)).exp()).long().clamp(1, 2048)


class Ways:
    """The same windows, cut in five ways; each way has a model of its own, and all see the same batches."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.num_at_once = workload.micro_batch_size
        assert workload.token_budget is not None and isinstance(workload.token_budget.max_tokens, int)
        self.budget = workload.token_budget
        self.max_tokens = workload.token_budget.max_tokens
        self.computed = dict.fromkeys(ARMS, 0)
        self.num_micro_batches = dict.fromkeys(ARMS, 0)
        self.largest = dict.fromkeys(ARMS, 0)
        self._accumulators: dict[str, gradfold.Accumulator] = {}

    def windows(self, name: str) -> Iterator[None]:
        """One window after another, forward and backward; never ends."""
        model = self._model()
        accumulator = self._accumulators[name] = self._accumulator(name, model)
        for samples in self._batches():
            for parameter in model.parameters():
                parameter.grad = None
            accumulator.backward(self._cut(name, samples))
            yield

    def count(self, num_rounds: int) -> list[int]:
        """Count what each way computed in the timed rounds; gives the real tokens of each round."""
        batches = list(islice(self._batches(), NUM_WARMUP, NUM_WARMUP + num_rounds))
        for name, samples in product(ARMS, batches):
            sizes = [self._padded(part) for part in self._parts(name, samples)]
            self.computed[name] += sum(sizes)
            self.num_micro_batches[name] += len(sizes)
            self.largest[name] = max(self.largest[name], *sizes)
        return list(map(self._num_tokens, batches))

    def overhead(self) -> float | None:
        """What the token budget measured."""
        overhead: float | None = self._accumulators[BUDGET].state_dict()["token_split"]["overhead"]
        return overhead

    def gradient_error(self, name: str) -> float:
        """Relative to the whole batch at once, of some samples in float64."""
        samples = next(self._batches())[:ROWS_IN_FLOAT64]
        model = self._model().double()
        output = self.workload.loss_fn(model, self._collate(samples))
        (output[0] if isinstance(output, tuple) else output).backward()  # type: ignore[union-attr]
        expected = _gradient(model)
        model = self._model().double()
        self._accumulator(name, model).backward(self._cut(name, samples))
        found = _gradient(model)
        return float((found - expected).norm() / expected.norm())

    def _model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return self.workload.make_model()

    def _accumulator(self, name: str, model: torch.nn.Module) -> gradfold.Accumulator:
        size: Any = {FIXED: self.num_at_once, SORTED: self.num_at_once, BUDGET: self.budget}.get(name)
        return gradfold.Accumulator(
            model, self.workload.loss_fn, micro_batch_size=size, weight=self.workload.weight, collate=self._collate
        )

    def _collate(self, samples: Sequence[Sample]) -> Any:
        assert self.workload.collate is not None
        return self.workload.collate(list(samples))

    def _batches(self) -> Iterator[list[Sample]]:
        """Global batches in a random order of the samples, for ever."""
        data = self.workload.train_data
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(data), generator=generator).tolist()
            for start in range(0, len(order) - GLOBAL_BATCH_SIZE + 1, GLOBAL_BATCH_SIZE):
                yield [data[row] for row in order[start : start + GLOBAL_BATCH_SIZE]]

    def _cut(self, name: str, samples: list[Sample]) -> Any:
        """What the accumulator is given."""
        if name == SORTED:
            return sorted(samples, key=self._length)
        if name == GREEDY:
            return self._window(self._greedily(samples))
        if name == LIMIT:
            return self._window(self._without_padding(samples))
        return samples

    def _window(self, groups: list[list[Sample]]) -> gradfold.LoadedWindow[Any]:
        (window,) = gradfold.windows(groups, len(groups))
        return window

    def _greedily(self, samples: list[Sample]) -> list[list[Sample]]:
        """As many of the shortest as fit, and so on: the token budget of trainers."""
        groups: list[list[Sample]] = [[]]
        for sample in sorted(samples, key=self._length):
            if groups[-1] and self._padded([*groups[-1], sample]) > self.max_tokens:
                groups.append([])
            groups[-1].append(sample)
        return groups

    def _without_padding(self, samples: list[Sample]) -> list[list[Sample]]:
        """The same tokens in as many rows, all of one length: what a batch without padding would take."""
        rows = self._of_one_length(samples)
        size = max(1, self.max_tokens // self._length(rows[0]))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _of_one_length(self, samples: list[Sample]) -> list[Sample]:
        if isinstance(samples[0], Tensor):
            tokens = torch.cat(samples)
            return list(tokens[: len(tokens) // len(samples) * len(samples)].view(len(samples), -1))
        columns = {name: self._of_one_length([sample[name] for sample in samples]) for name in samples[0]}
        return [{name: column[row] for name, column in columns.items()} for row in range(len(samples))]

    def _lengths(self, samples: Sequence[Sample]) -> list[Lengths]:
        found = self.budget.lengths(samples)
        return list(found.values()) if isinstance(found, dict) else [found]

    def _length(self, sample: Sample) -> int:
        return sum(chain.from_iterable(self._lengths([sample])))

    def _num_tokens(self, samples: Sequence[Sample]) -> int:
        return sum(map(sum, self._lengths(samples)))

    def _padded(self, samples: Sequence[Sample]) -> int:
        return len(samples) * sum(map(max, self._lengths(samples)))

    def _parts(self, name: str, samples: list[Sample]) -> list[list[Sample]]:
        """The micro-batches."""
        cut = self._cut(name, samples)
        if name in (FIXED, SORTED):
            return [cut[start : start + self.num_at_once] for start in range(0, len(cut), self.num_at_once)]
        if name == BUDGET:
            lengths = [torch.tensor(column) for column in self._lengths(samples)]
            plans = plan(lengths, self.max_tokens, StepCost(self.overhead()))
            return [[samples[row] for row in rows] for rows in plans]
        return list(cut)


def _gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


if __name__ == "__main__":
    main()
