"""Dropout by hash: the masks of the full batch, whatever the split, the order or the number of ranks; and fair ones."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
import gradfold.dropout


def gradients(model):
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def network(p=0.4):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 16), nn.Dropout(p), nn.Tanh(), nn.Linear(16, 16), nn.Dropout(p), nn.Linear(16, 2)]
    return gradfold.convert_dropout(nn.Sequential(*layers).double())


def batch(num_rows=33):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num_rows, 5, generator=generator, dtype=torch.float64),
        torch.randn(num_rows, 2, generator=generator, dtype=torch.float64),
    )


def regression(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def reference(model, batch, update):
    """The whole batch in plain torch, with the masks of an update."""
    model = copy.deepcopy(model)
    model.zero_grad()
    with gradfold.counter_based_dropout(model, update, num_rows=len(batch[0])):
        loss = regression(model, batch)
    loss.backward()
    return gradients(model), loss.detach()


@pytest.mark.parametrize("size", [1, 2, 5, 8, 32, None])
def test_every_split_has_the_gradient_of_the_full_batch_at_every_update(size):
    model = network()
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=size)
    for update in range(3):
        model.zero_grad()
        result = accumulator.backward(batch())
        expected, loss = reference(model, batch(), update)
        assert relative_error(gradients(model), expected) < 1e-12
        torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=0)


def test_torch_dropout_would_not_have_it():
    """So the test above can fail: two layers of torch's dropout draw in turn, and each split has other masks."""
    found = []
    for size in (33, 5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 2)).double()
        torch.manual_seed(1)
        gradfold.Accumulator(model, regression, micro_batch_size=size, self_check=False).backward(batch())
        found.append(gradients(model))
    assert relative_error(found[0], found[1]) > 0.1


def test_the_masks_are_those_of_rows_whatever_the_order():
    model = network().train()
    rows, _ = batch()
    with gradfold.counter_based_dropout(model, 3, num_rows=33):
        whole = model[:2](rows)
    for start, stop in ((20, 33), (0, 7), (7, 20)):
        with gradfold.counter_based_dropout(model, 3, first_row=start, num_rows=stop - start):
            part = model[:2](rows[start:stop])
        assert torch.equal(part == 0, whole[start:stop] == 0)


def test_a_resumed_run_goes_on_with_the_next_masks():
    model = network()
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=8)
    for _ in range(3):
        accumulator.backward(batch())
    state = accumulator.state_dict()
    resumed = gradfold.Accumulator(model, regression, micro_batch_size=5)
    resumed.load_state_dict(state)
    model.zero_grad()
    resumed.backward(batch())
    assert relative_error(gradients(model), reference(model, batch(), 3)[0]) < 1e-12
    assert relative_error(reference(model, batch(), 2)[0], reference(model, batch(), 3)[0]) > 0.01


def test_memory_running_out_changes_nothing():
    model = network()

    def loss_fn(model, batch):
        if len(batch[0]) > 9:
            raise torch.OutOfMemoryError("too many rows")
        return regression(model, batch)

    result = gradfold.Accumulator(model, loss_fn).backward(batch())
    assert result.recoveries
    assert relative_error(gradients(model), reference(model, batch(), 0)[0]) < 1e-12


def test_a_failed_window_leaves_the_update_and_the_layers_as_they_were():
    model = network()

    def loss_fn(model, batch):
        regression(model, batch)
        raise KeyError("mine")

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5)
    with pytest.raises(KeyError, match="mine"):
        accumulator.backward(batch())
    assert accumulator.num_windows == 0
    assert model[1].keys is None


def test_a_layer_that_is_called_twice_has_two_masks_and_the_law_holds():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(5, 64), nn.Linear(64, 2), nn.Dropout(0.5)

        def forward(self, x):
            self.seen = self.drop(torch.ones(len(x), 64)), self.drop(torch.ones(len(x), 64))
            return self.b(self.drop(self.drop(self.a(x))))

    torch.manual_seed(0)
    model = gradfold.convert_dropout(Twice().double())
    gradfold.Accumulator(model, regression, micro_batch_size=5).backward(batch())
    assert relative_error(gradients(model), reference(model, batch(), 0)[0]) < 1e-12
    with gradfold.counter_based_dropout(model, 0, num_rows=33):
        model(batch()[0])
    first, second = model.seen
    assert 0.4 < (first == second).double().mean() < 0.6


