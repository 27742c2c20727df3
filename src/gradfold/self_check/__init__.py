"""The self-check: whether a loss can be accumulated at all, tried once on a few rows of the first window.

Start with `self_check.py`, which calls the rest in order:

    experiment.py     `SplitExperiment` runs a micro-batch whole and in two parts (`Split`)
    comparison.py     `GradientComparison` of the whole with its parts, and the one table of tolerances
    diagnosis.py      why they differ, as the error that says what to write; `weight_search.py` finds the right weight
    probe_run.py      `ProbeRun`: passes without side effects
    rng_replay.py     recorded randomness of the whole, sliced for the rows of a part
    layers.py         a tracer of what goes into and out of every module
    observations.py   what else the three runs show, for other packages
"""
