"""Workloads: what the commands train, built in or the user's own. Start reading at `workload.py`.

- `Workload`: model, loss, data, optimizer and evaluation in one value.
- `registry`: the built-in ones by name, the user's own by module or file.
- `regression`, `images`, `language`, `translation`: the built-in ones; `transformer` and `scoring` are what they share.
- `image_data`, `text_data`: the data sets, out of `data_files`.
"""

from gradfold.workloads.registry import BUILT_IN as BUILT_IN
from gradfold.workloads.registry import load as load
from gradfold.workloads.workload import Workload as Workload
