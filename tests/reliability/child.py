"""A small training process to be killed: it imports once and forks one run after another.

    python child.py

It reads one JSON object a line: how to run (see `Order`). For each it forks, says `pid N`, and when
the run has ended, `exit CODE` (negative: killed by that signal). A run writes a line for each event
and each fault point of a save into the order's `lines`, a pipe that the parent reads.
"""

import gc
import json
import os
import resource
import signal
import sys
import time
import tracemalloc
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

warnings.filterwarnings("ignore", message=".*os.fork.*")

import jax  # noqa: E402
import numpy as np  # noqa: E402

import lorafusion_jax as lf  # noqa: E402
from lorafusion_jax.config import (  # noqa: E402
    BatchingConfig,
    EvalConfig,
    RunTrainConfig,
    SaveConfig,
    TrainConfig,
)
from lorafusion_jax.errors import LoraFusionError  # noqa: E402
from lorafusion_jax.train import loop  # noqa: E402
from tests.train.tiny import TILE, dataset, tiny_base  # noqa: E402


@dataclass
class Order:
    """One run.

    Attributes:
        output: folder of the run.
        lines: pipe for its lines.
        cache: folder of compiled programs.
        jobs: how many of four.
        steps: of every job.
        save_every: optimizer steps between checkpoints.
        die_at: fault point at which the process kills itself, as `point:count`.
        slow_at: what to dwell at: a fault point, or an event's name.
        dwell: seconds.
        watchdog: its limit in seconds.
        count: write what the process uses, after every save.
        leak: bytes to lose with every microbatch.
        file_limit: bytes that a file may have from the first checkpoint on.
        freeze: whether a non-finite batch freezes its job.
        nan: job whose loss is infinite from its third global batch on.
        config: changes of each job's sections.
    """

    output: str
    lines: str
    cache: str
    jobs: int = 2
    steps: int = 8
    save_every: int = 1
    die_at: str = ""
    slow_at: str = ""
    dwell: float = 0.5
    watchdog: float = 1800.0
    count: bool = False
    leak: int = 0
    freeze: bool = False
    nan: str = ""
    file_limit: int = 0
    config: dict[str, Any] = field(default_factory=dict)


JOBS = (
    ("sql", lf.LoraConfig(r=8, dropout=0.1), lf.AdamW(lr=1e-2, weight_decay=0.1), 5, (1, 30)),
    ("emoji", lf.LoraConfig(r=2, alpha=4), lf.Adam(lr=2e-2, schedule="linear"), 4, (2, 26, 4, 9)),
    ("late", lf.LoraConfig(r=4, dropout=0.5), lf.AdamW(lr=1e-2), 6, (3, 20)),
    ("spell", lf.LoraConfig(r=1, dropout=0.05), lf.Sgd(lr=1e-2), 3, (4, 24)),
)


LATE = {"late1": (5, 30), "late2": (6, 26)}


def poison(name: str) -> None:
    """Makes the losses of a job infinite, from its third global batch on."""
    real = loop.Run._pack

    def pack(run, want):
        packed = real(run, want)
        stretches = run.schedule.plan.microbatches[want.index].stretches
        if any(s.job == name and s.batch >= 2 for s in stretches):
            mine = np.repeat(packed.tile_adapter == run.schedule.slot[name], TILE)
            weight = np.where(mine & (packed.loss_weight > 0), np.inf, packed.loss_weight)
            packed = packed._replace(loss_weight=weight.astype(np.float32))
        return packed

    loop.Run._pack = pack


class Witness:
    """Writes down what happens, and does what the order asks for at that moment."""

    def __init__(self, order: Order, out: TextIO):
        self._order, self._out, self._programs = order, out, 0
        self._seen: dict[str, int] = {}
        self._lost: list[bytes] = []

    def __call__(self, event: object) -> None:
        """Takes note of an event."""
        kind = type(event).__name__
        where = getattr(event, "index", getattr(event, "start", getattr(event, "step", "")))
        self.at(kind, where)
        self._programs += kind == "Compiling"
        if self._order.leak and kind == "MicrobatchDone":
            self._lost.append(bytes(self._order.leak))
        if self._order.count and kind == "CheckpointSaved":  # no save is under way now
            self._out.write(f"counters {json.dumps(self._counters(int(where)))}\n")
        if kind == "CheckpointSaved" and self._order.file_limit:
            limit = (self._order.file_limit, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def _counters(self, microbatch: int) -> dict[str, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "microbatch": microbatch,
            "resident": pages * resource.getpagesize(),
            "python": tracemalloc.get_traced_memory()[0],
            "objects": len(gc.get_objects()),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "arrays": len(jax.live_arrays()),
            "programs": self._programs,
        }

    def at(self, point: str, where: object = "") -> None:
        """Takes note of a fault point, and dies or dwells there if that was ordered."""
        self._out.write(f"{point} {where}\n")
        self._seen[point] = self._seen.get(point, 0) + 1
        if self._order.die_at == f"{point}:{self._seen[point]}":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._order.slow_at == point:
            time.sleep(self._order.dwell)


def train(order: Order, lines: int) -> int:
    """Runs an order, writes its lines and returns the exit code of the command line."""
    jax.config.update("jax_compilation_cache_dir", order.cache)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if order.count:
        tracemalloc.start()
    with os.fdopen(lines, "w", buffering=1, encoding="utf-8") as out:
        witness = Witness(order, out)
        made = lf.MultiTrainer(
            tiny_base(),
            output=order.output,
            batching=BatchingConfig(tokens_per_microbatch=64, tile=TILE),
            train=RunTrainConfig(watchdog=order.watchdog),
            listener=witness,
        )
        made._at = witness.at
        resolve = made._resolve
        made._resolve = lambda job, data=None: resolve(
            job, dataset(*LATE[job.name]) if job.name in LATE else data
        )
        if order.nan:
            poison(order.nan)
        for name, lora, optim, size, data in JOBS[: order.jobs]:
            made.add_job(
                name,
                dataset(*data),
                lora=lora,
                optim=optim,
                train=TrainConfig(
                    max_steps=order.steps,
                    global_batch_size=size,
                    on_nonfinite="freeze" if order.freeze else "skip",
                ),
                eval=EvalConfig(split=6, every=4),
                save=SaveConfig(every=order.save_every, **order.config.get("save", {})),
            )
        try:
            made.fit()
        except LoraFusionError as error:
            out.write(f"error {error}\n")
            return error.exit_code
    return 0


def main() -> None:
    """Obeys one order after the other."""
    for line in sys.stdin:
        order = Order(**json.loads(line))
        lines = os.open(order.lines, os.O_WRONLY)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = train(order, lines)
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(lines)
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"exit {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
