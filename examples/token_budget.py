"""Texts of very different length, classified: most of a padded batch is padding, which costs nothing here.

A token budget says how many padded tokens run at once. The rows of each batch are sorted by length and split where
padding costs least, and every micro-batch is trimmed to its longest row. Gradient and update stay those of the batch as
the loader gave it.

     for batch in loader:                                            # padded to the longest text
    -    for start in range(0, len(batch["tokens"]), 8):             # each part padded as far as the batch
    -        part = {name: tensor[start : start + 8] for name, tensor in batch.items()}
    -        (loss_fn(model, part) * len(part["tokens"]) / len(batch["tokens"])).backward()
    -    optimizer.step()
    -    optimizer.zero_grad()
    +budget = gradfold.TokenBudget(2048, lengths=lambda batch: batch["mask"].sum(1))
    +step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, batching=budget), optimizer)
    +for batch in loader:
    +    step(batch)

The tensors to trim are found in each batch ("tokens" and "mask" here; "label" has no such dimension). A model whose
gradient depends on the padding is refused, by the name of the layer. Metrics with one value per
row come back in the order of the batch.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import gradfold

NUM_EPOCHS, MAX_LENGTH = 3, 256
BUDGET = gradfold.TokenBudget(2048, lengths=lambda batch: batch["mask"].sum(1))


def make_loader():
    """Which type does a docstring belong to? Text that comes with every Python."""
    types = (str, bytes, dict, list, int, float)
    samples = []
    for label, kind in enumerate(types):
        for name in sorted(vars(kind)):
            text = f"{name}: {getattr(kind, name).__doc__ or ''}".encode("ascii", "replace")[:MAX_LENGTH]
            samples.append((torch.tensor(list(text)), label))
    generator = torch.Generator().manual_seed(0)
    return DataLoader(samples, 64, shuffle=True, generator=generator, collate_fn=collate)


def collate(samples):
    return {
        "tokens": pad_sequence([tokens for tokens, _ in samples], batch_first=True),  # (B, L)
        "mask": pad_sequence([torch.ones(len(tokens)) for tokens, _ in samples], batch_first=True),
        "label": torch.tensor([label for _, label in samples]),
    }


class Classifier(nn.Module):
    def __init__(self, num_tokens=128, width=32, num_classes=6):
        super().__init__()
        self.token, self.position = nn.Embedding(num_tokens, width), nn.Embedding(MAX_LENGTH, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens, mask):  # (B, L) -> (B, num_classes)
        hidden = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        hidden = self.layer(hidden, src_key_padding_mask=mask == 0) * mask[..., None]
        return self.head(hidden.sum(1) / mask.sum(1, keepdim=True))  # the mean over tokens, padding left out


def loss_fn(model, batch):
    logits = model(batch["tokens"], batch["mask"])
    is_right = logits.argmax(1) == batch["label"]
    return F.cross_entropy(logits, batch["label"]), {"accuracy": is_right.float().mean(), "is_right": is_right}


def main():
    torch.manual_seed(0)
    loader, model = make_loader(), Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    step = gradfold.TrainStep(gradfold.Accumulator(model, loss_fn, batching=BUDGET), optimizer)
    for epoch in range(NUM_EPOCHS):
        right = []
        for batch in loader:
            result = step(batch)
            right.append(result.metrics["is_right"])
        print(f"epoch {epoch}: loss {result.loss:.3f}, right {torch.cat(right).float().mean():.3f}")
    return model, right


if __name__ == "__main__":
    main()
