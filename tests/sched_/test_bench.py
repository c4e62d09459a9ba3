"""The benchmark's programs and its file."""

import json
import random

import pytest

from lorafusion_jax.bench import schedule
from lorafusion_jax.bench.schedule_milp import milp_packer
from lorafusion_sched import pack, padded
from lorafusion_sched.baselines import head_tail_groups


@pytest.mark.parametrize("seed", range(4))
def test_the_programs_pack_legally_and_no_better_than_ours(seed):
    rng = random.Random(seed)
    lengths = [[rng.randint(100, 900) for _ in range(6)] for _ in range(2)]
    bins = milp_packer(3.0)(lengths, 2048, 128)
    rows = [
        sum(padded(sum(lengths[j][i] for i in x), 128) for j, x in content.items())
        for content in bins
    ]
    assert max(rows) <= 2048
    placed = sorted((j, i) for content in bins for j, x in content.items() for i in x)
    assert placed == [(j, i) for j in range(2) for i in range(6)]
    assert len(pack(lengths, 2048, 128)) <= len(bins)


def test_grouping_pairs_long_with_short_while_the_rest_covers_a_round():
    jobs = schedule.jobs_of("het", 16, 0)
    assert sorted(map(sorted, head_tail_groups(jobs, 4096, 2))) == [[0, 2], [1, 3]]
    assert head_tail_groups(jobs, 8192, 30) == [[0], [1], [2], [3]]


@pytest.mark.slow
def test_quick_run_writes_every_part(tmp_path):
    record = json.loads(schedule.run(quick=True, root=tmp_path).read_text())
    assert (tmp_path / "cpu/schedule.json").exists()
    assert {row["part"] for row in record["rows"]} == {"packing", "pipeline", "auto", "balance"}
    rows = [row for row in record["rows"] if row["part"] == "pipeline"]
    best = {row["planner"]: row["utilisation"] for row in rows if row["clock"] == "1f1b"}
    assert best["ours"] == max(best.values())
    assert all(row["violations"] == 0 for row in rows if row["planner"] == "ours")
