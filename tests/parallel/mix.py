"""A tiny mix of heterogeneous jobs, trained on one device or on a mesh."""

from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from lorafusion_jax.lora import LoraSpec, target_paths
from lorafusion_jax.lora.bank import attach_adapters, multi_linears, split_adapters, write_slot
from lorafusion_jax.models import ModelConfig, random_base
from lorafusion_jax.parallel.convert import Names, from_one_device, make_names, to_one_device
from lorafusion_jax.parallel.layout import Layout, even_layout
from lorafusion_jax.parallel.loading import place_base
from lorafusion_jax.parallel.mesh import make_mesh
from lorafusion_jax.parallel.pipeline import Pipeline
from lorafusion_jax.parallel.stage import StageModel, policies_at
from lorafusion_jax.parallel.state import StreamState, bank_shapes
from lorafusion_jax.parallel.stream import Slot, empty_slot, pack_slot, window_of
from lorafusion_jax.parallel.weights import Frozen
from lorafusion_jax.train.batch import JobRows, pack
from lorafusion_jax.train.optimizer import OPTIMIZERS, SCHEDULES, Hyper
from lorafusion_jax.train.step import Model, TrainState, init_state, train_step, update_step
from lorafusion_sched import Microbatch, Plan, Problem, job_from_lengths, plan
from pallas_kernels import job_seed

CONFIG = ModelConfig(
    vocab_size=61,  # no multiple of any number of stages
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)
CAPACITY, TILE = 64, 16
SEGMENTS = 16
TICKS = 8  # of a call
OPTIMIZER_NAMES = ("adamw", "sgd")


@dataclass(frozen=True)
class TinyJob:
    """One job: its adapter, its optimizer, and the lengths of its samples."""

    name: str
    spec: LoraSpec
    lengths: tuple[int, ...]
    batch_size: int
    kind: str
    lr: float
    max_grad_norm: float


