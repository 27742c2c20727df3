"""Set-ups that accumulate exactly: a mean over rows (or what `weight=` counts) of what each row says for itself."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gradfold
from zoo.case import Case, Module, case, classes, images, masks, net, pad, sentences, setup, tagger, tokens, two_views
from zoo.case import values as targets

RIGHT: list[Case] = []
right = functools.partial(case, RIGHT, guard="fits")


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def token_cross_entropy(model, batch):
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


# --- Means over rows


@right("cross-entropy, averaged over samples", why="Each sample has a loss of its own; the batch's is their mean.")
def plain():
    return setup(net(), cross_entropy, classes())


@right("mean squared error over all elements", why="Every row has as many elements.")
def squares():
    return setup(net(), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), targets())


@right("Huber loss", why="Robust, but element by element.")
def huber():
    return setup(net(), lambda model, batch: F.huber_loss(model(batch[0]), batch[1]), targets())


@right("quantile (pinball) loss", why="The quantile is of the target, not of the batch.")
def pinball():
    def loss_fn(model, batch):
        error = batch[1] - model(batch[0])
        return torch.maximum(0.9 * error, -0.1 * error).mean()

    return setup(net(), loss_fn, targets())


@right("cross-entropy with label smoothing", why="The smoothed target is the same for every row.")
def smoothed():
    return setup(net(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1), classes())


@right("binary cross-entropy with `pos_weight`", why="It weighs elements, and still divides by their number.")
def positive_weight():
    def loss_fn(model, batch):
        factor = batch[0].new_tensor([1.0, 5.0, 0.5])
        return F.binary_cross_entropy_with_logits(model(batch[0]), F.one_hot(batch[1], 3).to(factor), pos_weight=factor)

    return setup(net(), loss_fn, classes())


@right('distillation: KL divergence with `reduction="batchmean"`', why="The sum divided by the number of rows.")
def distillation():
    def loss_fn(model, batch):
        return F.kl_div(F.log_softmax(model(batch[0]), 1), F.softmax(batch[1], 1), reduction="batchmean")

    return setup(net(), loss_fn, targets())


@right(
    "KL divergence averaged over elements",
    why='`reduction="mean"` divides by a constant too much, but by the same one per row in every micro-batch.',
)
def divergence_of_elements():
    def loss_fn(model, batch):
        return F.kl_div(F.log_softmax(model(batch[0]), 1), F.softmax(batch[1], 1), reduction="none").mean()

    return setup(net(), loss_fn, targets())


@right('CTC with `reduction="mean"`', why="It divides each row by its own target length, then averages over rows.")
def ctc():
    def loss_fn(model, batch):
        scores = F.log_softmax(model(batch["x"]), 2).transpose(0, 1)
        return F.ctc_loss(scores, batch["targets"], batch["frames"], batch["lengths"])

    frames, lengths = torch.tensor([6, 5] * 8), torch.tensor([1, 1, 1, 3, 3, 2, 3, 3, 1, 2] + [1] * 6)
    batch = {"x": torch.randn(16, 6, 4), "targets": torch.randint(1, 4, (16, 3)), "frames": frames, "lengths": lengths}
    return setup(net(4), loss_fn, batch)


@right("Dice per sample, then the mean", why="The ratio is taken inside each row; the mean comes last.")
def dice_per_sample():
    def loss_fn(model, batch):
        guess = model(batch[0]).squeeze(-1).sigmoid()
        overlap = (guess * batch[1]).sum(1)
        return (1 - (2 * overlap + 1) / (guess.sum(1) + batch[1].sum(1) + 1)).mean()

    return setup(net(1), loss_fn, masks())


@right("triplets that come in the batch", why="Anchor, positive and negative are columns of one row.")
def triplets():
    def loss_fn(model, batch):
        return F.triplet_margin_loss(*(model(part) for part in batch), margin=3.0)

    return setup(net(), loss_fn, (*two_views(), torch.randn(16, 4)))


@right("preference pairs (DPO)", why="A pair is a row.")
def preferences():
    def loss_fn(model, batch):
        return -F.logsigmoid(model(batch[0]) - model(batch[1]) - batch[2]).mean()

    return setup(net(1), loss_fn, (*two_views(), torch.randn(16, 1)))


@right("contrastive against a fixed memory bank", why="The negatives are a buffer, unchanged in the window.")
def memory_bank():
    def loss_fn(model, batch):
        first, second = model.net(batch[0]), model.net(batch[1]).detach()
        scores = torch.cat([(first * second).sum(1, keepdim=True), first @ model.bank.T], 1)
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))

    return setup(Module(None, net=net(), buffers={"bank": torch.randn(5, 3)}), loss_fn, two_views())


@right("mixup with a partner from the loader", why="The partner is a column of the row that it is mixed into.")
def mixup_in_loader():
    def loss_fn(model, batch):
        x, y, partner_x, partner_y = batch
        logits = model(0.7 * x + 0.3 * partner_x)
        return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, partner_y)

    x, y = classes()
    return setup(net(), loss_fn, (x, y, x.flip(0), y.flip(0)))


@right(
    "policy gradient with advantages from the batch",
    why="Made before the split. That their mean, and so the loss, is 0 hides nothing.",
)
def policy_gradient():
    def loss_fn(model, batch):
        scores = F.log_softmax(model(batch["x"]), 1).gather(1, batch["actions"][:, None])[:, 0]
        ratio = (scores - scores.detach()).exp()  # on-policy: the value of the loss is the mean advantage, 0
        advantages = batch["advantages"]
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    x, actions = classes()
    advantages = torch.randn(16)
    advantages = torch.cat([advantages[:8] - advantages[:8].mean(), advantages[8:] - advantages[8:].mean()])
    return setup(net(), loss_fn, {"x": x, "actions": actions, "advantages": advantages})


# --- Constants, regularizers, several terms


@right(
    "a constant factor, such as `loss / 4`",
    why="It is part of the loss, and of the full batch's gradient. Whether it is intended cannot be seen.",
)
def constant_factor():
    return setup(net(), lambda model, batch: cross_entropy(model, batch) / 4, classes())


@right("a penalty on the weights in the loss", why="A term that no row changes: normalized weights sum to 1.")
def penalty_on_weights():
    def loss_fn(model, batch):
        return cross_entropy(model, batch) + 0.1 * sum(weight.square().sum() for weight in model.parameters())

    return setup(net(), loss_fn, classes())


@right("losses weighted by learned uncertainties", why="Parameters, the same in every micro-batch.")
def uncertainties():
    def loss_fn(model, batch):
        first, second = model.net(batch[0]).split([3, 3], 1)
        terms = torch.stack([F.mse_loss(first, batch[1]), F.l1_loss(second, batch[1])])
        return (terms * (-model.scale.weight[0]).exp() + model.scale.weight[0]).sum()

    return setup(Module(None, net=net(6), scale=nn.Linear(2, 1)), loss_fn, targets())


@right("several heads, all averaged over samples", why="A sum of means over the same thing.")
def heads():
    def loss_fn(model, batch):
        first, second = model(batch[0]).split([3, 3], 1)
        return F.cross_entropy(first, batch[1]) + 0.5 * F.mse_loss(second, batch[0][:, :3])

    return setup(net(6), loss_fn, classes())


def two_terms(weight):
    """A term over all rows, and one over those that have a depth."""

    def loss_fn(model, batch):
        logits, depth = model(batch["x"]).split([3, 1], 1)
        has_depth = batch["has_depth"]
        depth_loss = ((depth[:, 0] - batch["depth"]).square() * has_depth).sum() / has_depth.sum()
        return {"classes": F.cross_entropy(logits, batch["y"]), "depth": depth_loss}

    x, y = classes()
    has_depth = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1, 1] + [0] * 7)
    batch = {"x": x, "y": y, "depth": torch.randn(16), "has_depth": has_depth}
    return setup(net(4), loss_fn, batch, weight=weight)


@right("terms with a denominator each", why="`weight=` names the denominator of every term.")
def terms():
    return two_terms({"classes": "samples", "depth": lambda batch: batch["has_depth"].sum()})


# --- Sums


@right(
    'a sum divided by the number of tokens of the whole batch, weighted by "sum"',
    why="What `num_items_in_batch` is for: the losses of micro-batches add up to that of the batch.",
)
def share_of_the_batch():
    def loss_fn(model, batch):
        logits = model(batch["ids"]).flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum") / num_items

    batch = tokens()
    num_items = int((batch["labels"] != -100).sum())
    return setup(tagger(), loss_fn, batch, weight="sum")


@right('`reduction="sum"`, weighted by "sum"', why="Nothing is divided, so nothing is weighed.")
def plain_sum():
    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1], reduction="sum")

    return setup(net(), loss_fn, targets(), weight="sum")


# --- Means over tokens, positives, weights


@right("mean over tokens, weighted by `token_count`", why="The weight counts what the mean is over.")
def token_mean():
    return setup(tagger(), token_cross_entropy, tokens(), weight=gradfold.token_count("labels"))


@right("mean over tokens of samples that are collated", why="Padding is ignored by the loss and by its weight.")
def collated():
    weight = gradfold.token_count("labels")
    return setup(tagger(), token_cross_entropy, sentences(), collate=pad, weight=weight)


@right("a causal language model's loss with `shift=True`", why="Label t + 1 belongs to position t: one fewer per row.")
def causal_lm():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    return setup(tagger(), loss_fn, tokens(), weight=gradfold.token_count("labels", shift=True))


@right("labels ignored under another number", why="`token_count(..., ignore_index=0)` leaves out what the loss does.")
def ignored_zero():
    def loss_fn(model, batch):
        logits = model(batch["ids"]).flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=0, label_smoothing=0.1)

    return setup(tagger(), loss_fn, tokens(0), weight=gradfold.token_count("labels", ignore_index=0))


@right("rows without any label, weighted by `token_count`", why="They have weight 0, and are left out.")
def rows_without_labels():
    batch = tokens()
    batch["labels"][:3] = -100
    return setup(tagger(), token_cross_entropy, batch, weight=gradfold.token_count("labels"))


# Exact in binary: the weights of micro-batches are summed in float32 here.
CLASS_WEIGHTS = (0.25, 3.0, 1.0)


@right(
    "class-weighted cross-entropy, weighted alike",
    why="The loss divides by the sum of the class weights: `weight=lambda batch: class_weights[batch[1]].sum()`.",
)
def class_weights():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=batch[0].new_tensor(CLASS_WEIGHTS))

    return setup(net(), loss_fn, classes(), weight=lambda batch: torch.tensor(CLASS_WEIGHTS)[batch[1]].sum())


@right("importance weights, weighted alike", why="The loss divides by their sum, and so does `weight=`.")
def importance():
    def loss_fn(model, batch):
        each = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return (each * batch["importance"]).sum() / batch["importance"].sum()

    x, y = classes()
    batch = {"x": x, "y": y, "importance": torch.linspace(0.1, 2, 16).square()}
    return setup(net(), loss_fn, batch, weight=lambda batch: batch["importance"].sum())


@right("focal loss over the number of positives, weighted alike", why="`weight=` counts the positives.")
def focal():
    return focal_loss(weight=lambda batch: (batch["y"] > 0).sum())


def focal_loss(**options):
    """RetinaNet's: summed over all anchors, divided by the number of those that hold an object."""

    def loss_fn(model, batch):
        wanted = (batch["y"] > 0).to(batch["x"])
        each = F.binary_cross_entropy_with_logits(model(batch["x"])[..., 0], wanted, reduction="none")
        return ((1 - (-each).exp()).square() * each).sum() / wanted.sum()

    x, wanted = masks()
    wanted[:, 0] = 1
    return setup(net(1), loss_fn, {"x": x, "y": wanted.long()}, **options)


