"""BatchNorm in a window of several micro-batches: refused, by micro-batch, exact, or converted to GroupNorm.

BatchNorm makes every sample depend on the others, so the gradient of a batch is not the sum of its parts'.

- `policy.py`: the option `batch_norm=`, the layers that it is about, and the refusal where it is not given.
- `per_micro_batch.py`: each micro-batch by its own statistics, running statistics by the window's.
- `convert.py`: the public `convert_batch_norm`, which needs no option.
- `exact.py`: every BatchNorm normalizes by the whole window, of all ranks. Start here; the drawing is in
  `joint_call.py`. Forward passes run in `coroutines.py`; `intercept.py` sees calls of batch_norm; `moments.py` merges
  mean and variance; `coordinator.py` does so over ranks; `offload.py` sends activations to host memory; `mutations.py`
  and `checks.py` refuse what would not be exact.
"""
