"""Contrastive training: each image half told apart from all of the batch, not of the micro-batch; with dropout on.

A mean over micro-batches of 32 would tell each half apart from 31 others, another and easier task. In two phases every
half is told apart from all 256: first the embeddings of the whole batch, then the loss, then each part once more.

    -for i, (upper, lower) in enumerate(loader):                            # micro-batches of 32
    -    loss = contrast(model, embed(model, (upper, lower)))               # 31 negatives for each
    -    (loss / 8).backward()
    -    if (i + 1) % 8 == 0:
    -        optimizer.step()
    -        optimizer.zero_grad()
    +loss_fn = gradfold.TwoPhaseLoss(embed, contrast)
    +step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, micro_batch_size=32), optimizer)
    +for batch in loader:                                                   # batches of 256
    +    step(batch)                                                        # 255 negatives for each

`contrast` uses a parameter of the model (the scale of the scores), which gets its gradient there. `convert_dropout`
makes the masks those of the batch of 256, whatever the micro-batch; without it they would be drawn per micro-batch.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradfold

NUM_EPOCHS = 8


def make_loader():
    """The upper and lower halves (N, 32) of digits."""
    images = torch.from_numpy(load_digits().images).to(torch.get_default_dtype()) / 16
    halves = images.flatten(1).split(32, dim=1)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*halves), batch_size=256, shuffle=True, generator=generator)


class Matcher(nn.Module):
    def __init__(self):
        super().__init__()
        self.upper, self.lower = (
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 16)) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))


def embed(model, micro_batch):
    """The statistic: unit vectors of some pairs."""
    upper, lower = micro_batch
    return F.normalize(model.upper(upper), dim=1), F.normalize(model.lower(lower), dim=1)


def contrast(model, embeddings):
    """The loss of the whole batch, and how many halves score highest with their own."""
    upper, lower = embeddings
    loss = gradfold.losses.info_nce(upper, lower, temperature=(-model.log_scale).exp(), tile=128)
    with torch.no_grad():
        is_right = (upper @ lower.T).argmax(1) == torch.arange(len(upper), device=upper.device)
    return loss, {"recall": is_right.float().mean()}


def main():
    torch.manual_seed(0)
    loader = make_loader()
    model = gradfold.convert_dropout(Matcher())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    loss_fn = gradfold.TwoPhaseLoss(embed, contrast)
    step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, micro_batch_size=32), optimizer)
    for epoch in range(NUM_EPOCHS):
        for batch in loader:
            result = step(batch)
        if epoch % 2 == 1:
            print(f"epoch {epoch}: loss {result.loss:.3f}, recall {result.metrics['recall']:.1%}")
    return model


if __name__ == "__main__":
    main()
