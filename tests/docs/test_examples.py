"""The examples keep the law: each ends with the weights of the same training, written in plain torch on full batches.

They run in float64 here (none names a dtype), where a wrong weight cannot hide in rounding, and once as a user would.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import gradfold

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))

# Of the weights after all updates. At most 6e-13 was measured; dividing by the number of parts gives 3e-4 and more.
TOLERANCE = 1e-10


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run():
    """Runs an example in float64: its module, what main() returned; the random state is that after manual_seed(0)."""
    torch.set_default_dtype(torch.float64)

    def run_example(name):
        example = load(name)
        result = example.main()
        torch.manual_seed(0)
        return example, result

    yield run_example
    torch.set_default_dtype(torch.float32)


def distance(model, reference):
    """||w - ref|| / ||ref|| over all parameters."""
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    difference = sum((found.cpu() - expected).square().sum() for found, expected in pairs)
    return (difference / sum(expected.square().sum() for _, expected in pairs)).sqrt().item()


def update(model, optimizer, loss, max_norm=None):
    """One update by a full batch, as in any tutorial."""
    optimizer.zero_grad()
    loss.backward()
    if max_norm is not None:
        clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


def parts(batch, micro_batch_size):
    """The batch in as few nearly equal parts as have at most that many rows."""
    num_parts = -(-len(batch[0]) // micro_batch_size)
    return zip(*(torch.tensor_split(tensor, num_parts) for tensor in batch), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_tested_listed_and_runs_as_a_script(name, capsys):
    assert f"test_{name}" in globals()
    assert f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 8
    assert not any("nan" in line for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_begins_with_its_diff(name):
    docstring = load(name).__doc__
    assert any(line.startswith("    +") for line in docstring.splitlines())


def test_image_classifier(run):
    """Weights are those of the hand-weighted micro-batches; running statistics advance by the whole batch's."""
    example, (model, scheduler) = run("image_classifier")
    data = [tensor[: example.NUM_TRAINING_IMAGES] for tensor in example.make_data()]
    loader = example.make_loader(*data)
    reference = example.make_model()
    optimizer, reference_scheduler = example.make_optimizer(reference, example.NUM_EPOCHS * len(loader))
    layers = [module for module in reference if isinstance(module, nn.BatchNorm2d)]
    seen = {layer: [] for layer in layers}
    for layer in layers:
        layer.momentum = 0.0  # its own statistics stand still
        layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0].detach()))
    for _ in range(example.NUM_EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            for images, labels in parts(batch, 32):
                (F.cross_entropy(reference(images), labels) * len(images) / len(batch[0])).backward()
            optimizer.step()
            reference_scheduler.step()
            for layer, inputs in seen.items():
                values = torch.cat(inputs).transpose(0, 1).flatten(1)  # (C, N H W)
                layer.running_mean.lerp_(values.mean(1), 0.1)
                layer.running_var.lerp_(values.var(1), 0.1)
                inputs.clear()
    assert distance(model, reference) < TOLERANCE
    assert scheduler.last_epoch == reference_scheduler.last_epoch == 48
    for found, expected in zip((m for m in model if isinstance(m, nn.BatchNorm2d)), layers, strict=True):
        torch.testing.assert_close(found.running_mean, expected.running_mean, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found.running_var, expected.running_var, rtol=1e-11, atol=1e-13)
        assert found.num_batches_tracked == 48


def test_contrastive(run):
    """On whole batches, in plain torch but for the masks; with micro-batches as small as 32 it is another training."""
    example, model = run("contrastive")
    loader, reference = example.make_loader(), gradfold.convert_dropout(example.Matcher())
    optimizer = torch.optim.Adam(reference.parameters(), lr=3e-3)
    number = 0
    for _ in range(example.NUM_EPOCHS):
        for batch in loader:
            with gradfold.counter_based_dropout(reference, update=number, num_rows=len(batch[0])):
                loss, _ = example.contrast(reference, example.embed(reference, batch))
            update(reference, optimizer, loss)
            number += 1
    assert distance(model, reference) < TOLERANCE


def test_causal_lm(run):
    example, model = run("causal_lm")
    loader, reference = example.make_loader(), example.TinyGPT()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-3)
    for _ in range(example.NUM_EPOCHS):
        for samples in loader:
            update(reference, optimizer, example.loss_fn(reference, example.collate(samples)), max_norm=1.0)
    assert distance(model, reference) < TOLERANCE


