"""An image classifier with a cosine schedule per update, and BatchNorm layers that see micro-batches on purpose.

Batch size, learning rate and schedule are those of the global batch: one iteration is one update and one scheduler
step, and the smaller last batch of an epoch is an update like any other.

    -for i, (images, labels) in enumerate(loader):                      # batches of 32
    -    (F.cross_entropy(model(images), labels) / 4).backward()
    -    if (i + 1) % 4 == 0:                                           # what is left at the end joins the next epoch
    -        optimizer.step()
    -        optimizer.zero_grad()
    -        scheduler.step()
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=32, batch_norm="per_micro_batch")
    +step = gradfold.TrainStep(accumulator, optimizer, scheduler)
    +for batch in loader:                                               # batches of 128
    +    step(batch)

Without `batch_norm=` gradfold refuses: normalized by 32 images, the gradient is not that of 128. "per_micro_batch"
accepts that, as "ghost batch normalization" does, and lets running statistics advance once per update.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradfold

NUM_EPOCHS = 4
NUM_TRAINING_IMAGES = 1500  # the last batch of an epoch has 92 images


def make_data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.get_default_dtype()).unsqueeze(1) / 16  # (N, 1, 8, 8)
    return images, torch.tensor(digits.target)


def make_loader(images, labels):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True, generator=generator)


def make_model():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def make_optimizer(model, num_updates):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)


def loss_fn(model, batch):
    images, labels = batch
    logits = model(images)
    return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}


@torch.no_grad()
def evaluate(model, images, labels):
    model.eval()
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return accuracy


def main():
    torch.manual_seed(0)
    images, labels = make_data()
    loader = make_loader(images[:NUM_TRAINING_IMAGES], labels[:NUM_TRAINING_IMAGES])
    model = make_model()
    optimizer, scheduler = make_optimizer(model, NUM_EPOCHS * len(loader))

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=32, batch_norm="per_micro_batch")
    step = gradfold.TrainStep(accumulator, optimizer, scheduler)
    for epoch in range(NUM_EPOCHS):
        for batch in loader:
            result = step(batch)
        accuracy = evaluate(model, images[NUM_TRAINING_IMAGES:], labels[NUM_TRAINING_IMAGES:])
        print(f"epoch {epoch}: update {step.updates}, loss {result.loss:.4f}, held-out accuracy {accuracy:.3f}")
    return model, scheduler


if __name__ == "__main__":
    main()
