"""Token budgets: rows of similar length are packed into micro-batches with little padding.

Start with `token_budget.py`, the public option. `token_batcher.py` is its `MicroBatcher`, and combines the rest:
`packer.py` plans which rows run together, without tensors; `padding.py` finds the dimensions of a batch that are padded
and trims them; `padding_check.py` proves that the gradient does not depend on the padding. docs/token-budget.md has
what users see.
"""
