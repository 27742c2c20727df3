"""Set-ups whose accumulated gradient is not that of the batch, and what gives them away."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import gradfold
from zoo.case import Case, Module, case, classes, images, masks, net, pad, sentences, setup, tagger, tokens, two_views
from zoo.case import values as targets
from zoo.coupled import COUPLED, WHOLE
from zoo.right import (
    CLASS_WEIGHTS,
    box_loss,
    convolution,
    cross_entropy,
    focal_loss,
    importance,
    segmentation,
    token_cross_entropy,
    two_terms,
)

WRONG: list[Case] = []
weights = functools.partial(case, WRONG, guard="wrong", cause="weights")
sums = functools.partial(case, WRONG, guard="wrong", cause="sum")
means = functools.partial(case, WRONG, guard="wrong", cause="mean")
stateful = functools.partial(case, WRONG, guard="wrong", cause="state")
refused = functools.partial(case, WRONG, guard="refused")


def by_samples(made):
    """The same set-up, weighted by samples, which is wrong of it."""
    options = {name: value for name, value in made.options.items() if name != "weight"}
    return made._replace(options=options)


# --- Weighted by what the mean is not over

TOKENS = '`weight=gradfold.token_count("labels")`'


@weights(
    "mean over tokens, weighted by samples",
    says=r'token_count\("labels"\)',
    remedy=TOKENS,
    why="A mean of means over 14 and over 200 tokens is not the mean over 214.",
)
def token_mean():
    return setup(tagger(), token_cross_entropy, tokens())


@weights(
    "the same with a head that starts at zero",
    says=r'token_count\("labels"\)',
    remedy=TOKENS,
    why="Every loss is log(number of classes), whatever the split: only gradients show it.",
)
def zero_head():
    model = tagger()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return setup(model, token_cross_entropy, tokens())


@weights(
    "ignored labels, weighted by samples",
    says=r"token_count\(1\)",
    remedy="`weight=gradfold.token_count(1)`",
    why="`ignore_index` rows do not count in the mean.",
)
def ignored_labels():
    x, y = classes()
    y[[1, 5, 9, 10, 11, 12, 13]] = -100
    return setup(net(), cross_entropy, (x, y))


@weights(
    "padding ignored under label 0, weighted by all labels",
    says="ignore_index=0",
    remedy='`weight=gradfold.token_count("labels", ignore_index=0)`',
    why="`token_count` counts everything but -100 unless told otherwise.",
)
def ignored_zero():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=0)

    return setup(tagger(), loss_fn, tokens(0), weight=gradfold.token_count("labels"))


@weights(
    "a shifted loss, weighted without the shift",
    says="shift=True",
    remedy='`weight=gradfold.token_count("labels", shift=True)`',
    why="The first label of each row is not predicted, so short rows count less than their labels.",
)
def missing_shift():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    return setup(tagger(), loss_fn, tokens(), weight=gradfold.token_count("labels"))


@weights(
    "a loss that is not shifted, weighted with the shift",
    says=r'token_count\("labels"\)',
    remedy=TOKENS,
    why="The labels came shifted from the loader: all of them are predicted.",
)
def needless_shift():
    return setup(tagger(), token_cross_entropy, tokens(), weight=gradfold.token_count("labels", shift=True))


@weights(
    "samples that are collated, mean over tokens, weighted by samples",
    says=r'token_count\("labels"\)',
    remedy=TOKENS,
    why="As many samples, not as many tokens.",
)
def collated():
    return setup(tagger(), token_cross_entropy, sentences(), collate=pad)


@weights(
    "class-weighted cross-entropy, weighted by samples",
    remedy="`weight=lambda batch: class_weights[batch[1]].sum()`",
    why="`CrossEntropyLoss(weight)` divides by the sum of the classes' weights.",
)
def class_weights():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=batch[0].new_tensor(CLASS_WEIGHTS))

    return setup(net(), loss_fn, classes())


@weights(
    "importance weights, weighted by samples",
    remedy='`weight=lambda batch: batch["importance"].sum()`',
    why="The loss divides by the sum of the importance weights.",
)
def importance_by_samples():
    return by_samples(importance())


@weights(
    "a masked mean, weighted by samples",
    remedy="`weight=lambda batch: batch[2].sum()`",
    why="The mean is over what the mask keeps.",
)
def masked_mean():
    def loss_fn(model, batch):
        x, target, mask = batch
        return ((model(x)[..., 0] - target).square() * mask).sum() / mask.sum()

    x, mask = masks()
    mask[:, 0] = 1
    return setup(net(1), loss_fn, (x, torch.randn(16, 5), mask))


@weights(
    "focal loss over the number of positives (RetinaNet), weighted by samples",
    remedy='`weight=lambda batch: (batch["y"] > 0).sum()`',
    why="The sum over anchors is divided by the positives.",
)
def focal():
    return by_samples(focal_loss())


@weights(
    "boxes: smooth L1 over those that match, weighted by samples",
    remedy='`weight=lambda batch: batch["matched"].sum()`',
    why="Images have different numbers of matched boxes.",
)
def boxes():
    return by_samples(box_loss())


@weights(
    "segmentation with void pixels, weighted by samples",
    says="ignore_index=255",
    remedy="`weight=gradfold.token_count(1, ignore_index=255)`",
    why="Void pixels do not count in the mean.",
)
def void_pixels():
    return by_samples(segmentation())


@weights(
    "two means with denominators of their own, in one sum",
    says=r"a sum of 2 means, each with a denominator of its own .* Return a dict of terms",
    remedy="A dict of terms, each with its weight",
    why="Tokens and their successors: the second mean is over fewer tokens, and no number is right for both.",
)
def two_denominators():
    def loss_fn(model, batch):
        logits, labels = model(batch["ids"]), batch["labels"]
        return token_cross_entropy(model, batch) + F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])

    return setup(tagger(), loss_fn, tokens(), weight=gradfold.token_count("labels"))


@weights(
    "several terms, one of them with a wrong weight",
    says="depth",
    remedy='`weight={"classes": "samples", "depth": lambda batch: batch["has_depth"].sum()}`',
    why="The depth term is a mean over the rows that have a depth.",
)
def one_wrong_weight():
    return two_terms({"classes": "samples", "depth": "samples"})


@weights(
    "masked language modeling with the mask drawn inside the loss",
    remedy="Draw the mask in the loader, and `weight=gradfold.token_count(...)`",
    why="How many tokens are masked is not known before the forward pass, so no weight can count them.",
    proof=False,
)
def masked_language_model():
    def loss_fn(model, batch):
        hidden = (torch.rand(batch["ids"].shape) < 0.6) & (batch["ids"] > 0)
        hidden[:, 0] = True
        labels = (batch["ids"] % 5).masked_fill(~hidden, -100)
        return F.cross_entropy(model(batch["ids"].masked_fill(hidden, 10)).flatten(0, 1), labels.flatten())

    return setup(tagger(), loss_fn, tokens())


# Another weighting fits these exactly, but it is not known before the forward pass.


@weights(
    "logsumexp over the batch",
    remedy=WHOLE,
    why="A soft maximum: a mean of parts whose weights are the exponentials of the model's own output.",
)
def logsumexp():
    return setup(net(1), lambda model, batch: model(batch[0])[:, 0].logsumexp(0), classes())


@weights(
    "the largest loss of the batch",
    remedy=WHOLE,
    why="One row has all the weight, and which one it is, the losses say.",
)
def largest():
    return setup(net(), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1).amax(), targets())


@weights(
    "a loss divided by its own size",
    remedy="Divide by a running average that moves once per update",
    why="Each micro-batch is divided by its own loss, so that those with large losses count too little.",
)
def self_scaled():
    def loss_fn(model, batch):
        loss = F.mse_loss(model(batch[0]), batch[1])
        return loss / loss.detach()

    return setup(net(), loss_fn, targets())


@case(
    WRONG,
    "a part without any label, weighted by samples",
    "wrong",
    cause="empty",
    remedy="`weight=gradfold.token_count(1)`: what weighs nothing is not run",
    why="A mean over nothing is NaN. The batch has labels, but the next micro-batch may have none.",
)
def mean_over_nothing():
    x, y = classes()
    y[:4] = -100
    return setup(net(), cross_entropy, (x, y))


# --- Sums


@sums(
    '`reduction="sum"`',
    remedy='`weight="sum"`, or `reduction="mean"`',
    why="Weighted parts of a sum do not sum to it: the result would be too small by the number of micro-batches.",
)
def sum_of_squares():
    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1], reduction="sum")

    return setup(net(), loss_fn, targets())


@sums(
    "a sum over tokens, weighted by `token_count`",
    remedy='`weight="sum"`, or `reduction="mean"` and the same weight',
    why="The tokens count twice: in the sum and in the weight.",
)
def sum_over_tokens():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    return setup(tagger(), loss_fn, tokens(), weight=gradfold.token_count("labels"))


@sums(
    "a sum divided by the size of the whole batch",
    remedy='`weight="sum"`, or `.mean()`',
    why="Divided by hand already, so that parts add up; gradfold weighs them again.",
)
def divided_by_hand():
    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1], reduction="none").mean(1).sum() / 16

    return setup(net(), loss_fn, targets())


@means(
    'mean over tokens, weighted by "sum"',
    says=r'weight=gradfold\.token_count\("labels"\)',
    remedy=TOKENS,
    why="The means of two micro-batches sum to about twice the mean of the batch.",
)
def mean_that_adds_up():
    return setup(tagger(), token_cross_entropy, tokens(), weight="sum")


@means(
    'two terms by name, one of them a mean weighted by "sum"',
    says=r"the loss term 'depth' is a mean",
    remedy='`weight={"classes": "samples", "depth": lambda batch: batch["has_depth"].sum()}`',
    why="The classes term is weighed as it should be; the depth term would add up.",
)
def term_that_adds_up():
    return two_terms({"classes": "samples", "depth": "sum"})


WRONG += COUPLED


# --- BatchNorm

NORMS = (
    '`batch_norm="exact"`, `gradfold.convert_batch_norm(model)`, `layer.eval()`, or `"per_micro_batch"` to accept it'
)


def batch_norm(model, batch, name, **rest):
    case(
        WRONG,
        f"`nn.{name}` in training mode",
        "refused",
        cause="BatchNormError",
        says="BatchNorm in 1 layer",
        remedy=NORMS,
        why="Normalizes by the mean and spread of the micro-batch.",
        **rest,
    )(lambda: setup(model(), cross_entropy, batch()))


def volumes():
    return torch.randn(16, 2, 2, 2, 2), classes()[1]


def block(layer, inputs):
    return lambda: nn.Sequential(layer(2), nn.Flatten(), nn.Linear(inputs, 3))


batch_norm(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), classes, "BatchNorm1d")
batch_norm(lambda: convolution(nn.BatchNorm2d(4)), images, "BatchNorm2d")
batch_norm(block(nn.BatchNorm3d, 16), volumes, "BatchNorm3d")
batch_norm(block(nn.SyncBatchNorm, 32), images, "SyncBatchNorm", proof=False)  # runs on a GPU only


@case(
    WRONG,
    "functional `batch_norm(training=True)`",
    "wrong",
    cause="batch_norm",
    says="batch_norm",
    remedy='`batch_norm="exact"`, GroupNorm, or `training=False` with running statistics',
    why="Normalizes by the micro-batch, and no search for modules finds it.",
)
def functional_batch_norm():
    def forward(self, x):
        return self.last(F.batch_norm(self.first(x), None, None, training=True))

    return setup(Module(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, classes())


@case(
    WRONG,
    "functional `batch_norm` with running statistics of its own",
    "wrong",
    cause="batch_norm",
    says="batch_norm",
    remedy='`batch_norm="exact"`, GroupNorm, or `training=False`',
    why="The same within a hand-written layer; its buffers move, but it is the micro-batch that normalizes.",
)
def functional_batch_norm_with_buffers():
    def forward(self, x):
        return self.last(F.batch_norm(self.first(x), self.mean, self.variance, training=self.training))

    buffers = {"mean": torch.zeros(4), "variance": torch.ones(4)}
    model = Module(forward, buffers=buffers, first=nn.Conv2d(2, 4, 3))
    model.last = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return setup(model, cross_entropy, images())


# --- State that forward passes move

ONCE = "Move the state once per update, outside of the forward pass"


@stateful(
    "normalization by a running mean that each forward moves",
    remedy=ONCE,
    why="The second micro-batch is normalized by another mean than the first; in the batch all rows share one.",
)
def running_mean():
    def forward(self, x):
        hidden = self.first(x)
        normalized = hidden - self.mean
        self.mean.lerp_(hidden.detach().mean(0), 0.5)
        return self.last(normalized.tanh())

    model = Module(forward, buffers={"mean": torch.zeros(5)}, first=nn.Linear(4, 5), last=nn.Linear(5, 3))
    x, y = classes()
    return setup(model, cross_entropy, (x + 1, y))


@stateful(
    "a teacher's center that each forward moves (DINO)",
    remedy=ONCE,
    why="Later micro-batches have another target than the first.",
)
def center():
    def loss_fn(model, batch):
        teacher, student = model.net(batch[0]).detach(), model.net(batch[1])
        target = ((teacher - model.center) / 0.2).softmax(1)
        model.center.lerp_(teacher.mean(0), 0.5)
        return F.cross_entropy(student, target)

    return setup(Module(None, net=net(), buffers={"center": torch.zeros(3)}), loss_fn, two_views())


@stateful(
    "a queue of negatives that each forward fills (MoCo)",
    remedy=ONCE,
    why="The second micro-batch finds the first's keys in the queue.",
)
def queue():
    def loss_fn(model, batch):
        query, key = model.net(batch[0]), model.net(batch[1]).detach()
        scores = torch.cat([(query * key).sum(1, keepdim=True), query @ model.queue.T.clone()], 1)
        model.queue.copy_(torch.cat([key, model.queue])[:6])
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    return setup(Module(None, net=net(), buffers={"queue": torch.randn(6, 3)}), loss_fn, two_views())


@stateful(
    "a code book that each forward moves (VQ-VAE)",
    remedy=ONCE,
    why="The second micro-batch meets codes that the first has moved.",
)
def code_book():
    def loss_fn(model, batch):
        latent = model.encode(batch[0])
        chosen = F.one_hot((latent.detach()[:, None] - model.codes).square().sum(2).argmin(1), 4).to(latent)
        code = chosen @ model.codes
        used = chosen.sum(0)[:, None]
        means = chosen.T @ latent.detach() / used.clamp(min=1)
        loss = F.mse_loss(model.decode(latent + (code - latent).detach()), batch[0]) + F.mse_loss(latent, code)
        model.codes.lerp_(torch.where(used > 0, means, model.codes), 0.5)
        return loss

    model = Module(None, encode=net(2), decode=net(4, inputs=2), buffers={"codes": torch.randn(4, 2)})
    return setup(model, loss_fn, classes())


@stateful(
    "spectral norm whose estimate has not settled",
    remedy="Evaluation mode for the layer within the window",
    why="Each forward refines the estimate of the largest singular value, and divides by it.",
)
def spectral_norm():
    layer = parametrizations.spectral_norm(nn.Linear(6, 5))
    layer.parametrizations.weight.original.data.normal_()  # as training moves it
    return setup(nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(5, 3)), cross_entropy, classes())


# --- Losses that ignore their seed


class FusedCrossEntropy(torch.autograd.Function):
    """A linear layer and cross-entropy whose gradient is ready after the forward pass, and handed out unchanged."""

    @staticmethod
    def forward(ctx, x, weight, labels):
        logits = x @ weight.T
        slope = (logits.softmax(1) - F.one_hot(labels, weight.shape[0])) / len(x)
        ctx.save_for_backward(slope @ weight, slope.T @ x)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, gradient):
        return *ctx.saved_tensors, None


@case(
    WRONG,
    "a fused loss that ignores `grad_output`",
    "wrong",
    cause="grad_output",
    remedy="Multiply by `grad_output` in `backward`",
    why="The weight of a micro-batch is the `grad_output` of its backward pass, which is ignored: all count fully.",
)
def fused():
    def loss_fn(model, batch):
        return FusedCrossEntropy.apply(model[0](batch[0]).tanh(), model[1].weight, batch[1])

    return setup(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), loss_fn, classes())


@case(
    WRONG,
    "gradients divided by their norm on the way back",
    "wrong",
    cause="grad_output",
    remedy="Clip once per update: `TrainStep(max_grad_norm=...)`",
    why="A custom `autograd.Function` that normalizes: the `grad_output` cancels out.",
)
def normalized_gradient():
    return setup(net(), lambda model, batch: NormalizedGradient.apply(cross_entropy(model, batch)), classes())


class NormalizedGradient(torch.autograd.Function):
    """Hands on the sign of the gradient only."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.sign()


# --- Not a number


@refused(
    "one row whose loss is NaN",
    cause="NonFiniteLossError",
    says="is nan in micro-batch 0",
    remedy="Repair the row, or leave it out of the batch",
    why="The whole batch has no gradient either.",
)
def not_a_number():
    x, y = targets()
    x[5, 0] = float("nan")
    return setup(net(), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), (x, y))
