"""The built-in workloads do what they say, and the registry finds them and those of the user's own."""

import copy
import gzip
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gradfold
from gradfold.errors import DataError, WorkloadError
from gradfold.weights import token_count
from gradfold.workloads import BUILT_IN, Workload, load
from gradfold.workloads.images import LeNet, ResNet, classification_loss, perceptron
from gradfold.workloads.language import collate_masked
from gradfold.workloads.scoring import evaluating, mean_scores, slices
from gradfold.workloads.transformer import Encoder


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on several threads, far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder with a small MNIST and a small CIFAR-10, of random pixels."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)

    def random_bytes(*shape, below=256):
        return bytes(torch.randint(0, below, shape, generator=generator).flatten().tolist())

    for part in ("train", "t10k"):
        images, labels = random_bytes(150, 28, 28), random_bytes(150, below=10)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 150, 28, 28) + images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 150) + labels)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(b"".join(random_bytes(1, below=10) + random_bytes(3072) for _ in range(270)))
    write_sentences(folder, generator)
    words = [f"word{number}" for number in range(40)]

    def random_text(most, least=1):
        lengths = torch.randint(least, most + 1, (1,), generator=generator)
        return " ".join(words[number] for number in torch.randint(0, 40, (int(lengths),), generator=generator).tolist())

    for language in ("de", "en"):
        text = "\n".join(random_text(30, 3) for _ in range(20)) + "\n"
        (folder / f"val.{language}.gz").write_bytes(gzip.compress(text.encode()))
    for name, num in (("valid.txt", 200), ("test.txt", 12)):
        paragraphs = [f" \n = Heading = \n \n {random_text(300)} \n" for _ in range(num)]
        (folder / name).write_text("".join(paragraphs))
    return folder


def write_sentences(folder, generator):
    """A small Multi30k: a German sentence has the words of its English one, spelt in another way."""
    for part, count in (("train", 560), ("test_2016_flickr", 20)):
        lines = [
            torch.randint(0, 200, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator).tolist()
            for _ in range(count)
        ]
        for language in ("en", "de"):
            text = "".join(" ".join(f"{language}{word}" for word in line) + ".\n" for line in lines)
            (folder / f"{part}.{language}").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def workload(small_data):
    """Each built-in workload, built once; "resnet" is on digits, "resnet on cifar10" on images in color."""
    built = {}

    def get(name):
        if name not in built:
            spec, _, on_data = name.partition(" on ")
            needs_data = spec in ("mnist", "cifar10", "matching", "translation") or bool(on_data)
            built[name] = load(spec, small_data if needs_data else None)
        return built[name]

    return get


ALL = [*BUILT_IN, "resnet on cifar10", "language-model on paragraphs"]


def num_rows(data):
    return len(data) if isinstance(data, list) else len(pytree.tree_leaves(data)[0])


