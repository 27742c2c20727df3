"""Predicted peaks against measured ones: nine models on fake tensors and a recurrent one by probes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.memory.dry_run import DryRun, ProbeBatch
from gradfold.memory.estimate import PeakEstimate, largest_that_fits
from gradfold.memory.tracker import KINDS
from gradfold.precision import Precision
from gradfold.workloads.images import LeNet, ResNet

CPU = torch.device("cpu")
WORDS = 100


def classification(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def next_word(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def reconstruction(model, batch):
    return F.mse_loss(model(batch), batch)


class Transformer(nn.Module):
    def __init__(self, causal=False, tied=False, checkpointed=False):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        layers = [nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(32, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.causal, self.checkpointed = causal, checkpointed

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        x = self.embedding(x)
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.checkpointed else layer(x, src_mask=mask)
        return self.head(x)


class UShape(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU())
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cat([x, self.up(F.silu(self.down(x)))], 1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(WORDS, 32), nn.LSTM(32, 48, 2, batch_first=True)
        self.head = nn.Linear(48, WORDS)

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0])


def with_frozen_parts():
    model = ResNet(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv", "bn", "blocks.0")))
    return model


def images(num):
    return torch.randn(num, 3, 32, 32), torch.randint(0, 10, (num,))


def words(num):
    return torch.randint(0, WORDS, (num, 24)), torch.randint(0, WORDS, (num, 24))


MODELS = {
    "perceptron": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10)),
        classification,
        images,
    ),
    "LeNet": (LeNet, classification, images),
    "ResNet": (partial(ResNet, 3), classification, images),
    "encoder": (Transformer, next_word, words),
    "decoder LM": (partial(Transformer, causal=True), next_word, words),
    "U-Net shape": (UShape, reconstruction, lambda num: images(num)[0]),
    "shared embeddings": (partial(Transformer, tied=True), next_word, words),
    "checkpointing": (partial(Transformer, checkpointed=True), next_word, words),
    "frozen parts": (with_frozen_parts, classification, images),
    "LSTM": (Recurrent, next_word, words),
}
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
}


def predict(model, loss_fn, batch, optimizer=None, collate=None, precision=None, device=CPU):
    return PeakEstimate(
        DryRun(model, loss_fn, ProbeBatch(batch, collate), optimizer, precision or Precision()), torch.device(device)
    )


def measure(model, loss_fn, batch, optimizer, size, **options):
    options = {"batch_norm": "per_micro_batch", "self_check": False, **options}
    step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, micro_batch_size=size, **options), optimizer)
    step(batch)  # the state of the optimizer comes with the first update
    return gradfold.measure_peak(lambda: step(batch), model=model, optimizer=optimizer)


# Every model, and every optimizer; benchmarks/memory has all pairs.
PAIRS = [(name, list(OPTIMIZERS)[number % 3]) for number, name in enumerate(MODELS)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_the_prediction_is_what_is_measured(name, optimizer):
    make, loss_fn, data = MODELS[name]
    model, batch = make(), data(24)
    own = OPTIMIZERS[optimizer]([parameter for parameter in model.parameters() if parameter.requires_grad])
    prediction = predict(model, loss_fn, batch, own)
    assert prediction.source == ("probes" if name == "LSTM" else "fake tensors")
    for size in (12, 24):  # two micro-batches, and the whole batch; lines are drawn through 4 and 8 rows
        measured = measure(model, loss_fn, batch, own, size)
        assert prediction.peak(size).total == pytest.approx(measured.peak_bytes, rel=0.01)
        assert prediction.peaks(size)["update"].total == pytest.approx(
            measured.by_phase["update"].total, rel=0.01, abs=2**13
        )


def test_the_breakdown_is_what_is_measured():
    make, loss_fn, data = MODELS["decoder LM"]
    model, batch = make(), data(24)
    optimizer = torch.optim.Adam(model.parameters())
    predicted = predict(model, loss_fn, batch, optimizer).peak(12)
    measured = measure(model, loss_fn, batch, optimizer, 12).breakdown
    for kind in KINDS:
        assert getattr(predicted, kind) == pytest.approx(getattr(measured, kind), rel=0.01, abs=64), kind


METRICS = {
    "logits": lambda outputs, batch: {"logits": outputs},
    "wide, and a mean": lambda outputs, batch: {"wide": outputs.detach().repeat(1, 20), "mean": outputs.mean()},
    "views": lambda outputs, batch: {"first": outputs[:, 0]},
    "of the batch": lambda outputs, batch: {"labels": batch[1], "hit": outputs.argmax(1) == batch[1]},
}


@pytest.mark.parametrize("optimizer", [None, "Adam"])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_counted_for_all_micro_batches(name, optimizer):
    """A window keeps them to its end, and joins those with an entry per row, which outlive the update."""

    def loss_fn(model, batch):
        outputs = model(batch[0])
        return F.cross_entropy(outputs, batch[1]), METRICS[name](outputs, batch)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 512))
    batch = torch.randn(96, 64), torch.randint(0, 512, (96,))
    own = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else OPTIMIZERS[optimizer](model.parameters())
    prediction = predict(model, loss_fn, batch, own)
    for size in (4, 16, 48, 96):
        measured = measure(model, loss_fn, batch, own, size).by_phase
        for phase, found in prediction.peaks(size).items():
            assert found.total == pytest.approx(measured[phase].total, abs=256), (size, phase)


def test_metrics_are_counted_where_no_lines_hold_and_in_probes():
    def pairs(model, batch):
        features = model(batch)
        return (features @ features.t()).tanh().mean(), {"features": features}

    def reads(model, batch):
        features = model(batch)
        return features.mean() * (2.0 if features.sum().item() else 1.0), {"features": features}

    model, batch = nn.Linear(4, 16), torch.randn(256, 4)
    for loss_fn, source in ((pairs, "fake tensors"), (reads, "probes")):
        prediction = predict(model, loss_fn, batch)
        assert prediction.source == source and prediction.check(64) is (source == "probes")
        found = gradfold.measure_peak(
            lambda loss_fn=loss_fn: gradfold.Accumulator(
                model, loss_fn, micro_batch_size=64, self_check=False
            ).backward(batch),
            model=model,
        )
        assert prediction.peak(64).total == pytest.approx(found.peak_bytes, rel=0.01)


def test_a_prediction_leaves_no_trace():
    model, batch = (
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)),
        torch.randn(16, 8),
    )
    optimizer = torch.optim.Adam(model.parameters())

    def loss_fn(model, batch):
        return model(batch).square().mean()

    loss_fn(model, batch).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    prediction = predict(model, loss_fn, batch, optimizer)
    prediction.peak(16), prediction.peak(3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a.grad, b) for a, b in zip(model.parameters(), gradients, strict=True))
    for then, now in zip(before, (model.state_dict(), optimizer.state_dict()), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_what_reads_values_falls_back_to_probes():
    def reads(model, batch):
        loss = model(batch).square().mean()
        return loss * (2.0 if loss.item() > 0 else 1.0)

    model, batch = nn.Linear(64, 64), torch.randn(32, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prediction = predict(model, reads, batch, optimizer)
    assert prediction.source == "probes" and "DataDependentOutput" in prediction.reason
    measured = measure(model, reads, batch, optimizer, 16)
    assert prediction.peak(16).total == pytest.approx(measured.peak_bytes, rel=0.01)


def test_a_loss_that_trains_another_model_is_not_run_on_fakes():
    other, model, batch = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(8, 8)
    other.weight.grad = torch.ones(8, 8)
    prediction = predict(model, lambda model, batch: other(model(batch)).square().mean(), batch)
    assert prediction.source == "probes" and "not in the model" in prediction.reason
    # A probe trains a copy of the model, but the other one as it is: its gradient would be a trace.
    assert torch.equal(other.weight.grad, torch.ones(8, 8)) and other.bias.grad is None


def test_a_model_that_cannot_run_is_refused():
    def fails(model, batch):
        raise KeyError("no such thing")

    with pytest.raises(gradfold.ModelError, match=r"KeyError: 'no such thing'.*measure_peak"):
        predict(nn.Linear(2, 2), fails, torch.randn(4, 2))


def test_quadratic_memory_is_found_by_the_check():
    """Pairs of rows: no line goes through their memory."""

    def pairs(model, batch):
        features = model(batch)
        return (features @ features.t()).exp().mean()

    model, batch = nn.Linear(4, 4), torch.randn(256, 4)
    prediction = predict(model, pairs, batch)
    drawn = prediction.peak(128).total
    assert not prediction.check(128)
    assert prediction.peak(128).total > 1.5 * drawn
    assert prediction.peak(128).total == pytest.approx(
        gradfold.measure_peak(
            lambda: gradfold.Accumulator(model, pairs, micro_batch_size=128, self_check=False).backward(batch),
            model=model,
        ).peak_bytes,
        rel=0.01,
    )


def test_float32_sums_of_narrow_parameters_are_counted():
    model, batch = nn.Linear(64, 64, dtype=torch.bfloat16), torch.randn(8, 64, dtype=torch.bfloat16)

    def loss_fn(model, batch):
        return model(batch).float().square().mean()

    wide = predict(model, loss_fn, batch).peak(4)
    narrow = predict(model, loss_fn, batch, precision=Precision(accumulate_dtype=None)).peak(4)
    assert wide.gradients == 2 * narrow.gradients == 4 * (64 * 64 + 64)


def test_the_longest_sample_stands_for_all():
    samples = [torch.randn(length, 4) for length in (1, 30, 2, 3)]

    def collate(samples):
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    def loss_fn(model, batch):
        return model(batch).square().mean()

    model = nn.Linear(4, 16)
    ragged = predict(model, loss_fn, samples, collate=collate)
    longest = predict(model, loss_fn, [samples[1]] * 4, collate=collate)
    assert ragged.peak(2).saved_activations == longest.peak(2).saved_activations


def test_a_learning_rate_that_is_a_tensor_runs_on_fakes():
    model, batch = nn.Linear(8, 8), torch.randn(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    assert predict(model, reconstruction, batch, optimizer).source == "fake tensors"


def test_a_gpu_that_is_not_there():
    model, batch = nn.Sequential(*[nn.Linear(100, 100) for _ in range(4)]), torch.randn(64, 100)
    optimizer = torch.optim.Adam(model.parameters())

    def loss_fn(model, batch):
        return model(batch).square().mean()

    here = predict(model, loss_fn, batch, optimizer).peaks(8)
    there = predict(model, loss_fn, batch, optimizer, device="cuda").peaks(8)
    assert there["update"].total % 512 == 0
    assert there["update"].temporaries > here["update"].temporaries  # optimizers work on all parameters at once
    assert there["update"].inputs == 2 * 3584  # two micro-batches of 3200 bytes on the way, in blocks of 512


@pytest.mark.parametrize("most", [1, 2, 7, 100])
def test_the_largest_that_fits(most):
    for bound in range(most + 2):
        expected = max((size for size in range(1, most + 1) if size <= bound), default=None)
        assert largest_that_fits(lambda size, bound=bound: size <= bound, most) == expected
    assert largest_that_fits(lambda size: size == most, most) == most  # the whole at once may take less
    assert largest_that_fits(lambda size: True, 0) is None
