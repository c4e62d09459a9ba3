"""Trains random weights on a mesh and compares schedules: ours, Megatron's, mLoRA's.

    lorafusion bench pipeline --model 8b --stages 2 --lengths het,xsum [--layers N] [--data D]

All systems run in the same engine, on the same mesh, with the same rows per microbatch. The others'
microbatches are packed as full as their own order of samples allows, which is more than they do.
Every tick is timed. Rows go to docs/results/<device>/pipeline.json, the predicted and the measured
Gantt page beside it.
"""

import argparse
import datetime
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

from lorafusion_jax.bench.mesh_models import (
    MODELS,
    linear_widths,
    model_shape,
    peak_flops,
)
from lorafusion_jax.bench.pipeline_report import case_of, draw_speed, in_words_of
from lorafusion_jax.bench.pipeline_time import (
    TICKS,
    Stream,
    full_tick,
    measured_timeline,
    ranks_of,
    steady,
)
from lorafusion_jax.bench.profile import profiled
from lorafusion_jax.bench.results import (
    RESULTS,
    Row,
    device_name,
    this_command,
    write_results,
    written_before,
)
from lorafusion_jax.bench.schedule import LENGTHS, jobs_of
from lorafusion_jax.bench.shapes import step_flops
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import REMAT_POLICIES, Remat
from lorafusion_jax.parallel.convert import make_names
from lorafusion_jax.parallel.layout import even_layout
from lorafusion_jax.parallel.mesh import make_mesh
from lorafusion_jax.parallel.order import faster
from lorafusion_jax.parallel.pipeline import Order, Pipeline, ring_of
from lorafusion_jax.parallel.processes import is_first, start_processes
from lorafusion_jax.parallel.residuals import backward_ratio, in_words
from lorafusion_jax.parallel.stage import Residuals, StageModel, policies_at
from lorafusion_jax.parallel.state import StreamState, bank_shapes, mesh_sizes
from lorafusion_jax.parallel.stream import Slot, pack_slot
from lorafusion_jax.parallel.weights import Frozen, random_weights
from lorafusion_jax.plots import plot_gantt
from lorafusion_jax.train.batch import JobRows, longest_bucket, segment_bucket
from lorafusion_jax.train.memory import Step
from lorafusion_jax.train.memory_mesh import Share, available_everywhere, choose_stage
from lorafusion_jax.train.optimizer import OPTIMIZERS, Hyper
from lorafusion_jax.train.step import loss_chunk
from lorafusion_sched import (
    Cost,
    Job,
    Plan,
    Problem,
    plan,
    simulate,
)
from lorafusion_sched.baselines import megatron, mlora
from lorafusion_sched.gantt import gantt_html

RANK, DROPOUT = 16, 0.1
TRACED = 9
"""Ticks timed one by one after the pipeline is full, for the steady part and for the pages."""
PICTURED = 48
"""Slots of the run that is drawn, whose every tick is timed too."""
SYSTEMS = ("ours", "mlora", "megatron")


@dataclass(frozen=True)
class Bench:
    """An engine with random weights made on its devices.

    Attributes:
        pipeline: the engine.
        frozen: weights.
        adapters: adapter slots.
        capacity: rows of a microbatch.
        tile: rows of a tile.
    """

    pipeline: Pipeline
    frozen: Frozen
    adapters: int
    capacity: int
    tile: int

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.pipeline.model.config

    def state(self, like: Slot) -> StreamState:
        """Makes adapters of rank 16 with dropout 0.1 in all slots; none of their values is zero."""
        places = self.pipeline.model.place_paths
        inside = linear_widths(self.config)
        widths = {path: inside[path.split(".", 2)[2]] for path in places}
        shapes = bank_shapes(widths, self.adapters, RANK)
        state = self.pipeline.empty_state(like.batches[0], shapes, ("adamw",))
        bank = state.bank

        def filled(stacks):
            # Where they were: elsewhere, the engine would compile once more for the second call.
            places = jax.tree.map(lambda x: x.sharding, stacks)
            fill = partial(jax.tree.map, lambda x: jnp.full_like(x, 0.01))
            return jax.jit(fill, donate_argnums=0, out_shardings=places)(stacks)

        bank = bank._replace(
            a=filled(bank.a),
            b=filled(bank.b),
            targeted=jax.tree.map(lambda x: x | True, bank.targeted),
            scale=bank.scale + 2,
            rate=bank.rate + DROPOUT,
            rank=bank.rank + RANK,
        )
        return state._replace(bank=bank)