@pytest.mark.parametrize("name", ["with_ddp", "with_fsdp"])
def test_several_ranks_say_the_same_as_one(name, capsys):
    """As a user would start them; only rank 0 prints."""
    script = str(EXAMPLES / f"{name}.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    ranks = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ranks.returncode == 0, ranks.stderr
    runpy.run_path(script, run_name="__main__")
    assert ranks.stdout == capsys.readouterr().out
    assert "over 447 tokens of all ranks" in ranks.stdout


def trained_as_one_process(example):
    """The weights of `with_ddp` and `with_fsdp` by whole batches."""
    reference = example.make_model()
    optimizer = example.make_optimizer(reference)
    for number in range(example.NUM_UPDATES):
        update(reference, optimizer, example.loss_fn(reference, example.make_batch(number)), max_norm=1.0)
    return reference


def test_with_ddp(run):
    example, model = run("with_ddp")
    assert distance(model, trained_as_one_process(example)) < TOLERANCE


def test_with_fsdp(run):
    example, model = run("with_fsdp")
    assert distance(model, trained_as_one_process(example)) < TOLERANCE


def test_with_accelerate(run):
    example, model = run("with_accelerate")
    loader, reference = example.make_loader(), example.make_model()
    optimizer, scheduler = example.make_optimizer(reference)
    for _ in range(example.NUM_EPOCHS):
        for batch in loader:
            update(reference, optimizer, example.loss_fn(reference, batch), max_norm=1.0)
            scheduler.step()
    assert distance(model, reference) < TOLERANCE


def test_with_accelerate_that_divides_a_second_time_is_refused(run):
    example, _ = run("with_accelerate")
    accelerator = example.Accelerator(gradient_accumulation_steps=4)
    fold = gradfold.Accumulator(example.make_model(), example.loss_fn, backward=accelerator.backward)
    with pytest.raises(gradfold.BackwardError, match="gradient_accumulation_steps=1") as caught:
        fold.backward(next(iter(example.make_loader())))
    assert caught.value.factor == 0.25


def test_with_fabric(run):
    example, model = run("with_fabric")
    loader, reference = example.make_loader(), example.make_model()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for _ in range(example.NUM_EPOCHS):
        for batch in loader:
            update(reference, optimizer, example.loss_fn(reference, batch), max_norm=1.0)
    assert distance(model, reference) < TOLERANCE


def test_gan(run):
    example, networks = run("gan")
    loader, reference = example.make_loader(), example.make_networks()
    g_optimizer, d_optimizer = example.make_optimizers(reference)
    for _ in range(example.NUM_EPOCHS):
        for real in loader:
            batch = {"real": real, "noise": torch.randn(len(real), example.NUM_NOISE)}
            update(reference, d_optimizer, example.d_loss(reference, batch))
            update(reference, g_optimizer, example.g_loss(reference, batch))
    assert distance(networks, reference) < TOLERANCE


def test_ppo(run):
    example, (model, batch, result) = run("ppo")
    reference = example.ActorCritic()
    optimizer = torch.optim.Adam(reference.parameters(), lr=5e-3)
    for _ in range(example.NUM_ROLLOUTS):
        reference_batch = example.rollout(reference)
        for _ in range(example.EPOCHS_PER_ROLLOUT):
            terms, metrics = example.loss_fn(reference, reference_batch)
            if metrics["kl"] > example.MAX_KL:
                break
            update(reference, optimizer, sum(terms.values()))
    assert distance(model, reference) < TOLERANCE
    assert torch.equal(batch["tokens"], reference_batch["tokens"])
    for name, expected in {**terms, **metrics}.items():
        torch.testing.assert_close(result.metrics[name], expected.detach(), rtol=1e-7, atol=1e-10)


def test_diffusion(run):
    example, (model, ema) = run("diffusion")
    loader, reference = example.make_loader(), example.Denoiser()
    reference_ema = example.make_average(reference)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-3)
    for _ in range(example.NUM_EPOCHS):
        for points in loader:
            update(reference, optimizer, example.loss_fn(reference, example.with_noise(points)), max_norm=1.0)
            reference_ema.update_parameters(reference)
    assert distance(model, reference) < TOLERANCE
    assert distance(ema, reference_ema) < TOLERANCE
    assert ema.n_averaged == 80


def test_seq2seq(run):
    example, (model, accuracies) = run("seq2seq")
    loader, reference = example.make_loader(), example.Translator()
    optimizer = torch.optim.Adam(reference.parameters(), lr=5e-3)
    expected = []
    for _ in range(example.NUM_EPOCHS):
        for batch in loader:
            loss, metrics = example.loss_fn(reference, batch)
            expected.append(metrics["sentence_accuracy"].item())
            update(reference, optimizer, loss, max_norm=1.0)
    assert distance(model, reference) < TOLERANCE
    assert accuracies == pytest.approx(expected, rel=1e-6)  # whole sentences are counted in float32


