"""The self-check: when it runs, what it says, and that it refuses no loss that is right."""

from __future__ import annotations

import random
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from run_log import RunLog
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader
from zoo.right import RIGHT

import gradfold


def squares(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def rooted(model, batch):
    """Coupled: the root of a mean."""
    return squares(model, batch).sqrt()


def net(*widths, act=nn.Tanh):
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), act())]
    return nn.Sequential(*layers[:-1])


def rows(num_rows=16):
    return torch.randn(num_rows, 4), torch.randn(num_rows, 3) * torch.linspace(0.2, 3, num_rows)[:, None]


def same_rows(num_rows=16):
    """Nothing can be told from these."""
    return torch.ones(num_rows, 4), torch.ones(num_rows, 3)


class Checked:
    """An accumulator and the windows at which it checks itself."""

    def __init__(self, model=None, loss_fn=squares, **options):
        self.calls = RunLog()

        def counted(model, batch):
            self.calls.append(len(batch))
            return loss_fn(model, batch)

        self.model = nn.Linear(4, 3) if model is None else model
        self.accumulator = gradfold.Accumulator(self.model, counted, **({"micro_batch_size": 8} | options))

    def __call__(self, batch):
        """Whether this window was checked."""
        self.calls.clear()
        num_micro_batches = self.accumulator.backward(batch).num_micro_batches
        return len(self.calls) > num_micro_batches


def are_checked(accumulate, *batches):
    return [accumulate(batch) for batch in batches]


# --- When it runs


def test_the_first_window_is_checked_and_no_other():
    assert are_checked(Checked(), *[rows()] * 5) == [True, False, False, False, False]


def test_windows_of_one_micro_batch_are_not_checked_and_not_counted():
    assert are_checked(Checked(), rows(8), rows(8), rows(16), rows(16)) == [False, False, True, False]


def test_self_check_false_never_checks():
    assert are_checked(Checked(loss_fn=rooted, self_check=False), rows(), rows()) == [False, False]


def test_what_is_undecided_is_checked_again_at_windows_2_4_8_and_16():
    accumulate = Checked()
    with pytest.warns(RuntimeWarning, match="in 16 windows the self-check could not see") as caught:
        seen = are_checked(accumulate, *[same_rows()] * 40)
    assert len(caught) == 1
    assert [number for number, is_checked in enumerate(seen, 1) if is_checked] == [1, 2, 4, 8, 16]


def test_it_is_settled_as_soon_as_rows_tell():
    assert are_checked(Checked(), same_rows(), rows(), *[same_rows()] * 3) == [True, True, False, False, False]


def test_a_wrong_loss_is_found_when_rows_tell():
    accumulate = Checked(loss_fn=rooted)
    assert are_checked(accumulate, same_rows(), same_rows(), same_rows()) == [True, True, False]
    with pytest.raises(gradfold.NotDecomposableError):
        accumulate(rows())


STRUCTURES = {
    "a new key": ({"x": 1}, {"x": 1, "more": 1}),
    "another type": ({"x": 1}, {"x": 1.0}),
    "another number of dimensions": ({"x": (4,)}, {"x": (4, 2)}),
    "None": ({"x": 1, "y": 1}, {"x": 1, "y": None}),
}


def of_structure(structure):
    def leaf(kind):
        if kind is None:
            return None
        if isinstance(kind, tuple):
            return torch.randn(16, *kind)
        return torch.randn(16, 4) if isinstance(kind, float) else torch.randint(0, 9, (16, 4))

    return {"in": torch.randn(16, 4), **{key: leaf(kind) for key, kind in structure.items()}}


