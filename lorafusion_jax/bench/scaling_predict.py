"""Predicts large meshes from what was measured on one GPU; every assumption is in the file."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

from lorafusion_jax.bench.mesh_models import MODELS, PEAK_FLOPS, linear_widths
from lorafusion_jax.bench.pipeline import RANK
from lorafusion_jax.bench.results import Row, write_results
from lorafusion_jax.bench.schedule import LENGTHS, jobs_of
from lorafusion_jax.bench.shapes import step_flops
from lorafusion_jax.errors import ResourceError
from lorafusion_jax.models.decoder import Remat
from lorafusion_jax.parallel.pipeline import ring_of
from lorafusion_jax.parallel.residuals import BACKWARD, backward_ratio, in_words
from lorafusion_jax.train.memory import Step, kept_bytes
from lorafusion_jax.train.memory_mesh import Share, choose_stage
from lorafusion_sched import Cost, Job, Plan, Problem, distance_of, plan, simulate
from lorafusion_sched.baselines import megatron, mlora
from lorafusion_sched.simulate import Timeline

PEAK = PEAK_FLOPS["H100"]
# One Llama-3.1-8B layer with LoRA, rank 16 and dropout 0.1, 8192 tokens: 14.25 ms on one H200; the
# work is 12.55 ms at 61.4% of peak.
LAYER_MFU = 0.614 * 12.55 / 14.25
HEAD_MFU = 0.5  # head and loss in one pass: 1.04 times its two matrix products, f32 sums included
NVLINK = 223e9  # bytes/s one way, measured on two GPUs: 67 MB in 0.30 ms
NETWORK = 40e9  # bytes/s per GPU between hosts: 400 Gb/s, 80% of it; not measured
MEMORY = 2.9e12  # bytes/s of a copy on one H100, measured
GPUS_PER_HOST = 8
DEVICE_BYTES = int(0.95 * 79.1 * 2**30)  # of an H100, preallocated
CAPACITIES = (4096, 8192)
CLOCKS: tuple[Literal["fbh", "bfh"], ...] = ("fbh", "bfh")

ASSUMPTIONS = (
    "layer: 54.1% MFU without recomputation, measured on one H200 with a layer of the 8B shape; "
    "those of 70B are taken to be as efficient, also with 4096 rows",
    "backward: 1.1 forwards, and the large products that the layers' policies compute again; the "
    "policies are the richest that fit 95% of an H100's 79.1 GiB less 8% head-room, as predicted",
    "what waits in the rings is copied in and out at 2.9 TB/s (measured)",
    "all exchanges of a tick are exposed, at 223 GB/s (measured on 2 GPUs): two one way, one "
    "broadcast, two sums",
    "gradients of an ended batch are reduced over data ranks once, f32, ring all-reduce: "
    "223 GB/s in a host (measured on 2 GPUs), 40 GB/s per GPU between hosts (assumed)",
    "optimizer, host and checkpoint time are not in it; a slot is a static row of so many tokens",
    "stages lie in one host; data ranks are spread over hosts; no stragglers",
    "each system has the capacity and order of phases that are best for it",
)


class TickTime(NamedTuple):
    """Seconds of a full tick of one stage.

    Attributes:
        forward: of its layers.
        backward: of its layers, what is computed again included.
        rest: head, copies of the rings, exchanges.
    """

    forward: float
    backward: float
    rest: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self)


def policies_for(
    model: str, stages: int, rows: int, adapters: int, clock: Literal["fbh", "bfh"]
) -> tuple[Remat, ...]:
    """Returns the policies that fit an H100."""
    step = Step(MODELS[model], rows, adapters, RANK, loss_chunk=2048)
    places = -(-MODELS[model].num_hidden_layers // stages)
    return choose_stage(step, Share(stages, places, ring_of(clock, stages)), DEVICE_BYTES).remat


def tick_time(model: str, stages: int, rows: int, policies: Sequence[Remat]) -> TickTime:
    """Predicts the time of a full tick; all rows are computed whether real or not.

    Args:
        model: name of the shape.
        stages: pipeline stages.
        rows: tokens of the slot.
        policies: of the layer places.
    """
    config = MODELS[model]
    lengths = [2048] * (rows // 2048)
    one_layer = replace(config, num_hidden_layers=1)
    head = 4.0 * rows * config.vocab_size * config.hidden_size
    layer = (step_flops(one_layer, lengths, RANK) - head) / (PEAK * LAYER_MFU)
    forward = len(policies) * layer / (1 + BACKWARD)
    step = Step(config, rows, 1, RANK)
    copies = sum(4 * kept_bytes(step, remat) for remat in policies) / MEMORY
    tile = 2.0 * rows * config.hidden_size
    exchanges = 7 * tile / NVLINK if stages > 1 else 0.0
    rest = head / stages / (PEAK * HEAD_MFU) + copies + exchanges
    return TickTime(forward, forward * backward_ratio(config, policies), rest)


def reduction_seconds(model: str, data: int, stages: int) -> float:
    """Returns seconds to sum one job's gradients of a stage over the data ranks."""
    if data == 1:
        return 0.0
    config = MODELS[model]
    layers = -(-config.num_hidden_layers // stages)
    size = 4.0 * RANK * layers * sum(k + n for k, n in linear_widths(config).values())
    link = NVLINK if data * stages <= GPUS_PER_HOST else NETWORK
    return 2.0 * size * (data - 1) / data / link


def predicted(
    model: str, system: str, jobs: list[Job], *, stages: int, data: int, capacity: int, clock: str
) -> tuple[Plan, Timeline, Row]:
    """Plans and simulates one case."""
    order: Literal["fbh", "bfh"] = "bfh" if stages == 1 or clock == "bfh" else "fbh"
    policies = policies_for(model, stages, capacity, len(jobs), order)
    tick = tick_time(model, stages, capacity, policies)
    backward = tick.backward / tick.forward
    cost = Cost(per_token=1 / capacity, backward=backward)
    problem = Problem(
        jobs=tuple(jobs),
        capacities=(capacity,),
        distance=distance_of(order, stages),
        width=data,
        clock=order,
        cost=cost,
    )
    largest = max(len(batch) for job in jobs for batch in job.batches)
    if system == "ours":
        whole = plan(problem)
    else:
        whole = (megatron if system == "megatron" else mlora)(problem, samples=largest)
    timeline = simulate(whole, cost, stages, order)
    unit = tick.total / (1 + backward)  # the rest's time goes with the phases
    updates = sum(len(job.batches) for job in jobs)
    reduction = updates * reduction_seconds(model, data, stages)
    seconds = timeline.makespan * unit + reduction
    lengths = [s.length for job in jobs for batch in job.batches for s in batch]
    slots = len(whole.microbatches) // data
    real = sum(
        any(m.stretches for m in whole.microbatches[i * data : (i + 1) * data])
        for i in range(slots)
    )
    row: Row = {
        "system": system,
        "mesh": f"data={data},stage={stages}",
        "gpus": data * stages,
        "model": model,
        "layers": MODELS[model].num_hidden_layers,
        "capacity": capacity,
        "order": order,
        "remat": in_words(policies),
        "tokens_per_s": sum(lengths) / seconds,
        "mfu": step_flops(MODELS[model], lengths, RANK) / seconds / (PEAK * data * stages),
        "bubble": 1 - real * tick.total / seconds,
        "noop_share": 1 - real / slots,
        "reduction_share": reduction / seconds,
        "slots": slots,
        "noops": slots - real,
        "tick_ms": tick.total * 1e3,
        "forward_ms": tick.forward * 1e3,
    }
    return whole, timeline, row


def best(model: str, system: str, jobs: list[Job], *, stages: int, data: int) -> Row:
    """Returns the case with the capacity and order that are fastest, of those that fit."""
    rows, refusal = [], None
    for capacity, clock in product(CAPACITIES, CLOCKS):
        case = {"stages": stages, "data": data, "capacity": capacity, "clock": clock}
        try:
            rows.append(predicted(model, system, jobs, **case)[2])
        except ResourceError as error:
            refusal = error
    if not rows and refusal is not None:
        raise refusal
    return max(rows, key=lambda row: float(row["tokens_per_s"] or 0))


def predict(root: Path) -> int:
    """Writes docs/results/predicted/scaling_predicted.json."""
    rows: list[Row] = []
    for adapters in (4, 8):
        for lengths in LENGTHS:
            for batches in (4, 16) if lengths == "het" else (16,):
                jobs = jobs_of(lengths, 16, 0, jobs=adapters, batches=batches)
                label: Row = {"part": "4 GPUs", "lengths": lengths, "adapters": adapters}
                label |= {"gbs": 16, "batches": batches}
                for system in ("ours", "mlora", "megatron"):
                    rows.append(label | best("70b", system, jobs, stages=4, data=1))
    for gbs, batches, meshes in (
        (32, 8, ((1, 4), (2, 4), (1, 8))),
        (64, 6, ((1, 4), (4, 4))),
        (256, 4, ((1, 4), (16, 4))),
        (1024, 2, ((1, 4), (128, 4))),
    ):
        jobs = jobs_of("mix", gbs, 0, jobs=16, batches=batches)
        base = None
        for data, stages in meshes:
            row = best("70b", "ours", jobs, stages=stages, data=data)
            speed, gpus = float(row["tokens_per_s"] or 0), data * stages
            base = base or speed / gpus
            label = {"part": "efficiency", "lengths": "mix", "adapters": 16, "gbs": gbs}
            label["batches"] = batches
            rows.append(label | row | {"efficiency": speed / gpus / base})
            print(f"{gpus} GPUs, gbs {gbs}: {speed:.0f} tokens/s, {speed / gpus / base:.3f}")
    for number, text in enumerate(ASSUMPTIONS):
        rows.append({"part": "assumption", "number": number, "text": text})
    command = "lorafusion bench scaling --predict"
    print(write_results("scaling_predicted", rows, command=command, device="predicted", root=root))
    return 0
