"""GF016: a loss compares the samples of a batch with each other, and the batch is cut."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.events import Backward
from gradfold.doctor.finding import LIKELY, WARNING, Observation
from gradfold.doctor.history import RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        looked = [one for window in training.accumulating for one in window.micro_batches if one.census is not None]
        coupled = [one for one in looked if _compares(one)]
        if not coupled or 2 * len(coupled) <= len(looked):
            continue
        yield Observation(
            coupled[0].place,
            "the loss compares the samples of a batch with each other, or makes a statistic of them (a matrix over all "
            f"pairs): cut into {training.usual} micro-batches, each sample sees 1/{training.usual} of its batch. "
            "Accumulation does not make up for that: the mean over micro-batches is another loss than that of the "
            "whole batch.",
            "Compute the embeddings of the whole batch without a graph, the loss on all of them, and run the "
            "micro-batches again with the gradients of their embeddings (GradCache): `gradfold.TwoPhaseLoss(statistic, "
            "loss)` does that. Or use a larger micro-batch.",
            LIKELY,
        )


def _compares(one: Backward) -> bool:
    if one.census is None or one.rows < 2:
        return False
    return any(size in (one.rows, 2 * one.rows) for size in one.census.similarities)


RULE = Rule(
    code="GF016",
    name="in-batch loss under accumulation",
    severity=WARNING,
    what="A contrastive loss (InfoNCE, SimCLR, CLIP, triplets mined in the batch) or a statistic over the batch "
    "(Barlow Twins) is accumulated over micro-batches.",
    why="The other samples of the batch are the negatives. Cut into n parts, each sample meets n times fewer, and no "
    "sum over parts makes up for the pairs between them: 512 micro-batches of one sample learn nothing.",
    detection="The graph of the loss has a product or distance of two computed matrices (neither a parameter) over all "
    "pairs of rows of the micro-batch, or one summed over the rows, in most micro-batches.",
    limits="Told from shapes, so *likely*. Pairs made without a matrix product (by broadcasting) are not seen, nor "
    "what is inside of a compiled region.",
    wrong="""logits = image_features @ text_features.T
loss = F.cross_entropy(logits, torch.arange(len(logits))) / 8
loss.backward()
""",
    right="""with torch.no_grad():
    features = [encode(part) for part in window]
features = [part.requires_grad_() for part in features]
contrastive(torch.cat(features)).backward()
for part, wanted in zip(window, features):
    encode(part).backward(wanted.grad)
""",
    check=_check,
)