def rows_of(workload):
    """A global batch; of long texts a quarter of one."""
    return list(range(workload.global_batch_size // (4 if workload.name == "language-model" else 1)))


def batch_of(workload, rows, dtype=torch.float32):
    """The samples at `rows`, collated if need be, with floating point numbers in `dtype`."""
    if workload.collate is not None:
        return workload.collate([workload.train_data[row] for row in rows])
    return pytree.tree_map(
        lambda leaf: leaf[rows].to(dtype) if leaf.is_floating_point() else leaf[rows], workload.train_data
    )


def loss_of(workload, model, batch):
    result = workload.loss_fn(model, batch)
    return result[0] if isinstance(result, tuple) else result


def weight_of(workload, rows, batch):
    return len(rows) if workload.weight == "samples" else workload.weight(batch).item()


def gradient(workload, model, micro_batches):
    """The gradient of a global batch whose micro-batches are these rows, by hand; all parameters in a row."""
    model = copy.deepcopy(model)
    batches = [batch_of(workload, rows, dtype=torch.float64) for rows in micro_batches]
    weights = [weight_of(workload, rows, batch) for rows, batch in zip(micro_batches, batches, strict=True)]
    for batch, weight in zip(batches, weights, strict=True):
        (loss_of(workload, model, batch) * (weight / sum(weights))).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def relative_error(given, expected):
    return ((given - expected).norm() / expected.norm()).item()


def train(workload, num_updates):
    """The model after some updates in the order of the samples, a global batch at a time."""
    torch.manual_seed(0)
    model = workload.make_model()
    optimizer = workload.make_optimizer(model.parameters())
    rows = torch.arange(num_rows(workload.train_data)).repeat(20)
    for batch_rows in rows.split(workload.global_batch_size)[:num_updates]:
        optimizer.zero_grad()
        loss_of(workload, model, batch_of(workload, batch_rows.tolist())).backward()
        optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_micro_batches_add_up_to_the_global_batch_except_where_samples_see_each_other(workload, name):
    workload = workload(name)
    torch.manual_seed(0)
    model = workload.make_model().double()
    rows = rows_of(workload)
    size = workload.micro_batch_size
    micro_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    expected_num = 2 if name == "scalar" or "language-model" in name else 16 if name == "matching" else 4
    assert len(micro_batches) == expected_num
    error = relative_error(gradient(workload, model, micro_batches), gradient(workload, model, [rows]))
    if workload.batch_norm is None and not isinstance(workload.loss_fn, gradfold.TwoPhaseLoss):
        assert error < 1e-12
    else:
        assert error > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_accumulator_runs_it(workload, name):
    workload = workload(name)
    torch.manual_seed(0)
    model = workload.make_model().double()
    rows = rows_of(workload)
    size = workload.micro_batch_size
    micro_batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    is_whole = isinstance(workload.loss_fn, gradfold.TwoPhaseLoss)
    expected = gradient(workload, model, [rows] if is_whole else micro_batches)
    accumulator = workload.make_accumulator(model, micro_batch_size=size)
    if workload.collate is None:
        batch = batch_of(workload, rows, dtype=torch.float64)
    else:
        batch = [workload.train_data[row] for row in rows]
    result = accumulator.backward(batch)
    assert result.num_micro_batches == len(rows) // size
    given = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert relative_error(given, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_evaluation_gives_numbers_and_leaves_the_model_as_it_was(workload, name):
    workload = workload(name)
    torch.manual_seed(0)
    model = workload.make_model()
    frozen = list(model.modules())[-1]
    frozen.train(frozen is model)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    scores = workload.evaluate(model)
    assert scores and all(isinstance(score, float) and score == score for score in scores.values())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    pytree.tree_map(torch.testing.assert_close, dict(model.state_dict()), dict(state))
    in_double = workload.evaluate(copy.deepcopy(model).double())
    assert in_double == pytest.approx(dict(scores), rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_builds_the_same_model_in_training_mode(workload, name):
    workload = workload(name)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = workload.make_model()
        assert all(module.training for module in model.modules())
        states.append(dict(model.state_dict()))
    pytree.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), *states)


def test_scalar_by_hand(workload):
    workload = workload("scalar")
    model = workload.make_model()
    optimizer = workload.make_optimizer(model.parameters())
    x, y = workload.train_data
    accumulated = []
    for row in (0, 1):
        (workload.loss_fn(model, (x[row : row + 1], y[row : row + 1])) / 2).backward()
        accumulated.append(model.weight.grad.item())
    optimizer.step()
    assert x.tolist() == [4.0, 2.0] and y.tolist() == [8.0, 4.0]
    assert accumulated == [-16.0, -20.0]
    assert model.weight.item() == pytest.approx(1.2, abs=1e-7)


def test_scalar_by_the_accumulator(workload):
    workload = workload("scalar")
    model = workload.make_model()
    accumulated = []

    def loss_fn(model, micro_batch):
        accumulated.append(None if model.weight.grad is None else model.weight.grad.item())
        return workload.loss_fn(model, micro_batch)

    optimizer = workload.make_optimizer(model.parameters())
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=1).backward(workload.train_data)
    assert accumulated == [None, -16.0]
    assert model.weight.grad.item() == -20.0
    assert result.loss.item() == 10.0
    optimizer.step()
    assert workload.evaluate(model) == {"weight": pytest.approx(1.2, abs=1e-7)}


def test_linear_has_100_micro_batches_and_is_learnt_in_an_epoch(workload):
    workload = workload("linear")
    assert num_rows(workload.train_data) == 100 * workload.micro_batch_size
    assert workload.global_batch_size == 4 * workload.micro_batch_size
    assert workload.evaluate(workload.make_model())["mse"] > 1
    assert workload.evaluate(train(workload, num_updates=25))["mse"] < 0.011


def test_digits_ends_an_epoch_with_a_partial_batch_and_is_learnt(workload):
    workload = workload("digits")
    num_left = num_rows(workload.train_data) % workload.global_batch_size
    assert workload.micro_batch_size < num_left < workload.global_batch_size
    assert workload.evaluate(train(workload, num_updates=60))["accuracy"] > 0.9


def test_matching_leaves_out_pairs_without_words_and_knows_the_frequent_words(small_data, tmp_path):
    for language, train in (("en", "A b,\n \nc\n"), ("de", "X y.\nz\n\x85\n")):
        (tmp_path / f"train.{language}").write_text(train, encoding="utf-8")
        (tmp_path / f"test_2016_flickr.{language}").write_text("a\x85 q\n" if language == "en" else "y\n", "utf-8")
    workload = load("matching", tmp_path)
    assert [sample["en"].tolist() for sample in workload.train_data] == [[3, 4, 2]]  # "," comes before the letters
    assert [sample["de"].tolist() for sample in workload.train_data] == [[3, 4, 2]]
    assert workload.evaluate.keywords["samples"][0]["en"].tolist() == [3, 1]


def test_matching_padding_takes_no_part(workload):
    workload = workload("matching")
    torch.manual_seed(0)
    model = workload.make_model().double()
    short = min(workload.train_data, key=lambda sample: len(sample["en"]))
    together = model(workload.collate([short, *workload.train_data[:9]]))
    alone = model(workload.collate([short]))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-12)


