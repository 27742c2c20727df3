"""Object detection: images of different sizes, each with a different number of boxes.

Such samples do not stack, so the loader gives lists of samples, and `collate=` makes what the model takes from those of
one micro-batch. The two terms have denominators of their own: cells of the heat maps, and objects.

    -loader = DataLoader(dataset, batch_size=4, collate_fn=collate)
    -for i, batch in enumerate(loader):
    -    (sum(loss_fn(model, batch).values()) / 4).backward()         # means over uneven numbers of cells and objects
    -    if (i + 1) % 4 == 0:
    -        optimizer.step()
    -        optimizer.zero_grad()
    +loader = DataLoader(dataset, batch_size=16, collate_fn=list)
    +weight = {"center": num_cells, "size": num_objects}
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, collate=collate, weight=weight)
    +for samples in loader:
    +    accumulator.backward(samples)
    +    optimizer.step()
    +    optimizer.zero_grad()

Weights must be known before the forward pass. Detectors that draw their denominators inside it (sampled anchors) keep
weight="samples", the default: the mean over images of what each micro-batch gives.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gradfold

NUM_EPOCHS = 4


def num_cells(micro_batch):
    return sum(image.numel() for image in micro_batch["images"])


def num_objects(micro_batch):
    return sum(len(boxes) for boxes in micro_batch["boxes"])  # 0 in some micro-batches: they leave the term out


WEIGHTS = {"center": num_cells, "size": num_objects}


def make_loader():
    """Dark images with up to two bright rectangles; a box is its center's row and column, its height and its width."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for num_objects in torch.randint(0, 3, (60,), generator=generator).tolist():
        height, width = torch.randint(12, 24, (2,), generator=generator).tolist()
        image = 0.1 * torch.randn(1, height, width, generator=generator)
        boxes = torch.randint(3, 9, (num_objects, 4), generator=generator)
        for row, column, down, across in boxes.tolist():
            image[:, row - down // 2 : row + down // 2 + 1, column - across // 2 : column + across // 2 + 1] += 1.0
        samples.append((image, boxes))  # (1, H, W), (num_objects, 4)
    return DataLoader(samples, batch_size=16, shuffle=True, generator=generator, collate_fn=list)


def collate(samples):
    images, boxes = zip(*samples, strict=True)
    return {"images": images, "boxes": boxes}


def make_model():
    """For every cell: the logit that an object's center is there, and the object's height and width."""
    return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 3, 5, padding=2))


def loss_fn(model, micro_batch):
    logits, centers, sizes, true_sizes = [], [], [], []
    for image, boxes in zip(micro_batch["images"], micro_batch["boxes"], strict=True):
        output = model(image[None])[0]  # (3, H, W)
        row, column = boxes[:, 0], boxes[:, 1]
        logits.append(output[0].flatten())
        centers.append(torch.zeros_like(output[0]).index_put((row, column), output.new_ones(())).flatten())
        sizes.append(output[1:, row, column].T)  # (num_objects, 2)
        true_sizes.append(boxes[:, 2:])
    center = F.binary_cross_entropy_with_logits(torch.cat(logits), torch.cat(centers))
    return {"center": center, "size": 0.1 * F.l1_loss(torch.cat(sizes), torch.cat(true_sizes))}


def main():
    torch.manual_seed(0)
    loader, model = make_loader(), make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, collate=collate, weight=WEIGHTS)
    for epoch in range(NUM_EPOCHS):
        for samples in loader:
            result = accumulator.backward(samples)
            optimizer.step()
            optimizer.zero_grad()
        weights = ", ".join(f"{weight:.0f} for {name}" for name, weight in result.weight.items())
        print(f"epoch {epoch}: loss {result.loss:.4f}, denominators {weights}")
    return model


if __name__ == "__main__":
    main()
