"""A diffusion model with an exponential moving average (EMA) of its weights.

    -for i, points in enumerate(loader):
    -    time, noise = torch.rand(len(points)), torch.randn_like(points)
    -    (mse_loss(model(diffuse(points, time, noise), time), noise) / 4).backward()
    -    if (i + 1) % 4 == 0:
    -        optimizer.step()
    -        optimizer.zero_grad()
    -        ema.update_parameters(model)
    +step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, micro_batch_size=64), optimizer, max_grad_norm=1.0)
    +for points in loader:
    +    if step(with_noise(points)).applied:
    +        ema.update_parameters(model)

Times and noise are drawn with the batch and travel in it: the same numbers whatever the micro-batch, and a loss that
can be computed twice. Drawn inside `loss_fn` they would be right in distribution only. The average follows updates, not
micro-batches; `applied` is False where a batch made none.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import gradfold

NUM_EPOCHS = 20


def make_loader():
    """Points on a noisy spiral."""
    generator = torch.Generator().manual_seed(0)
    turn = 3 * torch.pi * torch.rand(990, 1, generator=generator).sqrt()
    points = torch.cat([turn.cos(), turn.sin()], dim=1) * turn / 5 + 0.02 * torch.randn(990, 2, generator=generator)
    return DataLoader(points, batch_size=256, shuffle=True, generator=generator)


class Denoiser(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, points, time):  # (B, 2), (B,) -> (B, 2)
        phase = time[:, None] * torch.pi * 2.0 ** torch.arange(4)
        return self.layers(torch.cat([points, phase.cos(), phase.sin()], dim=1))


def make_average(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))


def with_noise(points):
    return {"points": points, "time": torch.rand(len(points)), "noise": torch.randn_like(points)}


def loss_fn(model, batch):
    angle = batch["time"][:, None] * torch.pi / 2  # the cosine schedule: all signal at time 0, all noise at 1
    diffused = angle.cos() * batch["points"] + angle.sin() * batch["noise"]
    return F.mse_loss(model(diffused, batch["time"]), batch["noise"])


def main():
    torch.manual_seed(0)
    loader = make_loader()
    model = Denoiser()
    ema = make_average(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, micro_batch_size=64), optimizer, max_grad_norm=1.0)
    for epoch in range(NUM_EPOCHS):
        for points in loader:
            result = step(with_noise(points))
            if result.applied:
                ema.update_parameters(model)
        if epoch % 5 == 4:
            print(f"epoch {epoch}: loss {result.loss:.4f}, gradient norm {result.grad_norm:.3f}")
    return model, ema


if __name__ == "__main__":
    main()
