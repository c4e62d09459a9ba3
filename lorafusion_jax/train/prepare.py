"""From a schedule to a run in memory: adapters beside the base model, programs, restored state."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jaxtyping import PyTree

from lorafusion_jax.config import BatchingConfig, ParallelConfig
from lorafusion_jax.lora.bank import (
    attach_adapters,
    multi_linears,
    split_adapters,
    with_patterns,
)
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.parallel.engine import host_device, make_engine, on_host
from lorafusion_jax.parallel.order import order_of
from lorafusion_jax.parallel.processes import all_or_none
from lorafusion_jax.parallel.ranks import of_ranks, sum_ranks
from lorafusion_jax.parallel.run import MeshPrograms, MeshRun
from lorafusion_jax.train.background import BackgroundSaver
from lorafusion_jax.train.batch import longest_bucket, segment_bucket
from lorafusion_jax.train.choices import Choices, kept, plan_memory
from lorafusion_jax.train.evaluate import Evaluator
from lorafusion_jax.train.events import JobSummary, Listener, Notice, RunPlanned
from lorafusion_jax.train.goodput import Goodput
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.loop import Run
from lorafusion_jax.train.memory import (
    Step,
    device_bytes,
    largest_capacity,
    moments_of,
)
from lorafusion_jax.train.memory_mesh import (
    available_everywhere,
    largest_capacity_on_mesh,
    plan_stage,
    share_of,
)
from lorafusion_jax.train.programs import Programs
from lorafusion_jax.train.progress import JobProgress
from lorafusion_jax.train.resume import Saved, restore_state, run_facts
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_jax.train.schedule import Schedule, make_schedule, padding_share
from lorafusion_jax.train.step import Model, TrainState, init_state, loss_chunk
from lorafusion_sched import Microbatch, padded, to_json

GPU_TILE, CPU_TILE = 128, 16
ONE_DEVICE = ParallelConfig()


def tile_rows(batching: BatchingConfig) -> int:
    """Returns the rows per tile; "auto" is what the kernels of this device want."""
    if batching.tile != "auto":
        return batching.tile
    return GPU_TILE if jax.default_backend() == "gpu" else CPU_TILE


def prepare_run(
    base: Base,
    folder: RunFolder,
    schedule: Schedule,
    saved: Saved,
    saver: BackgroundSaver,
    listener: Listener,
    goodput: Goodput,
) -> Run:
    """Puts an adapter bank beside the base model and restores what was saved.

    Args:
        base: the base model; it stays as it is.
        folder: where results go.
        schedule: plan and slots.
        saved: configuration, jobs, and what the run goes on from.
        saver: of its states.
        listener: told about the plan first.
        goodput: told what time goes into.
    """
    config, jobs, tile = saved.config, saved.jobs, schedule.plan.tile
    num_slots = max(schedule.num_slots, saved.num_slots)
    paths = targeted(base, jobs)
    on_mesh = config.parallel.devices > 1
    # On a mesh the state as a whole exists on the host only; each stage has its part of it.
    with jax.default_device(host_device() if on_mesh else None):
        bank = attach_adapters(base.model, paths, num_slots, max(job.max_rank for job in jobs))
        patterned = {path for job in jobs for path in job.spec.patterned(job.targets)}
        bank = with_patterns(bank, [path for path in paths if path in patterned])
        graphdef, frozen = split_adapters(base.model)
        attach_adapters(base.model, (), 0, 1)
        state = init_state(bank, tuple(sorted({job.config.optim.name for job in jobs})))
        if saved.restored is not None:
            leaves = saved.restored.leaves
            if on_mesh and not saved.joined:
                state = of_ranks(state, leaves)
            else:
                leaves = sum_ranks(leaves)
            state = restore_state(state, leaves, joined=bool(saved.joined))
    listener(_planned(jobs, schedule, saved.cursor, base, state, frozen, tile))
    for notice in saved.notices:
        listener(Notice(notice))
    microbatches = schedule.plan.microbatches
    capacity = max(m.capacity for m in microbatches)
    step = memory_step(base, jobs, capacity, num_slots, tile, microbatches)
    before = saved.choices
    choices = kept(
        before,
        Choices(
            devices=config.parallel.devices,
            remat="none",  # chosen below
            loss_chunk=step.loss_chunk,
            eval_capacity=_eval_capacity(jobs, capacity, tile),
            segments=step.segments,
            longest=longest_bucket(microbatches),
        ),
    )
    programs: Programs
    make_run: Callable[..., Run]
    if on_mesh:
        order = order_of(schedule.plan, config.parallel.stage)
        step = memory_step(base, jobs, capacity, num_slots, tile, microbatches, config.parallel)
        step = step._replace(segments=choices.segments, longest=choices.longest)
        share = share_of(base, config.parallel, order)
        stage = plan_stage(step, share, config.train.remat, before)
        remat, planned = stage.plan.remat[-1], stage.words
        choices = choices._replace(policies=stage.plan.remat, residuals=stage.plan.residuals)
        with all_or_none():  # each process reads the weights of its own stages
            engine = make_engine(
                base,
                bank,
                data=config.parallel.data,
                stage=config.parallel.stage,
                order=order,
                residuals=stage.plan.residuals,
                remat=stage.plan.remat,
                capacity=capacity,
                deterministic=config.train.deterministic,
            )
        programs = MeshPrograms(engine)
        make_run = partial(MeshRun, engine, programs)
        state = on_host(state)
    else:
        step = step._replace(
            loss_chunk=choices.loss_chunk, segments=choices.segments, longest=choices.longest
        )
        remat, planned = plan_memory(
            step, config.train.remat, None if before is None else before.remat
        )
        model = Model(graphdef, remat, step.loss_chunk, config.train.deterministic)
        programs = Programs(model, frozen, listener, waiting=lambda: goodput.during("compile"))
        make_run = partial(Run, programs=programs)
    run = make_run(
        base=base,
        jobs=jobs,
        schedule=schedule,
        tile=tile,
        evaluator=Evaluator(programs, jobs, choices.eval_capacity, tile),
        state=state,
        folder=folder,
        saver=saver,
        listener=listener,
        facts=run_facts(config, base, jobs, to_json(schedule.plan), saved.added),
        choices=choices._replace(remat=remat),
        progress={name: JobProgress(**values) for name, values in saved.progress.items()},
        cursor=saved.cursor,
        goodput=goodput,
        ended=dict(saved.ended),
        planned_memory=planned,
    )
    if saved.change is not None and not saved.joined:
        run.resume_change(saved.change)
    return run


def memory_step(
    base: Base,
    jobs: Sequence[TrainJob],
    capacity: int,
    num_slots: int,
    tile: int,
    microbatches: Sequence[Microbatch] = (),
    parallel: ParallelConfig = ONE_DEVICE,
) -> Step:
    """Returns what the memory of the jobs' training step depends on."""
    vocabulary = -(-base.config.vocab_size // parallel.stage)
    longest = longest_bucket(microbatches) if microbatches else None
    return Step(
        base.config,
        capacity,
        num_slots,
        max(job.max_rank for job in jobs),
        itemsize=base.dtype.itemsize,
        loss_chunk=loss_chunk(vocabulary, capacity),
        segments=segment_bucket(microbatches, longest),
        longest=longest,
        moments=moments_of(job.config.optim.name for job in jobs),
        kernels=jax.default_backend() == "gpu",
        tile=tile,
    )


def within_memory(
    base: Base,
    jobs: Sequence[TrainJob],
    batching: BatchingConfig,
    num_slots: int,
    tile: int,
    parallel: ParallelConfig = ONE_DEVICE,
) -> BatchingConfig:
    """Lowers the largest size that `capacities: auto` may choose to what each device has room for.

    Sizes that were given stay as they are: if they do not fit, the run is refused and says so.
    """
    limit = batching.tokens_per_microbatch
    if batching.capacities != "auto":
        return batching
    available = available_everywhere() if parallel.devices > 1 else device_bytes()
    if available is None:
        return batching
    step = memory_step(base, jobs, limit, num_slots, tile, parallel=parallel)
    if parallel.devices > 1:  # of both orders, this one has the longer rings
        most = largest_capacity_on_mesh(step, share_of(base, parallel, "fbh"), available)
    else:
        most = largest_capacity(step, available, "full")
    longest = max((s.length for job in jobs for b in job.plan.batches for s in b), default=1)
    fitting = max(min(limit, most), padded(longest, tile))
    return batching.model_copy(update={"tokens_per_microbatch": min(limit, fitting)})


def targeted(base: Base, jobs: Sequence[TrainJob]) -> list[str]:
    """Paths that any job targets, in the model's order: the same for any order of jobs."""
    wanted = {path for job in jobs for path in job.targets}
    return [path for path in multi_linears(base.model) if path in wanted]


def _eval_capacity(jobs: Sequence[TrainJob], capacity: int, tile: int) -> int:
    """The training capacity, or what the longest held-out sample needs."""
    lengths = (sample.length for job in jobs for b in job.eval_plan().batches for sample in b)
    return max(capacity, padded(max(lengths, default=0), tile))


def _planned(
    jobs: Sequence[TrainJob],
    schedule: Schedule,
    cursor: int,
    base: Base,
    state: TrainState,
    frozen: PyTree,
    tile: int,
) -> RunPlanned:
    microbatches = schedule.plan.microbatches
    capacities = tuple(sorted({m.capacity for m in microbatches}))
    sizes = schedule.problem.capacities  # a job that is about to join may need a larger one
    alone = [
        m
        for job in jobs
        for m in make_schedule([job.plan], capacities=sizes, tile=tile).plan.microbatches
    ]
    linears = multi_linears(base.model)
    widths = {path: m.in_features + m.out_features for path, m in linears.items()}
    return RunPlanned(
        jobs=tuple(_job_summary(job, widths) for job in jobs),
        microbatches=len(microbatches),
        start=cursor,
        capacities=capacities,
        tile=tile,
        padding=padding_share(microbatches),
        padding_alone=padding_share(alone),
        slots=state.bank.rank.shape[0],
        r_max=next(iter(state.bank.a.values())).shape[1],
        base_bytes=_bytes(frozen),
        adapter_bytes=_bytes(state),
    )


def _job_summary(job: TrainJob, widths: dict[str, int]) -> JobSummary:
    tokens = sum(sample.length for batch in job.plan.batches for sample in batch)
    return JobSummary(
        name=job.name,
        steps=job.num_steps,
        samples=job.num_train,
        eval_samples=len(job.eval_indices),
        tokens=tokens,
        supervised=sum(job.batch_tokens.values()) / tokens,
        r=job.config.lora.r,
        parameters=sum(job.spec.rank_of(path) * widths[path] for path in job.targets),
    )


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
