"""Two-phase losses: the gradient of one graph over the whole batch, whatever couples its rows."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import two_phase_cases as cases
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from two_phase_cases import CASES, SIZE, numbers

import gradfold
from gradfold.twophase.statistics import Statistics

info_nce = gradfold.losses.info_nce
IDS = [case.name for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("size", [1, SIZE, 16, 32, None])
def test_the_gradient_is_that_of_one_graph_over_all_rows(case, size):
    assert relative_error(cases.two_phase(case, size), cases.reference(case, size)) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_plain_accumulation_is_wrong_so_that_the_test_above_can_fail(case):
    assert cases.plain_error(case) > 0.01


def test_the_page_has_the_table_of_the_tests():
    page = cases.PAGE.read_text()
    assert page == cases.with_table(page), "run: PYTHONPATH=tests .venv/bin/python -m two_phase_cases"


def towers(**layers):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": cases.net(6, 4), "b": cases.net(6, 4), **layers}).double()
    model.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    return model


def embed(model, batch):
    return {"pair": (model["a"](batch["x"]), model["b"](batch["y"])), "label": batch["label"]}


def match(model, statistics):
    loss = info_nce(*statistics["pair"], temperature=(-model.log_scale).exp(), tile=7)
    return loss, {"label": statistics["label"], "scale": model.log_scale.detach()}


def pairs(num_rows=33):
    return {"x": numbers(num_rows, 6), "y": numbers(num_rows, 6, seed=2), "label": torch.arange(num_rows)}


LOSS = gradfold.TwoPhaseLoss(embed, match)


def whole(model, batch, loss_fn=LOSS):
    """The whole batch in plain torch, on a copy: its gradient and its loss."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss = cases.total(loss_fn(model, batch))
    loss.backward()
    return gradients(model), loss.detach()


def test_loss_and_metrics_are_those_of_the_whole_batch():
    model, batch = towers(), pairs()
    result = gradfold.Accumulator(model, LOSS, micro_batch_size=5).backward(batch)
    expected, loss = whole(model, batch)
    assert relative_error(gradients(model), expected) < 1e-12
    torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=0)
    assert torch.equal(result.metrics["label"], torch.arange(33))
    assert result.metrics["scale"] == pytest.approx(1.5)
    assert (result.num_micro_batches, result.num_samples, result.weight) == (7, 33, 33.0)


def test_parameters_of_the_loss_alone_get_their_gradient_once():
    model = towers()
    gradfold.Accumulator(model, LOSS, micro_batch_size=5).backward(pairs())
    torch.testing.assert_close(model.log_scale.grad, whole(model, pairs())[0]["log_scale"], rtol=1e-12, atol=0)


def test_parameters_of_both_phases_and_frozen_ones():
    model = towers()
    model["a"][0].weight.requires_grad_(False)

    def loss(model, statistics):
        decay = model["b"][0].weight.square().sum()
        return {"match": match(model, statistics)[0], "decay": 0.1 * decay}

    loss_fn = gradfold.TwoPhaseLoss(embed, loss)
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=5).backward(pairs())
    expected, total = whole(model, pairs(), loss_fn)
    assert relative_error(gradients(model), expected) < 1e-12
    torch.testing.assert_close(result.loss, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.metrics["decay"], 0.1 * model["b"][0].weight.square().sum(), rtol=1e-12, atol=0)


def test_only_the_loss_may_be_trained():
    model = towers()
    for tower in ("a", "b"):
        model[tower].requires_grad_(False)
    accumulator = gradfold.Accumulator(model, LOSS, micro_batch_size=5)
    accumulator.backward(pairs())
    torch.testing.assert_close(model.log_scale.grad, whole(model, pairs())[0]["log_scale"], rtol=1e-12, atol=0)


def test_gradients_found_are_added_to():
    model = towers()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradfold.Accumulator(model, LOSS, micro_batch_size=5).backward(pairs())
    expected = {name: one + 1 for name, one in whole(model, pairs())[0].items()}
    assert relative_error(gradients(model), expected) < 1e-12


@dataclass
class Views:
    first: torch.Tensor
    rest: list


