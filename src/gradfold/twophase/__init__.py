"""Two-phase losses: exact gradients for losses that compare the samples of a batch."""
