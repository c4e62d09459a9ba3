"""Packs the samples of many fine-tuning jobs into few, full, dependency-safe microbatches.

Standard library only: planning needs no jax, no numpy and no GPU.
"""

from lorafusion_sched.cost import Measured as Measured
from lorafusion_sched.cost import cost_from_json as cost_from_json
from lorafusion_sched.cost import cost_to_json as cost_to_json
from lorafusion_sched.cost import fit_cost as fit_cost
from lorafusion_sched.problem import Clock as Clock
from lorafusion_sched.problem import Cost as Cost
from lorafusion_sched.problem import Job as Job
from lorafusion_sched.problem import Microbatch as Microbatch
from lorafusion_sched.problem import Plan as Plan
from lorafusion_sched.problem import PlanError as PlanError
from lorafusion_sched.problem import Problem as Problem
from lorafusion_sched.problem import Sample as Sample
from lorafusion_sched.problem import Stretch as Stretch
from lorafusion_sched.problem import distance_of as distance_of
from lorafusion_sched.problem import job_from_lengths as job_from_lengths
from lorafusion_sched.problem import padded as padded
from lorafusion_sched.refill import pack as pack
from lorafusion_sched.replan import Revision as Revision
from lorafusion_sched.replan import replan as replan
from lorafusion_sched.replan import trained_batches as trained_batches
from lorafusion_sched.replan import trained_part as trained_part
from lorafusion_sched.search import choose_capacity as choose_capacity
from lorafusion_sched.search import plan as plan
from lorafusion_sched.serialize import from_json as from_json
from lorafusion_sched.serialize import to_json as to_json
from lorafusion_sched.simulate import Timeline as Timeline
from lorafusion_sched.simulate import simulate as simulate
from lorafusion_sched.stream import Settings as Settings
from lorafusion_sched.stream import Stream as Stream
from lorafusion_sched.verify import verify as verify
