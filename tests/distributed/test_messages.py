"""What ranks say to each other does not grow with their number; and what they conclude from sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradfold
from gradfold import accumulator as accumulators
from gradfold.distributed.agreement import NUM_NUMBERS, digest, is_common
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.term_names import TermNames
from gradfold.engine.loss_terms import TermSums


class AlikeRanks:
    """Stands in for a group of ranks that are all like this one, and notes what each gets from a collective."""

    rank = 0

    def __init__(self, size):
        self.size = size
        self.group = None
        self.messages = []

    def begin_sum(self, numbers):
        self.messages.append(len(numbers))
        return lambda: [number * self.size for number in numbers]

    def exchange(self, value):
        self.messages.append("text")
        return [value] * self.size

    def begin_gather(self, numbers):
        self.messages.append(len(numbers) * self.size)
        return lambda: [list(numbers) for _ in range(self.size)]


class NoReduction:
    def __init__(self, ranks, parameters):
        pass

    def run(self, gradients):
        list(gradients)


def with_metrics(model, batch):
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    return {"one": loss, "two": loss.detach() + loss}, {"error": loss.detach()}


def messages(monkeypatch, size, num_windows):
    group = AlikeRanks(size)
    monkeypatch.setattr(accumulators, "is_initialized", lambda: True)
    monkeypatch.setattr(accumulators, "find_process_group", lambda *args: group)
    monkeypatch.setattr("gradfold.distributed.coordinators.Reduction", NoReduction)
    accumulator = gradfold.Accumulator(nn.Linear(3, 1), with_metrics, micro_batch_size=2, self_check=False)
    found = []
    for _ in range(num_windows):
        group.messages = []
        result = accumulator.backward((torch.randn(4, 3), torch.randn(4, 1)))
        assert math.isclose(result.metrics["error"], result.metrics["one"], rel_tol=1e-6)
        found.append(group.messages)
    return found


def test_messages_have_one_size_whatever_the_number_of_ranks(monkeypatch):
    first, *later = messages(monkeypatch, 4096, 3)
    assert first.count("text") == 1  # the names of loss terms and metrics, once
    assert later == [[32, 32, 32]] * 2
    assert later == messages(monkeypatch, 2, 3)[1:]


@pytest.mark.parametrize("size", [1, 2, 3, 4096])
def test_ranks_agree_where_all_digests_are_the_same(size):
    same = [size * number for number in digest(b"the same")]
    assert is_common(same, size)
    if size > 1:
        others = [one + (size - 1) * other for one, other in zip(digest(b"one"), digest(b"other"), strict=True)]
        assert not is_common(others, size)


def test_a_rank_in_the_middle_does_not_take_the_average_for_agreement():
    """Digests 1, 2 and 3: the sum is that of three ranks with a 2."""
    own = [[number, number**2] for number in (1.0, 2.0, 3.0)]
    assert not is_common([sum(column) for column in zip(*own, strict=True)], 3)


def test_a_digest_stays_exact_on_many_ranks():
    largest = [65535.0] * 3 + [65535.0**2] * 3
    assert len(largest) == NUM_NUMBERS
    for size in (4096, 2**21):
        assert is_common([size * number for number in largest], size)
        assert not is_common([size * largest[0] - 1, *[size * number for number in largest[1:]]], size)


def test_sums_are_added_in_the_order_of_names_and_missing_ones_are_told():
    names = TermNames()
    ours = TermSums({"a": 1.0, "b": 2.0}, torch.float64, {"m": (3.0, 0.5)})
    theirs = TermSums({"a": 10.0}, None, {"n": (4.0, 1.0)})
    assert not names.cover(ours)
    names.learn([TermNames.of(theirs), TermNames.of(ours)])
    assert names == TermNames(["a", "b"], ["m", "n"], torch.float64) and names.cover(ours) and names.cover(theirs)

    def joined(weighs):
        packed = names.pack(ours, lambda name: True), names.pack(theirs, weighs)
        return names.unpack([sum(column) for column in zip(*packed, strict=True)])

    sums = TermSums({"a": 11.0, "b": 2.0}, torch.float64, {"m": (3.0, 0.5), "n": (4.0, 1.0)})
    assert joined(lambda name: False) == (sums, [])
    assert joined(lambda name: name == "b") == (sums, ["b"])
    nothing = names.pack(TermSums({}, None, {}), lambda name: True)
    assert names.unpack(nothing) == (TermSums({}, torch.float64, {}), [])  # a term that no rank returned is not missed


def test_a_failed_rank_says_so_in_a_message_of_the_same_size():
    group = AlikeRanks(2)
    coordinator = DataParallelCoordinator(group, None)
    with pytest.raises(ValueError, match="mine"), coordinator:
        raise ValueError("mine")
    assert group.messages == [32, "text"] and not coordinator.is_awaited
