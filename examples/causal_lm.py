"""A causal language model fine-tuned on prompts and answers: the mean is over tokens, and texts differ in length.

Micro-batches have unequal numbers of tokens, so the mean of their means is not the mean of the batch. `weight=` says
what the mean is over. The loader gives lists of samples, and each micro-batch is padded to its own longest text.

    -samples = iter(loader)
    -while window := list(islice(samples, 4)):                       # micro-batches of 4
    -    num_tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
    -    for batch in window:
    -        (loss_sum(model, batch) / num_tokens).backward()        # a sum, not the model's own mean
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, collate=collate,
    +                                   weight=gradfold.token_count("labels", shift=True))
    +for samples in loader:                                          # lists of 16
    +    accumulator.backward(samples)
         clip_grad_norm_(model.parameters(), 1.0)
         optimizer.step()
         optimizer.zero_grad()

With a model of the transformers library, `loss_fn` is `lambda model, batch: model(**batch).loss`. `shift=True`, as such
models predict label t + 1 from position t: the first label of each row is not in the mean.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import gradfold

NUM_EPOCHS, MAX_LENGTH = 5, 96
WEIGHT = gradfold.token_count("labels", shift=True)


def make_loader():
    """Docstrings of the methods of str: text that comes with every Python. The public ones are asked for by name."""
    samples = []
    for name in sorted(vars(str)):
        prompt = b"" if name.startswith("_") else f"{name}: ".encode()
        answer = (getattr(str, name).__doc__ or name).encode("ascii", "replace")
        tokens = torch.tensor(list(prompt + answer))[:MAX_LENGTH]
        is_prompt = torch.arange(len(tokens)) < len(prompt)  # the loss is over the answers alone
        samples.append({"input_ids": tokens, "labels": tokens.masked_fill(is_prompt, -100)})
    return DataLoader(samples, 16, shuffle=True, generator=torch.Generator().manual_seed(0), collate_fn=list)


def collate(samples):
    def pad(name, value):
        return pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)

    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}  # (B, L) each


class TinyGPT(nn.Module):
    def __init__(self, num_tokens=128, width=32, num_heads=4):
        super().__init__()
        self.token, self.position = nn.Embedding(num_tokens, width), nn.Embedding(MAX_LENGTH, width)
        block = nn.TransformerEncoderLayer(width, num_heads, 4 * width, 0.0, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(block, num_layers=2)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, input_ids):  # (B, L) -> (B, L, num_tokens)
        length = input_ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)  # padding is on the right: no one looks there
        hidden = self.token(input_ids) + self.position.weight[:length]
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


def loss_fn(model, batch):
    logits = model(batch["input_ids"])[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)


def main():
    torch.manual_seed(0)
    loader, model = make_loader(), TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, collate=collate, weight=WEIGHT)
    for epoch in range(NUM_EPOCHS):
        for samples in loader:
            result = accumulator.backward(samples)
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {result.loss:.4f}, a mean over {result.weight:.0f} tokens")
    return model


if __name__ == "__main__":
    main()
