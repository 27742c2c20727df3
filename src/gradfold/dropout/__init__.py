"""Counter-based dropout: masks that depend on the row of the global batch, not on the split.

`convert.py` has the public `convert_dropout`, which replaces torch's layers by those of `layer.py`. Start there: a mask
is a hash of (seed, update, layer, call, row, element), as in stateless random number generators (Random123, JAX), so it
is the same however a batch is split, in whatever order its parts run, and when they run again.
"""
