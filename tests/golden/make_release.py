"""Writes what a release leaves behind: a finished run of two tiny jobs, and all of its losses.

    python -m tests.golden.make_release

Run once per release, into a new folder; older folders stay as they are, so that later versions show
that they still read them.
"""

import contextlib
import json
import platform
import shutil
import tempfile
from pathlib import Path

import lorafusion_jax as lf
from lorafusion_jax.config import BatchingConfig, EvalConfig, ReportConfig, SaveConfig, TrainConfig
from tests.train.tiny import TILE, dataset, tiny_base

FOLDER = Path(__file__).parent / f"release-{lf.__version__}"
STEPS = 20


def make(output: Path, steps: int = STEPS) -> lf.MultiTrainer:
    """Returns the trainer of the run."""
    made = lf.MultiTrainer(
        tiny_base(),
        output=output,
        batching=BatchingConfig(tokens_per_microbatch=64, tile=TILE),
        report=ReportConfig(every=1),
    )
    for name, seed, r, dropout in (("sql", 1, 2, 0.1), ("emoji", 2, 1, 0.0)):
        made.add_job(
            name,
            dataset(seed, 24),
            lora=lf.LoraConfig(r=r, dropout=dropout, target_modules=("q_proj", "down_proj")),
            optim=lf.AdamW(lr=1e-2),
            train=TrainConfig(max_steps=steps, global_batch_size=4),
            eval=EvalConfig(split=4, every=10),
            save=SaveConfig(every=10, keep_last=1, keep_best=0),
        )
    return made


def losses(folder: Path) -> dict[str, list[float]]:
    """The training losses of every step of every job."""
    run = lf.open_run(folder)
    return {
        name: [x["loss"] for x in run.metrics(name) if x["loss"] is not None] for name in run.jobs
    }


def processor() -> str:
    """What the bits of a CPU's results depend on: XLA compiles for the very model."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in text.partition("\n\n")[0].splitlines()
        if ":" in line
    )
    known = [facts[name] for name in ("vendor_id", "cpu family", "model") if name in facts]
    return " ".join([platform.machine(), *known])


def main() -> None:
    """Writes the folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        output = Path("run")  # no path of this machine
        make(output).fit()
        FOLDER.mkdir()
        for name in ("checkpoints", "config.resolved.yaml", "plan.json", "jobs"):
            source = output / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, FOLDER / name)
        for mark in FOLDER.rglob("commit_success.txt"):
            mark.write_text("Checkpoint commit was successful.\n")  # orbax names its own folder
        found = losses(output)
        record = {"losses": found, "exact": {processor(): found}}
        (FOLDER / "losses.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
