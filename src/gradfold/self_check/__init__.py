"""The self-check: whether a loss can be accumulated at all, tried on a few rows of the first window.

`self_check.py` says when to look, and at which parts. `experiment.py` runs a micro-batch whole and in two parts, and
`comparison.py` compares the gradients; where they differ `diagnosis.py` says why. `rng_replay.py` hands a part the
random numbers of its rows. `loop_check.py` judges the losses of a loop, which cannot be run in parts, by their graphs.
"""
