"""Counter-based dropout: masks that depend on the row of the batch, not on the split."""
