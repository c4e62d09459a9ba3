"""The command `lorafusion-sched`: plan, compare and show, without jax or numpy.

A lengths file is JSON:

    {"jobs": [{"name": "a", "lengths": [412, 96], "global_batch_size": 8, "epochs": 1}]}
"""

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from lorafusion_sched.baselines import lorafusion, megatron, mlora, violations
from lorafusion_sched.cost import cost_from_json
from lorafusion_sched.gantt import gantt_html
from lorafusion_sched.problem import (
    Clock,
    Cost,
    Job,
    Plan,
    PlanError,
    Problem,
    distance_of,
    job_from_lengths,
    padded,
)
from lorafusion_sched.search import choose_capacity, plan
from lorafusion_sched.serialize import from_json, to_json
from lorafusion_sched.simulate import simulate
from lorafusion_sched.verify import verify


def main(arguments: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line without the program's name; `sys.argv` by default.

    Returns:
        The exit code: 0, 2 for a problem that the message explains, or 130 when interrupted.
    """
    asked = _parser().parse_args(arguments)
    try:
        asked.command(asked)
    except (PlanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorafusion-sched",
        description="Packs the samples of many fine-tuning jobs into microbatches.",
    )
    commands = parser.add_subparsers(required=True)
    planning = argparse.ArgumentParser(add_help=False)
    _add_problem(planning)
    one = commands.add_parser("plan", parents=[planning], help="plan a lengths file")
    one.add_argument("--output", type=Path, help="write the plan here as JSON")
    one.add_argument("--html", type=Path, help="draw the simulated run here")
    one.set_defaults(command=_plan)
    compare = commands.add_parser(
        "compare", parents=[planning], help="compare with other systems' schedules"
    )
    compare.set_defaults(command=_compare)
    show = commands.add_parser("show", help="describe a plan file")
    show.add_argument("file", type=Path, help="a plan written by `plan --output`")
    show.add_argument("--microbatches", action="store_true", help="list every microbatch")
    show.set_defaults(command=_show)
    return parser


def _add_problem(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, help="lengths file")
    add(
        "--capacity", default="8192", help="tokens per microbatch, N[,N...], or auto (default 8192)"
    )
    add("--max-capacity", type=int, default=16384, help="largest size that auto may choose")
    add("--tile", type=int, default=128, help="padding multiple of a job's stretch (default 128)")
    add("--stages", type=int, default=1, help="pipeline stages (default 1)")
    add("--clock", choices=get_args(Clock.__value__), default="fbh", help="order of a stage's work")
    add("--data-parallel", type=int, default=1, help="microbatches per slot (default 1)")
    add("--max-jobs", type=int, help="jobs per microbatch at most")
    for field in fields(Cost):
        if field.name != "whole_bucket":
            name = f"--cost-{field.name.replace('_', '-')}"
            add(name, type=float, default=field.default, help=f"default {field.default}")
    add("--cost", type=Path, help="file of measured costs, instead of these")
    add("--dynamic-shapes", action="store_true", help="time follows padded tokens, not capacity")


def _problem(asked: argparse.Namespace) -> Problem:
    """Builds the problem from the command line; chooses the capacity if asked to."""
    jobs = _read_jobs(asked.file)
    clock = "1f1b" if asked.stages == 1 else asked.clock  # one stage alone has nothing to wait for
    problem = Problem(
        jobs=jobs,
        capacities=_capacities(asked, jobs),
        tile=asked.tile,
        distance=distance_of(clock, asked.stages),
        width=asked.data_parallel,
        max_jobs=asked.max_jobs,
        clock=clock,
        cost=replace(_cost(asked), whole_bucket=not asked.dynamic_shapes),
    )
    return choose_capacity(problem) if asked.capacity == "auto" else problem


def _cost(asked: argparse.Namespace) -> Cost:
    if asked.cost is not None:
        return cost_from_json(asked.cost.read_text())
    return Cost(
        fixed=asked.cost_fixed,
        per_token=asked.cost_per_token,
        per_square=asked.cost_per_square,
        backward=asked.cost_backward,
    )


def _capacities(asked: argparse.Namespace, jobs: tuple[Job, ...]) -> tuple[int, ...]:
    if asked.capacity != "auto":
        try:
            return tuple(sorted({int(part) for part in asked.capacity.split(",")}))
        except ValueError:
            raise PlanError(
                f"--capacity {asked.capacity!r}: expected 8192, or 4096,8192, or auto"
            ) from None
    if asked.tile < 1 or asked.max_capacity < asked.tile:
        raise PlanError(f"--max-capacity {asked.max_capacity} is less than a tile of {asked.tile}")
    step = max(asked.tile, padded(asked.max_capacity // 16, asked.tile))
    return tuple(range(step, asked.max_capacity + 1, step))


def _read_jobs(path: Path) -> tuple[Job, ...]:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise PlanError(f"{path}: invalid JSON: {error}") from error
    entries = record.get("jobs") if isinstance(record, dict) else None
    if not isinstance(entries, list):
        raise PlanError(f'{path}: expected {{"jobs": [...]}}')
    return tuple(_read_job(f"{path}: jobs[{i}]", entry) for i, entry in enumerate(entries))


def _read_job(where: str, entry: Any) -> Job:
    allowed = {"name", "lengths", "global_batch_size", "epochs"}
    if (
        not isinstance(entry, dict)
        or set(entry) - allowed
        or not isinstance(entry.get("name"), str)
    ):
        raise PlanError(f"{where}: expected an object with a name and {sorted(allowed)}")
    lengths = entry.get("lengths")
    if not isinstance(lengths, list) or not all(type(n) is int and n > 0 for n in lengths):
        raise PlanError(f"{where}: lengths must be a list of positive integers")
    counts = {"global_batch_size": entry.get("global_batch_size"), "epochs": entry.get("epochs", 1)}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise PlanError(f"{where}: {name} must be a positive integer, got {value!r}")
    return job_from_lengths(entry["name"], lengths, **counts)


def _plan(asked: argparse.Namespace) -> None:
    problem = _problem(asked)
    answer = plan(problem)
    verify(problem, answer)
    run = simulate(answer, problem.cost, problem.stages, problem.clock)
    print(_describe(answer))
    print(f"utilisation     {run.utilisation:.1%}, bubble {run.bubble:.1%}")
    if asked.output:
        asked.output.write_text(to_json(answer))
    if asked.html:
        asked.html.write_text(gantt_html(answer, run, title=asked.file.name))


def _compare(asked: argparse.Namespace) -> None:
    problem = _problem(asked)
    rivals = {"megatron": megatron, "mlora": mlora, "lorafusion": lorafusion, "ours": plan}
    if problem.width > 1:  # it has no notion of slots
        del rivals["lorafusion"]
    print(f"{'planner':12}{'microbatches':>13}{'no-ops':>8}{'utilisation':>13}{'violations':>12}")
    for name, planner in rivals.items():
        answer = planner(problem)
        run = simulate(answer, problem.cost, problem.stages, problem.clock)
        full = sum(bool(mb.stretches) for mb in answer.microbatches)
        print(
            f"{name:12}{full:13}{len(answer.microbatches) - full:8}{run.utilisation:13.1%}"
            f"{violations(answer):12}"
        )


def _show(asked: argparse.Namespace) -> None:
    answer = from_json(asked.file.read_text())
    print(_describe(answer))
    if not asked.microbatches:
        return
    for position, microbatch in enumerate(answer.microbatches):
        contents = ", ".join(
            f"{s.job}[{s.batch}] {len(s.samples)} samples, {s.tokens()} tokens"
            + (", end" if s.ends else "")
            for s in microbatch.stretches
        )
        print(f"{position:6} {microbatch.capacity:6}  {contents or 'no-op'}")


def _describe(answer: Plan) -> str:
    """Returns the figures of a plan, a line each."""
    stretches = [s for mb in answer.microbatches for s in mb.stretches]
    tokens = sum(s.tokens() for s in stretches)
    rows = sum(mb.capacity for mb in answer.microbatches if mb.stretches)
    noops = sum(not mb.stretches for mb in answer.microbatches)
    used = sorted({mb.capacity for mb in answer.microbatches if mb.stretches})
    return "\n".join(
        (
            f"jobs            {len({s.job for s in stretches})}",
            f"global batches  {len({(s.job, s.batch) for s in stretches})}",
            f"samples         {sum(len(s.samples) for s in stretches)}",
            f"microbatches    {len(answer.microbatches) - noops} of {used} tokens, {noops} no-ops",
            f"fill            {tokens / rows if rows else 0:.1%} of {rows} rows are tokens",
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
