"""Batches: nestings of tensors, their rows, and how they are split into micro-batches.

Start with `split.py`: a `MicroBatcher` splits batch after batch into `MicroBatch`es, by rows or by samples that are
collated, and learns which size fits. `rows.py` counts rows and refuses what has none; `nesting.py` maps and cuts
tuples, lists, dicts, dataclasses and named tuples.
"""
