"""The self-check: whether a loss can be accumulated at all, tried once on a few rows of the first window.

`self_check.py` has `experiment.py` run a micro-batch whole and in two parts, and compare (`comparison.py`); where they
differ `diagnosis.py` says why. `rng_replay.py` hands a part the random numbers of its rows.
"""
