"""The process that a script runs in: `python -m gradfold.doctor REQUEST`, started by `process.py`."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

from gradfold.doctor.diagnose import diagnose_run
from gradfold.doctor.run import Run, run


def main(request: str) -> None:
    """Run a script and write the report where the request says."""
    script, arguments, num_updates, timeout_s, answer = json.loads(request)

    def write(this: Run) -> None:
        unfinished = Path(answer).with_suffix(".part")
        unfinished.write_bytes(pickle.dumps(diagnose_run(this)))
        unfinished.replace(answer)

    write(run(Path(script), arguments, num_updates, timeout_s, write))


if __name__ == "__main__":
    main(sys.argv[1])