@pytest.mark.parametrize("combine", ["concatenate", "sum"])
def test_any_nesting_and_every_dtype(combine):
    model, rows = towers(), cut_or_whole(combine)

    def statistic(model, batch):
        z = model["a"](batch["x"])
        half = rows(z).to(torch.bfloat16)
        return Views(rows(z), [{"half": half, "count": rows(batch["label"]), "none": None}, "text", rows(z.float())])

    def loss(model, views):
        inside = views.rest[0]
        assert views.rest[1] == "text" and inside["none"] is None and not inside["count"].is_floating_point()
        weights = inside["count"].double().softmax(0).sum()
        return views.first.square().mean().sqrt() * weights + 1e-3 * inside["half"].float().mean()

    loss_fn = gradfold.TwoPhaseLoss(statistic, loss, combine=combine)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False)
    accumulator.backward(pairs())
    assert relative_error(gradients(model), whole(model, pairs(), loss_fn)[0]) < 1e-4  # of bfloat16


def cut_or_whole(combine):
    return (lambda z: z) if combine == "concatenate" else (lambda z: z.sum(0))


def test_numbers_are_added_in_sums_and_must_agree_beside_rows():
    model = towers()
    seen = []

    def loss(model, statistics):
        seen.append(statistics["rows"])
        return statistics["z"].square().mean()

    for combine, rows in (("sum", 33), ("concatenate", None)):
        loss_fn = gradfold.TwoPhaseLoss(
            lambda model, batch: {"z": model["a"](batch["x"]).sum(0), "rows": len(batch["x"])}, loss, combine=combine
        )
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False)
        if rows is None:
            with (
                pytest.warns(RuntimeWarning, match="which is the number of rows"),
                pytest.raises(gradfold.LossError, match=r"\['rows'\] is 5 in one micro-batch and 3 in another"),
            ):
                accumulator.backward(pairs())
        else:
            accumulator.backward(pairs())
            assert seen == [rows]


def test_token_statistics_have_as_many_rows_as_they_like():
    model = towers()

    def statistic(model, batch):
        return model["a"](batch["x"][batch["label"] % 3 == 0])

    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, z: z.T.cov().square().sum())
    gradfold.Accumulator(model, loss_fn, micro_batch_size=5).backward(pairs())
    assert relative_error(gradients(model), whole(model, pairs(), loss_fn)[0]) < 1e-12


def test_windows_of_a_loader_and_samples_to_collate():
    model = towers()
    parts = [{key: value[start : start + 8] for key, value in pairs().items()} for start in range(0, 33, 8)]
    (window,) = gradfold.windows(parts, 5)
    gradfold.Accumulator(model, LOSS).backward(window)
    assert relative_error(gradients(model), whole(model, pairs())[0]) < 1e-12
    model.zero_grad()
    samples = [{key: value[row] for key, value in pairs().items()} for row in range(33)]
    collate = torch.utils.data.default_collate
    gradfold.Accumulator(model, LOSS, micro_batch_size=5, collate=collate).backward(samples)
    assert relative_error(gradients(model), whole(model, pairs())[0]) < 1e-12


def test_training_ends_where_full_batches_end():
    model = towers()
    plain = copy.deepcopy(model)
    step = gradfold.TrainStep(
        gradfold.Accumulator(model, LOSS, micro_batch_size=5),
        torch.optim.Adam(model.parameters(), 0.01),
        max_grad_norm=0.5,
    )
    optimizer = torch.optim.Adam(plain.parameters(), 0.01)
    for _ in range(3):
        step(pairs())
        optimizer.zero_grad()
        LOSS(plain, pairs())[0].backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_backward_of_a_framework_is_called():
    model, calls = towers(), []

    def backward(loss, *, gradient):
        calls.append(loss.dim())
        loss.backward(gradient=gradient)

    gradfold.Accumulator(model, LOSS, micro_batch_size=5, backward=backward, self_check=False).backward(pairs())
    assert relative_error(gradients(model), whole(model, pairs())[0]) < 1e-12
    assert len(calls) == 1 + 1 + 7 and set(calls) == {0}  # the probe, the loss, the recompute pass


# --- what forward passes change