JOBS = (
    TinyJob(
        "a",
        LoraSpec(r=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj", "down_proj")),
        (9, 21, 14, 30, 8),
        2,
        "adamw",
        3e-3,
        1e9,
    ),
    TinyJob(
        "b",
        LoraSpec(r=2, alpha=2, target_modules=("q_proj", "v_proj")),
        (40, 12, 33, 17),
        3,
        "adamw",
        1e-2,
        0.05,
    ),
    TinyJob(
        "c",
        LoraSpec(r=3, alpha=6, dropout=0.5, target_modules=("up_proj", "down_proj")),
        (20, 11, 29),
        1,
        "adamw",
        2e-3,
        0.3,
    ),
    TinyJob(
        "d",
        LoraSpec(r=1, alpha=4, target_modules=("q_proj", "up_proj")),
        (60, 50, 7),
        3,
        "sgd",
        3e-2,
        1.0,
    ),
)


class Samples:
    """Random tokens; most of them supervised."""

    def __init__(self, name: str, lengths):
        rng = np.random.default_rng(job_seed(0, name))
        self.rows = [
            (rng.integers(0, CONFIG.vocab_size, n).astype(np.int32), rng.random(n) < 0.7)
            for n in lengths
        ]

    def __getitem__(self, index: int):
        return self.rows[index]


@dataclass(frozen=True)
class Mix:
    """The jobs with everything that training them needs; slots are in order of the jobs."""

    steps: int
    jobs: tuple[TinyJob, ...] = JOBS

    def problem(self, *, distance: int = 1, width: int = 1, clock="1f1b") -> Problem:
        planned = []
        for job in self.jobs:
            epochs = -(-self.steps * job.batch_size // len(job.lengths)) + 1
            whole = job_from_lengths(
                job.name, list(job.lengths), global_batch_size=job.batch_size, epochs=epochs
            )
            planned.append(replace(whole, batches=whole.batches[: self.steps]))
        return Problem(
            jobs=tuple(planned),
            capacities=(CAPACITY,),
            tile=TILE,
            distance=distance,
            width=width,
            clock=clock,
        )

    def rows(self) -> dict[str, JobRows]:
        found = {}
        for slot, (job, planned) in enumerate(zip(self.jobs, self.problem().jobs, strict=True)):
            samples = Samples(job.name, job.lengths)
            tokens = {
                number: sum(int(samples[s.index][1][1:].sum()) for s in batch)
                for number, batch in enumerate(planned.batches)
            }
            found[job.name] = JobRows(slot, job_seed(0, job.name), samples, tokens)
        return found

    def hyper(self) -> Hyper:
        n = len(self.jobs)

        def column(value, dtype=np.float32):
            return np.full(n, value, dtype)

        return Hyper(
            kind=np.array([OPTIMIZERS.index(job.kind) for job in self.jobs], np.int32),
            schedule=np.array([i % len(SCHEDULES) for i in range(n)], np.int32),
            lr=np.array([job.lr for job in self.jobs], np.float32),
            warmup_steps=column(2, np.int32),
            total_steps=column(2 * self.steps, np.int32),
            b1=column(0.9),
            b2=column(0.99),
            eps=column(1e-6),
            weight_decay=column(0.01),
            max_grad_norm=np.array([job.max_grad_norm for job in self.jobs], np.float32),
            lora_plus_ratio=np.ones(len(self.jobs), np.float32),
            freeze_on_nonfinite=column(False, np.bool_),
        )


def tiny_base(config: ModelConfig = CONFIG, dtype="float32"):
    return random_base(config, 1, dtype)


def module_paths(base, mix: Mix) -> tuple[str, ...]:
    wanted = {path for job in mix.jobs for path in target_paths(base.model, job.spec)}
    return tuple(path for path in multi_linears(base.model) if path in wanted)


def first_state(base, mix: Mix) -> tuple[object, object, TrainState]:
    """Structure, frozen weights and first state of one device. B starts random: A learns too."""
    paths = module_paths(base, mix)
    bank = attach_adapters(base.model, paths, len(mix.jobs), max(j.spec.r for j in mix.jobs))
    graphdef, frozen = split_adapters(base.model)
    attach_adapters(base.model, (), 0, 1)
    for slot, job in enumerate(mix.jobs):
        targets = target_paths(base.model, job.spec)
        bank = write_slot(bank, slot, job.spec, job_seed(0, job.name), targets)
        for i, path in enumerate(targets):
            rng = np.random.default_rng([slot, i])
            whole = np.array(bank.b[path])
            whole[slot, : job.spec.r] = 0.05 * rng.standard_normal(whole[slot, : job.spec.r].shape)
            bank.b[path] = jnp.asarray(whole)
    return graphdef, frozen, init_state(bank, OPTIMIZER_NAMES)


@cache
def _programs(model: Model):
    """Compiled once per dtype."""
    return jax.jit(partial(train_step, model)), jax.jit(update_step)


def train_one_device(base, mix: Mix, whole: Plan, widen=lambda tree: tree):
    """Trains a plan with the one-device step, in the dtype that `widen` gives all floats."""
    graphdef, frozen, state = first_state(base, mix)
    step, update = _programs(Model(graphdef, "none", 32))
    frozen, state, rows, hyper = widen(frozen), widen(state), mix.rows(), widen(mix.hyper())
    reports = []
    for start in range(0, len(whole.microbatches), whole.width):
        ended = np.zeros(len(mix.jobs), np.bool_)
        for microbatch in whole.microbatches[start : start + whole.width]:
            if microbatch.stretches:
                batch, _ = pack(
                    microbatch, rows, tile=TILE, num_slots=len(mix.jobs), max_segments=SEGMENTS
                )
                state, _ = step(state, frozen, widen(batch))
                ended |= batch.batch_end
        if ended.any():
            state, report = update(state, hyper, ended)
            reports.append((ended, jax.device_get(report)))
    return jax.device_get(state), reports


@dataclass
class OnMesh:
    """The engine over a tiny base, and how to run plans through it."""

    base: object
    mix: Mix
    data: int
    stage: int
    order: str = "fbh"
    residuals: str = "save"
    remat: str | tuple[str, ...] = "none"
    layers: tuple[int, ...] | None = None
    axis_kind: str = "auto"

    def __post_init__(self):
        config = self.base.config
        self.mesh = make_mesh(
            self.data, self.stage, num_layers=config.num_hidden_layers, axis_kind=self.axis_kind
        )
        layout = (
            Layout(self.layers)
            if self.layers
            else even_layout(config.num_hidden_layers, self.stage)
        )
        self.names: Names = make_names(layout, module_paths(self.base, self.mix))
        dtype = self.base.model.head_weight().dtype
        model = StageModel(
            config,
            dtype,
            layout.places,
            self.names.places,
            self.residuals,
            policies_at(self.remat, layout.places),
        )
        self.pipeline = Pipeline(self.mesh, model, layout.first, self.order, 16)
        self.frozen: Frozen = place_base(self.base, layout, self.mesh)

    def plan(self, distance: int | None = None) -> Plan:
        pipeline = self.pipeline
        if distance is None:
            return plan(
                self.mix.problem(distance=pipeline.distance, width=self.data, clock=self.order)
            )
        return plan(self.mix.problem(distance=distance, width=self.data, clock="1f1b"))

    def slots(self, whole: Plan) -> list[Slot]:
        """Slots of a plan of this width; a plan of width 1 feeds the ranks in turn."""
        rows = self.mix.rows()
        none = Microbatch((), CAPACITY)
        found = []
        for i in range(0, len(whole.microbatches), whole.width):
            ranks = list(whole.microbatches[i : i + whole.width])
            if whole.width == 1 < self.data:
                ranks = [ranks[0] if i % self.data == rank else none for rank in range(self.data)]
            found.append(
                pack_slot(
                    ranks,
                    rows,
                    capacity=CAPACITY,
                    tile=TILE,
                    num_slots=len(self.mix.jobs),
                    max_segments=SEGMENTS,
                )
            )
        return found

    def zero_state(self) -> StreamState:
        linears = multi_linears(self.base.model)
        widths = {}
        for path in self.names.paths:
            (place,) = self.names.layout.place_paths([path])
            widths[place] = (linears[path].in_features, linears[path].out_features)
        slots, r_max = len(self.mix.jobs), max(job.spec.r for job in self.mix.jobs)
        (batch, _) = pack(
            Microbatch((), CAPACITY), {}, tile=TILE, num_slots=slots, max_segments=SEGMENTS
        )
        return self.pipeline.empty_state(batch, bank_shapes(widths, slots, r_max), OPTIMIZER_NAMES)

    def start(self, saved: TrainState, versions=None) -> StreamState:
        versions = np.zeros(len(self.mix.jobs), np.int32) if versions is None else versions
        return from_one_device(saved, self.zero_state(), self.names, self.mesh, versions)

    def run(self, state: StreamState, slots: list[Slot], ticks: int = TICKS):
        """Feeds all slots and drains; returns the state, the reports, and the stale counts."""
        lag, stream = self.pipeline.lag, len(slots)
        total = stream + lag + 1
        none = empty_slot(slots[0])
        hyper = self.mix.hyper()
        reports = []
        for t0 in range(-1, total - 1, ticks):
            need = range(t0 - lag, t0 + ticks + 1)
            window = window_of([slots[m] if 0 <= m < stream else none for m in need], self.mesh)
            state, report = self.pipeline.run(
                state, hyper, self.frozen, window, np.int32(t0), ticks=ticks
            )
            reports.append(jax.device_get(report))
        report = jax.tree.map(lambda *x: np.concatenate(x), *reports)
        stale = np.asarray(state.flow.stale).reshape(-1, 2).sum(0)
        return state, report, stale

    def finish(self, state: StreamState) -> TrainState:
        return to_one_device(state, self.names, self.mesh)


def first_batches(whole: Plan) -> Plan:
    """The plan without anything but each job's first global batch, and that without its end."""
    microbatches = [
        replace(m, stretches=tuple(replace(s, ends=False) for s in m.stretches if s.batch == 0))
        for m in whole.microbatches
    ]
    return replace(whole, microbatches=tuple(microbatches))


def unfinished_near(whole: Plan, position: int) -> int:
    """The next position at which some job is in the middle of a global batch."""
    ended = {}
    for i, microbatch in enumerate(whole.microbatches):
        if i >= position and not all(ended.values()):
            return i
        ended |= {stretch.job: stretch.ends for stretch in microbatch.stretches}
    raise AssertionError("no global batch is cut anywhere")


def noop_positions(whole: Plan) -> int:
    return sum(not m.stretches for m in whole.microbatches)


def wide(tree):
    """All floats in float64."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
