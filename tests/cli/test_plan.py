"""The plan command: sizes chosen by the planner, measured costs, pipelines, pictures."""

import json
import random

import pytest

from lorafusion_jax.config import BatchingConfig
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.train.capacity import COST_FILE, capacities_of, cost_of_run, cost_of_shape
from lorafusion_sched import Cost, cost_from_json, cost_to_json, from_json, job_from_lengths
from tests.train.tiny import CONFIG


def test_sizes_are_given_filled_or_chosen():
    jobs = [job_from_lengths("a", [300, 40, 90, 33] * 8, global_batch_size=8)]
    given = BatchingConfig(tokens_per_microbatch=1024, capacities=(512, 1024))
    assert capacities_of(jobs, given, 16, Cost()) == (512, 1024)
    assert capacities_of(jobs, BatchingConfig(tokens_per_microbatch=4096), 16, Cost()) == (928,)
    rng = random.Random(1)
    lengths = [[rng.randint(10, 300) for _ in range(64)] for _ in range(3)]
    jobs = [job_from_lengths(f"job{i}", x, global_batch_size=8) for i, x in enumerate(lengths)]
    auto = BatchingConfig(tokens_per_microbatch=4096, tile=16, capacities="auto")
    dear, cheap = (capacities_of(jobs, auto, 16, Cost(fixed=f)) for f in (1e5, 0.0))
    assert 300 <= min(cheap) < max(dear) <= 4096
    deep = capacities_of(jobs, auto, 16, Cost(), clock="fbh", stages=4)
    assert max(deep) <= max(dear)


def test_the_measured_cost_goes_before_the_counted_one(tmp_path):
    assert cost_of_run(tmp_path, CONFIG) == cost_of_shape(CONFIG)
    assert cost_of_shape(CONFIG).per_square > 0
    measured = Cost(fixed=0.25, per_token=1e-3, per_square=0.0, backward=1.0)
    (tmp_path / COST_FILE).write_text(cost_to_json(measured, device="x"))
    assert cost_of_run(tmp_path, CONFIG) == measured
    (tmp_path / COST_FILE).write_text("{")
    with pytest.raises(ConfigError, match=r"cost.json.*plan --measure"):
        cost_of_run(tmp_path, CONFIG)


def test_a_pipeline_is_planned_written_and_drawn(lorafusion, project, tmp_path):
    plan, page, image = (tmp_path / name for name in ("plan.json", "plan.html", "plan.png"))
    options = ["--capacity", "auto", "--stages", "2", "--clock", "bfh", "--output", plan]
    code, out, _ = lorafusion("plan", project, *options, "--picture", page)
    assert code == 0
    answer = from_json(plan.read_text())
    assert answer.distance == 3 and len({m.capacity for m in answer.microbatches}) <= 2
    assert "on 2 stages" in out and "<svg" in page.read_text()
    assert lorafusion("plan", project, "--picture", image)[0] == 0
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_mesh_of_the_configuration_is_planned_unless_another_is_given(lorafusion, project):
    configured = ("--set", "parallel.stage=2", "--set", "parallel.data=2")
    given = lorafusion("plan", project, "--stages", "2", "--data-parallel", "2")[1]
    assert "on 2 stages" in given and lorafusion("plan", project, *configured)[1] == given
    assert "on 1 stages" in lorafusion("plan", project, *configured, "--stages", "1")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity", "8k"], "expected auto, 8192"),
        (["--clock", "gpipe"], "expected fbh, bfh or 1f1b"),
        (["--picture", "plan.jpg"], "ends in .html or .png"),
    ],
)
def test_bad_options_are_explained(lorafusion, project, options, message):
    code, _, error = lorafusion("plan", project, *options)
    assert code == 2 and message in error


@pytest.mark.slow
def test_costs_are_measured_on_this_device(lorafusion, project):
    """Two compilations of a tiny model; what is kept is what auto uses from then on."""
    small = ["--set", "batching.tokens_per_microbatch=64", "--set", "batching.max_length=64"]
    small += ["--set", "batching.tile=16", "--set", "batching.capacities=null"]
    code, out, error = lorafusion("plan", project, *small, "--measure")
    assert code == 0, error
    assert "us a token" in out
    run = next(line.split("kept in ")[1] for line in out.splitlines() if "kept in" in line)
    with open(run) as file:
        text = file.read()
    cost = cost_from_json(text)
    assert cost.fixed + 64 * cost.per_token > 0
    assert json.loads(text)["about"]["device"]
