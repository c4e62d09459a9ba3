"""From a job's configuration and data to what is planned and packed: samples, batches, weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from lorafusion_jax.config import BatchingConfig, DataConfig, JobConfig, OptimConfig, SourceConfig
from lorafusion_jax.config.schema import SpikeConfig
from lorafusion_jax.data import (
    Dataset,
    batch_order,
    concatenate,
    load_dataset,
    mixed_order,
    records_from_rows,
    split_eval,
    tokenize_dataset,
    with_system,
)
from lorafusion_jax.errors import DataError
from lorafusion_jax.lora import LoraSpec, target_paths
from lorafusion_jax.lora.bank import Adapter
from lorafusion_jax.lora.start import adapter_fingerprint, initial_adapter
from lorafusion_jax.lora.targets import refuse_unused_patterns
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.train.optimizer import OPTIMIZERS, SCHEDULES, Hyper
from lorafusion_sched import Job, Sample
from pallas_kernels import job_seed

type Data = DataConfig | str | Path | Dataset | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class TrainJob:
    """A job ready to be planned.

    Attributes:
        config: its settings.
        seed: its 32-bit seed, a function of the run's seed and its name (of a sweep, the name of
            the job in the file).
        samples: training data.
        plan: its global batches for the planner.
        batch_tokens: supervised tokens of each global batch.
        eval_samples: held-out data; the same data set as `samples` where it was split off.
        eval_indices: which of them are held out; may be empty.
        targets: paths of the modules its adapter changes.
        initial: the adapter it starts from; None for a fresh one.
    """

    config: JobConfig
    seed: int
    samples: Dataset
    plan: Job
    batch_tokens: dict[int, int]
    eval_samples: Dataset
    eval_indices: tuple[int, ...]
    targets: tuple[str, ...]
    initial: Adapter | None = None

    @property
    def name(self) -> str:
        """The job's name."""
        return self.config.name

    @property
    def num_steps(self) -> int:
        """Optimizer steps it takes."""
        return len(self.plan.batches)

    @property
    def num_train(self) -> int:
        """Samples it trains on in one epoch."""
        held_out = self.config.eval.path is None
        return len(self.samples) - (len(self.eval_indices) if held_out else 0)

    @property
    def fingerprint(self) -> str:
        """Content hash of its training and held-out data, and of the adapter it starts from."""
        data = f"{self.samples.fingerprint}:{self.eval_samples.fingerprint}"
        return data if self.initial is None else f"{data}:{adapter_fingerprint(self.initial)}"

    @property
    def spec(self) -> LoraSpec:
        """Its adapter in the words of the lora room."""
        return lora_spec(self.config)

    @property
    def max_rank(self) -> int:
        """Largest rank of its modules."""
        return self.spec.max_rank(self.targets)

    def eval_plan(self) -> Job:
        """Its held-out samples as one global batch, for packing."""
        lengths = self.eval_samples.lengths
        samples = tuple(Sample(0, i, int(lengths[i])) for i in self.eval_indices)
        return Job(name=self.name, batches=(samples,) if samples else ())


def resolve_job(
    config: JobConfig, data: Data, base: Base, batching: BatchingConfig, seed: int
) -> TrainJob:
    """Reads, tokenises and splits a job's data and cuts it into global batches.

    Args:
        config: the job.
        data: file, rows or tokenised samples to train on, or the job's own `data` section.
        base: whose tokenizer is used.
        batching: longest sample and what happens to longer ones.
        seed: of the run.

    Raises:
        DataError: the data cannot be used.
        AdapterError: the model has no such target modules.
    """
    samples = _dataset(data, config, base, batching)
    if config.eval.path is not None:
        eval_samples = _dataset(config.eval.path, config, base, batching)
        train, held_out = np.arange(len(samples)), np.arange(len(eval_samples))
    else:
        eval_samples = samples
        train, held_out = split_eval(len(samples), config.eval.split, seed, config.identity)
    held_out = held_out[: config.eval.max_samples]
    batches = _batches(config, samples, train, seed)
    counts = samples.supervised_counts
    tokens = {i: int(sum(counts[s.index] for s in batch)) for i, batch in enumerate(batches)}
    spec, start = lora_spec(config), config.lora.init_from
    targets = target_paths(base.model, spec)
    refuse_unused_patterns(spec, targets)
    return TrainJob(
        config=config,
        seed=job_seed(seed, config.identity),
        samples=samples,
        plan=Job(name=config.name, batches=batches),
        batch_tokens=tokens,
        eval_samples=eval_samples,
        eval_indices=tuple(int(i) for i in held_out),
        targets=tuple(targets),
        initial=None if start is None else initial_adapter(start, config, base.model, targets),
    )


