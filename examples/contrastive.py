"""Contrastive training: halves of images told apart from all of the batch, not of the micro-batch; with dropout on.

A mean over micro-batches of 32 would tell each half apart from 31 others, another and easier task. In two phases every
half is told apart from all 256: first the embeddings of the whole batch, then the loss, then each part once more.

    -for i, (even, odd) in enumerate(loader):                               # micro-batches of 32
    -    loss = contrast(model, embed(model, (even, odd)))                  # 31 negatives for each
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

NUM_EPOCHS = 12


def make_loader():
    """The even and the odd columns (N, 32) of digits."""
    images = torch.from_numpy(load_digits().images).to(torch.get_default_dtype()) / 16
    halves = images[:, :, ::2].flatten(1), images[:, :, 1::2].flatten(1)
    generator = torch.Generator().manual_seed(0)
    # The rest of an epoch would be a batch of 5, with 4 negatives.
    return DataLoader(TensorDataset(*halves), batch_size=256, shuffle=True, generator=generator, drop_last=True)


class Matcher(nn.Module):
    def __init__(self):
        super().__init__()
        self.even, self.odd = (
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 16)) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))


def embed(model, micro_batch):
    """The statistic: unit vectors of some pairs."""
    even, odd = micro_batch
    return F.normalize(model.even(even), dim=1), F.normalize(model.odd(odd), dim=1)


def contrast(model, embeddings):
    """The loss of the whole batch, and how many halves score highest with their own."""
    even, odd = embeddings
    loss = gradfold.losses.info_nce(even, odd, temperature=(-model.log_scale).exp(), tile=128)
    with torch.no_grad():
        is_right = (even @ odd.T).argmax(1) == torch.arange(len(even), device=even.device)
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
        if epoch % 3 == 2:
            print(f"epoch {epoch}: loss {result.loss:.3f}, recall {result.metrics['recall']:.1%}")
    return model


if __name__ == "__main__":
    main()
