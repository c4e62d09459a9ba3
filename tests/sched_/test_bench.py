"""The benchmark's programs and its file."""

import json
import random
from pathlib import Path

import pytest

from lorafusion_jax.bench import schedule
from lorafusion_jax.bench.schedule_milp import milp_packer
from lorafusion_jax.bench.schedule_report import bars, report, write_measured
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


RESULTS = Path(__file__).parents[2] / "docs/results/cpu/schedule.json"


def committed() -> list[dict]:
    return json.loads(RESULTS.read_text())["rows"]


def test_the_committed_results_reach_every_bar():
    found = bars(committed())
    assert len(found) == 14 and all(found.values()), [
        bar for bar, good in found.items() if not good
    ]


@pytest.mark.parametrize(
    ("where", "change", "bar"),
    [
        ({"planner": "milp"}, {"fewer_than_ours": 1}, "bins: never more"),
        ({"planner": "ours", "part": "packing"}, {"bins_over_bound": 0.01}, "0.5% of the bound"),
        ({"planner": "ours", "part": "packing"}, {"plan_seconds": 0.021}, "at most 20 ms"),
        ({"planner": "milp", "part": "packing"}, {"plan_seconds": 0.1}, "100 times"),
        ({"planner": "lorafusion", "lengths": "cnn"}, {"utilisation": 0.99}, "(the programs)"),
        ({"planner": "lorafusion"}, {"utilisation": 0.95}, "5% better"),
        ({"part": "auto", "stages": 8, "whole_bucket": True}, {"utilisation": 0.8}, "0.88"),
        ({"planner": "ours", "part": "pipeline", "seed": 2}, {"violations": 1}, "breaks a rule"),
        ({"part": "balance", "planner": "ours"}, {"spread": 1.1}, "halved"),
    ],
)
def test_a_bar_that_is_missed_is_seen(where, change, bar):
    rows = committed()
    for row in rows:
        if all(row.get(key) == value for key, value in where.items()):
            row.update(change)
    failed = [text for text, good in bars(rows).items() if not good]
    assert any(bar in text for text in failed)
    assert f"FAILS  {failed[0]}" in report(rows)


def test_pieces_of_the_benchmark_add_up(tmp_path):
    first = [{"part": "balance", "planner": "ours", "seed": s, "spread": 1.5} for s in range(2)]
    write_measured(first, add=True, root=tmp_path)
    again = [{"part": "balance", "planner": "ours", "seed": s, "spread": 1.2} for s in (1, 2)]
    path = write_measured(again, add=True, root=tmp_path)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["seed"], row["spread"]) for row in rows] == [(0, 1.5), (1, 1.2), (2, 1.2)]
    assert sum(line.lstrip().startswith('{"part"') for line in path.read_text().splitlines()) == 3
    write_measured(again, add=False, root=tmp_path)
    assert len(json.loads(path.read_text())["rows"]) == 2