def test_batch_norm_by_micro_batch_advances_its_statistics_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    plain = copy.deepcopy(model)
    one_phase = copy.deepcopy(model)
    loss_fn = gradfold.TwoPhaseLoss(lambda model, batch: model(batch[0]), lambda model, z: z.T.cov().square().sum())
    batch = (numbers(33, 6) + 1e3,)
    with pytest.raises(gradfold.BatchNormError):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=5).backward(batch)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=5, batch_norm="per_micro_batch").backward(batch)
    gradfold.Accumulator(
        one_phase, lambda model, batch: model(batch[0]).mean(), micro_batch_size=5, batch_norm="per_micro_batch"
    ).backward(batch)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(one_phase.named_buffers())[name], rtol=1e-12, atol=0)
    assert model[1].num_batches_tracked == 1
    z = torch.cat([plain(rows) for rows in batch[0].split([5, 5, 5, 5, 5, 4, 4])])
    z.T.cov().square().sum().backward()
    assert relative_error(gradients(model), gradients(plain)) < 1e-10


@pytest.mark.parametrize("fails", [False, True], ids=["as given", "out of memory"])
def test_a_micro_batch_of_one_row_is_refused_by_name_where_batch_norm_has_no_variance(fails):
    """The first pass ended in torch's ValueError."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()

    def statistic(model, x):
        if fails and len(x) > 1:
            raise torch.OutOfMemoryError("none left")
        return model(x)

    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, z: torch.pdist(z).exp().mean())
    options = {"micro_batch_size": 2, "batch_norm": "per_micro_batch", "self_check": False}
    kind = gradfold.DoesNotFitError if fails else gradfold.BatchNormError
    before = model[1].running_mean.clone()
    with pytest.raises(kind, match=r"BatchNorm in 1 got one value per channel.* a micro-batch of one row"):
        gradfold.Accumulator(model, loss_fn, **options).backward(torch.randn(4 if fails else 5, 3).double())
    assert torch.equal(model[1].running_mean, before) and not gradients(model)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


class Stateful(nn.Module):
    """Moves a buffer, a number and a list in every forward pass, and reads none of them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("ema", torch.zeros(()))
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.ema.mul_(0.5).add_(x.mean().detach())
        self.calls += 1
        self.seen.append(len(x))
        self.cached = self.linear.weight * 1  # under no_grad it would have no graph for the recompute pass
        return self.linear(x)


def test_buffers_and_attributes_move_once():
    torch.manual_seed(0)
    model = Stateful().double()
    plain = copy.deepcopy(model)
    for rows in pairs()["x"].split([5, 5, 5, 5, 5, 5, 3]):
        plain(rows)
    loss_fn = gradfold.TwoPhaseLoss(lambda model, batch: model(batch["x"]), lambda model, z: z.T.cov().square().sum())
    gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False).backward(pairs())
    assert torch.equal(model.ema, plain.ema)
    assert (model.calls, model.seen) == (7, [5, 5, 5, 5, 5, 5, 3])


def test_random_states_of_torch_numpy_and_python_come_again_and_move_once():
    numpy = pytest.importorskip("numpy")
    model = towers(drop=nn.Dropout(0.3))

    def statistic(model, batch):
        noise = random.random() + numpy.random.rand()
        return model["drop"](model["a"](model["drop"](batch["x"]))) + noise, model["b"](batch["y"])

    def loss(model, pair):
        return info_nce(*pair, temperature=0.3 + 0.1 * torch.rand(()).item(), tile=8)

    loss_fn = gradfold.TwoPhaseLoss(statistic, loss)

    def seed():
        torch.manual_seed(3), numpy.random.seed(3), random.seed(3)

    seed()
    gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False).backward(pairs())
    after = torch.rand(1), numpy.random.rand(), random.random()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    seed()
    parts = zip(*[value.split([5, 5, 5, 5, 5, 5, 3]) for value in pairs().values()], strict=True)
    found = [statistic(plain, dict(zip(pairs(), part, strict=True))) for part in parts]
    loss(plain, [torch.cat(column) for column in zip(*found, strict=True)]).backward()
    assert relative_error(gradients(model), gradients(plain)) < 1e-12
    assert after == (torch.rand(1), numpy.random.rand(), random.random())


