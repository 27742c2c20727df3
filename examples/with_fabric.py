"""Lightning Fabric: `backward=fabric.backward`.

Fabric keeps placing the model, wrapping the optimizer and running the backward pass; gradfold splits and weighs. The
loss is a regression whose samples have different weights, which a division by the number of micro-batches gets wrong.

     fabric = Fabric(devices=1)
     model, optimizer = fabric.setup(model, optimizer)
    -loader = fabric.setup_dataloaders(loader)                                              # batches of 16
    -for i, batch in enumerate(loader):
    -    is_accumulating = (i + 1) % 4 != 0
    -    with fabric.no_backward_sync(model, enabled=is_accumulating):
    -        fabric.backward(loss_fn(model, batch) / 4)
    -    if not is_accumulating:
    -        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    -        optimizer.step()
    -        optimizer.zero_grad()
    +loader = fabric.setup_dataloaders(loader, move_to_device=False)                        # batches of 64
    +fold = gradfold.Accumulator(model, loss_fn, micro_batch_size=16, backward=fabric.backward,
    +                            weight=lambda batch: batch["importance"].sum())
    +for batch in loader:
    +    fold.backward(batch)
    +    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    +    optimizer.step()
    +    optimizer.zero_grad()

In a LightningModule with manual optimization it is `backward=self.manual_backward`. One process, without fp16: a
framework that scales the loss does so in its own backward, which is not supported.
"""

import torch
from lightning_fabric import Fabric
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader

import gradfold

NUM_EPOCHS = 8


def make_loader():
    diabetes = load_diabetes()
    inputs = torch.tensor(diabetes.data * 20, dtype=torch.get_default_dtype())  # (442, 10)
    targets = torch.tensor(diabetes.target / 100, dtype=torch.get_default_dtype())  # (442,)
    importance = 1 + (targets > 2)  # severe cases count twice
    rows = [{"x": x, "y": y, "importance": i} for x, y, i in zip(inputs, targets, importance, strict=True)]
    return DataLoader(rows, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))


def make_model():
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def loss_fn(model, batch):
    errors = (model(batch["x"]).squeeze(1) - batch["y"]).square()
    return (errors * batch["importance"]).sum() / batch["importance"].sum()


def main():
    torch.manual_seed(0)
    loader, model = make_loader(), make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    fabric = Fabric(accelerator="auto", devices=1)
    model, optimizer = fabric.setup(model, optimizer)
    # The global batch may not fit on the device: it stays on the host, and gradfold moves its micro-batches.
    loader = fabric.setup_dataloaders(loader, move_to_device=False)

    fold = gradfold.Accumulator(
        model,
        loss_fn,
        micro_batch_size=16,
        weight=lambda batch: batch["importance"].sum(),  # what loss_fn divides by
        backward=fabric.backward,
    )
    for epoch in range(NUM_EPOCHS):
        for batch in loader:
            result = fold.backward(batch)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        if epoch % 2 == 1:
            fabric.print(f"epoch {epoch}: loss {result.loss:.4f}, importance {result.weight:.0f}")
    return model.module


if __name__ == "__main__":
    main()