def test_checkpointing_finds_the_masks_again():
    class Checkpointed(nn.Module):
        def __init__(self, layers, use_reentrant):
            super().__init__()
            self.layers, self.use_reentrant = layers, use_reentrant

        def forward(self, x):
            return checkpoint(self.layers, x.requires_grad_(), use_reentrant=self.use_reentrant)

    for use_reentrant in (False, True):
        plain = network()
        model = Checkpointed(copy.deepcopy(plain), use_reentrant)
        gradfold.Accumulator(model, regression, micro_batch_size=5, self_check=False).backward(batch())
        expected, _ = reference(plain, batch(), 0)
        assert relative_error(gradients(model.layers), expected) < 1e-12


def test_checkpointing_of_a_layer_that_is_called_twice_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop = nn.Linear(5, 2), nn.Dropout(0.5)

        def forward(self, x):
            return checkpoint(lambda y: self.drop(self.linear(self.drop(y))), x, use_reentrant=False)

    model = gradfold.convert_dropout(Model().double())
    with pytest.raises(gradfold.ModelError, match=r"'drop' is called 2 times"):
        gradfold.Accumulator(model, regression, micro_batch_size=5, self_check=False).backward(batch())


SHAPES = {
    nn.Dropout: (64, 50, 20),
    nn.Dropout1d: (64, 200, 7),
    nn.Dropout2d: (64, 200, 3, 2),
    nn.Dropout3d: (64, 200, 2, 2, 2),
    nn.AlphaDropout: (64, 1000),
    nn.FeatureAlphaDropout: (64, 200, 5),
}


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_kind_drops_what_torch_drops_at_the_same_rate(kind, p):
    """Within 4 sigma; and what is left and dropped has the values of torch's own layer."""
    torch.manual_seed(0)
    values = torch.randn(SHAPES[kind], dtype=torch.float64) + 3
    layer = gradfold.convert_dropout(nn.Sequential(kind(p)))[0]
    with gradfold.counter_based_dropout(nn.Sequential(layer), 0, num_rows=64):
        found = layer(values)
    own = kind(p)(values)

    def scale_and_shift(result):
        kept = (result - result.flatten().mode().values).abs() > 1e-9 if "Alpha" in kind.__name__ else result != 0
        x, y = values[kept], result[kept]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return slope.item(), (y.mean() - slope * x.mean()).item(), kept

    slope, shift, kept = scale_and_shift(found)
    own_slope, own_shift, own_kept = scale_and_shift(own)
    assert slope == pytest.approx(own_slope, rel=1e-9) and shift == pytest.approx(own_shift, abs=1e-9)
    assert found[~kept].unique().tolist() == pytest.approx(own[~own_kept].unique().tolist(), abs=1e-9)
    if "1d" in kind.__name__ or "2d" in kind.__name__ or "3d" in kind.__name__ or "Feature" in kind.__name__:
        flat = kept.flatten(2)
        assert bool((flat == flat[..., :1]).all())  # whole channels
        kept = flat[..., 0]
    num = kept.numel()
    assert abs((~kept).sum().item() - num * p) < 4 * math.sqrt(num * p * (1 - p))


def masks(p=0.5, rows=256, elements=256, **where):
    layer = gradfold.dropout.CounterBasedDropout(p, where.pop("name", "drop"), where.pop("seed", 0), 0)
    with gradfold.counter_based_dropout(nn.Sequential(layer), where.pop("update", 0), num_rows=rows, **where):
        return layer(torch.ones(rows, elements)) != 0


def agreement_in_sigmas(one, other):
    num = one.numel()
    return abs((one == other).sum().item() - num / 2) / math.sqrt(num / 4)


def test_masks_of_layers_updates_seeds_and_rows_are_independent():
    """Pairs of fair masks agree in half of their elements; each pair within 4.5 sigma, all together as chi-square."""
    base = masks()
    others = [masks(update=update) for update in range(1, 21)]
    others += [masks(name=f"layers.{index}.drop") for index in range(20)]
    others += [masks(seed=seed) for seed in range(1, 21)]
    others += [base.roll(shift, dim) for dim in (0, 1) for shift in range(1, 21)]
    sigmas = [agreement_in_sigmas(base, other) for other in others]
    assert max(sigmas) < 4.5
    chi_square = sum(sigma**2 for sigma in sigmas)
    assert abs(chi_square - len(sigmas)) < 4 * math.sqrt(2 * len(sigmas))


