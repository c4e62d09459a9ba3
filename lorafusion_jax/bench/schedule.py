"""Compares schedulers: bins against a lower bound, utilisation in simulation, planning time.

    lorafusion bench schedule [--quick] [--seeds N] [--part PART] [--cells FROM:TO] [--add]

Lengths are synthetic, log-normal with the moments of summarisation data sets. Parts (column
`part`): `packing` is one global batch of each of two jobs; `pipeline` is a run of four jobs; `auto`
lets the planner choose the capacity; `balance` is the spread of microbatch times with attention.
Times are CPU seconds of this process, so that a busy machine does not count. All of it takes an
hour, mostly in the mixed-integer programs; `--part`, `--cells` and `--add` measure it in pieces.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lorafusion_jax.bench.results import RESULTS, Row
from lorafusion_jax.bench.schedule_milp import milp_packer
from lorafusion_jax.bench.schedule_report import draw, report, write_measured
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.plots import plot_gantt
from lorafusion_sched import (
    Clock,
    Cost,
    Job,
    Plan,
    Problem,
    choose_capacity,
    distance_of,
    job_from_lengths,
    pack,
    padded,
    plan,
    simulate,
    verify,
)
from lorafusion_sched.baselines import ffd_bins, lorafusion, megatron, mlora, violations
from lorafusion_sched.bounds import martello_toth_l2, slots_bound, volume_bound
from lorafusion_sched.refill import Bin
from lorafusion_sched.simulate import slot_times

TILE = 128
BATCHES = 20  # global batches of each of four jobs
MOMENTS = {"xsum": (560, 330), "cnn": (960, 460), "wikisum": (1700, 750)}  # tokens: mean, deviation
PARTS = ("packing", "pipeline", "auto", "balance")
LENGTHS = ("xsum", "cnn", "wikisum", "mix", "het")
# (stages, global batch size, capacity, lengths)
CELLS = (
    (2, 8, 6144, "xsum"),
    (2, 8, 6144, "wikisum"),
    (2, 8, 6144, "het"),
    (4, 8, 6144, "xsum"),
    (4, 8, 6144, "cnn"),
    (4, 8, 6144, "wikisum"),
    (4, 8, 6144, "het"),
    (4, 16, 4096, "xsum"),
    (4, 16, 4096, "wikisum"),
    (4, 16, 4096, "het"),
    (4, 16, 6144, "xsum"),
    (4, 16, 6144, "het"),
    (8, 16, 6144, "xsum"),
    (8, 16, 6144, "het"),
    (8, 32, 6144, "xsum"),
    (8, 32, 6144, "wikisum"),
)

type Cell = tuple[int, int, int, str]
type Packer = Callable[[list[list[int]], int, int], list[Bin]]


def log_normal(rng: random.Random, mean: float, deviation: float, longest: int = 4096) -> int:
    """Draws one sample length in tokens, clipped to 32..longest."""
    variance = math.log(1 + (deviation / mean) ** 2)
    length = rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
    return min(longest, max(32, round(length)))


def jobs_of(
    lengths: str, gbs: int, seed: int, *, jobs: int = 4, batches: int = BATCHES
) -> list[Job]:
    """Returns jobs whose sample lengths follow one distribution, or `het`: one each."""
    rng = random.Random(f"{lengths} {gbs} {seed}")
    result = []
    for number in range(jobs):
        name = ("xsum", "cnn", "wikisum", "mix")[number % 4] if lengths == "het" else lengths
        drawn = [
            log_normal(rng, *MOMENTS[rng.choice(sorted(MOMENTS)) if name == "mix" else name])
            for _ in range(gbs * batches)
        ]
        result.append(job_from_lengths(f"job{number}", drawn, global_batch_size=gbs))
    return result


def problem_of(
    jobs: list[Job], capacity: int | tuple[int, ...], stages: int, clock: Clock = "1f1b", **cost
) -> Problem:
    """Returns the problem; a microbatch's time is its padded tokens, as in variable-length runs."""
    return Problem(
        jobs=tuple(jobs),
        capacities=(capacity,) if isinstance(capacity, int) else capacity,
        tile=TILE,
        distance=distance_of(clock, stages),
        clock=clock,
        cost=Cost(**{"whole_bucket": False, **cost}),
    )


