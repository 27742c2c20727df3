"""The zoo: set-ups that accumulate exactly, that do not, and that cannot be decided; each with the truth about it.

`tests/exactness/test_zoo.py` holds the labels against plain torch, `tests/self_check/test_zoo.py` the first-window
self-check against the labels, and `python -m zoo.page` (with PYTHONPATH=tests) writes docs/what-is-equal.md from them.
"""

from zoo.case import Case as Case
from zoo.case import Setup as Setup
from zoo.right import RIGHT as RIGHT
from zoo.unknowable import UNKNOWABLE as UNKNOWABLE
from zoo.wrong import WRONG as WRONG

ALL = [*RIGHT, *WRONG, *UNKNOWABLE]