def test_statistics_that_do_not_come_again_are_refused_by_micro_batch():
    model, generator = towers(), torch.Generator().manual_seed(0)

    def statistic(model, batch):
        noise = 0.1 * torch.rand(len(batch["x"]), 4, generator=generator, dtype=torch.float64)
        return embed(model, batch) | {"extra": model["a"](batch["x"]) + (noise if 10 in batch["label"] else 0)}

    accumulator = gradfold.Accumulator(
        model, gradfold.TwoPhaseLoss(statistic, match), micro_batch_size=5, self_check=False
    )
    with pytest.raises(gradfold.RecomputeError, match=r"micro-batch 2 of 7 \(rows 10 to 14\) differ by .*%") as e:
        accumulator.backward(pairs())
    assert e.value.micro_batch == 2 and 0.001 < e.value.deviation < 1
    assert not gradients(model)


@pytest.mark.parametrize("combine", ["concatenate", "sum"])
def test_other_labels_and_sums_that_do_not_come_again_are_refused(combine):
    model, count = towers(), iter(range(100))
    rows = cut_or_whole(combine)

    def statistic(model, batch):
        return rows(model["a"](batch["x"])), rows(batch["label"] + next(count))

    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, s: s[0].square().mean(), combine=combine)
    with pytest.raises(gradfold.RecomputeError, match=r"micro-batch .* differ by inf%"):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False).backward(pairs())


def test_a_batch_that_is_changed_in_place_is_refused():
    model = towers()

    def statistic(model, batch):
        batch["x"].mul_(2)
        return embed(model, batch)

    with pytest.raises(gradfold.BatchError, match=r"has changed micro-batch 0 .* in place"):
        gradfold.Accumulator(
            model, gradfold.TwoPhaseLoss(statistic, match), micro_batch_size=5, self_check=False
        ).backward(pairs())


def test_the_embed_pass_keeps_no_activations():
    statistics = Statistics("concatenate")
    hidden = torch.randn(4, 1000, 8)
    statistics.add(0, {"first": hidden[:, 0], "all": torch.ones(4)}, 4)
    first, _ = statistics._parts[0].values()
    assert first.untyped_storage().nbytes() == 4 * 8 * 4


def test_activations_of_one_micro_batch_are_alive_at_a_time():
    """Counted as graphs that are alive when a forward pass begins."""
    model, alive, most = towers(), set(), []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = object.__new__(Mark)
            alive.add(id(ctx.mark))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Mark:
        def __del__(self):
            alive.discard(id(self))

    def statistic(model, batch):
        most.append(len(alive))
        return {**embed(model, batch), "pair": tuple(map(Marked.apply, embed(model, batch)["pair"]))}

    loss_fn = gradfold.TwoPhaseLoss(statistic, match)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=3, self_check=False).backward(pairs())
    assert len(most) == 22 and max(most) <= 2  # the two towers of the one before


@pytest.mark.slow
def test_compiled_and_checkpointed_models():
    from torch.utils.checkpoint import checkpoint

    expected, _ = whole(towers(), pairs())
    model = towers()
    torch._dynamo.reset()
    for tower in ("a", "b"):
        model[tower] = torch.compile(model[tower], backend="aot_eager")
    gradfold.Accumulator(model, LOSS, micro_batch_size=5).backward(pairs())
    found = {name.replace("_orig_mod.", ""): one for name, one in gradients(model).items()}
    assert relative_error(found, expected) < 1e-12
    for use_reentrant in (False, True):
        model = towers()

        def statistic(model, batch, use_reentrant=use_reentrant):
            x = batch["x"].clone().requires_grad_(torch.is_grad_enabled())
            first = checkpoint(model["a"], x, use_reentrant=use_reentrant) if torch.is_grad_enabled() else model["a"](x)
            return {"pair": (first, model["b"](batch["y"])), "label": batch["label"]}

        loss_fn = gradfold.TwoPhaseLoss(statistic, match)
        gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False).backward(pairs())
        assert relative_error(gradients(model), expected) < 1e-12


def test_a_batch_whose_rows_cannot_be_counted_is_warned_of():
    class Graph:
        def __init__(self, batch):
            self.batch = batch

        def to(self, device):
            return self

    samples = [{key: value[row] for key, value in pairs(12).items()} for row in range(12)]
    loss_fn = gradfold.TwoPhaseLoss(lambda model, graph: embed(model, graph.batch), match)

    def collate(samples):
        return Graph(torch.utils.data.default_collate(samples))

    model = towers()
    accumulator = gradfold.Accumulator(
        model, loss_fn, micro_batch_size=5, collate=collate, weight="samples", self_check=False
    )
    accumulator.backward(samples)
    assert relative_error(gradients(model), whole(model, pairs(12))[0]) < 1e-12
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5, collate=collate)
    with pytest.warns(RuntimeWarning, match="cannot know"):
        accumulator.backward(samples)


