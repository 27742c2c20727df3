"""A loop that exists, over a loader of micro-batches: the smallest diff, in two ways.

Body as it was: only the two outer lines and `.backward` change. Weights are exact, for the last, short window too.

    -for i, (images, labels) in enumerate(loader):
    +for window in gradfold.windows(loader, 4, model=model):
    +    for images, labels in window:
             loss = F.cross_entropy(model(images), labels)     # and thirty more lines, locals and all
    -        (loss / 4).backward()
    -        if (i + 1) % 4 == 0:                              # never true for what the epoch ends with
    -            optimizer.step()
    -            optimizer.zero_grad()
    +            window.backward(loss)
    +    optimizer.step()
    +    optimizer.zero_grad()

Body as a function: the accumulator runs it. If anything fails, `.grad`, buffers and torch's random state are put back.

    +accumulator = gradfold.Accumulator(model, loss_fn)
    +for window in gradfold.windows(loader, 4):
    +    result = accumulator.backward(window)
    +    optimizer.step()
    +    optimizer.zero_grad()
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradfold

NUM_EPOCHS = 3


def make_loader():
    """300 images in micro-batches of 16: an epoch ends with a window of 3 of them, the last with 12 images."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.get_default_dtype()) / 16, torch.tensor(digits.target)
    data = TensorDataset(images[:300], labels[:300])
    return DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def loss_fn(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train_with_the_body_as_it_was():
    loader, model = make_loader(), make_model()
    optimizer = make_optimizer(model)
    for _ in range(NUM_EPOCHS):
        for window in gradfold.windows(loader, 4, model=model):
            for images, labels in window:
                loss = F.cross_entropy(model(images), labels)
                window.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    print(f"body as it was:     loss {window.loss:.4f} over the {len(window)} micro-batches of the last window")
    return model


def train_with_the_body_as_a_function():
    loader, model = make_loader(), make_model()
    optimizer = make_optimizer(model)
    accumulator = gradfold.Accumulator(model, loss_fn)
    for _ in range(NUM_EPOCHS):
        for window in gradfold.windows(loader, 4):
            result = accumulator.backward(window)
            optimizer.step()
            optimizer.zero_grad()
    print(f"body as a function: loss {result.loss:.4f} over the {result.num_micro_batches} micro-batches")
    return model


def main():
    return train_with_the_body_as_it_was(), train_with_the_body_as_a_function()


if __name__ == "__main__":
    main()