def packing_rows(seeds: int, milp_seeds: int, milp_seconds: float, quick: bool) -> Iterator[Row]:
    """Packs one global batch of two jobs, the unit of the published two-stage program."""
    packers: dict[str, Packer] = {"ours": pack, "ffd": ffd_bins, "milp": milp_packer(milp_seconds)}
    for lengths in LENGTHS[:1] if quick else LENGTHS:
        for gbs in (8,) if quick else (8, 16, 32):
            for capacity in (6144,) if quick else (4096, 6144, 8192):
                for seed in range(seeds):
                    jobs = jobs_of(lengths, gbs, seed, batches=1)
                    pair = [[s.length for s in jobs[n].batches[0]] for n in (0, 2)]
                    mine: list[Bin] = []
                    for planner, packer in packers.items():
                        if planner == "milp" and seed >= milp_seeds:
                            continue
                        start = time.process_time()
                        bins = packer(pair, capacity, TILE)
                        seconds = time.process_time() - start
                        mine = mine or bins
                        yield {
                            "part": "packing",
                            "lengths": lengths,
                            "stages": 1,
                            "gbs": gbs,
                            "capacity": capacity,
                            "planner": planner,
                            "seed": seed,
                            "microbatches": len(bins),
                            "noops": 0,
                            "bound": _bound(pair, capacity),
                            "bins_over_bound": len(bins) / _bound(pair, capacity) - 1,
                            "fewer_than_ours": max(0, len(mine) - len(bins)),
                            "tail_rows": min(_rows(content, pair) for content in bins),
                            "plan_seconds": seconds,
                        }


def _bound(pair: list[list[int]], capacity: int) -> int:
    items = [(job, n) for job, batch in enumerate(pair) for n in batch]
    l2 = martello_toth_l2([n for _, n in items], capacity)
    return max(volume_bound(items, capacity, TILE), l2)


def _rows(content: Bin, pair: list[list[int]]) -> int:
    return sum(padded(sum(pair[j][i] for i in x), TILE) for j, x in content.items())


def pipeline_rows(
    seeds: int, milp_seeds: int, milp_seconds: float, cells: Sequence[Cell]
) -> Iterator[Row]:
    """Plans whole runs; LoRAFusion packs by its programs, and also by our packer.

    `ours_full` always fills up to the capacity, as one static shape wants; `ours` may fill less.
    """
    milp = milp_packer(milp_seconds)
    packed: dict[tuple, list[Bin]] = {}

    def remembered(lengths: list[list[int]], capacity: int, tile: int) -> list[Bin]:
        key = (*map(tuple, lengths), capacity)
        if key not in packed:
            packed[key] = milp(lengths, capacity, tile)
        return packed[key]

    planners: dict[str, Callable[[Problem], Plan]] = {
        "megatron": megatron,
        "mlora": mlora,
        "ffd": lambda problem: lorafusion(problem, merge=False),
        "lorafusion_ffd": lorafusion,
        "lorafusion_our_packing": lambda problem: lorafusion(problem, pack),
        "lorafusion": lambda problem: lorafusion(problem, remembered),
        "ours_full": lambda problem: plan(replace(problem, cost=Cost())),
        "ours": plan,
    }
    for stages, gbs, capacity, lengths in cells:
        for seed in range(seeds):
            jobs = jobs_of(lengths, gbs, seed)
            labels: Row = {"part": "pipeline", "lengths": lengths, "gbs": gbs, "capacity": capacity}
            labels["seed"] = seed
            for planner, planned_by in planners.items():
                if planner == "lorafusion" and seed >= milp_seeds:
                    continue
                clocks: tuple[Clock, ...] = (
                    ("1f1b", "bfh", "fbh") if planner == "ours" else ("1f1b",)
                )
                for clock in clocks:
                    problem = problem_of(jobs, capacity, stages, clock)
                    yield labels | {"planner": planner} | _measure(problem, planned_by)


def _measure(problem: Problem, planned_by: Callable[[Problem], Plan]) -> Row:
    start = time.process_time()
    answer = planned_by(problem)
    seconds = time.process_time() - start
    broken = violations(answer)
    if not broken:
        verify(problem, answer)
    run = simulate(answer, problem.cost, problem.stages, problem.clock)
    rows = [
        padded(stretch.tokens(), TILE) for mb in answer.microbatches for stretch in mb.stretches
    ]
    tokens = [stretch.tokens() for mb in answer.microbatches for stretch in mb.stretches]
    return {
        "stages": problem.stages,
        "clock": problem.clock,
        "microbatches": sum(bool(mb.stretches) for mb in answer.microbatches),
        "noops": sum(not mb.stretches for mb in answer.microbatches),
        "bins_over_bound": len(answer.microbatches) / slots_bound(problem) - 1,
        "utilisation": run.utilisation,
        "bubble": run.bubble,
        "padding": sum(rows) / sum(tokens) - 1,
        "violations": broken,
        "plan_seconds": seconds,
    }


def auto_rows(seeds: int, quick: bool) -> Iterator[Row]:
    """Lets the planner choose the capacity; also with static shapes, where a bucket costs whole."""
    sizes = tuple(range(2048, 8193, 512))
    for stages in (4,) if quick else (4, 8):
        for gbs in (16,) if quick else (8, 16, 32):
            for lengths in LENGTHS[:1] if quick else LENGTHS:
                for seed in range(seeds):
                    for whole_bucket in (False, True):
                        jobs = jobs_of(lengths, gbs, seed)
                        problem = problem_of(jobs, sizes, stages, whole_bucket=whole_bucket)
                        start = time.process_time()
                        chosen = choose_capacity(problem)
                        seconds = time.process_time() - start
                        measured = _measure(chosen, plan)
                        yield {
                            "part": "auto",
                            "lengths": lengths,
                            "gbs": gbs,
                            "capacity": "auto",
                            "chosen": " ".join(map(str, chosen.capacities)),
                            "whole_bucket": whole_bucket,
                            "planner": "ours",
                            "seed": seed,
                            **measured,
                            "choose_seconds": seconds,
                        }


