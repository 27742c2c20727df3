"""What an adversarial reading of coupled batches and token budgets found: gradients that were wrong without a word."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reference import relative_error
from torch import nn
from torch.nn import functional as F

import gradfold


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(model):
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


class Normed(nn.Module):
    """Leaves things on itself before a BatchNorm, or after it."""

    def __init__(self, leaves):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)
        self.leaves, self.kept, self.num_calls = leaves, [], 0
        self.own, self.nested, self.sign = SimpleNamespace(), {"a": {}}, ""
        self.register_buffer("seen", torch.zeros(4, 6))

    def forward(self, x):
        hidden = self.first(x)
        self.num_calls += 1
        if self.leaves == "attribute":
            self.aux = hidden.square().mean()
        if self.leaves == "list":
            self.kept.clear()
            self.kept.append(hidden)
        if self.leaves == "buffer":
            self.seen = hidden.detach()
        if self.leaves == "number":
            self.scale = float(x[0, 0])
        if self.leaves == "text":
            self.sign = "+" if float(x[0, 0]) > 0 else "-"
        if self.leaves == "object":
            self.dist = torch.distributions.Normal(hidden, 1.0)
        if self.leaves == "in an object":
            self.own.hidden = hidden
        if self.leaves == "in a nesting":
            self.nested["a"]["b"] = hidden
        out = self.last(torch.tanh(self.norm(hidden)))
        if self.leaves == "attribute after all":
            self.aux = out.square().mean()
        return out


def plain(model, x):
    return model(x).square().mean()


def aux(model, x):
    return model(x).square().mean() + model.aux


def kept(model, x):
    return model(x).square().mean() + model.kept[0].mean()


def functional(model, x):
    larger = {name: one * 1.5 for name, one in model.named_parameters()}
    return torch.func.functional_call(model, larger, (x,)).square().mean()


def toggled(model, x):
    first = model(x).square().mean()
    model.last.requires_grad_(False)
    second = model(x + 1).square().mean()
    model.last.requires_grad_(True)
    return first + second


def mode(model, x):
    model.last.eval()
    loss = model(x).square().mean()
    model.last.train()
    return loss


@pytest.mark.parametrize(
    ("leaves", "loss_fn", "named"),
    [
        ("attribute", aux, "attribute 'aux' of the model itself"),
        ("list", kept, "in the attribute 'kept'"),
        ("buffer", plain, "the buffer 'seen' of the model itself"),
        ("number", plain, "the attribute 'scale' of the model itself is 1.5 in one micro-batch and -0.5"),
        ("text", plain, "the attribute 'sign' of the model itself is '\\+' in one micro-batch and '-' in another"),
        ("object", plain, "the attribute 'dist'"),
        ("in an object", plain, "in the attribute 'own'"),
        ("in a nesting", plain, "in the attribute 'nested'"),
        (None, functional, "a parameter of first"),
        (None, toggled, "whether last.weight requires grad"),
        (None, mode, "the mode of last"),
    ],
)
def test_what_a_waiting_forward_pass_leaves_on_modules_is_refused(leaves, loss_fn, named):
    """Other micro-batches overwrote it: 21 to 180 % off, and parameters that were none any more."""
    model = Normed(leaves)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="exact")
    x = torch.randn(12, 5)
    x[:, 0] = torch.tensor([1.5] * 4 + [-0.5] * 8)
    with pytest.raises(gradfold.BatchNormError, match=f"waits at BatchNorm in norm, .*{named}"):
        accumulator.backward(x)
    assert all(type(one) is nn.Parameter for one in (model.first.weight, model.last.weight))


def test_what_is_left_after_the_last_batch_norm_is_read_at_once_and_fine():
    x, model, whole = torch.randn(12, 5), Normed("attribute after all"), Normed("attribute after all")
    whole.load_state_dict(model.state_dict())
    gradfold.Accumulator(model, aux, micro_batch_size=4, batch_norm="exact").backward(x)
    aux(whole, x).backward()
    assert relative_error(gradients(model), gradients(whole)) < 1e-12


def test_numbers_that_are_the_same_in_every_micro_batch_and_counts_are_fine():
    class Sized(Normed):
        def forward(self, x):
            self.size, self.features = x.shape, x.shape[1]
            self.num_steps = getattr(self, "num_steps", 0) + 2
            return super().forward(x) * self.features

    x, model, whole = torch.randn(12, 5), Sized(None), Sized(None)
    whole.load_state_dict(model.state_dict())
    gradfold.Accumulator(model, plain, micro_batch_size=4, batch_norm="exact", self_check=False).backward(x)
    plain(whole, x).backward()
    assert relative_error(gradients(model), gradients(whole)) < 1e-12
    assert model.num_steps == 6


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_norm_outside_of_the_model_counts_once(momentum):
    """It counted in every micro-batch, and in every run of the guard."""
    judge = nn.Sequential(nn.BatchNorm1d(1, momentum=momentum), nn.Linear(1, 1))
    model, x = Normed(None), torch.randn(12, 5)
    accumulator = gradfold.Accumulator(
        model, lambda model, x: plain(judge, model(x)), micro_batch_size=4, batch_norm="exact"
    )
    accumulator.backward(x)
    assert int(judge[0].num_batches_tracked) == 1


def words(lengths, width):
    return torch.stack([F.pad(torch.randint(1, 20, (length,)), (0, width - length)) for length in lengths])


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, words):
        mask = (words > 0)[..., None]
        return self.out((self.words(words) * mask).sum(1) / mask.sum(1))


def weighted(model, batch):
    losses = F.cross_entropy(model(batch["words"]), batch["labels"], reduction="none")
    return (losses * batch["features"].square().mean(1)).mean()


def batch_of(lengths, width):
    return {
        "words": words(lengths, width),
        "features": torch.randn(len(lengths), 6),
        "labels": torch.arange(len(lengths)) % 3,
    }


def test_a_dimension_that_is_one_longer_than_all_rows_is_no_padding():
    """One column beyond every row is the same everywhere in it: features lost their last column, 14 to 43 % off."""
    model = Pool()
    budget = gradfold.TokenBudget(10, lengths=lambda batch: (batch["words"] > 0).sum(1), cost=1)
    accumulator = gradfold.Accumulator(model, weighted, batching=budget)
    for batch in (batch_of([10, 3, 2, 4, 9, 2, 3, 4], 10), batch_of([5] * 6, 5), batch_of([5], 5)):
        model.zero_grad()
        accumulator.backward(batch)
        found = {name: one.clone() for name, one in gradients(model).items()}
        model.zero_grad()
        weighted(model, batch).backward()
        assert relative_error(found, gradients(model)) < 1e-12


def test_what_goes_with_the_tokens_in_one_batch_and_not_in_another_is_refused():
    """Features that end in zeros were trimmed once their number was the padded length of a batch."""
    model = Pool()
    budget = gradfold.TokenBudget(10, lengths=lambda batch: (batch["words"] > 0).sum(1), cost=1)
    accumulator = gradfold.Accumulator(model, weighted, batching=budget)
    accumulator.backward(batch_of([10, 3, 2, 4], 10))
    second = batch_of([6, 2, 3, 4], 6)
    second["features"][:, 1:] = 0.0
    with pytest.raises(gradfold.BatchError, match=r"features.*did not go with the tokens.*trim="):
        accumulator.backward(second)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(20, 4), nn.LSTM(4, 5), nn.Linear(5, 20)

    def forward(self, words):
        return self.out(self.lstm(self.words(words))[0])


def test_rows_that_are_as_many_as_steps_by_accident_are_not_cut_in_time():
    """After an out-of-memory error a batch of (time, rows) was halved in time: 12 % off."""
    samples = [torch.randint(1, 20, (5,)) for _ in range(8)]
    limit = 8

    def collate(samples):
        stacked = torch.stack(samples, 1)
        return {"words": stacked[:-1], "labels": stacked[1:]}

    def loss_fn(model, batch):
        if batch["words"].numel() > limit:
            raise torch.OutOfMemoryError("too many words")
        return F.cross_entropy(model(batch["words"]).flatten(0, 1), batch["labels"].flatten())

    model = TimeFirst()
    result = gradfold.Accumulator(
        model, loss_fn, micro_batch_size=4, collate=collate, weight=lambda batch: batch["labels"].numel()
    ).backward(samples)
    assert result.recoveries
    found = {name: one.clone() for name, one in gradients(model).items()}
    limit = 1000
    model.zero_grad()
    loss_fn(model, collate(samples)).backward()
    assert relative_error(found, gradients(model)) < 1e-12


class Dropping(nn.Module):
    """Drops where the padded dimension is the last one."""

    def __init__(self):
        super().__init__()
        self.conv, self.dropout = nn.Conv1d(2, 3, 1), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.conv(x))


def test_masks_do_not_depend_on_how_far_a_row_is_padded():
    """Elements were numbered in one row, so that channels had other masks in a shorter micro-batch: 24 % off."""
    samples = [torch.randn(2, length) for length in (7, 3, 5, 2, 6, 4, 1)]

    def collate(samples):
        longest = max(sample.shape[1] for sample in samples)
        return {
            "x": torch.stack([F.pad(sample, (0, longest - sample.shape[1])) for sample in samples]),
            "mask": torch.stack([torch.arange(longest) < sample.shape[1] for sample in samples])[:, None],
        }

    def loss_fn(model, batch):
        return ((model(batch["x"]) * batch["mask"]).sum(-1)).square().mean()

    def gradient(size):
        torch.manual_seed(1)
        model = gradfold.convert_dropout(Dropping())
        gradfold.Accumulator(model, loss_fn, micro_batch_size=size, collate=collate).backward(samples)
        return gradients(model)

    whole = gradient(None)
    for size in (1, 2, 3):
        assert relative_error(gradient(size), whole) < 1e-12


def test_layers_that_would_have_the_same_masks_are_refused():
    model = nn.Sequential(
        gradfold.convert_dropout(nn.Sequential(nn.Dropout(0.5))), gradfold.convert_dropout(nn.Sequential(nn.Dropout()))
    )
    model.append(nn.Linear(3, 1))
    with pytest.raises(gradfold.OptionError, match="converted one by one"):
        gradfold.Accumulator(model, lambda model, x: model(x).mean(), micro_batch_size=2).backward(torch.randn(4, 3))


def test_what_a_converted_layer_would_lose_is_refused():
    with pytest.raises(gradfold.ModelError, match="works in place"):
        gradfold.convert_dropout(nn.Sequential(nn.Dropout(inplace=True)))
    hooked = nn.Sequential(nn.Dropout())
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(gradfold.ModelError, match="carries hooks"):
        gradfold.convert_dropout(hooked)


def test_a_statistic_that_changes_between_its_runs_is_seen_beside_large_labels():
    """Differences were pooled: labels of 10,000 hid guesses that had other masks."""
    generator = torch.Generator().manual_seed(0)

    def statistic(model, batch):
        mask = (torch.rand(batch[0].shape, generator=generator) > 0.5).float()
        return model((batch[0] * mask).float())[:, 0], batch[1].float()

    def loss(model, found):
        guesses, labels = (one - one.mean() for one in found)
        return (guesses * labels).mean()

    model = nn.Linear(5, 1).float()
    accumulator = gradfold.Accumulator(
        model, gradfold.TwoPhaseLoss(statistic, loss), micro_batch_size=4, self_check=False
    )
    with pytest.raises(gradfold.RecomputeError):
        accumulator.backward((torch.randn(12, 5), 1e4 + torch.randn(12)))


def test_the_number_of_rows_of_a_micro_batch_is_hardly_a_statistic():
    """The loss took it for that of the batch: 16 times too large."""
    loss_fn = gradfold.TwoPhaseLoss(lambda model, x: (model(x), len(x)), lambda model, found: found[0].sum() / found[1])
    with pytest.raises(gradfold.NotDecomposableError, match=r"the statistic \[1\] .* 3 for the whole, 1 and 2 for"):
        gradfold.Accumulator(nn.Linear(3, 1), loss_fn, micro_batch_size=4).backward(torch.randn(16, 3))
    with pytest.warns(RuntimeWarning, match="which is the number of rows of a micro-batch"):
        gradfold.Accumulator(nn.Linear(3, 1), loss_fn, micro_batch_size=4, self_check=False).backward(
            torch.randn(16, 3)
        )


def test_a_window_of_padded_batches_is_looked_at_where_it_is_padded():
    """Only the last batch's rows were looked at: one without padding let a model through that counts it, 65 % off."""

    class Mean(Pool):
        def forward(self, words):
            return self.out(self.words(words).mean(1))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["words"]), batch["labels"])

    parts = [batch_of([12, 3, 2, 4, 3, 2, 2, 2], 12), batch_of([12] * 8, 12)]
    for part in parts:
        del part["features"]
    budget = gradfold.TokenBudget(24, lengths=lambda batch: (batch["words"] > 0).sum(1), cost=1)
    accumulator = gradfold.Accumulator(Mean(), loss_fn, batching=budget)
    with pytest.raises(gradfold.PaddingError):
        accumulator.backward(next(iter(gradfold.windows(parts, 2))))