def test_rows_and_columns_are_dropped_at_the_rate():
    """Chi-square over rows, over elements and over pairs of neighbors, at a rate that is not a half."""
    for update in range(3):
        kept = masks(p=0.2, rows=512, elements=512, update=update).double()
        pairs = kept[:, 1:] * kept[:, :-1], kept[1:] * kept[:-1]
        for counts, num, p in (
            (kept.sum(0), 512, 0.8),
            (kept.sum(1), 512, 0.8),
            (pairs[0].sum(0)[::2], 512, 0.64),
            (pairs[1].sum(1)[::2], 512, 0.64),
        ):
            chi_square = ((counts - num * p).square() / (num * p * (1 - p))).sum().item()
            assert abs(chi_square - len(counts)) < 5 * math.sqrt(2 * len(counts))


def test_both_words_of_a_row_count():
    """Two rows among many may agree in one word of 32 bits; in both they will not."""
    words = torch.randint(0, 2**32, (2, 3), generator=torch.Generator().manual_seed(0))
    words[0, 1], words[1, 2] = words[0, 0], words[1, 0]
    first, other_second, other_first = gradfold.dropout._keep(*words, [3, 4096], 0, 0.5)
    for other in (other_second, other_first):
        assert 0.45 < (first == other).double().mean() < 0.55


def test_first_and_last_elements_of_many_updates_are_fair():
    bits = torch.stack([masks(rows=4, elements=4, update=update) for update in range(2000)]).double()
    assert bool(((bits.mean(0) - 0.5).abs() < 4.5 * 0.5 / math.sqrt(2000)).all())


def test_outside_of_windows_it_is_torchs_dropout():
    model = network()
    rows, _ = batch()
    torch.manual_seed(0)
    first = model(rows)
    assert not torch.equal(first, model(rows))
    torch.manual_seed(0)
    assert torch.equal(first, model(rows))
    assert torch.equal(model.eval()(rows), model(rows))


def test_torch_compile_makes_one_graph_with_the_same_masks():
    model = network().float()
    rows = batch(32)[0].float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    graphs = []
    torch._dynamo.utils.counters.clear()
    for update in range(3):
        for start in (0, 8, 16, 24):
            with gradfold.counter_based_dropout(model, update, first_row=start, num_rows=8):
                expected = model(rows[start : start + 8])
            with gradfold.counter_based_dropout(model, update, first_row=start, num_rows=8):
                found = compiled(rows[start : start + 8])
            torch.testing.assert_close(found, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1]


def test_rows_in_another_dimension():
    layer = gradfold.convert_dropout(nn.Sequential(nn.Dropout(0.5)), row_dim=1)
    with gradfold.counter_based_dropout(layer, 0, num_rows=6):
        whole = layer(torch.ones(3, 6, 4))
    with gradfold.counter_based_dropout(layer, 0, first_row=2, num_rows=3):
        assert torch.equal(layer(torch.ones(3, 3, 4)), whole[:, 2:5])


def test_rows_that_are_folded_are_refused():
    model = gradfold.convert_dropout(nn.Sequential(nn.Flatten(0, 1), nn.Dropout(0.5), nn.Linear(4, 1)))
    accumulator = gradfold.Accumulator(
        model, lambda model, batch: model(batch).mean(), micro_batch_size=3, self_check=False
    )
    with pytest.raises(gradfold.ModelError, match=r"'1' got an input of shape \(6, 4\) for a micro-batch of 3 rows"):
        accumulator.backward(torch.randn(6, 2, 4))


def test_verify_holds_with_dropout_on():
    verdict = gradfold.verify(gradfold.Accumulator(network(), regression, micro_batch_size=5), batch(17))
    assert verdict.ok and verdict.max_relative_error < 1e-12


def test_layers_that_drop_inside_of_torch_are_refused_by_name():
    for module, name in (
        (nn.MultiheadAttention(8, 2, dropout=0.1), "MultiheadAttention"),
        (nn.LSTM(4, 4, 2, dropout=0.1), "LSTM"),
    ):
        model = nn.Sequential(nn.Dropout(0.1), module)
        with pytest.raises(gradfold.ModelError, match=rf"1 \({name}\) drops .*get_submodule\('1'\)\.dropout = 0\.0"):
            gradfold.convert_dropout(model)
        assert type(model[0]) is nn.Dropout
        model.get_submodule("1").dropout = 0.0
        assert type(gradfold.convert_dropout(model)[0]) is not nn.Dropout
    layer = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(gradfold.ModelError, match="self_attn"):
        gradfold.convert_dropout(layer)


