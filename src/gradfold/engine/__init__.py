"""The engine: runs a window of micro-batches in some order, recovers it from faults, and makes one gradient of it.

Start with `window.py`, whose steps [1] to [6] the other files implement:

    window.py         `Context`, `Window`; `result.py` has `WindowResult` and `Recovery`
    strategy.py       `Strategy`: the order of forward and backward passes; `Sequential` is the plain one
    backward.py       `BackPropagation` of weighted loss terms, through torch or `backward=`
    loss_terms.py     `LossTerms` and their means over the window; `metrics.py` does so for `Metrics`
    prefetch.py       micro-batches on their way to the device
    recovery.py       `run_with_recovery`, which also finds the offending micro-batch
    coordinator.py    `Coordinator`: what ranks tell each other, here for one process
    model_checks.py   hooks, lazy layers, and layers that depend on the split
    loss_graph.py     what the graph of a loss tells; `graph.py` finds its leaves
    outside.py        gradients of tensors outside the model
    window_lock.py    what may not happen between the micro-batches of a loop

It knows no feature: BatchNorm, two-phase losses, token budgets and dropout come as strategies, splitters and listeners.
"""
