"""Set-ups whose rows depend on each other: no weighting of micro-batches gives the gradient of the batch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from zoo.case import Case, Module, case, classes, masks, net, pad, sentences, setup, two_views
from zoo.case import values as targets
from zoo.right import cross_entropy

COUPLED: list[Case] = []
coupled = functools.partial(case, COUPLED, guard="wrong", cause="coupled")

WHOLE = "No weight helps: `TwoPhaseLoss(statistic, loss)`, or the batch whole (`micro_batch_size=None`)"


# --- Contrastive and metric learning


def contrastive(model, batch):
    first, second = (F.normalize(model(view), dim=1) for view in batch)
    return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first)))


@coupled(
    "contrastive with negatives from the batch (InfoNCE)",
    remedy=WHOLE,
    why="Every other row of the micro-batch is a negative: 7 instead of 15.",
)
def info_nce():
    return setup(net(), contrastive, two_views())


@coupled(
    "the same, one row at a time",
    remedy=WHOLE,
    why="A row alone has no negatives, and no gradient; two micro-batches together have.",
)
def info_nce_by_row():
    return setup(net(), contrastive, two_views(), micro_batch_size=1)


@coupled("two towers (CLIP)", remedy=WHOLE, why="Captions are told apart from those of the same micro-batch only.")
def clip():
    def loss_fn(model, batch):
        first = F.normalize(model["image"](batch[0]), dim=1)
        second = F.normalize(model["text"](batch[1]), dim=1)
        scores = model["scale"].weight.exp() * first @ second.T
        index = torch.arange(len(scores))
        return (F.cross_entropy(scores, index) + F.cross_entropy(scores.T, index)) / 2

    return setup(
        nn.ModuleDict({"image": net(), "text": net(), "scale": nn.Linear(1, 1, bias=False)}), loss_fn, two_views()
    )


@coupled("supervised contrastive", remedy=WHOLE, why="Positives and negatives are other rows.")
def supervised_contrastive():
    def loss_fn(model, batch):
        points = F.normalize(model(batch[0]), dim=1)
        other = ~torch.eye(len(points), dtype=torch.bool)
        scores = (points @ points.T / 0.5).masked_fill(~other, -1e4).log_softmax(1)
        same = (batch[1][:, None] == batch[1]) & other
        return -((scores * same).sum(1) / same.sum(1).clamp(min=1)).mean()

    return setup(net(), loss_fn, classes())


@coupled("triplets with the hardest of the batch", remedy=WHOLE, why="The hardest of 8 rows is easier than of 16.")
def batch_hard():
    def loss_fn(model, batch):
        points = model(batch[0])
        distance = (points[:, None] - points).square().sum(2)
        same = (batch[1][:, None] == batch[1]).to(points)
        positive, negative = (distance * same).amax(1), (distance + 100 * same).amin(1)
        return F.relu(1 + positive - negative).mean()

    return setup(net(), loss_fn, classes())


@coupled("pairwise AUC surrogate", remedy=WHOLE, why="A mean over pairs of a positive and a negative row.")
def auc():
    def loss_fn(model, batch):
        score = model(batch[0])[:, 0]
        pair = ((batch[1][:, None] == 1) & (batch[1] != 1)).to(score)
        return (F.softplus(score - score[:, None]) * pair).sum() / pair.sum()

    return setup(net(1), loss_fn, classes())


@coupled("SwAV: codes by Sinkhorn over the batch", remedy=WHOLE, why="Codes are balanced over the rows at hand.")
def sinkhorn():
    def loss_fn(model, batch):
        first, second = (model(view) for view in batch)
        codes = (first.detach() / 0.5).exp()
        for _ in range(3):
            codes = codes / codes.sum(0)
            codes = codes / codes.sum(1, keepdim=True)
        return F.cross_entropy(second, codes)

    return setup(net(), loss_fn, two_views())


# --- Ratios and statistics of the batch


@coupled(
    "soft Dice over the batch",
    remedy="Take the ratio per sample, `dims=(1, 2)`, and then the mean",
    why="A ratio of sums over all rows is not a mean of ratios.",
)
def dice():
    def loss_fn(model, batch):
        guess = model(batch[0]).squeeze(-1).sigmoid()
        return 1 - (2 * (guess * batch[1]).sum() + 1) / (guess.sum() + batch[1].sum() + 1)

    return setup(net(1), loss_fn, masks())


@coupled(
    "IoU (Jaccard) over the batch",
    remedy="Take the ratio per sample, and then the mean",
    why="A ratio of sums over all rows.",
)
def jaccard():
    def loss_fn(model, batch):
        guess = model(batch[0]).squeeze(-1).sigmoid()
        overlap = (guess * batch[1]).sum()
        return 1 - overlap / (guess.sum() + batch[1].sum() - overlap)

    return setup(net(1), loss_fn, masks())


@coupled(
    "F1 surrogate, averaged over classes",
    remedy="Cross-entropy, or a ratio per sample",
    why="Precision and recall are of the batch.",
)
def f1():
    def loss_fn(model, batch):
        guess, truth = model(batch[0]).sigmoid(), F.one_hot(batch[1], 3)
        return 1 - (2 * (guess * truth).sum(0) / (guess + truth).sum(0)).mean()

    return setup(net(), loss_fn, classes())


@coupled("Barlow Twins", remedy=WHOLE, why="The correlation matrix is of the batch.")
def barlow_twins():
    def loss_fn(model, batch):
        first, second = (model(view) for view in batch)
        first, second = ((z - z.mean(0)) / (z.var(0) + 0.1).sqrt() for z in (first, second))
        return (first.T @ second / len(first) - torch.eye(3).to(first)).square().sum()

    return setup(net(), loss_fn, two_views())


@coupled("VICReg's variance and covariance terms", remedy=WHOLE, why="Variance and covariance are of the batch.")
def vicreg():
    def loss_fn(model, batch):
        first, second = (model(view) for view in batch)
        covariance = first.T.cov()
        spread = F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
        return F.mse_loss(first, second) + spread + covariance.triu(1).square().sum()

    return setup(net(), loss_fn, two_views())


@coupled("1 - Pearson correlation", remedy="A mean squared error", why="Means and spreads are of the batch.")
def pearson():
    def loss_fn(model, batch):
        return 1 - torch.stack([model(batch[0])[:, 0], batch[1][:, 0]]).corrcoef()[0, 1]

    return setup(net(1), loss_fn, targets(outputs=1))


@coupled("maximum mean discrepancy", remedy=WHOLE, why="A mean over pairs of rows.")
def discrepancy():
    def loss_fn(model, batch):
        first, second = (model(view) for view in batch)
        kernel = lambda a, b: (-(a[:, None] - b).square().sum(2)).exp().mean()  # noqa: E731
        return kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)

    return setup(net(), loss_fn, two_views())


@coupled(
    "the root of the mean squared error",
    remedy="Train on the mean squared error; take the root for the log",
    why="The root of a mean is not the mean of roots.",
)
def root():
    return setup(net(), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]).sqrt(), targets())


@coupled(
    "relative error: a ratio of two sums", remedy="The ratio per sample, and then the mean", why="A ratio of sums."
)
def relative_error():
    def loss_fn(model, batch):
        guess = model(batch[0])
        return (guess - batch[1]).square().sum() / (guess.square().sum() + batch[1].square().sum())

    return setup(net(), loss_fn, targets())


@coupled(
    "entropy of the mean prediction",
    remedy=WHOLE,
    why="A diversity bonus: the entropy of a mean is not the mean of entropies.",
)
def entropy_of_mean():
    def loss_fn(model, batch):
        logits = model(batch[0])
        mean = F.softmax(logits, 1).mean(0)
        return F.cross_entropy(logits, batch[1]) + (mean * mean.log()).sum()

    return setup(net(), loss_fn, classes())


@coupled(
    "class weights from the labels of the batch",
    remedy="Count the classes once, over the data set",
    why="Each micro-batch has frequencies of its own.",
)
def batch_frequencies():
    def loss_fn(model, batch):
        counts = torch.bincount(batch[1], minlength=3).to(batch[0])
        return F.cross_entropy(model(batch[0]), batch[1], weight=1 / (counts + 1))

    return setup(net(), loss_fn, classes())


@coupled("Cox partial likelihood", remedy=WHOLE, why="Everyone still at risk is in the denominator of every event.")
def cox():
    def loss_fn(model, batch):
        risk, time = model(batch[0])[:, 0], batch[1][:, 0]
        at_risk = time >= time[:, None]
        return (torch.where(at_risk, risk, -1e4).logsumexp(1) - risk).mean()

    return setup(net(1), loss_fn, targets(outputs=1))


@coupled("relativistic average GAN", remedy=WHOLE, why="Real rows are compared with the mean of the fake ones.")
def relativistic():
    def loss_fn(model, batch):
        real, fake = (model(part) for part in batch)
        return F.softplus(fake.mean() - real).mean() + F.softplus(fake - real.mean()).mean()

    return setup(net(1), loss_fn, two_views())


@coupled(
    "a gradient penalty on the batch's mean",
    remedy="`torch.autograd.grad(score.sum(), x)` and the norm per row",
    why="One norm over the rows together; and the slope of a mean shrinks with the number of rows.",
)
def penalty_on_mean():
    def loss_fn(model, batch):
        x = batch[0].clone().requires_grad_()
        score = model(x)
        (slope,) = torch.autograd.grad(score.mean(), x, create_graph=True)
        return score.mean() + (slope.norm() - 1).square()

    return setup(net(1), loss_fn, classes())


# --- Picking rows by comparing them


@coupled(
    "the median of the losses", remedy="A robust loss per row, such as Huber's", why="Which row it is, the others say."
)
def median():
    return setup(net(), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(1).median(), targets())


@coupled(
    "the hardest half of the rows (OHEM)",
    remedy="Pick the hard rows before the split, or keep those above a fixed loss",
    why="The hardest half of each micro-batch is not that of the batch.",
)
def hard_examples():
    def loss_fn(model, batch):
        each = (model(batch[0]) - batch[1]).square().mean(1)
        return each.topk(len(each) // 2).values.mean()

    return setup(net(), loss_fn, targets())


@coupled(
    "losses clipped at a quantile of the batch",
    remedy="Clip at a fixed value",
    why="The quantile is the micro-batch's own.",
)
def clipped():
    def loss_fn(model, batch):
        each = (model(batch[0]) - batch[1]).square().mean(1)
        return each.clamp(max=each.detach().quantile(0.6)).mean()

    return setup(net(), loss_fn, targets())


@coupled("listwise ranking over the batch (ListNet)", remedy="Make a list one row", why="A softmax over the rows.")
def listwise():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0])[:, 0], batch[1][:, 0].softmax(0))

    return setup(net(1), loss_fn, targets(outputs=1))


@coupled(
    "advantages standardized inside the loss",
    remedy="Standardize over the whole batch before `backward(batch)`",
    why="Mean and spread of the micro-batch instead of the batch.",
)
def standardized_advantages():
    def loss_fn(model, batch):
        rewards = batch["rewards"]
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        scores = F.log_softmax(model(batch["x"]), 1).gather(1, batch["actions"][:, None])[:, 0]
        return -(scores * advantages).mean()

    x, actions = classes()
    return setup(net(), loss_fn, {"x": x, "actions": actions, "rewards": torch.linspace(0, 2, 16).exp()})


# --- Models whose rows see each other


@coupled(
    "softmax over the rows by mistake",
    remedy="`softmax(dim=1)`",
    why="`dim=0` makes the classes of different rows compete.",
)
def softmax_over_rows():
    return setup(net(), lambda model, batch: F.mse_loss(model(batch[0]).softmax(0), batch[1]), targets())


@coupled(
    "inputs divided by their largest", remedy="Scale by a constant, or per row", why="The largest of the micro-batch."
)
def divided_by_largest():
    def loss_fn(model, batch):
        return cross_entropy(model, (batch[0] / batch[0].abs().max(), batch[1]))

    x, y = classes()
    return setup(net(), loss_fn, (x * torch.linspace(1, 4, 16)[:, None], y))


@coupled(
    "standardization over the rows, written by hand",
    remedy="LayerNorm or GroupNorm",
    why="BatchNorm by another name, which no search for modules finds.",
)
def standardized():
    def forward(self, x):
        hidden = self.first(x)
        return self.last((hidden - hidden.mean(0)) / (hidden.std(0) + 0.1))

    return setup(Module(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, classes())


@coupled(
    "attention over the rows (`batch_first` forgotten)",
    remedy="`batch_first=True`",
    why="The layer takes dim 0 for time, so the rows attend to each other.",
)
def attention_over_rows():
    def forward(self, x):
        return self.head(self.layer(x).mean(1))

    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    return setup(
        Module(forward, layer=layer, head=nn.Linear(4, 3)), cross_entropy, (torch.randn(16, 5, 4), classes()[1])
    )


@coupled(
    "LSTM over the rows (`batch_first` forgotten)",
    remedy="`batch_first=True`",
    why="The layer takes dim 0 for time, so the state runs from row to row.",
)
def lstm_over_rows():
    def forward(self, x):
        return self.head(self.cell(x)[0].mean(1))

    model = Module(forward, cell=nn.LSTM(4, 5), head=nn.Linear(5, 3))
    return setup(model, cross_entropy, (torch.randn(16, 5, 4), classes()[1]))


@coupled(
    "the spread over the micro-batch as a feature (GAN discriminator)",
    remedy="Spread over groups that are one row each, or none",
    why="Minibatch standard deviation.",
)
def minibatch_spread():
    def forward(self, x):
        hidden = self.first(x)
        spread = (hidden.var(0, unbiased=False) + 1e-4).sqrt().mean()
        return self.last(torch.cat([hidden, spread.expand(len(x), 1)], 1))

    return setup(Module(forward, first=nn.Linear(4, 5), last=nn.Linear(6, 3)), cross_entropy, classes())


@coupled(
    "mixture of experts: load balance in training mode",
    remedy="A balance over the tokens of each row; or a bias on the gate, moved once per update",
    why="A product of two means over the rows; the model in evaluation mode does not have it.",
)
def load_balance():
    def forward(self, x):
        gate = self.gate(x).softmax(1)
        chosen = F.one_hot(gate.argmax(1), 2).to(gate)
        balance = 2 * (gate.mean(0) * chosen.mean(0)).sum()
        experts = torch.stack([self.first(x), self.second(x)], 2)
        return (experts * (gate * chosen)[:, None]).sum(2), balance if self.training else 0.0

    def loss_fn(model, batch):
        logits, balance = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.5 * balance

    model = Module(forward, gate=nn.Linear(4, 2), first=nn.Linear(4, 3), second=nn.Linear(4, 3))
    return setup(model, loss_fn, classes())


class CenterdGradient(torch.autograd.Function):
    """Per row forwards; backwards, the mean over the rows is taken off the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


