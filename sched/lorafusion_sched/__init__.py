"""Packs the samples of many fine-tuning jobs into few, full, dependency-safe microbatches.

Standard library only: planning needs no jax, no numpy and no GPU.
"""

from lorafusion_sched.problem import Job as Job
from lorafusion_sched.problem import Microbatch as Microbatch
from lorafusion_sched.problem import Plan as Plan
from lorafusion_sched.problem import PlanError as PlanError
from lorafusion_sched.problem import Problem as Problem
from lorafusion_sched.problem import Sample as Sample
from lorafusion_sched.problem import Stretch as Stretch
from lorafusion_sched.problem import job_from_lengths as job_from_lengths
from lorafusion_sched.problem import padded as padded
from lorafusion_sched.serialize import from_json as from_json
from lorafusion_sched.serialize import to_json as to_json
from lorafusion_sched.stream import stream as stream
from lorafusion_sched.verify import verify as verify


def plan(problem: Problem) -> Plan:
    """Plans a problem: every sample once, in few full microbatches, in a legal order.

    Args:
        problem: jobs, capacities and the pipeline's rules.

    Returns:
        The plan; deterministic.
    """
    return stream(problem, focus=1.0)