def two_inputs(first, second):
    model = nn.Module()
    model.source, model.target = first, second
    return model


def lengths_of_both(batch):
    return {"source": (batch["source"] > 0).sum(1), "target": (batch["target"] > 0).sum(1)}


def test_a_mask_that_would_go_with_the_other_input_is_refused():
    """With every row of the source full, its mask of ones was cut to the width of the target: 70 % off."""

    def batch(source, target, width):
        words_of_source = words(source, 8)
        return {
            "source": words_of_source,
            "mask": (words_of_source > 0).double(),
            "target": words(target, width),
            "labels": torch.arange(8) % 3,
        }

    def loss_fn(model, batch):
        scores = model.source(batch["source"]) / batch["mask"].sum(1, keepdim=True) + model.target(batch["target"])
        return F.cross_entropy(scores, batch["labels"])

    budget = gradfold.TokenBudget(24, lengths=lengths_of_both, cost=1)
    accumulator = gradfold.Accumulator(two_inputs(Pool(), Pool()), loss_fn, batching=budget)
    accumulator.backward(batch([8, 3, 4, 2, 7, 2, 1, 1], [6, 3, 2, 4, 2, 3, 1, 1], 6))
    with pytest.raises(gradfold.BatchError, match=r"mask.*'target'.*went with 'source'"):
        accumulator.backward(batch([8] * 8, [8, 3, 2, 4, 2, 3, 1, 1], 8))


def test_rows_that_tell_of_both_inputs_are_looked_at():
    """Those with one of them trimmed counted as checked: 76 % off where the other one's padding counts."""

    class Mean(Pool):
        def forward(self, words):
            return self.out(self.words(words).mean(1))

    def loss_fn(model, batch):
        scores = model.source(batch["source"]) + model.target(batch["target"])
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64))

    batch = {"source": words([8, 8, 8, 8, 8, 2, 2, 2], 8), "target": words([24, 24, 5, 5, 5, 3, 3, 3], 24)}
    budget = gradfold.TokenBudget(64, lengths=lengths_of_both, cost=1)
    with pytest.raises(gradfold.PaddingError):
        gradfold.Accumulator(two_inputs(Mean(), Pool()), loss_fn, batching=budget).backward(batch)
