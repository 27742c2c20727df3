"""A padded sequence-to-sequence model: the loss is a mean over target tokens, the accuracy one over sentences.

A weight for each: token weights for the loss, samples for the accuracy. With one weight for both, long sentences would
count more in an accuracy over sentences.

    -for batches in windows_of_4(loader):
    -    num_tokens = sum((batch["target"][:, 1:] != PAD).sum() for batch in batches)
    -    for batch in batches:
    -        loss_sum, num_right = sums(model, batch)
    -        (loss_sum / num_tokens).backward()
    -    optimizer.step()
    -    optimizer.zero_grad()
    +weight = {"loss": token_count("target", ignore_index=PAD, shift=True), "sentence_accuracy": "samples"}
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=16, weight=weight)
    +step = gradfold.TrainStep(accumulator, optimizer, max_grad_norm=1.0)
    +for batch in loader:
    +    step(batch)

Label smoothing needs no care: `cross_entropy` takes its mean over the same tokens. `shift=True`, as the first target
token only starts the decoder.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import gradfold

PAD, START, END, NUM_TOKENS = 0, 1, 2, 13
NUM_EPOCHS, MAX_LENGTH = 5, 10

WEIGHTS = {"loss": gradfold.token_count("target", ignore_index=PAD, shift=True), "sentence_accuracy": "samples"}


def collate(sentences):
    """The task: write a sentence backwards."""
    start, end = torch.tensor([START]), torch.tensor([END])
    targets = [torch.cat([start, sentence.flip(0), end]) for sentence in sentences]
    return {"source": pad_sequence(sentences, batch_first=True), "target": pad_sequence(targets, batch_first=True)}


def make_loader():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, MAX_LENGTH - 1, (400,), generator=generator).tolist()
    sentences = [torch.randint(3, NUM_TOKENS, (length,), generator=generator) for length in lengths]
    return DataLoader(sentences, batch_size=64, shuffle=True, generator=generator, collate_fn=collate)


class Translator(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.token, self.position = nn.Embedding(NUM_TOKENS, width), nn.Embedding(MAX_LENGTH, width)
        self.transformer = nn.Transformer(width, 4, 1, 1, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, NUM_TOKENS)

    def forward(self, source, target):  # (B, S), (B, T) -> (B, T, NUM_TOKENS)
        embedded = [self.token(tokens) + self.position.weight[: tokens.shape[1]] for tokens in (source, target)]
        padding, future = source == PAD, torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": future}
        return self.head(self.transformer(*embedded, **masks))


def loss_fn(model, batch):
    labels = batch["target"][:, 1:]
    logits = model(batch["source"], batch["target"][:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=0.1)
    is_right = ((logits.argmax(-1) == labels) | (labels == PAD)).all(1)
    return loss, {"sentence_accuracy": is_right.float().mean()}


def main():
    torch.manual_seed(0)
    loader, model = make_loader(), Translator()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=16, weight=WEIGHTS)
    step = gradfold.TrainStep(accumulator, optimizer, max_grad_norm=1.0)
    accuracies = []
    for epoch in range(NUM_EPOCHS):
        for batch in loader:
            result = step(batch)
            accuracies.append(result.metrics["sentence_accuracy"].item())
        print(f"epoch {epoch}: loss {result.loss:.4f}, whole sentences right {accuracies[-1]:.3f}")
    return model, accuracies


if __name__ == "__main__":
    main()