def _dataset(data: Data, config: JobConfig, base: Base, batching: BatchingConfig) -> Dataset:
    if isinstance(data, Dataset):
        return data
    rules, name = config.data, config.name
    limits: dict[str, Any] = {
        "max_length": batching.max_length,
        "overlong": batching.overlong,
        "vocab_size": base.config.vocab_size,
        "learn": "all" if rules.train_on_prompt else _ANSWERS[rules.last_turn_only],
    }
    if isinstance(data, DataConfig | str | Path):
        parts = data.parts if isinstance(data, DataConfig) else (rules.at(str(data)),)
        return concatenate([_load(part, rules.system, base, limits) for part in parts])
    rows = [dict(row) for row in data]
    columns = {str(key): own for key, own in rules.columns.items()}
    records = records_from_rows(rows, rules.format, name, columns)
    if rules.system is not None:
        records = with_system(records, rules.system, name)
    return tokenize_dataset(records, base.tokenizer, name=name, **limits)


_ANSWERS = {False: "answers", True: "last_answer"}


def _load(part: SourceConfig, system: str | None, base: Base, limits: dict[str, Any]) -> Dataset:
    options = part.model_dump(exclude={"path", "weight"})
    return load_dataset(part.path, base.tokenizer, system=system, **options, **limits)


def _batches(
    config: JobConfig, samples: Dataset, train: np.ndarray, seed: int
) -> tuple[tuple[Sample, ...], ...]:
    """Walks over the training samples epoch by epoch; an epoch's last batch may be smaller.

    `Sample.epoch` counts how often the sample was seen before, so that dropout differs each time.
    """
    size, lengths = config.train.global_batch_size, samples.lengths
    per_epoch = math.ceil(len(train) / size)
    steps = config.train.max_steps or per_epoch * (config.train.epochs or 1)
    batches: list[tuple[Sample, ...]] = []
    for epoch in range(math.ceil(steps / per_epoch)):
        times, order = _epoch(config, samples, train, seed, epoch)
        visits = [
            Sample(int(seen), int(i), int(lengths[i])) for seen, i in zip(times, order, strict=True)
        ]
        batches += batched(visits, size)
    return tuple(batches[:steps])


def _epoch(
    config: JobConfig, samples: Dataset, train: np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each visited sample was seen before, and which samples, in order."""
    weights = [part.weight for part in config.data.sources if part.weight is not None]
    if not weights or len(samples.sizes) != len(weights):
        order = batch_order(seed, config.identity, epoch, len(train))
        return np.full(len(train), epoch), train[order]
    ends = np.cumsum(samples.sizes)
    parts = np.split(train, np.searchsorted(train, ends[:-1]))
    for part, source in zip(parts, config.data.sources, strict=True):
        if not len(part):
            message = "has no row left to train on: all are too long or held out"
            raise DataError(message, path=source.path)
    return mixed_order(seed, config.identity, epoch, parts, weights)


def lora_spec(config: JobConfig) -> LoraSpec:
    """Returns a job's adapter in the words of the lora room."""
    return LoraSpec.from_config(config.lora)


def hyper_parameters(jobs: Sequence[TrainJob], slots: Mapping[str, int], num_slots: int) -> Hyper:
    """Returns the hyper-parameters of every slot; free slots have learning rate 0."""
    columns: dict[str, np.ndarray] = {
        "kind": np.zeros(num_slots, np.int32),
        "schedule": np.zeros(num_slots, np.int32),
        "warmup_steps": np.zeros(num_slots, np.int32),
        "total_steps": np.ones(num_slots, np.int32),
        "freeze_on_nonfinite": np.zeros(num_slots, np.bool_),
    } | {
        name: np.zeros(num_slots, np.float32)
        for name in ("lr", "b1", "b2", "eps", "weight_decay", "max_grad_norm", "lora_plus_ratio")
    }
    for job in jobs:
        if job.name in slots:
            values = _slot_values(job.config.optim, job.num_steps)
            values["freeze_on_nonfinite"] = job.config.train.on_nonfinite == "freeze"
            for name, value in values.items():
                columns[name][slots[job.name]] = value
    return Hyper(**columns)  # pyright: ignore[reportArgumentType]


def _slot_values(optim: OptimConfig, num_steps: int) -> dict[str, Any]:
    warmup = optim.warmup_steps
    clip = optim.max_grad_norm
    return {
        "kind": OPTIMIZERS.index(optim.name),
        "schedule": SCHEDULES.index(optim.schedule.removesuffix("_with_warmup")),
        "lr": optim.lr,
        "warmup_steps": math.ceil(optim.warmup_ratio * num_steps) if warmup is None else warmup,
        "total_steps": num_steps,
        "b1": optim.betas[0],
        "b2": optim.betas[1],
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": math.inf if clip is None else clip,
        "lora_plus_ratio": optim.lora_plus_ratio,
    }


def spike_configs(jobs: Sequence[TrainJob]) -> dict[str, SpikeConfig]:
    """Returns the guards against loss spikes of the jobs that have one, by job."""
    found = {job.name: job.config.train.spike for job in jobs}
    return {name: spike for name, spike in found.items() if spike is not None}
