"""Predicts large meshes from what was measured on one GPU; every assumption is in the file."""

from dataclasses import replace
from pathlib import Path

from lorafusion_jax.bench.mesh_models import MODELS, PEAK_FLOPS, linear_widths, train_flops
from lorafusion_jax.bench.pipeline import RANK
from lorafusion_jax.bench.results import Row, write_results
from lorafusion_jax.bench.schedule import LENGTHS, jobs_of
from lorafusion_sched import Cost, Job, Plan, Problem, distance_of, plan, simulate
from lorafusion_sched.baselines import megatron, mlora
from lorafusion_sched.simulate import Timeline

PEAK = PEAK_FLOPS["H100"]
# One Llama-3.1-8B layer, 4 x 2048 tokens, frozen, torch.compile: 61.4% of peak on one H100. The
# fused LoRA linears cost 1.10 to 1.16 of the frozen ones by kernel times; 1.13 here.
LAYER_MFU = 0.614 / 1.13
HEAD_MFU = 0.5  # head and loss in one pass: 1.04 times its two matrix products, f32 sums included
TICK_EXCHANGE = 0.03  # of a tick, measured on two GPUs with residuals saved
HEAD_EXCHANGE = 0.05  # vocabulary-parallel head on two GPUs: 1.83 against 1.93 times one GPU
NVLINK = 223e9  # bytes/s one way, measured on two GPUs: 67 MB in 0.30 ms
NETWORK = 40e9  # bytes/s per GPU between hosts: 400 Gb/s, 80% of it; not measured
GPUS_PER_HOST = 8
CAPACITY = 8192
RECOMPUTE = {"none": 1.1, "full": 2.1}  # backward over forward

ASSUMPTIONS = (
    "layer: 61.4% MFU of a frozen layer on one H100 (measured), times 1/1.13 for LoRA (sum of "
    "kernel times, measured in parts)",
    "full recomputation: the backward takes 2.1 forwards, without it 1.1",
    "exchange between stages 3% of a tick (measured on 2 GPUs), vocabulary-parallel head's "
    "exchanges another 5% (measured on 2 GPUs)",
    "gradients of an ended batch are reduced over data ranks once, f32, ring all-reduce: "
    "223 GB/s in a host (measured on 2 GPUs), 40 GB/s per GPU between hosts (assumed)",
    "optimizer, host and checkpoint time are not in it; every slot is a static row of 8192 tokens",
    "stages lie in one host; data ranks are spread over hosts; no stragglers",
)


def stage_seconds(model: str, stages: int, rows: int, remat: str) -> tuple[float, float]:
    """Returns seconds of one slot's forward on a stage, and of its whole tick, without exchanges.

    Args:
        model: name of the shape.
        stages: pipeline stages.
        rows: tokens of the slot; computed whether real or not.
        remat: "none" or "full".
    """
    config = MODELS[model]
    lengths = [2048] * (rows // 2048)
    layers = -(-config.num_hidden_layers // stages)
    one_layer = replace(config, num_hidden_layers=1)
    head = 4.0 * rows * config.vocab_size * config.hidden_size
    layer = (train_flops(one_layer, lengths, RANK) - head) / (PEAK * LAYER_MFU)
    forward = layers * layer / 2.1
    head_seconds = head / stages / (PEAK * HEAD_MFU)
    return forward, forward * (1 + RECOMPUTE[remat]) + head_seconds


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
    model: str, system: str, jobs: list[Job], *, stages: int, data: int, remat: str
) -> tuple[Plan, Timeline, Row]:
    """Plans and simulates one case."""
    clock = "bfh" if stages == 1 else "fbh"
    cost = Cost(per_token=1 / CAPACITY, backward=RECOMPUTE[remat])
    problem = Problem(
        jobs=tuple(jobs),
        capacities=(CAPACITY,),
        distance=distance_of(clock, stages),
        width=data,
        clock=clock,
        cost=cost,
    )
    largest = max(len(batch) for job in jobs for batch in job.batches)
    if system == "ours":
        whole = plan(problem)
    else:
        whole = (megatron if system == "megatron" else mlora)(problem, samples=largest)
    timeline = simulate(whole, cost, stages, clock)
    forward, tick = stage_seconds(model, stages, CAPACITY, remat)
    unit = tick / (1 + RECOMPUTE[remat])  # the head's time goes with the phases
    exchanges = 1 + (TICK_EXCHANGE + HEAD_EXCHANGE if stages > 1 else 0)
    updates = sum(len(job.batches) for job in jobs)
    reduction = updates * reduction_seconds(model, data, stages)
    seconds = timeline.makespan * unit * exchanges + reduction
    lengths = [s.length for job in jobs for batch in job.batches for s in batch]
    slots = len(whole.microbatches) // data
    real = sum(
        any(m.stretches for m in whole.microbatches[i * data : (i + 1) * data])
        for i in range(slots)
    )
    full = tick * exchanges
    row: Row = {
        "system": system,
        "mesh": f"data={data},stage={stages}",
        "gpus": data * stages,
        "model": model,
        "layers": MODELS[model].num_hidden_layers,
        "remat": remat,
        "tokens_per_s": sum(lengths) / seconds,
        "mfu": train_flops(MODELS[model], lengths, RANK) / seconds / (PEAK * data * stages),
        "bubble": 1 - real * full / seconds,
        "bubble_steady": 1 - real / slots,
        "reduction_share": reduction / seconds,
        "slots": slots,
        "noops": slots - real,
        "tick_ms": full * 1e3,
        "forward_ms": forward * 1e3,
    }
    return whole, timeline, row


def predict(root: Path) -> int:
    """Writes docs/results/predicted/scaling_predicted.json."""
    rows: list[Row] = []
    for adapters in (4, 8):
        for lengths in LENGTHS:
            jobs = jobs_of(lengths, 16, 0, jobs=adapters, batches=4)
            for system in ("ours", "mlora", "megatron"):
                label: Row = {"part": "4 GPUs", "lengths": lengths, "adapters": adapters, "gbs": 16}
                _, _, row = predicted("70b", system, jobs, stages=4, data=1, remat="full")
                rows.append(label | row)
    for adapters, gbs, meshes in (
        (16, 32, ((1, 4), (2, 4), (1, 8), (4, 2))),
        (16, 64, ((1, 4), (4, 4))),
        (16, 256, ((1, 4), (16, 4))),
        (16, 1024, ((1, 4), (128, 4))),
    ):
        batches = {32: 4, 64: 3}.get(gbs, 2)
        jobs = jobs_of("mix", gbs, 0, jobs=adapters, batches=batches)
        base = None
        for data, stages in meshes:
            _, _, row = predicted("70b", "ours", jobs, stages=stages, data=data, remat="full")
            speed, gpus = float(row["tokens_per_s"] or 0), data * stages
            base = base or speed / gpus
            label = {"part": "efficiency", "lengths": "mix", "adapters": adapters, "gbs": gbs}
            rows.append(label | row | {"efficiency": speed / gpus / base})
            print(f"{gpus} GPUs, gbs {gbs}: {speed:.0f} tokens/s, {speed / gpus / base:.3f}")
    for number, text in enumerate(ASSUMPTIONS):
        rows.append({"part": "assumption", "number": number, "text": text})
    command = "lorafusion bench scaling --predict"
    print(write_results("scaling_predicted", rows, command=command, device="predicted", root=root))
    return 0
