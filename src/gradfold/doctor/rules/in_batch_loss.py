"""GF016: in-batch loss under accumulation (warning).

A contrastive loss (InfoNCE, SimCLR, CLIP, triplets mined in the batch) or a statistic over the batch (Barlow Twins) is
accumulated over micro-batches.

Why: The other samples of the batch are the negatives. Split into n parts, each sample is compared with n times fewer,
and no sum over parts contains the pairs between them: 512 micro-batches of one sample learn nothing.
Detection: In most micro-batches, the graph of the loss has a product or distance of two computed matrices (not a
parameter) over all pairs of rows of the micro-batch, or a product summed over the rows.
Limits: Shapes are the only evidence, so the finding is *likely*. Pairs made without a matrix product (by broadcasting)
are not seen, nor what is inside a compiled region.

Fix:
- logits = image_features @ text_features.T
- loss = F.cross_entropy(logits, torch.arange(len(logits))) / 8
- loss.backward()
+ with torch.no_grad():
+     features = [encode(part) for part in window]
+ features = [part.requires_grad_() for part in features]
+ contrastive(torch.cat(features)).backward()
+ for part, wanted in zip(window, features):
+     encode(part).backward(wanted.grad)
"""

from __future__ import annotations

from gradfold.doctor.history import RunRecord
from gradfold.doctor.rule import Violation, Violations


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        walked = [one for one in history.micro_batches if one.graph.is_walked]
        coupled = [one for one in walked if one.rows > 1 and {one.rows, 2 * one.rows} & {*one.graph.compared_rows}]
        if 2 * len(coupled) <= len(walked):
            continue
        n = history.window_length
        yield Violation(
            coupled[0].location,
            "the loss compares the samples of a batch with each other, or computes a statistic of them (a matrix over "
            f"all pairs): split into {n} micro-batches, each sample sees 1/{n} of its batch. Accumulation does not "
            "make up for that: the mean over micro-batches is a different loss from that of the whole batch.",
            "Compute the embeddings of the whole batch without a graph, the loss on all of them, and run the "
            "micro-batches again with the gradients of their embeddings (GradCache), as `gradfold.TwoPhaseLoss("
            "statistic, loss)` does. Or use a larger micro-batch.",
            "likely",
        )