def make_bench(
    config: ModelConfig,
    *,
    data: int,
    stages: int,
    order: Order,
    adapters: int,
    capacity: int,
    tile: int,
    remat: str,
    dtype: str,
    frozen: Frozen | None = None,
) -> Bench:
    """Makes an engine with random weights, or with those of another one of the same mesh."""
    mesh = make_mesh(data, stages, num_layers=config.num_hidden_layers)
    layout = even_layout(config.num_hidden_layers, stages)
    paths = [
        f"model.layers.{layer}.{path}"
        for layer in range(config.num_hidden_layers)
        for path in linear_widths(config)
    ]
    names = make_names(layout, paths)
    width, chunk = jnp.dtype(dtype), loss_chunk(-(-config.vocab_size // stages), capacity)
    step = Step(config, capacity, adapters, RANK, width.itemsize, chunk)
    share = Share(stages, layout.places, ring_of(order, stages))
    residuals, policies = kept_by_stage(remat, step, share)
    model = StageModel(config, width, layout.places, names.places, residuals, policies)
    pipeline = Pipeline(mesh, model, layout.first, order, chunk)
    frozen = frozen or random_weights(config, width, layout, mesh, 0)
    return Bench(pipeline, frozen, adapters, capacity, tile)


def kept_by_stage(remat: str, step: Step, share: Share) -> tuple[Residuals, tuple[Remat, ...]]:
    """Returns what a stage keeps; "auto" is the most that fits, all of it on CPUs."""
    if remat == "recompute":
        return "recompute", policies_at("none", share.places)
    if remat == "auto":
        if (available := available_everywhere()) is not None:
            return choose_stage(step, share, available)[:2]
        remat = "none"
    return "save", policies_at(remat, share.places)  # pyright: ignore[reportArgumentType]


class RandomSamples:
    """Random tokens, all supervised."""

    def __init__(self, job: Job, vocab_size: int):
        self._lengths = {s.index: s.length for batch in job.batches for s in batch}
        self._vocab = vocab_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng, length = np.random.default_rng(index), self._lengths[index]
        return rng.integers(0, self._vocab, length).astype(np.int32), np.ones(length, np.bool_)


def bench_for(
    arguments: argparse.Namespace,
    config: ModelConfig,
    jobs: Sequence[Job],
    tile: int,
    frozen: Frozen | None,
) -> Bench:
    """Makes the engine for these jobs; with `--order auto` as training does, by our plans."""
    data, stages, order = arguments.data, arguments.stages, arguments.order
    problem = partial(Problem, jobs=tuple(jobs), capacities=(arguments.capacity,), tile=tile)
    if order == "auto" or stages == 1:  # one stage has nobody to exchange with, whatever was asked

        def make(**kinds) -> Plan:
            return plan(problem(**kinds))

        order, _ = faster(make, lambda made: made, data=data, stage=stages)
    return make_bench(
        config, data=data, stages=stages, order=order, adapters=len(jobs),
        capacity=arguments.capacity, tile=tile, remat=arguments.remat,
        dtype="bfloat16" if jax.default_backend() == "gpu" else "float32", frozen=frozen,
    )  # fmt: skip


def planned(system: str, jobs: Sequence[Job], bench: Bench) -> Plan:
    """Plans as a system does; all of them keep the distance that the engine needs."""
    pipeline = bench.pipeline
    problem = Problem(
        jobs=tuple(jobs),
        capacities=(bench.capacity,),
        tile=bench.tile,
        distance=pipeline.distance,
        width=mesh_sizes(pipeline.mesh)[0],
        clock=pipeline.order,
    )
    if system == "ours":
        return plan(problem)
    largest = max(len(batch) for job in jobs for batch in job.batches)
    return (megatron if system == "megatron" else mlora)(problem, samples=largest)


def slots_of(whole: Plan, jobs: Sequence[Job], bench: Bench, sizes: tuple[int, int]) -> list[Slot]:
    """Packs all slots of a plan; `sizes` are static segments and the longest of them."""
    rows = {
        job.name: JobRows(
            number,
            number + 1,
            RandomSamples(job, bench.config.vocab_size),
            {i: sum(s.length - 1 for s in batch) for i, batch in enumerate(job.batches)},
        )
        for number, job in enumerate(jobs)
    }
    return [
        pack_slot(
            whole.microbatches[i : i + whole.width],
            rows,
            capacity=bench.capacity,
            tile=bench.tile,
            num_slots=bench.adapters,
            max_segments=sizes[0],
            longest=sizes[1],
        )
        for i in range(0, len(whole.microbatches), whole.width)
    ]


def hyper_of(adapters: int) -> Hyper:
    """Returns AdamW for all slots."""
    values = {"lr": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "max_grad_norm": 1.0}
    whole = {"kind": OPTIMIZERS.index("adamw"), "total_steps": 1000}
    fields: dict[str, np.ndarray] = {
        name: np.full(adapters, whole.get(name, 0), np.int32)
        for name in ("kind", "schedule", "warmup_steps", "total_steps")
    } | {name: np.full(adapters, value, np.float32) for name, value in values.items()}
    fields["weight_decay"] = np.zeros(adapters, np.float32)
    fields["lora_plus_ratio"] = np.ones(adapters, np.float32)
    fields["freeze_on_nonfinite"] = np.zeros(adapters, np.bool_)
    return Hyper(**fields)  # pyright: ignore[reportArgumentType]


def measure(
    bench: Bench,
    whole: Plan,
    jobs: Sequence[Job],
    backward: float,
    pages: Path,
    label: str,
    sizes: tuple[int, int],
    picture: Path | None,
) -> Row:
    """Runs a plan and returns its figures; writes its Gantt pages.

    Args:
        bench: the engine.
        whole: the plan.
        jobs: that it trains.
        backward: time of a backward over that of a forward.
        pages: folder for the pages.
        label: what is measured, for the pages.
        sizes: static segments of a microbatch, and rows of the longest.
        picture: of the predicted and the measured run, to be written.
    """
    slots = slots_of(whole, jobs, bench, sizes)
    data, stages = mesh_sizes(bench.pipeline.mesh)
    hyper = hyper_of(bench.adapters)
    Stream(bench.pipeline, bench.frozen, hyper, slots[:2]).run(bench.state(slots[0]), TICKS)
    stream = Stream(bench.pipeline, bench.frozen, hyper, slots)  # all is compiled now
    state, calls = stream.run(bench.state(slots[0]), TICKS)
    stale = np.asarray([x.data for x in state.flow.stale.addressable_shards])
    del state  # its rings fill the device
    traced_slots = PICTURED if picture else bench.pipeline.lag + TRACED
    part = replace(whole, microbatches=whole.microbatches[: traced_slots * data])
    part_stream = Stream(bench.pipeline, bench.frozen, hyper, slots[:traced_slots])
    ends = part_stream.run(bench.state(slots[0]), 1)[1]
    seconds, valid = calls[-1], [bool(slot.valid.any()) for slot in slots]
    real, seen = sum(valid), valid[:traced_slots]
    ticks = np.diff(ends)
    # A short stream has no tick in which all stages are busy: its longest one stands for that.
    traced = full_tick(ticks, seen, stages) or float(ticks.max())
    full = min(full_tick(np.diff(calls), valid, stages, TICKS) or traced, traced)
    order = bench.pipeline.order
    cost = Cost(per_token=full / (1 + backward) / bench.capacity, backward=backward)
    predicted = simulate(whole, cost, stages, order)
    lengths = [s.length for job in jobs for batch in job.batches for s in batch]
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = step_flops(bench.config, lengths, RANK)
    # No-ops come where a job waits: some ticks of such a plan say nothing of the others.
    patterned = real < len(slots) and traced_slots < len(slots)
    slow = Cost(per_token=traced / (1 + backward) / bench.capacity, backward=backward)
    gantt = {"predicted": simulate(part, slow, stages, order)}
    gantt["measured"] = measured_timeline(part, ends, stages, backward, gantt["predicted"])
    for kind, timeline in gantt.items():
        page = gantt_html(part, timeline, title=f"{label}, {kind}")
        (pages / f"gantt_{label}_{kind}.html".replace(" ", "_")).write_text(page)
    if picture is not None:
        titled = {f"{label}, {kind}": (part, timeline) for kind, timeline in gantt.items()}
        plot_gantt(titled, picture, unit="seconds")
    memory = jax.local_devices()[0].memory_stats() or {}
    tokens = [float(sum(s.tokens() for m in slot for s in m.stretches)) for slot in ranks_of(part)]
    return {
        "tokens_per_s": sum(lengths) / seconds,
        "tokens_per_s_steady": None
        if patterned
        else steady(ticks, tokens, stages, backward) * traced / full,
        "mfu": None if peak is None else flops / seconds / (peak * data * stages),
        "bubble": 1 - real * full / seconds,
        "bubble_steady": None if patterned else 1 - steady(ticks, seen, stages, backward) * traced,
        "slots": len(slots),
        "noops": len(slots) - real,
        "tick_ms": full * 1e3,
        "call_ms": (traced - full) * 1e3,
        "seconds": seconds,
        "predicted_seconds": predicted.makespan,
        "predicted_error": predicted.makespan / seconds - 1,
        "stale": int(stale.sum()),
        "peak_gib": memory["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in memory else None,
        "ticks_ms": " ".join(f"{t * 1e3:.2f}" for t in ticks),
    }


def profile_ticks(bench: Bench, slots: list[Slot]) -> Row:
    """Returns milliseconds of a tick by class of kernel, of the process's devices on average.

    The profile is of the first ticks, some of which fill the pipeline; prints the heaviest kernels.
    """
    stream = Stream(bench.pipeline, bench.frozen, hyper_of(bench.adapters), slots[: 3 * TICKS])
    state = bench.state(slots[0])
    profile = profiled(lambda: jax.block_until_ready(stream.run(state, TICKS)))
    print(profile.heaviest(stream.ticks), profile.waits(stream.ticks), sep="\n")
    return dict(profile.by_class(stream.ticks))


def rows_of(arguments: argparse.Namespace, root: Path) -> Iterator[Row]:
    """Measures everything that was asked for."""
    config = model_shape(arguments.model, arguments.layers)
    tile = arguments.tile or (128 if jax.default_backend() == "gpu" else 16)
    frozen: Frozen | None = None
    for adapters in arguments.adapters:
        for lengths in arguments.lengths:
            jobs = jobs_of(lengths, arguments.gbs, 0, jobs=adapters, batches=arguments.batches)
            if arguments.shrink != 1:
                jobs = [_shrunk(job, arguments.shrink) for job in jobs]
            bench = bench_for(arguments, config, jobs, tile, frozen)
            frozen, model = bench.frozen, bench.pipeline.model
            backward = backward_ratio(config, model.remat)
            if model.residuals == "recompute":
                backward += 1
            plans = {system: planned(system, jobs, bench) for system in arguments.systems}
            everything = [m for whole in plans.values() for m in whole.microbatches]
            longest = longest_bucket(everything)
            sizes = (segment_bucket(everything, longest), longest)  # one program for all systems
            for system, whole in plans.items():
                label = f"{arguments.model} {arguments.stages}x{arguments.data} {lengths}"
                row: Row = {
                    "system": system,
                    "mesh": f"data={arguments.data},stage={arguments.stages}",
                    "model": arguments.model,
                    "layers": config.num_hidden_layers,
                    "lengths": lengths,
                    "adapters": adapters,
                    "gbs": arguments.gbs,
                    "capacity": arguments.capacity,
                    "order": bench.pipeline.order,
                    "distance": bench.pipeline.distance,
                    "remat": "recompute"
                    if model.residuals == "recompute"
                    else in_words(model.remat),
                    "batches": arguments.batches,
                }
                page = f"{label} {system}"
                picture = root.parent / f"{root.name}_gantt.png"
                first = system == "ours" and lengths == arguments.lengths[0]
                first = first and adapters == arguments.adapters[0]
                kept = arguments.append and picture.exists()  # it is of the file's first row
                drawn = picture if first and not kept else None
                row |= measure(bench, whole, jobs, backward, root, page, sizes, drawn)
                if arguments.profile and system == arguments.systems[0]:
                    row |= profile_ticks(bench, slots_of(whole, jobs, bench, sizes))
                print(f"{label} {adapters} adapters {system}: {in_words_of(row)}", flush=True)
                yield row


def _shrunk(job: Job, factor: float) -> Job:
    batches = tuple(
        tuple(s._replace(length=max(4, round(s.length * factor))) for s in batch)
        for batch in job.batches
    )
    return Job(name=job.name, batches=batches)


def _words(text: str) -> list[str]:
    return text.split(",")


def parser(prog: str, stages: int, model: str) -> argparse.ArgumentParser:
    """Returns the command line of `lorafusion bench pipeline` and `scaling`."""
    made = argparse.ArgumentParser(prog=prog)
    made.add_argument("--model", default=model, choices=sorted(MODELS))
    made.add_argument("--layers", type=int, help="fewer layers than the model has")
    made.add_argument("--stages", type=int, default=stages)
    made.add_argument("--data", type=int, default=1)
    made.add_argument("--adapters", default=[4], type=lambda x: [int(n) for n in x.split(",")])
    made.add_argument("--lengths", default=list(LENGTHS), type=_words)
    made.add_argument("--systems", default=list(SYSTEMS), type=_words)
    made.add_argument("--gbs", type=int, default=8)
    made.add_argument("--batches", type=int, default=6, help="global batches of each job")
    made.add_argument("--capacity", type=int, default=8192)
    made.add_argument("--tile", type=int)
    made.add_argument("--order", default="auto", choices=("auto", "fbh", "bfh"))
    made.add_argument("--remat", default="auto", choices=("auto", *REMAT_POLICIES, "recompute"))
    made.add_argument("--shrink", type=float, default=1.0, help="factor of all sample lengths")
    made.add_argument(
        "--profile", action="store_true", help="time of the first system by class of kernel"
    )
    made.add_argument("--quick", action="store_true", help="a tiny model, seconds on CPUs")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--append", action="store_true", help="keep the rows that the file has")
    made.add_argument("--coordinator", help="HOST:PORT of process 0, for several processes")
    made.add_argument("--process", type=int, help="number of this one, from 0")
    made.add_argument("--processes", type=int, help="how many there are")
    return made


def run(name: str, arguments: argparse.Namespace) -> int:
    """Measures and writes the results file after every row, so that a lost machine costs one."""
    if arguments.quick:
        arguments.model, arguments.capacity, arguments.tile = "tiny", 64, 16
        arguments.layers = arguments.layers or arguments.stages
        arguments.shrink, arguments.gbs, arguments.batches = 0.015, 4, 3
        arguments.lengths = arguments.lengths[:1] if len(arguments.lengths) == 1 else ["het"]
    if unknown := set(arguments.systems) - set(SYSTEMS):
        raise ConfigError(f"--systems {unknown.pop()}: expected some of {', '.join(SYSTEMS)}")
    if unknown := set(arguments.lengths) - set(LENGTHS):
        raise ConfigError(f"--lengths {unknown.pop()}: expected some of {', '.join(LENGTHS)}")
    start_processes(arguments.coordinator, arguments.process, arguments.processes)
    if not is_first():  # it measures with process 0, which writes and prints
        with TemporaryDirectory() as scratch, redirect_stdout(None):
            deque(rows_of(arguments, Path(scratch)), maxlen=0)
        return 0
    pages = arguments.out / device_name() / name
    pages.mkdir(parents=True, exist_ok=True)
    path = pages.with_suffix(".json")
    rows, before = written_before(path) if arguments.append else ([], "")
    command = f"{before}; {this_command()}" if before else this_command()
    for row in rows_of(arguments, pages):
        rows = [old for old in rows if case_of(old) != case_of(row)]
        rows.append(row | {"date": datetime.date.today().isoformat()})
        draw_speed(rows, write_results(name, rows, command=command, root=arguments.out))
    print(path)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs `lorafusion bench pipeline`."""
    return run("pipeline", parser("lorafusion bench pipeline", 2, "8b").parse_args(arguments))
