"""State: what a run may change, saved and put back.

Start with `snapshot.py`: a `Snapshot` is all of it; docs/design.md says what windows and probes put back. Its parts
are `gradients.py` (the `.grad` fields), `buffers.py` (which buffers forward passes change is learned), `rng.py` (random
states), `attributes.py` (of modules) and `external.py` (closures and globals of the user's functions).
"""