# --- memory that runs out


def failing(limit, when):
    def statistic(model, batch):
        if len(batch["x"]) > limit and torch.is_grad_enabled() == when:
            raise torch.OutOfMemoryError("too many rows")
        return embed(model, batch)

    return gradfold.TwoPhaseLoss(statistic, match)


@pytest.mark.parametrize("when", [False, True], ids=["in the embed pass", "in the recompute pass"])
@pytest.mark.parametrize("size", [None, 16])
def test_memory_that_runs_out_is_survived(when, size):
    model = towers()
    loss_fn = failing(5, when)
    if size is None and not when:  # a whole batch has no embed pass
        return
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(pairs())
    assert relative_error(gradients(model), whole(model, pairs())[0]) < 1e-12
    assert result.recoveries and result.recoveries[-1].micro_batch_size <= 5
    torch.testing.assert_close(result.metrics["label"], torch.arange(33))


def test_memory_that_runs_out_in_the_loss_is_named():
    model = towers()

    def loss(model, statistics):
        raise torch.OutOfMemoryError("all pairs")

    accumulator = gradfold.Accumulator(model, gradfold.TwoPhaseLoss(embed, loss), micro_batch_size=5)
    with pytest.raises(gradfold.DoesNotFitError, match=r"in loss\(model, statistics\).*info_nce.*all pairs"):
        accumulator.backward(pairs())
    assert not gradients(model)


def test_a_failure_in_the_middle_leaves_everything_as_it_was():
    torch.manual_seed(0)
    model = Stateful().double()

    def statistic(model, batch):
        if torch.is_grad_enabled() and 20 in batch["label"]:
            raise KeyboardInterrupt
        return model(batch["x"])

    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, z: z.T.cov().square().sum())
    random_state = torch.get_rng_state()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False)
    with pytest.raises(KeyboardInterrupt):
        accumulator.backward(pairs())
    assert not gradients(model) and float(model.ema) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    model.zero_grad()
    model.cached = None
    again = gradfold.TwoPhaseLoss(lambda model, batch: model(batch["x"]), loss_fn.loss)
    gradfold.Accumulator(model, again, micro_batch_size=5, self_check=False).backward(pairs())
    model.cached = None  # a result with a graph, which cannot be copied
    assert relative_error(gradients(model), whole(model, pairs(), again)[0]) < 1e-12


# --- precision