@right("boxes: smooth L1 over those that match, weighted alike", why="`weight=` counts the matched boxes.")
def boxes():
    return box_loss(weight=lambda batch: batch["matched"].sum())


def box_loss(**options):
    def loss_fn(model, batch):
        matched = batch["matched"]
        return F.smooth_l1_loss(model(batch["x"])[matched], batch["boxes"][matched])

    x, matched = masks()
    matched[:, 0] = 1
    return setup(net(4), loss_fn, {"x": x, "boxes": torch.randn(16, 5, 4), "matched": matched.bool()}, **options)


@right("segmentation with void pixels, weighted by `token_count`", why="Pixels are tokens; labels have any shape.")
def segmentation():
    labels = torch.randint(0, 3, (16, 4, 4))
    labels[:3, 1:] = 255
    labels[9:, :, 2:] = 255

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], ignore_index=255)

    weight = gradfold.token_count(1, ignore_index=255)
    return setup(nn.Conv2d(2, 3, 3, padding=1), loss_fn, (torch.randn(16, 2, 4, 4), labels), weight=weight)


# --- Layers


@right("LayerNorm", why="It normalizes each row by itself.")
def layer_norm():
    return setup(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), cross_entropy, classes())


def convolution(*norm):
    return nn.Sequential(nn.Conv2d(2, 4, 3), *norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


@right("GroupNorm", why="Groups of channels, within each row.")
def group_norm():
    return setup(convolution(nn.GroupNorm(2, 4)), cross_entropy, images())


@right("InstanceNorm", why="Each channel of each row by itself.")
def instance_norm():
    return setup(convolution(nn.InstanceNorm2d(4, affine=True)), cross_entropy, images())


@right(
    "InstanceNorm that tracks running statistics",
    why="In training mode they are moved, not used. (How far they move does depend on the number of forwards.)",
)
def tracking_instance_norm():
    return setup(convolution(nn.InstanceNorm2d(4, track_running_stats=True)), cross_entropy, images())


@right("BatchNorm in evaluation mode", why="Running statistics are constants.")
def frozen_batch_norm():
    model = convolution(nn.BatchNorm2d(4))
    model[1].eval()
    return setup(model, cross_entropy, images())


@right("spectral norm in evaluation mode", why="The estimate of the norm is unchanged.")
def frozen_spectral_norm():
    return setup(nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))).eval(), cross_entropy, classes())


