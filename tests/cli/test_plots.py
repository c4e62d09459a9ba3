"""Figures are drawn from records that may be few, cut or strange."""

import math

import pytest

from lorafusion_jax import plots
from lorafusion_sched import Problem, job_from_lengths, plan

PNG = b"\x89PNG\r\n\x1a\n"


def records(n=5):
    rows = [{"step": 0, "loss": None, "eval_loss": 4.0, "microbatch": -1, "time": 99.0}]
    for i in range(1, n):
        rows.append(
            {"step": i, "loss": 4.0 / i, "eval_loss": None, "microbatch": i, "time": 100.0 + i}
        )
    rows.append({"step": n, "loss": math.nan, "eval_loss": None, "microbatch": n, "time": 106.0})
    rows.append({"step": n, "loss": None, "eval_loss": 1.0, "microbatch": n, "time": 107.0})
    return rows


@pytest.fixture(scope="module")
def small_plan():
    job = job_from_lengths("a", [10, 20, 30, 16] * 3, global_batch_size=2)
    return plan(Problem(jobs=(job,), capacities=(64,), tile=16))


def test_series_leaves_out_what_is_not_finite():
    assert plots.series(records(3), "loss") == ([1, 2], [4.0, 2.0])
    assert plots.series(records(3), "eval_loss") == ([0, 3], [4.0, 1.0])
    assert plots.series([], "loss") == ([], [])


@pytest.mark.parametrize("rows", [[], records()], ids=["empty", "some"])
def test_figures_are_pngs_and_repeat_to_the_byte(tmp_path, rows, small_plan):
    draw = {
        "job": lambda path: plots.plot_job(rows, "a", path),
        "jobs": lambda path: plots.plot_jobs({"a": rows, "b": rows}, path),
        "use": lambda path: plots.plot_utilisation(small_plan, {"a": rows}, path),
    }
    for name, function in draw.items():
        first, second = tmp_path / f"{name}1.png", tmp_path / "new" / f"{name}2.png"
        function(first)
        function(second)
        assert first.read_bytes().startswith(PNG)
        assert first.read_bytes() == second.read_bytes()


def test_throughput_counts_real_tokens(small_plan):
    tokens = [sum(s.tokens() for s in m.stretches) for m in small_plan.microbatches]
    rows = [{"microbatch": i, "time": 10.0 + 2 * i} for i in range(len(tokens))]
    xs, ys = plots.throughput(small_plan, {"a": rows})
    assert xs == list(range(1, len(tokens)))
    assert ys == [t / 2 for t in tokens[1:]]
