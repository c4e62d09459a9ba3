"""Trains random weights on a mesh and compares schedules: ours, Megatron's, mLoRA's.

    lorafusion bench pipeline --model 8b --stages 2 --lengths het,xsum [--layers N] [--data D]

All systems run in the same engine, on the same mesh, with the same rows per microbatch. The others'
microbatches are packed as full as their own order of samples allows, which is more than they do.
Every tick is timed. Rows go to docs/results/<device>/pipeline.json, the predicted and the measured
Gantt page beside it.
"""

import argparse
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from lorafusion_jax.bench.mesh_models import (
    MODELS,
    linear_widths,
    model_shape,
    peak_flops,
    train_flops,
)
from lorafusion_jax.bench.results import RESULTS, Row, device_name, write_results
from lorafusion_jax.bench.schedule import LENGTHS, jobs_of
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import REMAT_POLICIES, Remat
from lorafusion_jax.parallel.convert import make_names
from lorafusion_jax.parallel.layout import even_layout
from lorafusion_jax.parallel.mesh import make_mesh
from lorafusion_jax.parallel.pipeline import Order, Pipeline, Window, ring_of
from lorafusion_jax.parallel.residuals import backward_ratio, choose_policies, in_words
from lorafusion_jax.parallel.stage import StageModel, policies_at
from lorafusion_jax.parallel.state import StreamState, bank_shapes, mesh_sizes
from lorafusion_jax.parallel.stream import Slot, empty_slot, pack_slot, window_of
from lorafusion_jax.parallel.weights import Frozen, random_weights
from lorafusion_jax.train.batch import JobRows, longest_bucket, segment_bucket
from lorafusion_jax.train.memory import Step, device_bytes
from lorafusion_jax.train.optimizer import OPTIMIZERS, Hyper
from lorafusion_jax.train.step import loss_chunk
from lorafusion_sched import (
    Cost,
    Job,
    Microbatch,
    Plan,
    Problem,
    Timeline,
    distance_of,
    plan,
    simulate,
)
from lorafusion_sched.baselines import megatron, mlora
from lorafusion_sched.gantt import gantt_html
from lorafusion_sched.simulate import Span