def layer_sizes(model):
    return [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]


def test_mnist_is_as_in_its_description(workload):
    workload = workload("mnist")
    model = workload.make_model()
    assert layer_sizes(model) == [(784, 512), (512, 256), (256, 128), (128, 10)]
    optimizer = workload.make_optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 1e-3
    assert (workload.micro_batch_size, workload.global_batch_size, workload.num_epochs) == (32, 128, 2)
    assert 60_000 % workload.global_batch_size == 96
    assert set(workload.evaluate(model)) == {"accuracy", "loss"}
    assert workload.facts["training samples"] == "150"


def test_cifar10_is_as_in_its_description(workload):
    workload = workload("cifar10")
    model = workload.make_model()
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, layer.kernel_size) for layer in convolutions] == [(6, (5, 5)), (16, (5, 5))]
    assert layer_sizes(model) == [(400, 120), (120, 84), (84, 10)]
    optimizer = workload.make_optimizer(model.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (1e-3, 0.9)
    assert (workload.micro_batch_size, workload.global_batch_size) == (64, 256)


def test_resnet_normalizes_per_micro_batch_and_learns(workload):
    workload = workload("resnet")
    assert workload.batch_norm == "per_micro_batch"
    assert any("micro-batch" in fact for fact in workload.facts.values())
    model = train(workload, num_updates=40)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()) == 9
    assert workload.evaluate(model)["accuracy"] > 0.8