@right("tied embeddings", why="One parameter, used twice: gradients add up in `.grad` either way.")
def tied():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    model[1].weight = model[0].weight
    return setup(model, token_cross_entropy, tokens(), weight=gradfold.token_count("labels"))


@right("an embedding with sparse gradients", why="Sparse gradients add up like dense ones.")
def sparse():
    model = nn.Sequential(nn.Embedding(11, 6, sparse=True), nn.Linear(6, 5))
    return setup(model, token_cross_entropy, tokens(), weight=gradfold.token_count("labels"))


def encoder(dropout):
    def forward(self, ids):
        return self.head(self.layer(self.embed(ids), src_key_padding_mask=ids == 0))

    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout, batch_first=True)
    return Module(forward, embed=nn.Embedding(11, 6), layer=layer, head=nn.Linear(6, 5))


@right("attention with a padding mask", why="Rows attend to themselves; padding is masked.")
def attention():
    return setup(encoder(0.0), token_cross_entropy, tokens(), weight=gradfold.token_count("labels"))


@right("LSTM with `batch_first=True`", why="The state starts at zero in every row.")
def lstm():
    model = Module(lambda self, x: self.head(self.cell(x)[0][:, -1]), cell=nn.LSTM(4, 5, batch_first=True))
    model.head = nn.Linear(5, 3)
    return setup(model, cross_entropy, (torch.randn(16, 5, 4), torch.arange(16) % 3))


