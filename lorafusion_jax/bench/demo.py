"""Turns a finished run into the results file and the figure that the README shows.

    python -m lorafusion_jax.bench.demo runs/demo

The run is `make demo`; nothing is measured here, and nothing but the run's own files is read.
"""

import shutil
import sys
from pathlib import Path

from lorafusion_jax.bench.results import RESULTS, Row, device_name, write_results
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.train.run_folder import RunFolder, open_run


def rows_of(folder: RunFolder) -> list[Row]:
    """Returns one row per job: held-out results of the base and of its best adapter.

    Raises:
        ConfigError: a job was not evaluated before and after training.
    """
    rows: list[Row] = []
    events = folder.events()
    whole = _of_the_run(events)
    events = [event for event in events if event["event"] == "Evaluated"]
    for name, job in folder.jobs.items():
        mine = [event for event in events if event["job"] == name]
        before = next((event for event in mine if event["step"] == 0), None)
        after = min((e for e in mine if e["step"]), key=lambda e: e["loss"], default=None)
        if before is None or after is None:
            raise ConfigError(f"{folder.path}: job {name} has no evaluation before or after it")
        rows.append(
            {
                "job": name,
                "rank": job.lora.r,
                "samples": after["samples"],
                "steps": after["step"],
                "base_loss": before["loss"],
                "adapter_loss": after["loss"],
                "base_exact": before["exact_match"],
                "adapter_exact": after["exact_match"],
            }
            | whole
        )
    return rows


def _of_the_run(events: list[dict]) -> Row:
    """What all jobs share: real tokens per second of training, and the device's memory."""
    ends = [event for event in events if event["event"] == "RunEnded"]
    if not ends:
        return {}
    ended = max(ends, key=lambda event: event["tokens"])  # of the process that trained most
    peak, seconds = ended["peak_bytes"], ended["parts"].get("train", 0)
    return {
        "run_tokens_per_s": ended["tokens"] / seconds if seconds else None,
        "run_seconds": ended["seconds"],
        "peak_gib": None if peak is None else peak / 2**30,
    }


def main(arguments: list[str], root: Path = RESULTS) -> int:
    """Writes demo.json and loss.png under docs/results/<device>/; returns the exit code."""
    if len(arguments) != 1:
        raise ConfigError("expected one argument, the folder of the demo's run")
    folder = open_run(arguments[0])
    path = write_results("demo", rows_of(folder), command="make demo", root=root)
    shutil.copyfile(folder.path / "loss.png", root / device_name() / "demo_loss.png")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
