"""A night in short: kills, a full disk, a NaN job, late jobs and a cancel in one run.

    python -m tests.reliability.soak [--quick]

2,000 optimizer steps (200 with --quick) of four jobs: three kills, a stop by signal, a disk that is
full once, one job whose loss becomes infinite, one that is cancelled, two that join. At the end the
two jobs to which nothing happened have, bit for bit, the adapters of a run to which nothing
happened, and every promise about the rest is checked.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from lorafusion_jax.cli import main as lorafusion
from lorafusion_jax.train import control
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.control import Add, Cancel
from lorafusion_jax.train.run_folder import RunFolder
from tests.reliability.nursery import Child, Nursery, nursery

NAN, CANCELLED, LATE = "spell", "late", ("late1", "late2")


def soak(folder: Path, steps: int, seed: int = 0) -> list[str]:
    """Runs it all in a folder and returns what was checked.

    Raises:
        AssertionError: a promise was broken.
    """
    choice = random.Random(seed)
    order = {"jobs": 4, "steps": steps // 4, "save_every": 5, "freeze": True}
    troubled = order | {"nan": NAN}
    output = folder / "run"
    with nursery(folder) as runs:
        runs.run(folder / "quiet", **order)
        for turn, request in enumerate((None, _join(LATE[0]), Cancel(job=CANCELLED))):
            child = _some_steps(runs, output, choice, troubled, request)
            time.sleep(choice.random() * 0.1)
            child.kill()
            assert child.end() == -signal.SIGKILL, turn
        child = runs.start(output, **troubled, file_limit=20_000)
        assert child.end() == 5, child.seen[-2:]
        child = _some_steps(runs, output, choice, troubled, _join(LATE[1]))
        child.kill(signal.SIGTERM)
        assert child.end() == 143, child.seen[-2:]
        runs.run(output, **troubled)
    return [check(folder, output) for check in CHECKS]


def _join(name: str) -> Add:
    job = {
        "name": name,
        "data": {"path": f"{name}.jsonl"},
        "lora": {"r": 2},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {"max_steps": 5, "global_batch_size": 4},
        "eval": {"split": 4, "every": 2},
        "save": {"every": 5},
    }
    return Add.model_validate_json(json.dumps({"action": "add", "jobs": [job]}))


def _some_steps(
    runs: Nursery,
    output: Path,
    choice: random.Random,
    order: dict,
    request: control.Request | None,
) -> Child:
    child = runs.start(output, **order)
    child.until("MicrobatchDone", choice.randint(3, 6))
    if request is not None:
        control.send(RunFolder(output), request)
        child.until("Notice")  # obeyed; whether it is saved already is a matter of luck
    child.until("MicrobatchDone", choice.randint(1, 4))
    return child


def undisturbed(folder: Path, output: Path) -> str:
    """The jobs to which nothing happened."""
    for job in ("sql", "emoji"):
        for which in ("adapter", "adapter_last"):
            path = Path("jobs") / job / which / "adapter_model.safetensors"
            assert (folder / "quiet" / path).read_bytes() == (output / path).read_bytes(), path
    return "two jobs have the bits of an undisturbed run"


def the_others(folder: Path, output: Path) -> str:
    """The jobs to which something happened."""
    saved = Checkpoints(output / "checkpoints").restore()
    assert saved is not None
    jobs = saved.progress["jobs"]
    assert jobs[NAN]["status"] == "frozen" and jobs[NAN]["rejected"] == 1, jobs[NAN]
    assert jobs[CANCELLED]["status"] == "cancelled", jobs[CANCELLED]
    for name in LATE:
        assert (jobs[name]["status"], jobs[name]["step"]) == ("done", 5), jobs[name]
    for name in jobs:
        assert (output / "jobs" / name / "adapter_last").is_dir(), name
    assert not control.waiting(RunFolder(output))
    return "NaN job frozen, one cancelled, two joined and done"


def metrics_are_whole(folder: Path, output: Path) -> str:
    """No step twice or missing."""
    run = RunFolder(output)
    for name in run.jobs:
        done = [line["step"] for line in run.metrics(name) if line["eval_loss"] is None]
        assert len(done) == len(set(done)) and done == sorted(done), (name, done)
    ends = max(line["step"] for line in run.metrics("sql"))
    assert ends == max(line["step"] for line in RunFolder(folder / "quiet").metrics("sql"))
    return "metrics without gaps"


def checkpoints_are_whole(folder: Path, output: Path) -> str:
    """Every checkpoint that is left verifies, and nothing else lies there."""
    assert lorafusion(["verify-checkpoint", str(output)]) == 0
    assert not Checkpoints(output / "checkpoints").leftovers()
    return "checkpoints verified"


CHECKS = (undisturbed, the_others, metrics_are_whole, checkpoints_are_whole)


def main() -> int:
    """Runs the soak."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for line in soak(Path(folder), 200 if options.quick else 2000, options.seed):
            print("ok  ", line)
    print(f"soaked in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
