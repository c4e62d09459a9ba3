"""Compares whole training steps of five systems over the same jobs, on one device, in one process.

    lorafusion bench training --lengths xsum [--model llama-3.1-8b] [--layers N] [--microbatches N]

a  one job at a time, batches of 4 samples padded to the longest, naive LoRA (PEFT-style)
b  one job at a time, samples packed, naive LoRA
c  batches of one sample of each job, padded to the longest (mLoRA-style)
d  fused kernels, packed by first-fit decreasing, projections one by one (LoRAFusion-style)
e  ours: planned microbatches, grouped fused kernels

b, d and e run the first microbatches of their plans. a and c have other shapes in every batch:
their step is timed at several lengths, and every batch counts what lies between them. Weights are
random; tokens are real ones only: padding earns nothing. b, d and e run in the training loop's own
order, with packing, transfers and reports; of e the parts that are no work are told apart.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafusion_jax.bench.compile_time import COMPILE_ONLY, compile_times
from lorafusion_jax.bench.padded import measure_padded, write_padded_batches
from lorafusion_jax.errors import ConfigError

if TYPE_CHECKING:
    from lorafusion_jax.models.config import ModelConfig
    from lorafusion_jax.models.hf_weights import Base

SYSTEMS = {
    "a": "a_sequential_padded",
    "b": "b_sequential_packed",
    "c": "c_mlora",
    "d": "d_lorafusion",
    "e": "e_ours",
}
LINEARS = {"a": "naive", "b": "naive", "c": "xla", "d": "ungrouped", "e": "ours"}
JOBS, GBS = 4, 8


class Setup(NamedTuple):
    """What all systems share.

    Attributes:
        config: shape of the model.
        base: the model.
        jobs: to plan, from `lorafusion_jax.bench.schedule`.
        capacity: rows of a packed microbatch.
        tile: rows per tile.
        r: rank.
        p: dropout rate.
        remat: policy, or "auto".
        deterministic: as in the configuration.
    """

    config: "ModelConfig"
    base: "Base"
    jobs: list
    capacity: int
    tile: int
    r: int
    p: float
    remat: str
    deterministic: bool


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lorafusion bench training", description=__doc__)
    parser.add_argument("--lengths", default="xsum", help="xsum, cnn, wikisum, mix or het")
    parser.add_argument("--systems", default="abcde", help="letters of those to run, in order")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the model has")
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--microbatches", type=int, default=12, help="to time, of each system")
    parser.add_argument("--batches", type=int, default=8, help="global batches of each job")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.1)
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--profile", action="store_true", help="time by class of kernel")
    parser.add_argument(
        "--compile-times", action="store_true", help="of e, cold and cached, each in its process"
    )
    parser.add_argument(COMPILE_ONLY, action="store_true", help="compile e, print the seconds")
    parser.add_argument("--baselines", type=Path, default=None, help="JSON rows of other programs")
    parser.add_argument(
        "--padded-batches", type=Path, default=None, help="add a's batches to this JSON, and stop"
    )
    parser.add_argument("--output", type=Path, default=None, help="folder of training.json")
    return parser.parse_args(arguments)


class Program:
    """A system's compiled training step and its state."""

    def __init__(self, setup: Setup, system: str):
        import jax

        from lorafusion_jax.lora.bank import (
            attach_adapters,
            multi_linears,
            split_adapters,
            write_slot,
        )
        from lorafusion_jax.lora.targets import LoraSpec
        from lorafusion_jax.train.step import init_state

        self.slots = 1 if system in "ab" else JOBS
        model = setup.base.model
        paths = list(multi_linears(model))
        bank = attach_adapters(model, paths, self.slots, setup.r)
        self._graphdef, self._frozen = split_adapters(model)
        attach_adapters(model, (), 0, 1)
        spec = LoraSpec(r=setup.r, alpha=2 * setup.r, dropout=setup.p)
        for slot in range(self.slots):
            bank = write_slot(bank, slot, spec, slot + 1, paths)
        self._state = init_state(bank, ("adamw",))
        self._hyper = jax.device_put(_hyper(self.slots))  # as in training
        self._setup, self._system, self._compiled = setup, system, {}
        self.remat, self.compile_seconds, self.bytes, self.planned_bytes = "", 0.0, 0, 0

    def compile(self, batch) -> None:
        """Compiles the step for batches of this shape, with the system's linears."""
        from lorafusion_jax.bench.systems import compiled_bytes, lora_linears
        from lorafusion_jax.train.programs import programs_of
        from lorafusion_jax.train.step import Model

        start = time.perf_counter()
        setup, rows = self._setup, batch.tokens.shape[0]
        segments = batch.segment_offsets.shape[0] - 1
        remat, chunk = self._plan_memory(rows, segments, batch.longest.rows)
        model = Model(self._graphdef, remat, chunk, setup.deterministic)
        programs = programs_of(model)
        with lora_linears(kind := LINEARS[self._system]):
            args = (self._state, self._frozen, batch)
            # What is kept on disk is the program of the usual linears.
            train = programs["train"]
            compiled = train.compile(args) if kind == "ours" else train.compile_anew(args)
        self._compiled[rows] = compiled
        self._update = programs["update"].compile((self._state, self._hyper, batch.batch_end))
        self.compile_seconds += time.perf_counter() - start
        self.bytes = max(self.bytes, compiled_bytes(compiled))

    def _plan_memory(self, rows: int, segments: int, longest: int | None):
        """Returns the remat policy and the chunk of the loss for microbatches of so many rows."""
        import jax

        from lorafusion_jax.train.memory import Step, choose_remat, device_bytes, predict
        from lorafusion_jax.train.step import loss_chunk

        setup = self._setup
        chunk = loss_chunk(setup.config.vocab_size, rows)
        planned = Step(
            setup.config,
            rows,
            self.slots,
            setup.r,
            itemsize=setup.base.model.head_weight().dtype.itemsize,
            loss_chunk=chunk,
            segments=segments,
            longest=longest,
            kernels=jax.default_backend() == "gpu",
            tile=setup.tile,
        )
        remat: Any = setup.remat
        available = device_bytes()
        if remat == "auto":
            remat = "none" if available is None else choose_remat(planned, available)[0]
        self.planned_bytes = max(self.planned_bytes, predict(planned, remat).total)
        self.remat = " ".join(dict.fromkeys([*self.remat.split(), remat]))
        return remat, chunk

    def step(self, batch):
        """Dispatches a microbatch; returns its loss."""
        compiled = self._compiled[batch.tokens.shape[0]]
        self._state, loss = compiled(self._state, self._frozen, batch)
        return loss

    def update(self, batch_end):
        """Dispatches the update of the slots whose global batch ends; returns its report."""
        self._state, report = self._update(self._state, self._hyper, batch_end)
        return report

    def wait(self) -> None:
        """Waits for all that was dispatched."""
        import jax

        jax.block_until_ready(self._state)

    def run(self, batches: Sequence) -> float:
        """Runs microbatches, and updates where global batches end; returns seconds."""
        import numpy as np

        start = time.perf_counter()
        for batch in batches:
            self.step(batch)
            if np.any(batch.batch_end):
                self.update(batch.batch_end)
        self.wait()
        return time.perf_counter() - start