@pytest.mark.parametrize("name", ["DropPath", "WordDropout"])
def test_others_that_seem_to_drop_are_warned_of(name):
    other = type(name, (nn.Module,), {})()
    with pytest.warns(RuntimeWarning, match=rf"0 \({name}\)"):
        gradfold.convert_dropout(nn.Sequential(other, nn.Dropout(0.1)))


def test_a_dropout_of_the_users_own_is_refused():
    class Mine(nn.Dropout):
        pass

    with pytest.raises(gradfold.ModelError, match="0 is a Mine"):
        gradfold.convert_dropout(nn.Sequential(Mine(0.1)))


def test_shared_layers_stay_one_and_checkpoints_stay_the_same():
    shared = nn.Dropout(0.3)
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    keys = list(model.state_dict())
    gradfold.convert_dropout(model)
    assert model[0] is model[2] and model[0].p == 0.3
    assert list(model.state_dict()) == keys
    before = model[0]
    assert gradfold.convert_dropout(model)[0] is before
    assert isinstance(gradfold.convert_dropout(nn.Dropout(0.2)), nn.Dropout)


def test_options_are_checked():
    for options in ({"seed": -1}, {"seed": 0.5}, {"row_dim": True}):
        with pytest.raises(gradfold.OptionError):
            gradfold.convert_dropout(nn.Dropout(), **options)
    with pytest.raises(gradfold.OptionError, match="row_dim=1 is not supported with Dropout2d"):
        gradfold.convert_dropout(nn.Sequential(nn.Dropout2d(0.1)), row_dim=1)
    with pytest.raises(gradfold.OptionError, match=r"nn\.Module"):
        gradfold.convert_dropout("model")


class Attention(nn.Module):
    """As in BERT: the layer is there for its rate, which goes to a function of torch."""

    def __init__(self, p=0.3, calls=False):
        super().__init__()
        self.inner, self.drop, self.unused = nn.Linear(5, 2), nn.Dropout(p), nn.Dropout(0.2)
        self.calls = calls
        self.skips = True

    def forward(self, x):
        if not self.skips:
            x = self.unused(x)
        return self.drop(self.inner(x)) if self.calls else F.dropout(self.inner(x), self.drop.p, self.training)


def converted(**options):
    torch.manual_seed(0)
    return gradfold.convert_dropout(Attention(**options).double())


def test_layers_that_are_never_called_are_named_where_torch_drops_in_their_place():
    accumulator = gradfold.Accumulator(converted(), regression, micro_batch_size=5)
    with pytest.warns(RuntimeWarning, match=r"not called.*'drop' and 'unused'.*get_submodule\('drop'\)\.p = 0\.0"):
        accumulator.backward(batch())
    accumulator.backward(batch())  # said once


def test_the_fix_in_that_message_makes_the_gradient_that_of_the_batch():
    model = converted()
    model.get_submodule("drop").p = 0.0
    gradfold.Accumulator(model, regression, micro_batch_size=5).backward(batch())
    assert relative_error(gradients(model), reference(model, batch(), 0)[0]) < 1e-12


def test_random_numbers_beside_layers_that_are_called_are_said_without_a_name():
    def loss_fn(model, batch):
        return regression(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    model = converted(calls=True)
    model.skips = False
    with pytest.warns(RuntimeWarning, match=r"loss_fn draws random numbers of torch's own .*beside the layers"):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False).backward(batch())


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("case", ["a skipped branch", "p = 0", "eval mode", "noise without dropout", "all are called"])
def test_layers_that_rightly_do_not_run_are_not_accused(case, size):
    model = converted(p=0.0 if case in ("p = 0", "noise without dropout") else 0.3, calls=True)
    model.skips = case != "all are called"
    if case == "noise without dropout":
        model.unused.p = 0.0
    model.train(case != "eval mode")

    def loss_fn(model, batch):
        inputs, targets = batch
        noise = torch.randn_like(inputs) if case in ("eval mode", "noise without dropout") else 0
        return F.mse_loss(model(inputs + noise), targets)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(batch())
    assert [str(one.message) for one in caught] == []


