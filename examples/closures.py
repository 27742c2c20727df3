"""Optimizers that ask for the gradient themselves, as often as they like: LBFGS, and SAM.

Such optimizers take a closure, and the closure is where the accumulator goes. LBFGS compares losses of the whole batch
along a line; SAM climbs along the gradient of the whole batch. Both need it exactly, at every call.

     def closure():
         optimizer.zero_grad()
    -    total = 0.0
    -    for part in micro_batches:
    -        loss = loss_fn(model, part) * len(part[0]) / num_rows
    -        loss.backward()
    -        total += loss.detach()
    -    return total
    +    return accumulator.backward(batch).loss
     optimizer.step(closure)

`TrainStep` makes one gradient per update, and refuses such optimizers.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import gradfold

NUM_UPDATES = {"LBFGS": 6, "SAM": 50}


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412): the gradient is taken a step `rho` uphill."""

    def __init__(self, parameters, rho=0.05, **options):
        super().__init__(parameters, **options)
        self.rho = rho

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad.clone() for parameter in parameters]
        size = self.rho / torch.nn.utils.get_total_norm(gradients)
        torch._foreach_add_(parameters, torch._foreach_mul(gradients, size))
        closure()  # the gradient up there
        torch._foreach_sub_(parameters, torch._foreach_mul(gradients, size))
        super().step()
        return loss


def make_batch():
    inputs, labels = load_digits(return_X_y=True)
    return torch.tensor(inputs[:500], dtype=torch.get_default_dtype()) / 16, torch.tensor(labels[:500])


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def make_optimizer(name, model):
    if name == "SAM":
        return SAM(model.parameters(), lr=0.5, momentum=0.9)
    return torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")


def loss_fn(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def train(name, batch):
    model = make_model()
    optimizer = make_optimizer(name, model)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=64)

    def closure():
        optimizer.zero_grad()
        return accumulator.backward(batch).loss

    losses = [optimizer.step(closure).item() for _ in range(NUM_UPDATES[name])]
    print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}, {accumulator.num_windows} gradients of the batch")
    return model


def main():
    batch = make_batch()
    return {name: train(name, batch) for name in NUM_UPDATES}


if __name__ == "__main__":
    main()