def test_under_bfloat16_autocast_the_gradient_is_that_of_the_whole_batch():
    model = towers().float()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in pairs().items()}
    gradfold.Accumulator(model, LOSS, micro_batch_size=5, precision="bf16").backward(batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = whole(model, batch)
    assert relative_error(gradients(model), expected) < 0.02
    assert relative_error(expected, whole(model, batch)[0]) > 0


def test_autocast_around_the_whole_step_keeps_no_casts_without_a_graph():
    """Casts that the embed pass made would cut the recompute pass off from the parameters; torch keeps none."""
    model = towers().float()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in pairs().items()}
    with torch.autocast("cpu", torch.bfloat16):
        gradfold.Accumulator(model, LOSS, micro_batch_size=5, self_check=False).backward(batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = whole(model, batch)
    assert relative_error(gradients(model), expected) < 0.02


def test_a_loss_scaler_scales_what_arrives_at_the_statistics_once():
    model = towers()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    precision = gradfold.Precision(grad_scaler=scaler)
    accumulator = gradfold.Accumulator(model, LOSS, micro_batch_size=5, precision=precision)
    accumulator.backward(pairs())
    expected = {name: one * 2.0**12 for name, one in whole(model, pairs())[0].items()}
    assert relative_error(gradients(model), expected) < 1e-12


def test_gradients_too_small_for_float16_survive_by_the_scale():
    """Scaled after the statistics they would be 0: the seed of the loss has to carry the scale."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    batch = numbers(33, 6).float()
    loss_fn = gradfold.TwoPhaseLoss(
        lambda model, batch: model(batch).half(), lambda model, z: 1e-7 * z.float().square().mean()
    )
    precision = gradfold.Precision(grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**14))
    gradfold.Accumulator(model, loss_fn, micro_batch_size=5, precision=precision, self_check=False).backward(batch)
    plain = copy.deepcopy(model)
    plain.zero_grad()
    (1e-7 * plain(batch).square().mean()).backward()
    expected = {name: one * 2.0**14 for name, one in gradients(plain).items()}
    assert relative_error(gradients(model), expected) < 0.01


# --- what is not finite


def test_statistics_that_are_not_finite_are_named():
    model, batch = towers(), pairs()
    batch["x"][21] = torch.inf
    accumulator = gradfold.Accumulator(model, LOSS, micro_batch_size=5, self_check=False)
    with pytest.raises(gradfold.NonFiniteLossError, match=r"statistics of micro-batch 4 of 7 \(rows 20 to 24\)") as e:
        accumulator.backward(batch)
    assert e.value.micro_batch == 4
    assert not gradients(model)
    result = gradfold.Accumulator(
        model, LOSS, micro_batch_size=5, on_non_finite="skip_update", self_check=False
    ).backward(batch)
    assert result.is_skipped and not gradients(model)


def test_a_loss_or_gradient_that_is_not_finite_though_statistics_are_is_named():
    model = towers()
    for loss, message in (
        (lambda model, s: (s["pair"][0].sum() * 0).log(), r"statistics of this rank are finite"),
        (lambda model, s: (s["pair"][0].sum() * 0).abs().sqrt(), r"with respect to the statistics is not"),
    ):
        accumulator = gradfold.Accumulator(
            model, gradfold.TwoPhaseLoss(embed, loss), micro_batch_size=5, self_check=False
        )
        with pytest.raises((gradfold.NonFiniteLossError, gradfold.NonFiniteGradientError), match=message):
            accumulator.backward(pairs())
        assert not gradients(model)


def test_a_gradient_that_is_not_finite_in_one_micro_batch_is_named():
    model = towers()

    def statistic(model, batch):
        z = model["a"](batch["x"])
        return z + (z * 0).abs().sqrt() if 12 in batch["label"] else z

    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, z: z.T.cov().square().sum())
    with pytest.raises(gradfold.NonFiniteGradientError, match=r"micro-batch 2 of 7 \(rows 10 to 14\)"):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False).backward(pairs())


# --- the guard, and proofs


def test_verify_proves_it_and_names_it_where_it_is_missing():
    model = towers(drop=nn.Dropout(0.2))

    def statistic(model, batch):
        return embed(model, {**batch, "x": model["drop"](batch["x"])})

    loss_fn = gradfold.TwoPhaseLoss(statistic, match)
    verdict = gradfold.verify(gradfold.Accumulator(model, loss_fn, micro_batch_size=5), pairs())
    assert verdict.ok and verdict.max_relative_error < 1e-12, str(verdict)

    def one_phase(model, batch):
        return loss_fn(model, batch)

    verdict = gradfold.verify(gradfold.Accumulator(model, one_phase, micro_batch_size=5), pairs())
    assert not verdict.ok and verdict.causes[0].name == "coupled"
    assert "loss_fn = gradfold.TwoPhaseLoss(statistic, loss)" in " ".join(str(verdict).split())
    accumulator = gradfold.Accumulator(model, one_phase, micro_batch_size=5)
    with pytest.raises(gradfold.NotDecomposableError, match=r"loss_fn = gradfold\.TwoPhaseLoss\(statistic, loss\)"):
        accumulator.backward(pairs())


@pytest.mark.parametrize(
    "statistic",
    [
        lambda model, batch: model["a"](batch["x"]) - model["a"](batch["x"]).mean(0),
        lambda model, batch: F.normalize(model["a"](batch["x"]), dim=0),
        lambda model, batch: F.batch_norm(model["a"](batch["x"]), None, None, training=True),
        lambda model, batch: model["a"](batch["x"]).flip(0).cumsum(0),
    ],
    ids=["centered", "scaled", "batch norm", "cumulated"],
)
def test_rows_that_depend_on_others_in_the_statistic_are_refused(statistic):
    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, z: z.T.cov().square().sum())
    accumulator = gradfold.Accumulator(towers(), loss_fn, micro_batch_size=9)
    with pytest.raises(gradfold.NotDecomposableError, match=r"a row must not depend on others in statistic"):
        accumulator.backward(pairs())
    verdict = gradfold.verify(accumulator, pairs())
    assert not verdict.ok and "must not depend on others" in " ".join(str(verdict).split())


def test_means_in_the_place_of_sums_are_refused():
    loss_fn = gradfold.TwoPhaseLoss(
        lambda model, batch: model["a"](batch["x"]).mean(0), lambda model, mean: mean.square().sum(), combine="sum"
    )
    with pytest.raises(gradfold.NotDecomposableError, match=r"must return sums over rows, not means"):
        gradfold.Accumulator(towers(), loss_fn, micro_batch_size=9).backward(pairs())


def test_the_guard_looks_once_and_leaves_no_trace():
    calls = []

    def statistic(model, batch):
        calls.append(len(batch["x"]))
        return embed(model, batch)

    accumulator = gradfold.Accumulator(towers(), gradfold.TwoPhaseLoss(statistic, match), micro_batch_size=5)
    accumulator.backward(pairs())
    first = len(calls)
    accumulator.backward(pairs())
    assert first > 14 and len(calls) - first == 14


# --- errors


def test_options_are_checked():
    with pytest.raises(gradfold.OptionError, match=r"combine='mean'; expected \"concatenate\""):
        gradfold.TwoPhaseLoss(embed, match, combine="mean")
    with pytest.raises(gradfold.OptionError, match="statistic is a str"):
        gradfold.TwoPhaseLoss("embed", match)
    for options, message in (
        ({"weight": gradfold.token_count("label")}, "weight= is not supported with a TwoPhaseLoss"),
        ({"on_non_finite": "skip_micro_batch"}, "skip_update"),
    ):
        with pytest.raises(gradfold.OptionError, match=message):
            gradfold.Accumulator(towers(), LOSS, **options)


@pytest.mark.parametrize(
    ("statistic", "combine", "message"),
    [
        (lambda m, b: m["a"](b["x"]).sum(), "concatenate", r"S is a 0-d tensor.*combine=\"sum\""),
        (lambda m, b: m["a"](b["x"]), "sum", r"S has shape \(3, 4\) in one micro-batch and \(5, 4\)"),
        (lambda m, b: (m["a"](b["x"]).sum(0), b["x"].sum(0) > 0), "sum", r"\[1\] is a bool tensor"),
        (lambda m, b: (m["a"](b["x"]), {1, 2}), "concatenate", r"\[1\] is a set"),
        (
            lambda m, b: m["a"](b["x"])[:, : len(b["x"])].reshape(len(b["x"]), -1, 1)[:, : len(b["x"]) - 2],
            "concatenate",
            r"S is \(3, 1, 1\) .* in micro-batch 6, and \(5, 3, 1\)",
        ),
        (
            lambda m, b: {"z": m["a"](b["x"]), **({"w": b["x"]} if 30 in b["label"] else {})},
            "concatenate",
            r"Return the same nesting",
        ),
        (lambda m, b: m["a"](b["x"]).to_sparse(), "concatenate", r"expected a dense one"),
    ],
)
def test_statistics_that_cannot_be_combined_are_refused(statistic, combine, message):
    model = towers()
    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, s: s.sum(), combine=combine)
    with pytest.raises(gradfold.LossError, match=message):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False).backward(pairs())
    assert not gradients(model)


def test_a_loss_that_reaches_nothing_is_refused():
    loss_fn = gradfold.TwoPhaseLoss(
        lambda model, batch: model["a"](batch["x"]).detach(), lambda model, z: z.square().mean()
    )
    with pytest.raises(gradfold.LossError, match="no statistic requires grad"):
        gradfold.Accumulator(towers(), loss_fn, micro_batch_size=5).backward(pairs())


def test_metrics_with_other_rows_are_refused():
    loss_fn = gradfold.TwoPhaseLoss(embed, lambda model, s: (match(model, s)[0], {"bad": torch.zeros(7)}))
    with pytest.raises(gradfold.LossError, match=r"'bad' has shape \(7,\) for a batch of 33 rows"):
        gradfold.Accumulator(towers(), loss_fn, micro_batch_size=5).backward(pairs())


# --- statistics that have no gradient


def test_statistics_without_a_gradient_get_none_in_the_loss():
    """They did: the derivative of sqrt at a label of 0 made a right loss not finite, nor could labels be written to."""
    model = towers()

    def statistic(model, batch):
        return model["a"](batch["x"])[:, 0], batch["label"].double()

    def loss(model, found):
        guesses, labels = found
        assert guesses.requires_grad and not labels.requires_grad
        labels.numpy()
        weights = labels.sqrt()
        labels -= labels.mean()
        return -(weights * labels * guesses).mean() / guesses.std()

    loss_fn = gradfold.TwoPhaseLoss(statistic, loss)
    batch = pairs()
    expected, _ = whole(model, batch, loss_fn)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=5).backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12


def test_statistics_that_have_a_gradient_in_some_micro_batches_are_found():
    """Once one is found, the window begins again, and no other does."""
    model, calls = towers(), []

    def statistic(model, batch):
        calls.append(len(batch["x"]))
        late = batch["label"] >= 20
        second = batch["y"].new_zeros(len(late), 4)
        if late.any():
            second = torch.where(late[:, None], model["b"](batch["y"]), second)
        return {"first": model["a"](batch["x"]), "second": second}

    def loss(model, found):
        return (found["first"].T @ found["second"]).square().mean()

    loss_fn = gradfold.TwoPhaseLoss(statistic, loss)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5, self_check=False)
    for num_runs in (4, 2):
        model.zero_grad()
        expected, _ = whole(model, pairs(), loss_fn)
        calls.clear()
        result = accumulator.backward(pairs())
        assert relative_error(gradients(model), expected) < 1e-12
        assert len(calls) == 7 * num_runs and not result.recoveries


def test_a_loss_of_what_has_a_gradient_in_later_micro_batches_alone():
    model = towers()

    def statistic(model, batch):
        return model["a"](batch["x"]) if batch["label"].min() >= 5 else model["a"](batch["x"]).detach()

    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, z: z.T.cov().square().sum())
    plain = copy.deepcopy(model)
    z = [model["a"](rows) for rows in pairs()["x"].split([5, 5, 5, 5, 5, 5, 3])]
    loss_fn.loss(model, torch.cat([z[0].detach(), *z[1:]])).backward()
    gradfold.Accumulator(plain, loss_fn, micro_batch_size=5, self_check=False).backward(pairs())
    assert relative_error(gradients(plain), gradients(model)) < 1e-12


def test_a_tower_that_is_trained_from_the_second_window_on():
    model = towers()
    model["b"].requires_grad_(False)
    accumulator = gradfold.Accumulator(model, LOSS, micro_batch_size=5)
    for _ in "ab":
        model.zero_grad()
        accumulator.backward(pairs())
        assert relative_error(gradients(model), whole(model, pairs())[0]) < 1e-12
        model["b"].requires_grad_(True)
    assert any(name.startswith("b.") for name in gradients(model))


def test_a_loss_that_is_cut_off_from_its_statistics_is_refused():
    loss_fn = gradfold.TwoPhaseLoss(embed, lambda model, found: found["pair"][0].detach().square().mean())
    with pytest.raises(gradfold.LossError, match="the loss does not require grad"):
        gradfold.Accumulator(towers(), loss_fn, micro_batch_size=5, self_check=False).backward(pairs())


@pytest.mark.parametrize("size", [1, 2, None])
@pytest.mark.parametrize("make", [lambda weight: weight[None], lambda weight: weight.view(1, -1).expand(1, 2)])
def test_a_statistic_that_reaches_its_parameter_through_views_alone(make, size):
    """Autograd may then make the memory of an incoming gradient the parameter's own, and add to it."""

    def statistic(model, batch):
        return (batch @ model.weight.T + make(model.bias)).sum(0)

    def loss(model, total):
        return (total - 1).square().sum()

    model, batch = nn.Linear(3, 2).double(), torch.randn(6, 3).double()
    expected = full_batch_gradient(model, lambda model: loss(model, statistic(model, batch)))
    two_phase = gradfold.TwoPhaseLoss(statistic, loss, combine="sum")
    gradfold.Accumulator(model, two_phase, micro_batch_size=size, self_check=False).backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12
