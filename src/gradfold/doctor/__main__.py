"""The process that a script runs in: `python -m gradfold.doctor REQUEST`, started by `process.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gradfold.doctor.diagnose import examine
from gradfold.doctor.run import Run, run

__all__: list[str] = []


def main(request: str) -> None:
    """Run a script and write the report where the request says."""
    asked = json.loads(request)
    script, answer = Path(asked["script"]), Path(asked["answer"])

    def write(this: Run) -> None:
        unfinished = answer.with_suffix(".part")
        unfinished.write_text(json.dumps(examine(this).to_dict()), "utf-8")
        unfinished.replace(answer)

    write(run(script, asked["arguments"], asked["num_updates"], asked["timeout_s"], write))


if __name__ == "__main__":
    main(sys.argv[1])
