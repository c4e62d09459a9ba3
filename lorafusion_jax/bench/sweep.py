"""Turns the comparison table of a finished sweep into a results file.

    python -m lorafusion_jax.bench.sweep runs/sweep

Nothing is measured here, and nothing but the run's own files is read.
"""

import json
import sys
from pathlib import Path

from lorafusion_jax.bench.results import RESULTS, Row, write_results
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.train.run_folder import RunFolder, open_run


def rows_of(folder: RunFolder) -> list[Row]:
    """Returns the rows of all sweeps of a run, the lowest held-out loss of each first.

    Raises:
        ConfigError: the run has no comparison table (yet).
    """
    path = folder.path / "sweep.json"
    if not path.is_file():
        raise ConfigError(f"{folder.path} has no sweep.json: it holds no finished sweep")
    tables = json.loads(path.read_text(encoding="utf-8"))
    return [{"sweep": name, **row} for name, rows in tables.items() for row in rows]


def main(arguments: list[str], root: Path = RESULTS) -> int:
    """Writes sweep.json under docs/results/<device>/; returns the exit code."""
    if len(arguments) != 1:
        raise ConfigError("expected one argument, the folder of the sweep's run")
    command = "lorafusion train examples/sweep_demo.yaml --set base.model=MODEL"
    print(write_results("sweep", rows_of(open_run(arguments[0])), command=command, root=root))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
