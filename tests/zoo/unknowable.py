"""Set-ups that the self-check cannot decide: it warns, or is silent where there is nothing to see."""

from __future__ import annotations

import functools
import random

import numpy as np
import torch
import torch.nn.functional as F

from zoo.case import Case, case, classes, net, setup, tagger, tokens
from zoo.right import cross_entropy, token_cross_entropy

UNKNOWABLE: list[Case] = []
warns = functools.partial(case, UNKNOWABLE, guard="warns", proof=False, in_verify=False)
undecided = functools.partial(case, UNKNOWABLE, guard="undecided", in_verify=False)


@warns(
    "mixup with `torch.randperm` partners",
    says="randperm",
    why="A permutation of 8 rows is not made of one of 2 and one of 6. Partners come from the micro-batch, not from "
    "the batch: another distribution, and often a harmless one.",
    remedy="Mix in the loader, or accept the warning",
)
def mixup_permuted():
    def loss_fn(model, batch):
        order = torch.randperm(len(batch[0]))
        logits = model(0.7 * batch[0] + 0.3 * batch[0][order])
        return 0.7 * F.cross_entropy(logits, batch[1]) + 0.3 * F.cross_entropy(logits, batch[1][order])

    return setup(net(), loss_fn, classes())


@warns(
    "actions sampled with `torch.multinomial`",
    says="multinomial",
    why="How many numbers it draws per row is its own business, so its draws cannot be given to the rows again.",
    remedy="Nothing, if each row samples for itself; or sample before the split",
)
def sampled_actions():
    def loss_fn(model, batch):
        scores = F.log_softmax(model(batch[0]), 1)
        actions = torch.multinomial(scores.detach().exp(), 1)
        rewards = (actions[:, 0] == batch[1]).to(scores)
        return -(scores.gather(1, actions)[:, 0] * (rewards - 0.3)).mean()

    return setup(net(), loss_fn, classes())


@warns(
    "noise drawn with numpy",
    why="numpy's random state is not torch's: two runs over the same rows differ.",
    remedy="Draw with torch, or in the loader",
)
def numpy_noise():
    def loss_fn(model, batch):
        noise = torch.from_numpy(np.random.standard_normal(batch[0].shape)).to(batch[0])
        return cross_entropy(model, (batch[0] + noise, batch[1]))

    return setup(net(), loss_fn, classes())


@warns(
    "a factor drawn with Python's `random`",
    why="Python's random state is not torch's: two runs over the same rows differ.",
    remedy="Draw with torch, or in the loader",
)
def python_noise():
    return setup(net(), lambda model, batch: cross_entropy(model, (batch[0] * random.random(), batch[1])), classes())


class Annealed:
    """A loss that counts its own calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        return cross_entropy(model, batch) * min(1.0, self.calls / 50)


@warns(
    "a factor that grows with every call of the loss",
    why="A counter in Python, which goes up once per micro-batch: two runs over the same rows differ.",
    remedy="Count updates, outside of `loss_fn`",
)
def annealed():
    return setup(net(), Annealed(), classes())


@undecided(
    "all rows are the same",
    why="Every part has the same gradient, so every weighting gives it. Looked at again in later windows.",
    remedy="Nothing",
)
def same_rows():
    x, y = classes()
    return setup(net(), cross_entropy, (x[:1].expand(16, 4).clone(), y[:1].expand(16).clone()))


@undecided(
    "a loss without any slope",
    why="A hinge that every row has passed: all gradients are 0. Looked at again in later windows.",
    remedy="Nothing",
)
def no_slope():
    return setup(net(), lambda model, batch: F.relu(model(batch[0]) - 100).mean(), classes())


@undecided(
    "mean over tokens, as many in each row of the first micro-batch",
    why="Weighted by samples, which is right in the first micro-batch and wrong in the batch.",
    remedy='`weight=gradfold.token_count("labels")`, and batches of unequal lengths when you try it out',
)
def equal_counts():
    batch = tokens()
    batch["labels"][:8] = torch.randint(1, 5, (8, 8))
    return setup(tagger(), token_cross_entropy, batch)
