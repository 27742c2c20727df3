"""Token budgets: rows of like length packed into micro-batches with little padding."""
