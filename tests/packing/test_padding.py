"""A trimming cuts off padding and nothing else, and says where it cannot know what padding is."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from gradfold.errors import BatchError
from gradfold.packing.packer import width_of
from gradfold.packing.padding import PaddedBatch

LENGTHS = torch.tensor([4, 1, 0, 3])
PADDED = 6


def named(**leaves):
    return {"": leaves}


def tokens(lengths=LENGTHS, size=PADDED, pad=0, side="right"):
    """Rows 1, 2, 3, ... up to their length, and padding."""
    rows = torch.full((len(lengths), size), pad)
    for row, length in enumerate(lengths.tolist()):
        place = slice(0, length) if side == "right" else slice(size - length, size)
        rows[row, place] = torch.arange(1, length + 1)
    return rows


def trimming(batch, lengths=LENGTHS, side="right", name=None):
    lengths = lengths if isinstance(lengths, dict) else {"": lengths}
    return PaddedBatch(batch, lengths, side, name or named())


def test_rows_are_cut_to_the_longest_of_them():
    batch = {"ids": tokens(), "labels": tokens(pad=-100), "class": torch.arange(4), "scale": torch.tensor(2.0), "n": 3}
    cut = trimming(batch)
    assert cut.paths == {"['ids']": (1,), "['labels']": (1,)} and cut.full_width == PADDED
    part = cut.of_rows((3, 1))
    assert torch.equal(part["ids"], torch.tensor([[1, 2, 3], [1, 0, 0]]))
    assert torch.equal(part["labels"], torch.tensor([[1, 2, 3], [1, -100, -100]]))
    assert part["class"].tolist() == [3, 1] and part["scale"] == batch["scale"] and part["n"] == 3
    assert width_of(cut.widths, (3, 1)) == 3 and width_of(cut.widths, (2,)) == 1
    assert torch.equal(cut.untrimmed((3, 1))["ids"], batch["ids"][[3, 1]])


def test_what_is_cut_off_can_be_viewed_and_changed():
    batch = {"ids": tokens()}
    part = trimming(batch).of_rows(range(2))
    part["ids"].view(-1).zero_()
    assert torch.equal(batch["ids"], tokens())


def test_a_tensor_that_is_in_the_batch_twice_stays_one():
    ids = tokens()
    part = trimming((ids, ids)).of_rows((0, 1))
    assert part[0] is part[1]


def test_rows_without_tokens_keep_one_column():
    part = trimming({"ids": tokens()}).of_rows((2,))
    assert part["ids"].shape == (1, 1)


@pytest.mark.parametrize("lengths", [torch.zeros(3).long(), torch.ones(3).long()])
@pytest.mark.parametrize("size", [1, 5])
def test_a_batch_of_next_to_nothing(lengths, size):
    cut = trimming({"ids": tokens(lengths, size), "bias": torch.zeros(3, 1, size, size)}, lengths)
    assert cut.of_rows((1,))["ids"].shape == (1, 1)


def test_masks_of_two_dimensions_of_the_sequence():
    """Which query sees which key: causal, and no padding. A query that is padding sees the row's keys."""
    places = torch.arange(PADDED)
    keys = places < LENGTHS[:, None]
    mask = (places[:, None] >= places) & keys[:, None, None, :]  # (B, 1, T, T)
    cut = trimming({"ids": tokens(), "mask": mask})
    assert cut.paths["['mask']"] == (2, 3)
    assert torch.equal(cut.of_rows((3, 1))["mask"], mask[[3, 1], :, :3, :3])


def test_features_of_every_token_are_trimmed_with_them():
    frames = torch.zeros(4, PADDED, 2)
    for row, length in enumerate(LENGTHS.tolist()):
        frames[row, :length] = torch.randn(length, 2)
    assert trimming({"frames": frames}).of_rows((1,))["frames"].shape == (1, 1, 2)


def test_padding_on_the_left_keeps_the_column_before_the_longest_row():
    cut = trimming({"ids": tokens(side="left")}, side="left")
    assert torch.equal(cut.of_rows((3, 1))["ids"], torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]))
    assert cut.of_rows((0,))["ids"].shape == (1, 5)
    full = torch.tensor([PADDED, 1])
    assert trimming({"ids": tokens(full, side="left")}, full, "left").of_rows((0,))["ids"].shape == (1, PADDED)