RANK, DROPOUT = 16, 0.1
SYSTEMS = ("ours", "mlora", "megatron")
TICKS = 8
"""Of a call whose speed is measured; every tick is a call where they are timed one by one."""
IN_FLIGHT = 2


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

        @partial(jax.jit, donate_argnums=0)
        def filled(stacks):
            return jax.tree.map(lambda x: jnp.full_like(x, 0.01), stacks)

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
) -> Bench:
    """Makes an engine with random weights."""
    mesh = make_mesh(data, stages, num_layers=config.num_hidden_layers)
    layout = even_layout(config.num_hidden_layers, stages)
    paths = [
        f"model.layers.{layer}.{path}"
        for layer in range(config.num_hidden_layers)
        for path in linear_widths(config)
    ]
    names = make_names(layout, paths)
    width, chunk = jnp.dtype(dtype), loss_chunk(-(-config.vocab_size // stages), capacity)
    policies = policies_of(remat, config, stages, order, adapters, capacity, chunk, width)
    residuals = "recompute" if remat == "recompute" else "save"
    model = StageModel(config, width, layout.places, names.places, residuals, policies)
    pipeline = Pipeline(mesh, model, layout.first, order, chunk)
    frozen = random_weights(config, width, layout, mesh, 0)
    return Bench(pipeline, frozen, adapters, capacity, tile)


def policies_of(
    remat: str,
    config: ModelConfig,
    stages: int,
    order: Order,
    adapters: int,
    capacity: int,
    chunk: int,
    dtype: jnp.dtype,
) -> tuple[Remat, ...]:
    """Returns the policies of a stage's layer places; "auto" are the richest that fit."""
    places = -(-config.num_hidden_layers // stages)
    available = device_bytes()
    if remat == "recompute" or (remat == "auto" and available is None):
        return ("none",) * places
    if remat != "auto":
        return policies_at(remat, places)  # pyright: ignore[reportArgumentType]
    assert available is not None
    step = Step(config, capacity, adapters, RANK, dtype.itemsize, chunk)
    return choose_policies(step, stages, ring_of(order, stages), available)[0]


class RandomSamples:
    """Random tokens, all supervised."""

    def __init__(self, job: Job, vocab_size: int):
        self._lengths = {s.index: s.length for batch in job.batches for s in batch}
        self._vocab = vocab_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng, length = np.random.default_rng(index), self._lengths[index]
        return rng.integers(0, self._vocab, length).astype(np.int32), np.ones(length, np.bool_)


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


def slots_of(whole: Plan, jobs: Sequence[Job], bench: Bench) -> list[Slot]:
    """Packs all slots of a plan."""
    longest = longest_bucket(whole.microbatches)
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
            max_segments=segment_bucket(whole.microbatches, longest),
            longest=longest,
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


class Stream:
    """A plan's slots on their way through an engine, and when they came out.

    Args:
        bench: the engine.
        slots: of the plan.
    """

    def __init__(self, bench: Bench, slots: Sequence[Slot]):
        self._bench, self._lag = bench, bench.pipeline.lag
        self._slots, self._none = slots, empty_slot(slots[0])
        self.ticks = len(slots) + self._lag + 1
        """The first one only fetches the first embedding."""

    def run(self, ticks: int) -> tuple[StreamState, list[float]]:
        """Feeds all slots and drains, in calls of so many ticks.

        Returns:
            The state, and when each call had ended, in seconds since the first began.
        """
        pipeline, hyper = self._bench.pipeline, hyper_of(self._bench.adapters)
        state = jax.block_until_ready(self._bench.state(self._slots[0]))
        calls = [(t, self._window(t)) for t in range(-1, self.ticks - 1, ticks)]
        under_way: queue.Queue[jax.Array | None] = queue.Queue()
        ends: list[float] = []
        # A call with conditionals returns late on a GPU: only another thread sees when it ended.
        watch = threading.Thread(target=_note_ends, args=(under_way, ends))
        watch.start()
        start = time.perf_counter()
        try:
            for t0, window in calls:
                count = min(ticks, self.ticks - 1 - t0)
                state, report = pipeline.run(
                    state,
                    hyper,
                    self._bench.frozen,
                    window,
                    np.int32(t0),
                    np.int32(count),
                    ticks=TICKS,
                )
                under_way.put(report.loss)
                while len(under_way.queue) > IN_FLIGHT:
                    time.sleep(1e-4)
        finally:
            under_way.put(None)
            watch.join()
        return state, [end - start for end in ends]

    def _window(self, t0: int) -> Window:
        need = range(t0 - self._lag, t0 + TICKS + 1)
        count = len(self._slots)
        slots = [self._slots[m] if 0 <= m < count else self._none for m in need]
        return window_of(slots, self._bench.pipeline.mesh)


def _note_ends(under_way: queue.Queue[jax.Array | None], ends: list[float]) -> None:
    """Notes when each of the arrays is there."""
    while (result := under_way.get()) is not None:
        result.block_until_ready()
        ends.append(time.perf_counter())


def measured_timeline(
    whole: Plan, ends: Sequence[float], stages: int, backward: float, predicted: Timeline
) -> Timeline:
    """Draws ticks as forwards and backwards, in the order of the engine.

    Phases are not timed one by one: a tick is divided as the cost model divides it.
    """
    count, lag = len(whole.microbatches) // whole.width, 2 * stages - 1
    real = [
        any(m.stretches for m in whole.microbatches[i * whole.width : (i + 1) * whole.width])
        for i in range(count)
    ]
    spans = []
    for tick in range(count + lag):
        begin, end = ends[tick], ends[min(tick + 1, len(ends) - 1)]
        middle = begin + (end - begin) / (1 + backward)
        for stage in range(stages):
            for phase, slot, a, b in (
                ("F", tick - stage, begin, middle),
                ("B", tick - lag + stage, middle, end),
            ):
                if 0 <= slot < count and real[slot]:
                    spans.append(Span(stage, slot, phase, a, b))
    busy = [sum(s.end - s.start for s in spans if s.stage == i) for i in range(stages)]
    return Timeline(ends[-1] - ends[0], tuple(busy), predicted.useful, tuple(spans))


def measure(
    bench: Bench, system: str, jobs: Sequence[Job], backward: float, root: Path, label: str
) -> Row:
    """Runs one system's plan and returns its figures; writes its Gantt pages."""
    whole = planned(system, jobs, bench)
    slots = slots_of(whole, jobs, bench)
    data, stages = mesh_sizes(bench.pipeline.mesh)
    Stream(bench, slots[:2]).run(TICKS)  # compiles
    stream = Stream(bench, slots)
    state, calls = stream.run(TICKS)
    stale = np.asarray([x.data for x in state.flow.stale.addressable_shards])
    del state  # its rings fill the device
    ends = stream.run(1)[1]
    seconds, valid = calls[-1], [bool(slot.valid.any()) for slot in slots]
    real = sum(valid)
    # A short stream has no tick in which all stages are busy: its longest one stands for that.
    traced = full_tick(np.diff(ends), valid, stages) or float(np.diff(ends).max())
    full = min(full_tick(np.diff(calls), valid, stages, TICKS) or traced, traced)
    cost = Cost(per_token=1 / bench.capacity, backward=backward)
    predicted = simulate(whole, cost, stages, bench.pipeline.order)
    unit = full / (1 + backward)
    lengths = [s.length for job in jobs for batch in job.batches for s in batch]
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = train_flops(bench.config, lengths, RANK)
    gantt = {"predicted": predicted}
    gantt["measured"] = measured_timeline(whole, ends, stages, backward, predicted)
    for kind, timeline in gantt.items():
        page = gantt_html(whole, timeline, title=f"{label}, {system}, {kind}")
        (root / f"gantt_{label}_{system}_{kind}.html".replace(" ", "_")).write_text(page)
    memory = jax.local_devices()[0].memory_stats() or {}
    tokens = [float(sum(s.tokens() for m in part for s in m.stretches)) for part in ranks_of(whole)]
    return {
        "system": system,
        "tokens_per_s": sum(lengths) / seconds,
        "tokens_per_s_steady": steady(np.diff(ends), tokens, stages, backward) * traced / full,
        "mfu": None if peak is None else flops / seconds / (peak * data * stages),
        "bubble": 1 - real * full / seconds,
        "bubble_steady": 1 - steady(np.diff(ends), valid, stages, backward) * traced,
        "slots": len(slots),
        "noops": len(slots) - real,
        "tick_ms": full * 1e3,
        "call_ms": (traced - full) * 1e3,
        "seconds": seconds,
        "predicted_seconds": predicted.makespan * unit,
        "predicted_error": predicted.makespan * unit / seconds - 1,
        "stale": int(stale.sum()),
        "peak_gib": memory["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in memory else None,
        "ticks_ms": " ".join(f"{t * 1e3:.2f}" for t in np.diff(ends)),
    }


def ranks_of(whole: Plan) -> list[tuple[Microbatch, ...]]:
    """Returns the microbatches of each slot."""
    count = len(whole.microbatches)
    return [whole.microbatches[i : i + whole.width] for i in range(0, count, whole.width)]


def steady(ticks: np.ndarray, of_slots: Sequence[float], stages: int, backward: float) -> float:
    """Returns what was done per second between the fill and the drain; 0 for too short a stream.

    A slot counts where each stage runs its forward and its backward, by their shares of the time.

    Args:
        ticks: seconds of each tick, from the one on in which slot 0 enters.
        of_slots: what each slot is worth: its tokens, or 1 where it has work.
        stages: of the pipeline.
        backward: time of a backward over that of a forward.
    """
    lag, count = 2 * stages - 1, len(of_slots)
    done = 0.0
    for tick in range(lag, count):
        for stage in range(stages):
            forward, back = of_slots[tick - stage], of_slots[tick - lag + stage]
            done += (forward + backward * back) / (1 + backward) / stages
    return done / float(ticks[lag:count].sum()) if count > lag else 0.0


def full_tick(
    spans: np.ndarray, valid: Sequence[bool], stages: int, ticks: int = 1
) -> float | None:
    """Returns the median time of a tick in which every stage has a forward and a backward.

    Args:
        spans: seconds of each call, from the second call on.
        valid: whether each slot has work.
        stages: of the pipeline.
        ticks: of a call; the first call's first tick is -1.

    Returns:
        Seconds, None where no call has such ticks alone.
    """
    lag, found = 2 * stages - 1, []
    for call, seconds in enumerate(spans, 1):
        first = call * ticks - 1
        around = range(first - lag, first + ticks)
        if all(0 <= slot < len(valid) and valid[slot] for slot in around):
            found.append(float(seconds) / ticks)
    return median(found) if found else None


def rows_of(arguments: argparse.Namespace, root: Path) -> Iterator[Row]:
    """Measures everything that was asked for."""
    config = model_shape(arguments.model, arguments.layers)
    tile = arguments.tile or (128 if jax.default_backend() == "gpu" else 16)
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    for adapters in arguments.adapters:
        bench = make_bench(
            config,
            data=arguments.data,
            stages=arguments.stages,
            order=arguments.order,
            adapters=adapters,
            capacity=arguments.capacity,
            tile=tile,
            remat=arguments.remat,
            dtype=dtype,
        )
        model = bench.pipeline.model
        backward = backward_ratio(config, model.remat)
        if model.residuals == "recompute":
            backward += 1
        for lengths in arguments.lengths:
            jobs = jobs_of(lengths, arguments.gbs, 0, jobs=adapters, batches=arguments.batches)
            if arguments.shrink != 1:
                jobs = [_shrunk(job, arguments.shrink) for job in jobs]
            for system in arguments.systems:
                label = f"{arguments.model} {arguments.stages}x{arguments.data} {lengths}"
                row: Row = {
                    "mesh": f"data={arguments.data},stage={arguments.stages}",
                    "model": arguments.model,
                    "layers": config.num_hidden_layers,
                    "lengths": lengths,
                    "adapters": adapters,
                    "gbs": arguments.gbs,
                    "capacity": arguments.capacity,
                    "order": arguments.order,
                    "distance": distance_of(arguments.order, arguments.stages),
                    "remat": "recompute"
                    if model.residuals == "recompute"
                    else in_words(model.remat),
                    "batches": arguments.batches,
                }
                row |= measure(bench, system, jobs, backward, root, label)
                print(
                    f"{label} {adapters} adapters {system}: {row['tokens_per_s']:.0f} tokens/s "
                    f"(steady {row['tokens_per_s_steady']:.0f}), remat {row['remat']}, "
                    f"bubble {row['bubble']:.1%}, steady {row['bubble_steady']:.1%}, "
                    f"tick {row['tick_ms']:.1f} ms",
                    flush=True,
                )
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
    made.add_argument("--order", default="fbh", choices=("fbh", "bfh"))
    made.add_argument("--remat", default="auto", choices=("auto", *REMAT_POLICIES, "recompute"))
    made.add_argument("--shrink", type=float, default=1.0, help="factor of all sample lengths")
    made.add_argument("--quick", action="store_true", help="a tiny model, seconds on CPUs")
    made.add_argument("--out", type=Path, default=RESULTS)
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
    pages = arguments.out / device_name() / name
    pages.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for row in rows_of(arguments, pages):
        rows.append(row)
        write_results(name, rows, root=arguments.out)
    print(pages.parent / f"{name}.json")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs `lorafusion bench pipeline`."""
    return run("pipeline", parser("lorafusion bench pipeline", 2, "8b").parse_args(arguments))