@right("GRU over sequences first, rows second", why="The model transposes: rows are where it expects them.")
def gru():
    model = Module(lambda self, x: self.head(self.cell(x.transpose(0, 1))[0][-1]), cell=nn.GRU(4, 5))
    model.head = nn.Linear(5, 3)
    return setup(model, cross_entropy, (torch.randn(16, 5, 4), torch.arange(16) % 3))


@right("complex numbers inside (FFT)", why="Each row is transformed by itself.")
def fourier():
    def forward(self, x):
        spectrum = torch.fft.rfft(x) * torch.complex(*self.filter.weight)
        return self.head(torch.fft.irfft(spectrum, n=4))

    return setup(Module(forward, filter=nn.Linear(3, 2), head=nn.Linear(4, 3)), cross_entropy, classes())


@right("a model in float64", why="The tolerance of the self-check follows the precision.")
def double():
    x, y = classes()
    return setup(net().double(), cross_entropy, (x.double(), y))


# --- Frozen, unused, training only


@right("frozen parameters", why="They get no gradient either way.")
def frozen():
    model = net()
    model[0].requires_grad_(False)
    return setup(model, cross_entropy, classes())


@right("a loss on one output of many", why="Unused parameters get no gradient either way.")
def unused():
    def loss_fn(model, batch):
        return F.cross_entropy(model["used"](batch[0]), batch[1])

    return setup(nn.ModuleDict({"used": net(), "unused": net()}), loss_fn, classes())