def test_encoder_counts_differ_between_micro_batches_so_that_equal_weights_are_wrong(workload):
    workload = workload("encoder")
    assert (workload.global_batch_size, workload.micro_batch_size) == (8, 2)
    micro_batches = [[0, 1], [2, 3], [4, 5], [6, 7]]
    counts = [weight_of(workload, rows, batch_of(workload, rows)) for rows in micro_batches]
    assert len(set(counts)) > 1 and min(counts) >= 2
    torch.manual_seed(0)
    model = workload.make_model().double()
    expected = gradient(workload, model, [list(range(8))])
    mean_of_means = torch.stack([gradient(workload, model, [rows]) for rows in micro_batches]).mean(dim=0)
    assert relative_error(mean_of_means, expected) > 1e-2


def test_encoder_masks_some_tokens_of_every_sample_and_the_same_every_time(workload):
    samples = workload("encoder").train_data
    for sample in samples:
        masked = sample["labels"] != -100
        num_tokens = len(sample["tokens"])
        assert masked.sum() == max(1, round(0.15 * num_tokens))
        assert torch.equal(sample["tokens"] == 1, masked)
        assert (sample["labels"][masked] > 1).all()
        assert 1 <= num_tokens <= 64
    again = load("encoder").train_data
    assert len(samples) == len(again) == 2000
    for sample, other in zip(samples, again, strict=True):
        assert torch.equal(sample["tokens"], other["tokens"])
        assert torch.equal(sample["labels"], other["labels"])


def test_encoder_does_not_see_the_padding(workload):
    samples = sorted(workload("encoder").train_data[:50], key=lambda sample: len(sample["tokens"]))
    short, long = samples[0], samples[-1]
    assert len(short["tokens"]) < len(long["tokens"])
    torch.manual_seed(0)
    model = Encoder(num_tokens=1003, max_tokens=64).double()
    alone = model(short["tokens"][None])[0]
    padded = model(collate_masked([short, long])["tokens"])[0, : len(alone)]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_encoder_learns(workload):
    workload = workload("encoder")
    torch.manual_seed(0)
    before = workload.evaluate(workload.make_model())["loss"]
    assert workload.evaluate(train(workload, num_updates=40))["loss"] < before - 1


