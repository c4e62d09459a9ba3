"""A tiny base model, data and a bench that trains microbatch by microbatch, for these tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorafusion_jax.data.dataset import Dataset, join_samples
from lorafusion_jax.lora import LoraSpec
from lorafusion_jax.lora.bank import (
    AdapterBank,
    attach_adapters,
    empty_bank,
    multi_linears,
    put_slot,
    split_adapters,
)
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import Decoder
from lorafusion_jax.models.hf_weights import Base, random_base
from lorafusion_jax.train.batch import JobRows, PackedBatch, pack, segment_bucket
from lorafusion_jax.train.optimizer import OPTIMIZERS, SCHEDULES, Hyper
from lorafusion_jax.train.programs import Programs
from lorafusion_jax.train.step import Model, StepReport, TrainState, init_state
from lorafusion_sched import Job, Microbatch, Problem, Sample, plan
from pallas_kernels import job_seed

VOCAB, TILE, CAPACITY, SLOTS, R_MAX = 97, 16, 64, 4, 8
CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }
)


@cache
def tiny_base() -> Base:
    """A random Llama of two layers, width 32."""
    return random_base(CONFIG, 0)


def dataset(seed: int, num_samples: int, shortest: int = 5, longest: int = 20) -> Dataset:
    """Samples of a learnable pattern; the second half of each is supervised."""
    rng = np.random.default_rng(seed)
    samples = []
    for line in range(num_samples):
        length = int(rng.integers(shortest, longest + 1))
        half = -(-length // 2)
        prompt = rng.integers(0, VOCAB, half)
        answer = (prompt[: length - half] + 1) % VOCAB
        tokens = [int(t) for t in (*prompt, *answer)]
        samples.append((line + 1, tokens, [i >= half for i in range(length)]))
    return join_samples(samples)


@dataclass(frozen=True)
class TinyJob:
    """A job for the bench: its data, adapter and hyper-parameters."""

    name: str
    samples: Dataset
    batch_size: int
    spec: LoraSpec = field(default_factory=lambda: LoraSpec(r=4, alpha=8))
    lr: float = 1e-2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    schedule: str = "constant"
    freeze: bool = False

    @property
    def plan(self) -> Job:
        """Its samples in order, batch by batch."""
        samples = [Sample(0, i, int(n)) for i, n in enumerate(self.samples.lengths)]
        size = self.batch_size
        batches = [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]
        return Job(name=self.name, batches=tuple(batches))

    def rows(self, slot: int) -> JobRows:
        """Where its rows come from."""
        counts = self.samples.supervised_counts
        tokens = {
            i: int(sum(counts[s.index] for s in batch)) for i, batch in enumerate(self.plan.batches)
        }
        return JobRows(slot, job_seed(0, self.name), self.samples, tokens)


def plan_jobs(jobs: Sequence[TinyJob], capacity: int = CAPACITY) -> tuple[Microbatch, ...]:
    """Plans jobs together."""
    problem = Problem(jobs=tuple(j.plan for j in jobs), capacities=(capacity,), tile=TILE)
    return plan(problem).microbatches


def hyper(jobs: Mapping[int, TinyJob], num_slots: int = SLOTS) -> Hyper:
    """Hyper-parameters of jobs by slot."""

    def column(dtype, value):
        return np.array([value(jobs[s]) if s in jobs else 0 for s in range(num_slots)], dtype)

    return Hyper(
        kind=column(np.int32, lambda j: OPTIMIZERS.index(j.optimizer)),
        schedule=column(np.int32, lambda j: SCHEDULES.index(j.schedule)),
        lr=column(np.float32, lambda j: j.lr),
        warmup_steps=column(np.int32, lambda j: 2),
        total_steps=column(np.int32, lambda j: len(j.plan.batches) + 1),
        b1=column(np.float32, lambda j: 0.9),
        b2=column(np.float32, lambda j: 0.99),
        eps=column(np.float32, lambda j: 1e-8),
        weight_decay=column(np.float32, lambda j: j.weight_decay),
        max_grad_norm=column(np.float32, lambda j: j.max_grad_norm),
        lora_plus_ratio=column(np.float32, lambda j: 1.0),
        freeze_on_nonfinite=column(np.bool_, lambda j: j.freeze),
    )


def random_adapter(spec: LoraSpec, name: str, shapes: Mapping[str, tuple[int, int]]):
    """Non-zero A and B: zeros would hide what must not happen."""
    rng = np.random.default_rng(job_seed(1, name))
    return {
        path: (
            jnp.asarray(rng.normal(size=(spec.r, k)) * k**-0.5, jnp.float32),
            jnp.asarray(rng.normal(size=(spec.r, n)) * 0.05, jnp.float32),
        )
        for path, (k, n) in shapes.items()
    }


class Bench:
    """Trains jobs in given slots; every bench of one size shares the compiled programs.

    Args:
        jobs: jobs by slot.
        num_slots: slots of the bank.
        dtype: of base, adapters and moments.
    """

    def __init__(self, jobs: Mapping[int, TinyJob], num_slots: int = SLOTS, dtype=jnp.float32):
        self.jobs, self.num_slots = dict(jobs), num_slots
        self.programs, shapes = _programs(num_slots, jnp.dtype(dtype))
        bank = empty_bank(shapes, num_slots, R_MAX)
        for slot, job in jobs.items():
            bank = put_slot(bank, slot, job.spec, random_adapter(job.spec, job.name, shapes))
        bank = bank._replace(**jax.tree.map(lambda x: x.astype(dtype), {"a": bank.a, "b": bank.b}))
        self.state = init_state(bank, OPTIMIZERS)
        self.hyper = hyper(jobs, num_slots)
        self.reports: list[StepReport] = []

    @property
    def bank(self) -> AdapterBank:
        """The adapters now."""
        return self.state.bank

    def pack(self, microbatch: Microbatch, segments: int = 32) -> PackedBatch:
        """Packs the rows of this bench's jobs; others become padding."""
        rows = {job.name: job.rows(slot) for slot, job in self.jobs.items()}
        sizes = {"tile": TILE, "num_slots": self.num_slots, "max_segments": segments}
        return pack(microbatch, rows, **sizes)[0]

    def step(self, batch: PackedBatch) -> None:
        """Trains on one microbatch and updates what it ends."""
        self.state, _ = self.programs.train(self.state, batch)
        if batch.batch_end.any():
            self.state, report = self.programs.update(self.state, self.hyper, batch.batch_end)
            self.reports.append(jax.device_get(report))

    def run(self, microbatches: Sequence[Microbatch]) -> "Bench":
        """Trains on planned microbatches."""
        assert segment_bucket(microbatches) <= 32
        for microbatch in microbatches:
            self.step(self.pack(microbatch))
        return self

    def slot(self, slot: int) -> dict:
        """Everything the state holds of one slot."""
        return slot_of(self.state, slot)


def slot_of(state: TrainState, slot: int) -> dict:
    """Returns one slot's part of a state, on the host."""
    tree = {**state._asdict(), "bank": state.bank._asdict(), "opt": state.opt._asdict()}
    return jax.tree.map(lambda leaf: np.asarray(leaf[slot]), tree)


@cache
def _programs(num_slots: int, dtype: jnp.dtype) -> tuple[Programs, dict[str, tuple[int, int]]]:
    model = tiny_base().model
    if dtype != jnp.float32:
        wide = Decoder(CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
        weights = jax.tree.map(lambda x: x.astype(dtype), nnx.state(model))
        nnx.update(wide, weights)
        model = wide
    linears = multi_linears(model)
    shapes = {path: (m.in_features, m.out_features) for path, m in linears.items()}
    attach_adapters(model, tuple(shapes), num_slots, R_MAX)
    graphdef, frozen = split_adapters(model)
    attach_adapters(model, (), 0, 1)
    return Programs(Model(graphdef, "none", 16), frozen), shapes


def frozen_leaves(base: Base) -> list[np.ndarray]:
    """The base model's weights, copied."""
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(base.model))]