def test_source_and_target_have_widths_of_their_own():
    lengths = {"source": torch.tensor([2, 5, 1]), "target": torch.tensor([4, 3, 7])}
    batch = {"source": tokens(lengths["source"], 5), "mask": tokens(lengths["source"], 5) > 0}
    batch["target"] = tokens(lengths["target"], 8)
    cut = trimming(batch, lengths)
    part = cut.of_rows((0, 2))
    assert part["source"].shape == part["mask"].shape == (2, 2) and part["target"].shape == (2, 7)
    assert width_of(cut.widths, (0, 2)) == 9 and cut.full_width == 13


def test_a_tensor_that_fits_two_inputs_goes_with_the_shorter():
    """All targets are shorter than their sources, so what is padding there is also padding here."""
    lengths = {"source": torch.tensor([4, 3]), "target": torch.tensor([2, 1])}
    batch = {"source": tokens(lengths["source"], 5), "target": tokens(lengths["target"], 5)}
    part = trimming(batch, lengths).of_rows((1,))
    assert part["source"].shape == (1, 3) and part["target"].shape == (1, 1)


def test_what_looks_like_tokens_and_holds_something_else_has_to_be_named():
    positions = torch.arange(PADDED).expand(4, PADDED)
    batch = {"ids": tokens(), "position_ids": positions}
    with pytest.raises(
        BatchError,
        match=r"batch\['position_ids'\] \(4, 6\) has the padded length in dim 1, .* "
        r"trim=\(\"position_ids\",\). If not: trim=\{\"position_ids\": \(\)\}",
    ):
        trimming(batch)
    for name in (named(position_ids=None), named(position_ids=(1,)), named(position_ids=(-1,))):
        assert trimming(batch, name=name).of_rows((3,))["position_ids"].tolist() == [[0, 1, 2]]
    assert trimming(batch, name=named(position_ids=())).of_rows((3,))["position_ids"].shape == (1, PADDED)


def test_names_are_keys_attributes_indices_or_whole_paths():
    class Pair(NamedTuple):
        ids: torch.Tensor
        positions: torch.Tensor

    positions = torch.arange(PADDED).expand(4, PADDED)
    for batch, name in (
        ({"x": Pair(tokens(), positions)}, "positions"),
        ((tokens(), positions), 1),
        ({"a": {"ids": tokens(), "positions": positions}}, "['a']['positions']"),
    ):
        assert len(trimming(batch, name={"": {name: None}}).paths) == 2
    with pytest.raises(BatchError, match=r"trim= names 'nothing', and the batch has no such tensor"):
        trimming({"ids": tokens()}, name=named(nothing=None))


@pytest.mark.parametrize(
    ("batch", "name", "message"),
    [
        ({"ids": tokens(), "zeros": torch.zeros(4, 9)}, {}, r"dimensions of 6 and 9 could each be the padded length"),
        ({"ids": torch.randn(4, 6)}, {}, r"no tensor of the batch goes with the tokens: .*, 4, .*\['ids'\] \(4, 6\)"),
        ({"class": torch.arange(4)}, {}, "no tensor of the batch"),
        ({"ids": tokens(), "x": torch.randn(4, 7)}, {"x": (1,), "ids": (1,)}, r"another size than the padded length"),
        (
            {"ids": tokens()},
            {"ids": (0,)},
            r"dimensions \(0,\) .* expected such from 1 to 1, since dim 0 counts the rows",
        ),
        ({"x": torch.randn(4, 7, 6)}, {"x": None}, r"unclear which of its dimensions has the padded length"),
    ],
)
def test_what_cannot_be_known_is_refused(batch, name, message):
    with pytest.raises(BatchError, match=message):
        trimming(batch, name={"": name})


def test_a_dimension_with_nothing_beyond_it_is_no_rival():
    """All rows have four tokens, and there are four features."""
    lengths = torch.tensor([4, 4])
    cut = trimming({"ids": tokens(lengths), "features": torch.randn(2, 4)}, lengths)
    assert cut.paths == {"['ids']": (1,)}
    assert cut.of_rows((0,))["ids"].shape == (1, 4)