@pytest.mark.parametrize("pair", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_another_structure_of_the_batch_is_checked_once(pair):
    calls = RunLog()

    def loss_fn(model, batch):
        calls.append(len(batch["in"]))
        return model(batch["in"]).square().mean()

    accumulator = gradfold.Accumulator(nn.Linear(4, 3), loss_fn, micro_batch_size=8)
    seen = []
    for structure in (pair[0], pair[0], pair[1], pair[1], pair[0]):
        calls.clear()
        accumulator.backward(of_structure(structure))
        seen.append(len(calls) > 2)
    assert seen == [True, False, True, False, False]


def test_sizes_are_no_structure():
    accumulate = Checked()
    assert are_checked(accumulate, rows(16), rows(11), rows(33)) == [True, False, False]


def test_training_and_evaluation_mode_are_checked_once_each():
    accumulate = Checked()
    seen = []
    for mode in (True, True, False, False, True):
        accumulate.model.train(mode)
        seen.append(accumulate(rows()))
    assert seen == [True, False, True, False, False]


def test_new_loss_terms_are_checked_in_the_same_window():
    names = ["a"]
    accumulate = Checked(loss_fn=lambda model, batch: {name: squares(model, batch) for name in names})
    seen = are_checked(accumulate, rows(), rows())
    names[:] = ["a", "b"]
    seen += are_checked(accumulate, rows(), rows(), rows())
    names[:] = ["b", "a"]
    seen += are_checked(accumulate, rows(), rows())
    assert seen == [True, False, True, False, False, False, False]


def test_a_term_without_weight_when_it_was_checked_is_not_settled():
    def loss_fn(model, batch):
        x, y, has = batch
        each = (model(x) - y).square().mean(1)
        return {"all": each.mean(), "some": (each * has).sum()}  # a sum, which is wrong

    weight = {"all": "samples", "some": lambda batch: batch[2].sum()}
    accumulator = gradfold.Accumulator(nn.Linear(4, 3), loss_fn, micro_batch_size=8, weight=weight)
    accumulator.backward((*rows(), torch.zeros(16)))
    with pytest.raises(gradfold.NotDecomposableError) as caught:
        for _ in range(16):
            accumulator.backward((*rows(), torch.ones(16)))
    assert caught.value.term == "some"


def test_a_term_without_a_gradient_does_not_hide_the_wrong_one():
    def loss_fn(model, batch):
        return {"constant": batch[1].mean(), "rooted": rooted(model, batch)}

    with pytest.raises(gradfold.NotDecomposableError) as caught:
        gradfold.Accumulator(nn.Linear(4, 3), loss_fn, micro_batch_size=8).backward(rows())
    assert (caught.value.term, caught.value.cause) == ("rooted", "coupled")


def test_a_first_micro_batch_that_weighs_nothing_is_passed_over():
    def loss_fn(model, batch):
        x, y, has = batch
        return (((model(x) - y).square().mean(1) * has).sum() / has.sum()).sqrt()

    has = torch.cat([torch.zeros(8), torch.ones(8)])
    with pytest.raises(gradfold.NotDecomposableError):
        gradfold.Accumulator(
            nn.Linear(4, 3), loss_fn, micro_batch_size=8, weight=lambda batch: batch[2].sum()
        ).backward((*rows(), has))


def test_micro_batches_of_one_row_are_checked_together():
    with pytest.raises(gradfold.NotDecomposableError):
        gradfold.Accumulator(nn.Linear(4, 3), rooted, micro_batch_size=1).backward(rows(4))


@pytest.mark.parametrize("size", [2, 3, 5, 7, 31])
def test_micro_batches_of_any_size_show_what_is_wrong(size):
    with pytest.raises(gradfold.NotDecomposableError):
        gradfold.Accumulator(nn.Linear(4, 3), rooted, micro_batch_size=size).backward(rows(32))


def test_lazy_layers_are_checked_in_the_second_window():
    model = nn.LazyLinear(3)
    accumulator = gradfold.Accumulator(model, rooted, micro_batch_size=8)
    accumulator.backward(rows())
    with pytest.raises(gradfold.NotDecomposableError):
        accumulator.backward(rows())


def test_what_cannot_be_known_is_said_once():
    def loss_fn(model, batch):
        return squares(model, (batch[0], batch[1][torch.randperm(len(batch[1]))]))

    accumulator = gradfold.Accumulator(nn.Linear(4, 3), loss_fn, micro_batch_size=8)
    with pytest.warns(RuntimeWarning, match="randperm") as caught:
        for _ in range(20):
            accumulator.backward(rows())
    assert len(caught) == 1
    assert caught[0].filename == __file__


# --- What goes in


def test_windows_of_a_loader():
    data = list(zip(*rows(24), strict=True))
    accumulator = gradfold.Accumulator(nn.Linear(4, 3), rooted)
    with pytest.raises(gradfold.NotDecomposableError):
        for window in gradfold.windows(DataLoader(data, batch_size=8), 3):
            accumulator.backward(window)
    accumulator = gradfold.Accumulator(nn.Linear(4, 3), squares)
    for window in gradfold.windows(DataLoader(data, batch_size=8), 3):
        accumulator.backward(window)


LENGTHS = (2, 2, 2, 7, 8, 6, 7, 8, 2, 3, 2, 2, 2, 3, 2, 2)


def sequences():
    return [(torch.randn(length, 4), torch.randint(0, 3, (length,))) for length in LENGTHS]


def padded(samples):
    x, y = zip(*samples, strict=True)
    return {"x": pad_sequence(x, True), "y": pad_sequence(y, True, -100)}


def token_loss(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


@pytest.mark.parametrize("weight", ["samples", gradfold.token_count("y")])
def test_samples_that_are_padded_and_a_window_of_them(weight):
    for batch in (sequences(), next(gradfold.windows(DataLoader(sequences(), 8, collate_fn=list), 2))):
        accumulator = gradfold.Accumulator(net(4, 6, 3), token_loss, micro_batch_size=8, collate=padded, weight=weight)
        if weight != "samples":
            accumulator.backward(batch)
        else:
            with pytest.raises(gradfold.NotDecomposableError, match="token_count"):
                accumulator.backward(batch)


def test_samples_that_come_with_what_is_no_tensor_show_wrong_weights():
    def collate(samples):
        return padded(samples) | {"lengths": [len(x) for x, _ in samples]}

    with pytest.raises(gradfold.NotDecomposableError, match="token_count"):
        gradfold.Accumulator(net(4, 6, 3), token_loss, micro_batch_size=8, collate=collate).backward(sequences())


def test_a_collate_function_that_draws_is_no_reason_to_refuse():
    def collate(samples):
        x, y = padded(samples).values()
        return {"x": x + torch.randn_like(x), "y": y}

    weight = gradfold.token_count("y")
    accumulator = gradfold.Accumulator(net(4, 6, 3), token_loss, micro_batch_size=8, collate=collate, weight=weight)
    accumulator.backward(sequences())


def test_packed_sequences_are_not_refused():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.GRU(4, 5, num_layers=2, dropout=0.3)
            self.head = nn.Linear(5, 3)

        def forward(self, packed):
            return self.head(pad_packed_sequence(self.layers(packed)[0], batch_first=True)[0])

    def collate(samples):
        x, y = zip(*samples, strict=True)
        return {"x": pack_sequence(x, enforce_sorted=False), "y": pad_sequence(y, True, -100)}

    weight = gradfold.token_count("y")
    accumulator = gradfold.Accumulator(Recurrent(), token_loss, micro_batch_size=8, collate=collate, weight=weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is packed cannot be cut
        accumulator.backward(sequences())


def test_a_weight_that_does_not_take_parts_is_no_failure():
    def loss_fn(model, batch):
        x, y, has = batch
        each = (model(x) - y).square().mean(1).view(-1, 4).mean(1)
        has = has.view(-1, 4).any(1)
        return (each * has).sum() / has.sum()

    accumulator = gradfold.Accumulator(
        nn.Linear(4, 3), loss_fn, micro_batch_size=8, weight=lambda batch: batch[2].view(-1, 4).any(1).sum()
    )
    accumulator.backward((*rows(), torch.ones(16)))  # two micro-batches tell


def test_a_collate_function_that_does_not_take_parts_is_no_failure():
    def collate(samples):
        if len(samples) % 4:
            raise ValueError("groups of 4")
        return tuple(map(torch.stack, zip(*samples, strict=True)))

    accumulator = gradfold.Accumulator(nn.Linear(4, 3), squares, micro_batch_size=8, collate=collate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        accumulator.backward(list(zip(*rows(), strict=True)))


def test_backward_is_called_through_the_seam():
    calls = []

    def backward(loss, gradient):
        calls.append(float(gradient))
        loss.backward(gradient=gradient)

    gradfold.Accumulator(nn.Linear(4, 3), squares, micro_batch_size=8, backward=backward).backward(rows())
    assert len(calls) > 3  # the probe, the self-check's, and the window's two
    assert calls[-2:] == [0.5, 0.5]
    with pytest.raises(gradfold.NotDecomposableError):
        gradfold.Accumulator(nn.Linear(4, 3), rooted, micro_batch_size=8, backward=backward).backward(rows())


# --- Models


class Sorted(nn.Module):
    """Sorts its rows and puts them back, as for packed sequences: each mask belongs to the row that it fell to."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.last(F.dropout(self.first(x[order])))[order.argsort()]


class TwoViews(Sorted):
    """Runs two views of each row in one pass."""

    def forward(self, x):
        first, second = self.last(F.dropout(self.first(torch.cat([x, -x])))).chunk(2)
        return first + second


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).abs()


class OneNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x[:, :3] * self.scale


MODELS = {
    "complex parameters": Complex,
    "one number": OneNumber,
    "frozen parameters": lambda: net(4, 6, 3)[:2].requires_grad_(False).append(nn.Linear(6, 3)),
    "parameters of several types": lambda: nn.Sequential(nn.Linear(4, 6).double(), nn.Linear(6, 3).double()).double(),
    "compiled": lambda: torch.compile(net(4, 6, 3), backend="eager"),
    "compiled, with dropout": lambda: torch.compile(
        nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3)), backend="eager"
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_right_model_is_left_alone_and_a_wrong_loss_is_found(name):
    def cast(loss_fn):
        def of(model, batch):
            dtype = next((p.dtype for p in model.parameters() if p.dtype == torch.float64), torch.float32)
            return loss_fn(model, (batch[0].to(dtype), batch[1].to(dtype)))

        return of

    gradfold.Accumulator(MODELS[name](), cast(squares), micro_batch_size=8).backward(rows())
    if "dropout" not in name:
        with pytest.raises(gradfold.NotDecomposableError):
            gradfold.Accumulator(MODELS[name](), cast(rooted), micro_batch_size=8).backward(rows())


@pytest.mark.parametrize("model", [Sorted, TwoViews])
def test_rows_that_draw_in_another_order_are_not_refused(model):
    accumulator = gradfold.Accumulator(model(), squares, micro_batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accumulator.backward(rows())


def test_a_wrong_loss_of_a_model_in_channels_last_is_found():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(memory_format=torch.channels_last)
    with pytest.raises(gradfold.NotDecomposableError):
        gradfold.Accumulator(model, rooted, micro_batch_size=8).backward((torch.randn(16, 2, 4, 4), rows()[1]))


def test_parameters_are_bitwise_as_before_when_nothing_could_be_proved():
    model = net(4, 6, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(gradfold.NotDecomposableError):
        gradfold.Accumulator(model, rooted, micro_batch_size=8).backward(rows())
    assert all(map(torch.equal, model.parameters(), before))


def test_hooks_on_parameters_are_warned_of_and_not_refused():
    model = net(4, 6, 3)
    model[0].weight.register_hook(lambda gradient: gradient / (1e-6 + gradient.norm()))
    with pytest.warns(RuntimeWarning, match="hook") as caught:
        gradfold.Accumulator(model, squares, micro_batch_size=8).backward(rows())
    assert len(caught) == 1


def test_two_models_that_train_each_other():
    generator, critic = net(4, 6, 3), net(3, 6, 1)
    both = nn.ModuleList([generator, critic])

    def of_generator(model, batch):
        return F.softplus(-critic(generator(batch))).mean()

    def of_both(model, batch):
        return {"generator": of_generator(model, batch), "critic": critic(generator(batch).detach()).square().mean()}

    for model, loss_fn in ((generator, of_generator), (both, of_both)):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=8).backward(torch.randn(16, 4))


# --- Precision: what is right is never refused


def quietly(model, loss_fn, batch, **options):
    """The self-check neither raises nor warns (warnings are errors); the window may run into infinity."""
    gradfold.Accumulator(model, loss_fn, **({"micro_batch_size": 8} | options)).backward(batch)


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-22, 1e-20, 1e-12, 1e6, 1e20])
@pytest.mark.parametrize("seed", range(3))
def test_losses_of_any_size(scale, seed):
    torch.manual_seed(seed)
    quietly(net(4, 6, 3), lambda model, batch: scale * squares(model, batch), rows())


def fitted(model, x, off):
    """Targets at which the model is near its optimum."""
    y = model(x).detach()
    return x, y + off * torch.randn_like(y)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("off", [0.0, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss], ids=["squares", "absolute"])
def test_inputs_far_from_zero_near_and_far_from_the_optimum(shift, off, loss):
    for seed in range(40):
        torch.manual_seed(seed)
        model = net(8, 32, 1, act=nn.ReLU)
        num_rows = 4 + seed % 30
        batch = fitted(model, torch.randn(num_rows, 8) + shift, off)
        quietly(model, lambda model, batch: loss(model(batch[0]), batch[1]), batch, micro_batch_size=3 + seed % 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_autocast(dtype, inside, scale):
    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype=dtype, enabled=inside or torch.is_autocast_enabled("cpu")):
            output = model(batch[0])
        return scale * F.mse_loss(output.float(), batch[1])

    for seed in range(8):
        torch.manual_seed(seed)
        batch = torch.randn(32, 20), torch.randn(32, 500)
        with torch.autocast("cpu", dtype=dtype, enabled=not inside):
            quietly(net(20, 32, 500), loss_fn, batch, micro_batch_size=16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype):
    for seed in range(8):
        torch.manual_seed(seed)
        model = net(4, 16, 3).to(dtype)
        quietly(model, lambda model, batch: squares(model, (batch[0].to(dtype), batch[1].to(dtype))).float(), rows())


def test_a_model_whose_gradient_is_rounding_alone():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.randn(1))

        def forward(self, x):
            return x + self.shift  # softmax does not see it

    for seed in range(20):
        torch.manual_seed(seed)
        quietly(Shift(), cross_entropy, (torch.randn(16, 3), torch.randint(0, 3, (16,))))


@pytest.mark.parametrize("seed", range(10))
def test_decisions_that_rounding_may_turn(seed):
    torch.manual_seed(seed)

    def loss_fn(model, batch):
        logits = model(batch)
        sure = logits.detach().softmax(1).amax(1) > 0.4
        return (F.cross_entropy(logits, logits.argmax(1), reduction="none") * sure).mean()

    quietly(net(4, 6, 3), loss_fn, torch.randn(16, 4))


# --- Right models drawn at random


def drawn_model(draw, width):
    """A body from (N, T, width) to (N, T, width), and what it is made of."""
    kind = draw.choice(["mlp", "conv", "lstm", "attention"])
    drop = draw.choice([0.0, 0.0, 0.3])
    if kind == "lstm":
        body = nn.LSTM(width, width, num_layers=draw.choice([1, 2]), dropout=0.0, batch_first=draw.random() < 0.5)
    elif kind == "attention":
        body = nn.TransformerEncoderLayer(width, 2, 8, drop, batch_first=True, norm_first=draw.random() < 0.5)
    elif kind == "conv":
        body = nn.Conv1d(width, width, 3, padding=1)
    else:
        body = net(width, 8, width)
    norm = draw.choice([nn.Identity(), nn.LayerNorm(width), nn.GroupNorm(2, width), nn.InstanceNorm1d(width)])
    return Drawn(kind, body, norm, nn.Dropout(drop), nn.Linear(width, 4))


class Drawn(nn.Module):
    def __init__(self, kind, body, norm, drop, head):
        super().__init__()
        self.kind, self.body, self.norm, self.drop, self.head = kind, body, norm, drop, head

    def forward(self, x):
        if self.kind == "conv":
            x = self.body(x.mT).mT
        elif self.kind == "lstm":
            first = self.body.batch_first
            x = self.body(x)[0] if first else self.body(x.transpose(0, 1))[0].transpose(0, 1)
        else:
            x = self.body(x)
        x = self.norm(x) if isinstance(self.norm, (nn.Identity, nn.LayerNorm)) else self.norm(x.mT).mT
        return self.head(self.drop(x))


def drawn_case(seed):
    """A right set-up: a model, a loss, a batch and the weights that belong to it."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    num_rows, length, width = draw.randint(2, 40), draw.randint(2, 6), 4
    model = drawn_model(draw, width)
    batch = {"x": torch.randn(num_rows, length, width) * draw.choice([0.1, 1, 10]) + draw.choice([0, 0, 5, 100])}
    batch["lengths"] = torch.randint(1, length + 1, (num_rows,))
    outside = torch.arange(length) >= batch["lengths"][:, None]
    batch["y"] = torch.randint(0, 4, (num_rows, length)).masked_fill(outside, -100)
    by_token = gradfold.token_count("y")

    def tokens(model, batch):
        return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    def samples(model, batch):
        return model(batch["x"]).square().mean()

    def terms(model, batch):
        return {"tokens": tokens(model, batch), "size": samples(model, batch) * 1e-3}

    loss_fn, weight = draw.choice(
        [(tokens, by_token), (samples, "samples"), (terms, {"tokens": by_token, "size": "samples"})]
    )
    return model, loss_fn, batch, {"weight": weight, "micro_batch_size": draw.randint(1, max(1, num_rows - 1))}


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_right_models_drawn_at_random_are_never_refused(block):
    for seed in range(25 * block, 25 * block + 25):
        model, loss_fn, batch, options = drawn_case(seed)
        try:
            quietly(model, loss_fn, batch, **options)
        except (gradfold.NotDecomposableError, Warning) as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.name)
def test_the_right_ones_of_the_zoo_with_other_seeds(case):
    for seed in range(1, 6):
        torch.manual_seed(seed)
        made = case.make.__wrapped__()
        quietly(made.model, made.loss_fn, made.batch, **made.options)
