"""A GAN: two optimizers, two losses, and gradients that must not leak from one into the other.

The generator's loss goes through the discriminator and leaves gradients there. `TrainStep` zeroes first, over all
modules of the accumulator: both accumulators get both networks, in an `nn.ModuleList`.

    -for i, real in enumerate(loader):
    -    (d_loss(networks, real, noise()) / 4).backward()
    -    if (i + 1) % 4 == 0:
    -        d_optimizer.step()
    -        d_optimizer.zero_grad()
    -    (g_loss(networks, noise()) / 4).backward()            # fills the discriminator's .grad, too: the next
    -    if (i + 1) % 4 == 0:                                  # d_loss is added to that
    -        g_optimizer.step()
    -        g_optimizer.zero_grad()
    +d_step = gradfold.TrainStep(gradfold.Accumulator(networks, d_loss, micro_batch_size=32), d_optimizer)
    +g_step = gradfold.TrainStep(gradfold.Accumulator(networks, g_loss, micro_batch_size=32), g_optimizer)
    +for real in loader:
    +    batch = {"real": real, "noise": torch.randn(len(real), 4)}
    +    d_step(batch)
    +    g_step(batch)

The noise is drawn with the batch, not inside a loss, so it does not depend on the split.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gradfold

NUM_EPOCHS = 10
NUM_NOISE = 4


def make_loader():
    """Points on a circle of radius 1."""
    generator = torch.Generator().manual_seed(0)
    angles = 2 * torch.pi * torch.rand(990, generator=generator)
    points = torch.stack([angles.cos(), angles.sin()], dim=1)  # (990, 2)
    return DataLoader(points, batch_size=128, shuffle=True, generator=generator)


def make_networks():
    generator = nn.Sequential(nn.Linear(NUM_NOISE, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    discriminator = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32), nn.LeakyReLU(0.2))
    discriminator.append(nn.Linear(32, 1))
    return nn.ModuleList([generator, discriminator])


def make_optimizers(networks):
    return [torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.999)) for network in networks]


def d_loss(networks, batch):
    generator, discriminator = networks
    with torch.no_grad():
        fake = generator(batch["noise"])
    return F.softplus(-discriminator(batch["real"])).mean() + F.softplus(discriminator(fake)).mean()


def g_loss(networks, batch):
    generator, discriminator = networks
    return F.softplus(-discriminator(generator(batch["noise"]))).mean()


def main():
    torch.manual_seed(0)
    loader = make_loader()
    networks = make_networks()
    g_optimizer, d_optimizer = make_optimizers(networks)

    d_step = gradfold.TrainStep(gradfold.Accumulator(networks, d_loss, micro_batch_size=32), d_optimizer)
    g_step = gradfold.TrainStep(gradfold.Accumulator(networks, g_loss, micro_batch_size=32), g_optimizer)
    for epoch in range(NUM_EPOCHS):
        for real in loader:
            batch = {"real": real, "noise": torch.randn(len(real), NUM_NOISE)}
            d_result = d_step(batch)
            g_result = g_step(batch)
        if epoch % 3 == 0:
            print(f"epoch {epoch}: discriminator {d_result.loss:.4f}, generator {g_result.loss:.4f}")
    return networks


if __name__ == "__main__":
    main()