def test_the_first_window_in_training_mode_is_the_one_that_is_looked_at():
    model = converted().eval()
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=5)
    accumulator.backward(batch())
    model.train()
    with pytest.warns(RuntimeWarning, match="not called"):
        accumulator.backward(batch())


def test_a_window_that_warns_as_an_error_leaves_nothing():
    model = converted()
    with pytest.raises(RuntimeWarning, match="not called"):
        gradfold.Accumulator(model, regression, micro_batch_size=5).backward(batch())
    assert not gradients(model)


def padded(side):
    """Sequences of up to 20 tokens, with padding on one side."""
    generator = torch.Generator().manual_seed(5)
    lengths = [20, 3, 11, 1, 7, 7, 16, 2, 9, 5]
    ids = torch.zeros(len(lengths), 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, 30, (length,), generator=generator)
        ids[row, slice(0, length) if side == "right" else slice(20 - length, 20)] = tokens
    return {"ids": ids, "labels": ids.masked_fill(ids == 0, -100)}


class Scores(nn.Module):
    """Drops in two dimensions that are trimmed, as attention does, and in one of features of the same size."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.drop, self.scores = nn.Embedding(30, width), nn.Dropout(0.5), nn.Dropout(0.5)
        self.out = nn.Linear(width, 30)

    def forward(self, ids):
        hidden = self.drop(self.embed(ids))
        mask = (ids > 0).double()
        attended = self.scores(hidden @ hidden.transpose(1, 2) / 9) * mask[:, None, :]
        return self.out(attended @ hidden)


def masked_entropy(model, batch):
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("width", [8, 7, 11])  # some as long as a micro-batch is
@pytest.mark.parametrize("side", ["left", "right"])
def test_trimming_on_either_side_changes_no_mask(side, width):
    torch.manual_seed(0)
    model = gradfold.convert_dropout(Scores(width).double(), padding_side=side)
    whole = copy.deepcopy(model)
    with gradfold.counter_based_dropout(whole, 0, num_rows=10):
        masked_entropy(whole, padded(side)).backward()
    budget = gradfold.TokenBudget(
        30, lengths=lambda batch: (batch["ids"] > 0).sum(1), padding_side=side, cost=2, trim=("ids", "labels")
    )
    for options in ({"batching": budget}, {"micro_batch_size": 3}, {}):
        model.zero_grad()
        gradfold.Accumulator(model, masked_entropy, weight=gradfold.token_count("labels"), **options).backward(
            padded(side)
        )
        assert relative_error(gradients(model), gradients(whole)) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_collation_to_the_longest_of_a_micro_batch_changes_no_mask(side):
    torch.manual_seed(0)
    model = gradfold.convert_dropout(Scores(6).double(), padding_side=side)
    samples = [row[row > 0] for row in padded(side)["ids"]]

    def collate(samples):
        ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_side=side)
        return {"ids": ids, "labels": ids.masked_fill(ids == 0, -100)}

    whole = copy.deepcopy(model)
    with gradfold.counter_based_dropout(whole, 0, num_rows=10):
        masked_entropy(whole, collate(samples)).backward()
    budget = gradfold.TokenBudget(30, lengths=lambda samples: list(map(len, samples)), padding_side=side, cost=2)
    for options in ({"batching": budget}, {"micro_batch_size": 3}):
        model.zero_grad()
        weight = gradfold.token_count("labels")
        gradfold.Accumulator(model, masked_entropy, weight=weight, collate=collate, **options).backward(samples)
        assert relative_error(gradients(model), gradients(whole)) < 1e-12


@pytest.mark.parametrize(("side", "other"), [("left", "right"), ("right", "left")])
def test_a_budget_that_trims_where_elements_are_counted_from_is_refused(side, other):
    model = gradfold.convert_dropout(Scores(8).double(), padding_side=other)
    budget = gradfold.TokenBudget(30, lengths=lambda batch: (batch["ids"] > 0).sum(1), padding_side=side)
    accumulator = gradfold.Accumulator(model, masked_entropy, batching=budget)
    with pytest.raises(gradfold.OptionError, match=rf'convert_dropout\(model, padding_side="{side}"\)'):
        accumulator.backward(padded(side))
    with pytest.raises(gradfold.OptionError, match=r'padding_side=\'both\'; expected "right" or "left"'):
        gradfold.convert_dropout(model, padding_side="both")
