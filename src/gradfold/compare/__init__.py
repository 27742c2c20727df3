"""`gradfold compare`: one model trained in several ways from one start, and what differs.

Every arm (an experiment's arm: a way to train) runs in a process of its own. Read in this order: `arms` (the table of
all arms), `loops` (their training loops), `experiment` (one arm trained and measured), `runner` and `worker` (the
processes), `results` (what comes back, and the distances from the full batch), `summary` (tables and footnotes),
`report` (figures and the HTML page). `settings` has what the command line asks for, `data` the batches, `measure` clock
and memory.
"""

from gradfold.compare.results import Comparison as Comparison
from gradfold.compare.runner import ArmProgress as ArmProgress
from gradfold.compare.runner import compare as compare
from gradfold.compare.settings import Settings as Settings