def balance_rows(seeds: int, quick: bool) -> Iterator[Row]:
    """Packs long-tailed lengths by tokens and by time; attention is a share of the linear time."""
    for share in (0.5,) if quick else (0.25, 0.5, 1.0):  # at 8192 tokens
        for seed in range(seeds):
            rng = random.Random(f"balance {seed}")
            jobs = [
                job_from_lengths(
                    f"job{n}",
                    [log_normal(rng, 1500, 2500, 8192) for _ in range(320)],
                    global_batch_size=16,
                )
                for n in range(4)
            ]
            problem = problem_of(jobs, 16384, 4, per_square=share / 8192)
            by_tokens = problem_of(jobs, 16384, 4)
            for planner, asked in (("token packing", by_tokens), ("ours", problem)):
                answer = plan(asked)
                times = [t for t in slot_times(answer, problem.cost) if t]
                yield {
                    "part": "balance",
                    "lengths": "long tail",
                    "stages": 4,
                    "gbs": 16,
                    "capacity": 16384,
                    "planner": planner,
                    "seed": seed,
                    "attention_share": share,
                    "spread": max(times) * len(times) / sum(times),
                    "utilisation": simulate(answer, problem.cost, 4).utilisation,
                }


def _rounded(row: Row) -> Row:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def run(
    *,
    seeds: int = 5,
    milp_seeds: int = 1,
    milp_seconds: float = 3.0,
    quick: bool = False,
    parts: Sequence[str] = PARTS,
    cells: Sequence[Cell] = CELLS,
    add: bool = False,
    root: Path = RESULTS,
) -> Path:
    """Runs the parts, writes `cpu/schedule.json` and draws its figures.

    Args:
        seeds: instances of each kind; four times as many of the packing.
        milp_seeds: instances that are also given to the mixed-integer programs (minutes each).
        milp_seconds: limit of each program in seconds of wall time.
        quick: one small cell of each part.
        parts: which ones.
        cells: of the part `pipeline`.
        add: keep the rows of the file that are not measured again.
        root: folder of all results.

    Returns:
        The file written.
    """
    if quick:
        seeds, milp_seeds, cells = 1, 1, CELLS[3:4]
    sources = {
        "packing": packing_rows(4 * seeds, 4 * milp_seeds, milp_seconds, quick),
        "pipeline": pipeline_rows(seeds, milp_seeds, milp_seconds, cells),
        "auto": auto_rows(seeds, quick),
        "balance": balance_rows(seeds, quick),
    }
    rows = [_rounded(row) for part in parts for row in sources[part]]
    path = write_measured(rows, add=add, root=root)
    draw(json.loads(path.read_text())["rows"], path.parent)
    if "pipeline" in parts:
        draw_runs(path.parent)
    return path


def draw_runs(folder: Path) -> None:
    """Draws one run as LoRAFusion (packed first-fit) and as we plan it: `schedule_gantt.png`."""
    stages, gbs, capacity, lengths = CELLS[3]
    problem = problem_of(jobs_of(lengths, gbs, 0), capacity, stages)
    answers = {"LoRAFusion": lorafusion(problem), "ours": plan(problem)}
    runs = {
        f"{name}, {stages} stages, global batches of {gbs}": (
            answer,
            simulate(answer, problem.cost, stages),
        )
        for name, answer in answers.items()
    }
    plot_gantt(runs, folder / "schedule_gantt.png")


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line, runs, and prints the table, the bars and where the results are."""
    parser = argparse.ArgumentParser(
        prog="lorafusion bench schedule", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one small cell of each part")
    parser.add_argument("--seeds", type=int, default=5, help="instances of each kind")
    parser.add_argument("--milp-seeds", type=int, default=1, help="of them given to the MILPs")
    parser.add_argument("--milp-seconds", type=float, default=3.0, help="limit of each program")
    parser.add_argument("--part", choices=PARTS, action="append", help="measure this part only")
    parser.add_argument("--cells", default=":", help="FROM:TO of the cells of the part pipeline")
    parser.add_argument("--add", action="store_true", help="keep rows that are not measured again")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what there is")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of all results")
    asked = parser.parse_args(arguments)
    path = asked.output / "cpu" / "schedule.json"
    if not asked.show:
        first, _, last = asked.cells.partition(":")
        path = run(
            seeds=asked.seeds,
            milp_seeds=asked.milp_seeds,
            milp_seconds=asked.milp_seconds,
            quick=asked.quick,
            parts=asked.part or PARTS,
            cells=CELLS[int(first or 0) : int(last or len(CELLS))],
            add=asked.add,
            root=asked.output,
        )
    if not path.exists():
        raise ConfigError(f"{path} does not exist: run `lorafusion bench schedule` first")
    print(report(json.loads(path.read_text())["rows"]))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
