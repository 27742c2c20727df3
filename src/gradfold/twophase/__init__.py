"""Two-phase losses: exact gradients for losses that compare the samples of a batch, in the memory of a micro-batch.

Such a loss is a function of *statistics* (embeddings, overlaps, counts), which are a function of each sample and much
smaller than the activations behind them. A window runs in three passes (GradCache: Gao et al. 2021, arXiv 2101.06983):
embed every micro-batch without a graph, the loss once over all statistics, recompute every micro-batch and
back-propagate the cached gradients of its statistics.

Start with `loss.py`, the public `TwoPhaseLoss` and the mathematics. Then `strategy.py` runs the passes, `statistics.py`
concatenates or sums what they exchange, over micro-batches and ranks, and `checks.py` compares statistics without a
gradient (labels, masks) in the self-check.
"""