def test_scores_do_not_depend_on_the_slices():
    torch.manual_seed(0)
    model = perceptron(num_pixels=4)
    images, labels = torch.randn(2300, 1, 2, 2), torch.randint(0, 10, (2300,))
    logits = model(images)
    batches = list(zip(slices(images, 1000), slices(labels, 1000), strict=True))
    scores = mean_scores(model, classification_loss, batches, lambda batch: len(batch[1]))
    assert scores["accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    assert scores["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_encoder_scores_are_means_over_all_masked_tokens(workload):
    workload = workload("encoder")
    torch.manual_seed(0)
    model = workload.make_model()
    samples = workload.train_data[:120]
    loss, metrics = workload.loss_fn(model, collate_masked(samples))
    batches = map(collate_masked, slices(samples, 50))
    scores = mean_scores(model, workload.loss_fn, batches, token_count("labels"))
    assert scores["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(metrics["accuracy"].item(), rel=1e-5)


def test_an_evaluation_that_fails_gives_the_modes_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not torch.is_grad_enabled()
        assert not model[0].training
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize(
    ("model", "shape"), [(LeNet(), (2, 3, 32, 32)), (ResNet(3), (2, 3, 32, 32)), (ResNet(1), (2, 1, 8, 8))]
)
def test_models_give_a_score_for_each_class(model, shape):
    assert model(torch.randn(shape)).shape == (2, 10)


def test_all_built_in_workloads_are_described_without_building_them():
    images = ("digits", "linear", "scalar", "mnist", "cifar10", "encoder", "resnet")
    assert tuple(BUILT_IN) == (*images, "language-model", "translation", "matching")
    assert BUILT_IN["mnist"].data == "downloaded (12 MB), or --data DIR"
    assert all("\n" not in line.text and 20 < len(line.text) < 120 for line in BUILT_IN.values())


@pytest.mark.parametrize("name", ["language-model", "language-model on paragraphs", "translation"])
def test_texts_carry_a_token_budget_that_takes_the_memory_of_a_fixed_number(workload, name):
    workload = workload(name)
    lengths = workload.token_budget.lengths(workload.train_data)
    columns = list(lengths.values()) if isinstance(lengths, dict) else [lengths]
    batch = batch_of(workload, range(len(workload.train_data)))
    padded = batch.values() if isinstance(batch, dict) else [batch]
    assert [leaf.shape[1] for leaf in padded] == [max(column) for column in columns]
    assert workload.token_budget.max_tokens == workload.micro_batch_size * sum(map(max, columns))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["language-model on paragraphs", "translation"])
def test_texts_are_accumulated_under_their_token_budget(workload, name):
    workload = workload(name)
    torch.manual_seed(0)
    model = workload.make_model().double()
    rows = rows_of(workload)
    expected = gradient(workload, model, [rows])
    budget = replace(workload.token_budget, max_tokens=workload.token_budget.max_tokens // 4)
    accumulator = workload.make_accumulator(model, batching=budget)
    result = accumulator.backward([workload.train_data[row] for row in rows])
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert relative_error(found, expected) < 1e-12 and result.num_micro_batches > 2
    scores = workload.evaluate(model)
    assert 0 <= scores["accuracy"] <= 1 and scores["loss"] > 0


def test_what_a_decoder_says_of_a_word_does_not_depend_on_what_comes_after_it(workload):
    model = workload("language-model").make_model()
    tokens = torch.randint(1, 100, (2, 9))
    torch.testing.assert_close(model(tokens)[:, :4], model(tokens[:, :4]))


def test_texts_that_cannot_be_had_say_why(small_data, tmp_path):
    with pytest.raises(DataError, match=r"expected a file train.txt or wiki.train.tokens or .*, found an empty folder"):
        load("language-model", tmp_path)
    (tmp_path / "test.txt").write_text(" = Heading = \n \n")
    (tmp_path / "valid.txt").write_text("One paragraph .\n")
    with pytest.raises(DataError, match=r"expected paragraphs of WikiText in test\.txt, one per line, found none"):
        load("language-model", tmp_path)


@pytest.mark.parametrize("name", ["translation", "matching"])
def test_pairs_that_cannot_be_had_say_why(tmp_path, name):
    with pytest.raises(
        DataError, match=r"Multi30k, .* Download .*train\.en\.gz.* from https://github.com/.*--data DIR"
    ):
        load(name)
    with pytest.raises(DataError, match="expected a folder with data files, found nothing"):
        load(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected a file train\.(..)\.gz or train\.\1, found an empty folder"):
        load(name, tmp_path)
    (tmp_path / "train.en").write_text("one\n")
    (tmp_path / "train.de.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"train\.de\.gz is corrupt: expected a gzip file"):
        load(name, tmp_path)
    (tmp_path / "train.de.gz").unlink()
    (tmp_path / "train.de").write_text("eins\nzwei\n")
    with pytest.raises(DataError, match=r"a line for each pair, found (2 and 1|1 and 2) lines"):
        load(name, tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_a_workload_has_the_name_and_description_of_its_line(workload, name):
    workload, spec = workload(name), name.partition(" on ")[0]
    assert workload.name == spec
    assert workload.description == BUILT_IN[spec].text


USERS_FILE = """
from __future__ import annotations

import gradfold
import torch
from dataclasses import dataclass
from helper_of_mine import ROWS

@dataclass
class Settings:
    rows: int = ROWS

def tiny():
    x = torch.randn(Settings().rows, 3)
    return gradfold.Workload(
        name="tiny", description="mine", make_model=lambda: torch.nn.Linear(3, 1),
        loss_fn=lambda model, x: model(x).square().mean(),
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        train_data=x, global_batch_size=4, micro_batch_size=2)

def with_data(data):
    workload = tiny()
    workload.facts["data"] = str(data)
    return workload

def not_a_workload():
    return 3

def two_arguments(first, second):
    return tiny()

def failing():
    return [][1]

def without_its_data(data=None):
    raise gradfold.DataError("no such file")

number = 5
"""


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(USERS_FILE)
    (tmp_path / "helper_of_mine.py").write_text("ROWS = 7\n")
    (tmp_path / "broken.py").write_text("import torch\nimport no_such_package\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in list(sys.modules):
        if name in ("mine", "helper_of_mine") or name.startswith("gradfold_workload_"):
            del sys.modules[name]


@pytest.mark.parametrize("spec", ["mine:tiny", "mine.py:tiny", "{folder}/mine.py:tiny", "./mine.py:with_data"])
def test_a_workload_of_a_user(users_folder, spec):
    workload = load(spec.format(folder=users_folder))
    assert isinstance(workload, Workload)
    assert workload.train_data.shape == (7, 3)


def test_a_workload_of_a_user_gets_the_data(users_folder):
    assert load("mine.py:with_data", users_folder).facts["data"] == str(users_folder)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "minst",
            r"no workload 'minst'. Did you mean 'mnist'\? Built in: digits, .*, matching. Write .*module:callable",
        ),
        ("xyzzy", "no workload 'xyzzy'. Built in: digits"),
        ("", "no workload ''"),
        ("mine.py", "which callable in it\\? Write mine.py:callable"),
        ("mine:", "no workload 'mine:'"),
        (":tiny", "no workload ':tiny'"),
        ("absent.py:tiny", "there is no file absent.py"),
        ("absent:tiny", "cannot import absent: ModuleNotFoundError: No module named 'absent'. Write the name"),
        ("broken.py:tiny", r"cannot import broken.py: .* 'no_such_package' \(.*broken.py, line 2\)"),
        ("mine.py:number", "expected 'number' in mine.py to be a callable .*, found a int"),
        ("mine.py:absent", "found no such name"),
        ("mine.py:not_a_workload", r"expected not_a_workload\(\) to return a gradfold.Workload, it returned a int"),
        ("mine.py:two_arguments", "takes nothing or an argument `data`: missing a required argument: 'first'"),
        ("mine.py:failing", r"cannot be built: IndexError: list index out of range \(.*mine.py, line 33\)"),
    ],
)
def test_a_workload_that_cannot_be_had_says_why(users_folder, spec, message):
    with pytest.raises(WorkloadError, match=message):
        load(spec)


def test_errors_of_the_data_pass_as_they_are(users_folder):
    with pytest.raises(DataError, match="no such file"):
        load("mine.py:without_its_data")


@pytest.mark.parametrize("spec", ["linear", "mine.py:tiny"])
def test_data_that_would_not_be_read_are_refused(users_folder, spec):
    with pytest.raises(WorkloadError, match=f"{spec} takes no data, but was given .*: leave out --data"):
        load(spec, users_folder)


def test_a_file_may_have_the_name_of_an_installed_package(users_folder):
    (users_folder / "torch.py").write_text(USERS_FILE)
    assert load("torch.py:tiny").name == "tiny"
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize(
    ("name", "package"), [("digits", "sklearn.datasets"), ("mnist", "pooch"), ("cifar10", "pooch")]
)
def test_a_missing_extra_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WorkloadError, match=r'not installed .*: pip install "gradfold\[cli\]"'):
        load(name)


@pytest.mark.slow
def test_without_the_extras_everything_imports_and_the_rest_is_built():
    program = """
        import sys
        sys.modules.update(dict.fromkeys(["numpy", "sklearn", "pooch", "scipy"]))
        from gradfold.workloads import BUILT_IN, load
        assert len(BUILT_IN) == 10
        assert load("linear").name == "linear"
        assert load("encoder").name == "encoder"
        assert load("language-model").name == "language-model"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