@coupled(
    "rows coupled in the backward pass only",
    remedy="Let `backward` treat each row by itself",
    why="A custom `autograd.Function` that centers the gradient over the rows: values do not show it.",
)
def backward_only():
    def forward(self, x):
        return self.last(CenterdGradient.apply(self.first(x)).tanh())

    return setup(Module(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), cross_entropy, classes())


@coupled(
    "rows mixed with their mirror image `x.flip(0)`",
    remedy="Mix in the loader, before the split",
    why="The last row of the micro-batch is the partner, not that of the batch.",
)
def flipped():
    return setup(
        net(), lambda model, batch: cross_entropy(model, (batch[0] + 0.5 * batch[0].flip(0), batch[1])), classes()
    )


@coupled(
    "rows that see their neighbor `x.roll(1, 0)`",
    remedy="Shift in the loader, before the split",
    why="The first row of a micro-batch sees its last, not the one before it in the batch.",
)
def rolled():
    return setup(
        net(), lambda model, batch: cross_entropy(model, (batch[0] + 0.5 * batch[0].roll(1, 0), batch[1])), classes()
    )


@coupled(
    "mixup with flipped partners",
    remedy="Mix in the loader, before the split",
    why="The partners of a micro-batch are its own rows.",
)
def mixup():
    def loss_fn(model, batch):
        x, y = batch
        logits = model(0.7 * x + 0.3 * x.flip(0))
        return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y.flip(0))

    return setup(net(), loss_fn, classes())


@coupled(
    "padding that leaks into the output",
    remedy="Mask the padding in the model, or pad every sample to one length",
    why="Each micro-batch is padded to its own longest row, and the mean over time counts the padding.",
)
def leaking_padding():
    def forward(self, ids):
        return self.head(self.embed(ids).mean(1))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["ids"]), batch["labels"][:, 0])

    model = Module(forward, embed=nn.Embedding(11, 6), head=nn.Linear(6, 5))
    return setup(model, loss_fn, sentences(), collate=pad)