def test_token_budget(run):
    example, (model, right) = run("token_budget")
    loader, reference = example.make_loader(), example.Classifier()
    optimizer = torch.optim.Adam(reference.parameters(), lr=3e-3)
    for _ in range(example.NUM_EPOCHS):
        expected = []
        for batch in loader:
            loss, metrics = example.loss_fn(reference, batch)
            expected.append(metrics["is_right"])
            update(reference, optimizer, loss)
    assert distance(model, reference) < TOLERANCE
    assert all(map(torch.equal, right, expected))  # of the last epoch, row by row


def test_multi_task(run):
    example, model = run("multi_task")
    generator, reference = torch.Generator().manual_seed(0), example.TwoHeads()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for _ in range(example.NUM_UPDATES):
        batch = example.make_batch(generator)
        update(reference, optimizer, sum(example.loss_fn(reference, batch).values()))
    assert distance(model, reference) < TOLERANCE
    assert not batch["depth"][-4:].isfinite().any() and (batch["classes"][:4] == example.NO_CLASS).all()


def test_preference_pairs(run):
    example, model = run("preference_pairs")
    generator, reference = torch.Generator().manual_seed(0), example.make_model()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2)
    for _ in range(example.NUM_UPDATES):
        update(reference, optimizer, example.loss_fn(reference, example.make_batch(generator)))
    assert distance(model, reference) < TOLERANCE


def test_closures(run):
    example, models = run("closures")
    batch = example.make_batch()

    reference = example.make_model()
    optimizer = example.make_optimizer("LBFGS", reference)

    def closure():
        optimizer.zero_grad()
        loss = example.loss_fn(reference, batch)
        loss.backward()
        return loss

    for _ in range(example.NUM_UPDATES["LBFGS"]):
        optimizer.step(closure)
    assert distance(models["LBFGS"], reference) < 1e-8  # its line search amplifies rounding

    reference = example.make_model()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
    for _ in range(example.NUM_UPDATES["SAM"]):
        climber = copy.deepcopy(reference)
        gradients = torch.autograd.grad(example.loss_fn(climber, batch), list(climber.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(climber.parameters(), gradients, strict=True):
                parameter += 0.05 * gradient / norm
        gradients = torch.autograd.grad(example.loss_fn(climber, batch), list(climber.parameters()))
        for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert distance(models["SAM"], reference) < TOLERANCE


def test_detection(run):
    example, model = run("detection")
    loader, reference = example.make_loader(), example.make_model()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for _ in range(example.NUM_EPOCHS):
        for samples in loader:
            update(reference, optimizer, sum(example.loss_fn(reference, example.collate(samples)).values()))
    assert distance(model, reference) < TOLERANCE


def test_resumable(run):
    """The two runs are the same bit for bit, and that of micro-batches weighed by hand, dropout drawn in turn."""
    example, ((unbroken, log), (resumed, log_in_parts)) = run("resumable")
    assert list(log_in_parts) == list(log) == list(range(1, 41))
    assert log_in_parts == log
    assert distance(resumed, unbroken) == 0.0

    digits = example.load_digits()
    data = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    reference = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, example.NUM_UPDATES)
    for batch in islice(example.batches(*data, start=0), example.NUM_UPDATES):
        loss = sum(example.loss_fn(reference, part) * len(part[0]) for part in parts(batch, 32)) / len(batch[0])
        update(reference, optimizer, loss, max_norm=1.0)
        scheduler.step()
    assert distance(unbroken, reference) < TOLERANCE


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_resumable_survives_a_kill_in_the_middle_of_writing(run, tmp_path):
    example, ((unbroken, log), _) = run("resumable")
    path = tmp_path / "checkpoint.pt"
    program = f"""
import os, runpy, signal, torch
from pathlib import Path
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
save, saved = torch.save, []
def save_and_die(checkpoint, file):
    saved.append(file)
    if len(saved) == 3:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(checkpoint, file)
torch.save = save_and_die
runpy.run_path({str(EXAMPLES / "resumable.py")!r})["train"](Path({str(path)!r}), {{}})
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    assert path.with_suffix(".new").read_bytes() == b"half a checkpoint"
    assert torch.load(path)["step"]["updates"] == 20
    log_of_the_rest = {}
    resumed = example.train(path, log_of_the_rest)
    assert log_of_the_rest == {update: log[update] for update in range(21, 41)}
    assert distance(resumed, unbroken) == 0.0


def test_existing_loop(run):
    example, models = run("existing_loop")
    loader, reference = example.make_loader(), example.make_model()
    optimizer = example.make_optimizer(reference)
    for _ in range(example.NUM_EPOCHS):
        micro_batches = list(loader)
        for window in (micro_batches[start : start + 4] for start in range(0, len(micro_batches), 4)):
            images, labels = (torch.cat(tensors) for tensors in zip(*window, strict=True))
            update(reference, optimizer, example.loss_fn(reference, (images, labels)))
    for model in models:
        assert distance(model, reference) < TOLERANCE