def _hyper(slots: int):
    import numpy as np

    from lorafusion_jax.train.optimizer import Hyper

    columns: dict[str, Any] = {
        name: np.full(slots, 0, np.int32) for name in ("kind", "schedule", "warmup_steps")
    }
    values = {"lr": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    values |= {"max_grad_norm": 1.0, "lora_plus_ratio": 1.0}
    columns |= {name: np.full(slots, value, np.float32) for name, value in values.items()}
    columns["total_steps"] = np.full(slots, 1000, np.int32)
    columns["freeze_on_nonfinite"] = np.zeros(slots, np.bool_)
    return Hyper(**columns)


class _RandomTokens:
    """A data set of given lengths; every token is supervised."""

    def __init__(self, job, vocab_size: int):
        self._lengths = {s.index: s.length for batch in job.batches for s in batch}
        self._vocab_size = vocab_size

    def __getitem__(self, index: int):
        import numpy as np

        tokens = np.random.default_rng(index).integers(0, self._vocab_size, self._lengths[index])
        return tokens.astype(np.int32), np.ones(len(tokens), bool)


def _plan(setup: Setup, system: str):
    """Microbatches of a packed system, and the seconds that planning took."""
    from lorafusion_sched import Problem, plan
    from lorafusion_sched.baselines import lorafusion

    def problem(jobs):
        return Problem(jobs=tuple(jobs), capacities=(setup.capacity,), tile=setup.tile)

    start = time.perf_counter()
    if system == "b":
        found = [m for job in setup.jobs for m in plan(problem([job])).microbatches]
    else:
        found = list((plan if system == "e" else lorafusion)(problem(setup.jobs)).microbatches)
    return found, time.perf_counter() - start


class Packed(NamedTuple):
    """A packed system, compiled.

    Attributes:
        program: its step.
        plan: all its microbatches.
        plan_seconds: that planning took.
        make: packs the microbatch of an index.
    """

    program: Program
    plan: list
    plan_seconds: float
    make: Callable


def compile_packed(setup: Setup, system: str) -> Packed:
    """Plans b, d or e and compiles its step."""
    from lorafusion_jax.train.batch import JobRows, longest_bucket, pack, segment_bucket

    plan, plan_seconds = _plan(setup, system)
    longest = longest_bucket(plan)
    sizes = {"max_segments": segment_bucket(plan, longest), "longest": longest}
    program = Program(setup, system)
    rows = {
        job.name: JobRows(0 if program.slots == 1 else slot, slot + 1,
                          _RandomTokens(job, setup.config.vocab_size))
        for slot, job in enumerate(setup.jobs)
    }  # fmt: skip

    def make(index: int):
        return pack(plan[index], rows, tile=setup.tile, num_slots=program.slots, **sizes)[0]

    program.compile(make(0))
    return Packed(program, plan, plan_seconds, make)


def _packed(setup: Setup, system: str, microbatches: int) -> dict:
    """Measures b, d or e over the first microbatches of its plan."""
    from lorafusion_jax.bench.overhead import measure_overhead, run_loop
    from lorafusion_jax.train.schedule import padding_share

    program, plan, plan_seconds, make = compile_packed(setup, system)
    count = min(microbatches, len(plan))
    start = time.perf_counter()
    batches = [make(index) for index in range(count)]
    pack_seconds = (time.perf_counter() - start) / count
    program.run(batches[:2])
    more: dict = {}
    if system == "e":
        found = measure_overhead(
            program, make, count,
            padding=padding_share(plan[:count]), plan_seconds=plan_seconds / len(plan),
        )  # fmt: skip
        seconds, more = count * found.loop_ms / 1e3, found.columns()
    else:
        seconds = run_loop(program, make, count)
    lengths = [s.length for m in plan[:count] for stretch in m.stretches for s in stretch.samples]
    return {
        "program": program, "batches": batches, "seconds": seconds, "lengths": lengths,
        "padding": padding_share(plan), "microbatches": count, "plan_seconds": plan_seconds,
        "pack_ms": 1e3 * pack_seconds, "more": more,
    }  # fmt: skip


def measure(setup: Setup, system: str, lengths: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the results row of one system."""
    from lorafusion_jax.bench.profile import profiled
    from lorafusion_jax.bench.shapes import H100_PEAK, step_flops

    if system in "ac":
        repeat = max(1, options.microbatches // 4)
        found = measure_padded(Program(setup, system), setup, system, repeat)
    else:
        found = _packed(setup, system, options.microbatches)
    program, seconds = found["program"], found["seconds"]
    row = {
        "system": SYSTEMS[system], "lengths": lengths, "model": options.model,
        "layers": setup.config.num_hidden_layers, "capacity": setup.capacity, "r": setup.r,
        "p": setup.p, "remat": program.remat, "deterministic": setup.deterministic,
        "tokens_per_s": sum(found["lengths"]) / seconds,
        "mfu": step_flops(setup.config, found["lengths"], setup.r) / seconds / H100_PEAK,
        "padding": found["padding"], "peak_gib": program.bytes / 2**30,
        "planned_gib": program.planned_bytes / 2**30, "microbatches": found["microbatches"],
        "seconds": seconds, "compile_seconds": program.compile_seconds,
        "plan_seconds": found["plan_seconds"], "pack_ms": found["pack_ms"], **found["more"],
    }  # fmt: skip
    if options.profile:
        batches = found["batches"][-2:]
        profile = profiled(lambda: program.run(batches))
        print(profile.heaviest(len(batches)), profile.waits(len(batches)), sep="\n")
        row |= profile.by_class(len(batches))
    return row


def _kept_rows(path: Path, setup: Setup, options: argparse.Namespace, others: list[dict]) -> list:
    """Rows of other mixes and sizes that an earlier process wrote.

    Those of the same mix and size go, whatever their system: ratios are of one process.
    """
    if not path.exists():
        return []

    def size(row: dict) -> tuple:
        return tuple(row.get(key) for key in ("lengths", "model", "layers", "deterministic"))

    layers = setup.config.num_hidden_layers
    now = (options.lengths, options.model, layers, setup.deterministic)
    known = {(row["system"], row["lengths"], row.get("layers")) for row in others}
    return [
        row
        for row in json.loads(path.read_text())["rows"]
        if size(row) != now and (row["system"], row["lengths"], row.get("layers")) not in known
    ]


def main(arguments: list[str]) -> int:
    """Runs the benchmark; see the module's help."""
    options = _arguments(arguments)
    unknown = sorted(set(options.systems) - set(SYSTEMS))
    if unknown:
        raise ConfigError(
            f"--systems {options.systems}: unknown {', '.join(unknown)}; known: abcde"
        )
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    from lorafusion_jax.bench import training_report
    from lorafusion_jax.bench.results import RESULTS, device_name, read_baselines, write_results
    from lorafusion_jax.bench.schedule import LENGTHS, jobs_of
    from lorafusion_jax.bench.shapes import model_shape
    from lorafusion_jax.models.hf_weights import random_base

    if options.lengths not in LENGTHS:
        raise ConfigError(f"--lengths {options.lengths}: expected one of {', '.join(LENGTHS)}")
    config = model_shape(options.model, options.layers)
    jobs = jobs_of(options.lengths, GBS, 0, jobs=JOBS, batches=options.batches)
    if options.padded_batches:
        write_padded_batches(options.padded_batches, options.lengths, jobs)
        return 0
    compiled = {}
    if options.compile_times and not options.compile_only:
        compiled = compile_times(arguments)
    setup = Setup(
        config, random_base(config, dtype=options.dtype), jobs, options.capacity, options.tile,
        options.r, options.p, options.remat, options.deterministic,
    )  # fmt: skip
    if options.compile_only:
        program = compile_packed(setup, "e").program
        print(json.dumps({"compile_seconds": program.compile_seconds}))
        return 0
    folder = options.output or RESULTS / device_name()
    others = []
    if options.baselines:
        others = read_baselines(options.baselines, ("system", "lengths", "tokens_per_s"))
        mine = [row for row in others if row["lengths"] == options.lengths]
        others = [{"model": options.model, **row} for row in mine]
    rows = _kept_rows(folder / "training.json", setup, options, others) + others
    for system in options.systems:
        rows.append(measure(setup, system, options.lengths, options))
        if system == "e":
            rows[-1] |= compiled
        _print(rows[-1])
        # After every system: a benchmark cut short leaves what it has.
        write_results("training", rows, folder=folder)
    training_report.draw(rows, folder)
    return 0


def _print(row: dict) -> None:
    print(
        f"{row['lengths']:<8} {row['system']:<20} {row['tokens_per_s']:>10,.0f} tokens/s  "
        f"MFU {row['mfu']:.1%}  padding {row['padding']:.1%}  {row['peak_gib']:.2f} GiB "
        f"(planned {row['planned_gib']:.2f}), compiled in {row['compile_seconds']:.0f} s",
        flush=True,
    )
    if "overhead" in row:
        parts = ("padding", "plan", "optimizer", "host")
        print(
            "         overhead "
            + " + ".join(f"{part} {row[f'{part}_ms']:.2f}" for part in parts)
            + f" ms of {row['loop_ms']:.2f} a microbatch: {row['overhead']:.1%}",
            flush=True,
        )
