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