@right("a loss that exists only in training mode", why="The self-check runs the model in its current mode (detection).")
def training_loss():
    def forward(self, x, y):
        return F.cross_entropy(self.net(x), y) if self.training else self.net(x).argmax(1)

    return setup(Module(forward, net=net()), lambda model, batch: model(*batch), classes())


@right("an auxiliary head only in training mode", why="As in Inception: a tuple in training, a tensor otherwise.")
def auxiliary_head():
    def forward(self, x):
        return (self.net(x), self.aux(x)) if self.training else self.net(x)

    def loss_fn(model, batch):
        main, aux = model(batch[0])
        return F.cross_entropy(main, batch[1]) + 0.4 * F.cross_entropy(aux, batch[1])

    return setup(Module(forward, net=net(), aux=net()), loss_fn, classes())


# --- Gradients inside the loss


@right("a gradient penalty per sample (R1)", why="The gradient by each row's input depends on that row alone.")
def gradient_penalty():
    def loss_fn(model, batch):
        x = batch[0].clone().requires_grad_()
        score = model(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return F.softplus(-score).mean() + 5 * slope.square().sum(1).mean()

    return setup(net(1), loss_fn, classes())


class Reversal(torch.autograd.Function):
    """The identity, whose gradient is reversed and halved."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -0.5 * gradient


@right("gradient reversal (domain adaptation)", why="A custom `autograd.Function` that is linear in its gradient.")
def reversal():
    def loss_fn(model, batch):
        hidden = model["body"](batch[0])
        return F.cross_entropy(hidden, batch[1]) + F.softplus(model["domain"](Reversal.apply(hidden))).mean()

    return setup(nn.ModuleDict({"body": net(), "domain": nn.Linear(3, 1)}), loss_fn, classes())


@right("activation checkpointing", why="Runs the same forward again.")
def checkpointed():
    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))

    return setup(Module(forward, body=net(5), head=nn.Linear(5, 3)), cross_entropy, classes())


# --- Random draws: right in distribution; the self-check keys the draws by row


drawn = functools.partial(right, proof=False)


@drawn("activation checkpointing with dropout inside", why="The mask is drawn again as it was.")
def checkpointed_dropout():
    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))

    body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
    return setup(Module(forward, body=body, head=nn.Linear(6, 3)), cross_entropy, classes())


@drawn("dropout", why="Other masks when the batch is split, each element's with the same chance.")
def dropout():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))
    return setup(model, cross_entropy, classes())


@drawn("Dropout2d", why="Whole channels, row by row.")
def dropout2d():
    return setup(convolution(nn.Dropout2d(0.3)), cross_entropy, images())


@drawn("dropout in attention (TransformerEncoderLayer)", why="Masks over rows, heads and positions.")
def attention_dropout():
    return setup(encoder(0.2), token_cross_entropy, tokens(), weight=gradfold.token_count("labels"))


@drawn("stochastic depth", why="Rows skip the branch, each by its own draw.")
def stochastic_depth():
    def forward(self, x):
        keep = torch.empty(len(x), 1).bernoulli_(0.7).to(x)
        return self.head(x + keep / 0.7 * self.branch(x))

    return setup(Module(forward, branch=net(4), head=nn.Linear(4, 3)), cross_entropy, classes())


@drawn("VAE: the latent is drawn inside the model", why="One draw per row.")
def vae():
    def loss_fn(model, batch):
        mean, log_variance = model["encode"](batch[0]).chunk(2, 1)
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
        return F.mse_loss(model["decode"](latent), batch[0]) + divergence

    return setup(nn.ModuleDict({"encode": net(4), "decode": net(4, inputs=2)}), loss_fn, classes())


@drawn("diffusion: noise and timesteps are drawn inside the loss", why="One timestep and one noise per row.")
def diffusion():
    def loss_fn(model, batch):
        x = batch[0]
        noise, time = torch.randn_like(x), torch.randint(0, 10, (len(x),))
        keep = (1 - (time + 1) / 11).to(x)[:, None]
        return F.mse_loss(model(torch.cat([keep.sqrt() * x + (1 - keep).sqrt() * noise, keep], 1)), noise)

    return setup(net(4, inputs=5), loss_fn, classes())


@drawn("Gumbel softmax", why="One draw per row and class.")
def gumbel():
    def loss_fn(model, batch):
        choice = F.gumbel_softmax(model["choose"](batch[0]))
        return F.mse_loss(model["decode"](choice), batch[0])

    return setup(nn.ModuleDict({"choose": net(3), "decode": net(4, inputs=3)}), loss_fn, classes())


@drawn("WGAN-GP: points between real and fake are drawn per row", why="One draw and one norm per row.")
def wgan():
    def loss_fn(model, batch):
        real, fake = batch
        mix = torch.rand(len(real), 1).to(real)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        return model(fake).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    return setup(net(1), loss_fn, (torch.randn(16, 4), torch.randn(16, 4) + 1))


@drawn("masked autoencoder: each row hides as many patches", why="The mean is over the same number in every row.")
def masked_autoencoder():
    def loss_fn(model, batch):
        hidden = torch.rand(batch[0].shape[:2]).argsort(1) < 3
        guess = model(batch[0] * ~hidden[..., None])
        return ((guess - batch[0]).square() * hidden[..., None]).sum() / hidden.sum() / 4

    return setup(net(4), loss_fn, (torch.randn(16, 5, 4),))


@drawn("noise from a custom generator", why="The self-check restores the generator, too.")
def own_generator():
    generator = torch.Generator().manual_seed(1)

    def loss_fn(model, batch):
        noise = torch.randn(batch[0].shape, generator=generator)
        return cross_entropy(model, (batch[0] + noise.to(batch[0]), batch[1]))

    return setup(net(), loss_fn, classes())


@drawn("one random shift for the whole batch", why="One draw for all rows: the mean over draws is the same.")
def one_shift():
    def loss_fn(model, batch):
        return cross_entropy(model, (batch[0].roll(int(torch.randint(0, 4, ())), 1), batch[1]))

    return setup(net(), loss_fn, classes())


def grouped(model, batch):
    """Four answers per question; the advantages of a group are standardized within it (GRPO)."""
    rewards = batch["rewards"].view(-1, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten()
    scores = F.log_softmax(model(batch["x"]), 1).gather(1, batch["actions"][:, None])[:, 0]
    return -(scores * advantages).mean()


@right(
    "groups of 4 rows that belong together (GRPO), in micro-batches of whole groups",
    why="A mean over groups. It does not run on a part of a group, and no micro-batch is one.",
)
def groups_of_rows():
    x, actions = classes()
    return setup(net(), grouped, {"x": x, "actions": actions, "rewards": torch.randn(16)})


@right(
    "a model that fails on few rows",
    why="It runs on micro-batches, and on two together; that it fails on a part of one proves nothing.",
)
def too_few_rows():
    def loss_fn(model, batch):
        if len(batch[0]) < 8:
            raise RuntimeError("expected at least 8 rows")
        return cross_entropy(model, batch)

    return setup(net(), loss_fn, classes())
