"""Two tasks on one trunk, where most images have the labels of one task only, and some micro-batches none of them.

Each term has its own denominator: pixels with a depth, pixels with a class. Where a micro-batch has none of a term's
labels, its weight is 0 and the term (a mean over nothing, NaN) is left out there.

    -for batch in micro_batches:
    -    depth, classes = terms(model, batch)                      # and nan_to_num, or an if for each task
    -    ((depth + 0.5 * classes) / len(micro_batches)).backward()
    +weight = {"depth": lambda batch: batch["depth"].isfinite().sum(), "classes": token_count("classes", ...)}
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, weight=weight)
    +accumulator.backward(batch)

A mean per micro-batch, divided by their number, gives a labeled pixel more weight the fewer there are in its
micro-batch.
"""

import torch
from torch import nn
from torch.nn import functional as F

import gradfold

NUM_UPDATES = 20
NUM_CLASSES, NO_CLASS = 4, 255


def num_depths(batch):
    return batch["depth"].isfinite().sum()


WEIGHTS = {"depth": num_depths, "classes": gradfold.token_count("classes", ignore_index=NO_CLASS)}


def make_batch(generator):
    """24 scenes: 14 from a data set with depths (with holes), then 10 from one with classes."""
    depth = torch.rand(24, 1, 12, 12, generator=generator)
    depth = F.avg_pool2d(depth, 5, stride=1, padding=2)  # smooth surfaces
    images = torch.cat([depth, depth.square(), 1 - depth], dim=1)  # (24, 3, 12, 12)
    classes = (depth.squeeze(1) * 2 * NUM_CLASSES).long().clamp(max=NUM_CLASSES - 1)
    depth[torch.rand(depth.shape, generator=generator) < 0.3] = torch.nan  # the sensor saw nothing
    depth[14:], classes[:14] = torch.nan, NO_CLASS
    return {"image": images, "depth": depth.squeeze(1), "classes": classes}


class TwoHeads(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU())
        self.depth, self.classes = nn.Conv2d(width, 1, 1), nn.Conv2d(width, NUM_CLASSES, 1)

    def forward(self, images):  # (B, 3, H, W) -> (B, H, W), (B, NUM_CLASSES, H, W)
        features = self.trunk(images)
        return self.depth(features).squeeze(1), self.classes(features)


def loss_fn(model, batch):
    depth, logits = model(batch["image"])
    is_known = batch["depth"].isfinite()
    return {
        "depth": F.l1_loss(depth[is_known], batch["depth"][is_known]),
        "classes": 0.5 * F.cross_entropy(logits, batch["classes"], ignore_index=NO_CLASS),
    }


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, weight=WEIGHTS)
    step = gradfold.TrainStep(accumulator, optimizer)
    for _ in range(NUM_UPDATES):
        result = step(make_batch(generator))
        if step.updates % 5 == 0:
            terms = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            print(f"update {step.updates}: loss {result.loss:.4f} = {terms}")
    return model


if __name__ == "__main__":
    main()
