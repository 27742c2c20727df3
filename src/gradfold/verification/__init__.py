"""Verification: whether the accumulated gradient is that of the whole batch, on a user's own model, and if not, why.

Start with `verify.py`. It runs a `Setup` (a frozen copy of the user's model, loss and batch) whole and in micro-batches
(`runs.py`), compares (`comparison.py`), and finds the cause by experiment (`causes.py`, `locate.py`). The reference
(`reference.py`) imports nothing of gradfold. The result is a `Verdict`.
"""
