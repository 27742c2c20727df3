"""PPO on token sequences: a denominator per term, and advantages normalized over the whole batch.

The policy and entropy terms are means over tokens, the value term over sequences: no single division is right for all.
What belongs to the whole batch (the advantages) is computed on the whole batch, before it is split.

    -for batch in micro_batches:
    -    policy, entropy, value, kl = terms(model, batch)
    -    ((policy + entropy + value) / len(micro_batches)).backward()
    +weight = {"policy": num_tokens, "entropy": num_tokens, "value": "samples", "kl": num_tokens}
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=16, weight=weight)
    +result = accumulator.backward(batch)
    +if result.metrics["kl"] > MAX_KL: ...             # of the whole batch, before the update

"kl" is a metric, not a loss term, and has a weight, too. "log_prob" has one entry per row: such metrics need no weight,
and come back in the order of the batch.
"""

import torch
from torch import nn
from torch.nn import functional as F

import gradfold

NUM_ROLLOUTS, EPOCHS_PER_ROLLOUT, MAX_KL = 12, 4, 0.1
NUM_SEQUENCES, MAX_LENGTH, NUM_TOKENS, END = 128, 8, 6, 0


def num_tokens(batch):
    return batch["mask"].sum()


WEIGHTS = {"policy": num_tokens, "entropy": num_tokens, "value": "samples", "kl": num_tokens}


class ActorCritic(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(NUM_TOKENS, width), nn.GRU(width, width, batch_first=True)
        self.actor, self.critic = nn.Linear(width, NUM_TOKENS), nn.Linear(width, 1)

    def forward(self, tokens):  # (B, L) -> log-probabilities of the next token (B, L, NUM_TOKENS), values (B,)
        hidden, _ = self.recurrent(self.embedding(tokens))
        return self.actor(hidden).log_softmax(-1), self.critic(hidden[:, 0]).squeeze(-1)


@torch.no_grad()
def rollout(model):
    """Each sequence starts with a prompt; its reward is how often it repeats it before it ends."""
    tokens = torch.randint(1, NUM_TOKENS, (NUM_SEQUENCES, 1))
    for _ in range(MAX_LENGTH):
        log_probs, values = model(tokens)
        tokens = torch.cat([tokens, log_probs[:, -1].exp().multinomial(1)], dim=1)
    actions = tokens[:, 1:]
    mask = ((actions == END).cumsum(1) - (actions == END).long() == 0).to(values)  # up to the first END, with it
    returns = ((actions == tokens[:, :1]) * mask).sum(1) / MAX_LENGTH
    advantages = returns - values
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # over the whole batch
    taken = log_probs.gather(-1, actions[..., None]).squeeze(-1)  # the last pass saw all but the last action
    return {"tokens": tokens, "mask": mask, "log_probs": taken, "returns": returns, "advantages": advantages}


def loss_fn(model, batch):
    def token_mean(per_token):
        return (per_token * batch["mask"]).sum() / batch["mask"].sum()

    every, values = model(batch["tokens"][:, :-1])
    log_probs = every.gather(-1, batch["tokens"][:, 1:, None]).squeeze(-1)
    ratio = (log_probs - batch["log_probs"]).exp()
    gain = batch["advantages"][:, None] * torch.stack([ratio, ratio.clamp(0.8, 1.2)])
    policy, entropy = -token_mean(gain.amin(0)), -token_mean((every.exp() * every).sum(-1))
    terms = {"policy": policy, "entropy": -0.01 * entropy, "value": 0.5 * F.mse_loss(values, batch["returns"])}
    return terms, {"kl": token_mean(ratio - 1 - ratio.log()), "log_prob": (log_probs * batch["mask"]).sum(1)}


def main():
    torch.manual_seed(0)
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=16, weight=WEIGHTS)
    for index in range(NUM_ROLLOUTS):
        batch = rollout(model)
        for _ in range(EPOCHS_PER_ROLLOUT):
            optimizer.zero_grad()
            result = accumulator.backward(batch)
            if result.metrics["kl"] > MAX_KL:
                break
            optimizer.step()
        if index % 4 == 3:
            surest = batch["tokens"][result.metrics["log_prob"].argmax()].tolist()
            print(f"rollout {index}: reward {batch['returns'].mean():.3f}, kl {result.metrics['kl']:.4f}, {surest}")
    return model, batch, result


if __name__ == "__main__":
    main()
