"""`lorafusion sweep` and `init --jobs`: from one job to a table."""

import json

import numpy as np
import pytest

from lorafusion_jax.bench import sweep
from lorafusion_jax.cli.prepare import prepare
from lorafusion_jax.cli.training import read_config
from lorafusion_jax.config import load_config, resolved_yaml
from lorafusion_jax.errors import ConfigError


def test_a_sweep_ends_with_a_table_sorted_by_held_out_loss(lorafusion, project, tmp_path):
    over = ["--over", "optim.lr=[1.0e-6, 5.0e-2]", "--over", "lora.r=[2, 4]"]
    words = ["sweep", project, "numbers", *over, "--plain", "--max-steps", "3"]
    code, out, err = lorafusion(*words)
    assert code == 0, err
    run = project.parent / "run"
    rows = json.loads((run / "sweep.json").read_text())["numbers"]
    losses = [row["best_loss"] for row in rows]
    assert losses == sorted(losses) and len(rows) == 4
    assert rows[0]["optim.lr"] == 5e-2 and rows[-1]["optim.lr"] == 1e-6
    assert all(row["status"] == "done" and row["steps"] == 3 for row in rows)
    assert len({row["base_loss"] for row in rows}) == 1  # the same held-out rows for all
    table = out.split("sweep of numbers, lowest held-out loss first\n")[1].splitlines()
    assert table[0].split()[:3] == ["job", "optim.lr", "lora.r"]
    assert [line.split()[0] for line in table[1:5]] == [row["job"] for row in rows]
    summary = (run / "summary.md").read_text()
    assert sweep.main([str(run)], root=tmp_path / "results") == 0
    (written,) = (tmp_path / "results").glob("*/sweep.json")
    record = json.loads(written.read_text())
    assert (
        record["bench"] == "sweep" and [row["sweep"] for row in record["rows"]] == ["numbers"] * 4
    )
    assert "## Sweep of numbers" in summary and f"| {rows[0]['job']} | 0.05 |" in summary


def test_points_of_a_sweep_share_all_but_what_is_swept(project):
    (project.parent / "one.yaml").write_text(project.read_text())
    grid = "jobs.numbers.sweep={lora.r: [4, 8]}"
    points = prepare(read_config(project, [grid], jobs="numbers")).jobs
    (hand,) = prepare(read_config(project, jobs="numbers")).jobs
    assert [job.name for job in points] == ["numbers-r4", "numbers-r8"]
    for point in points:
        assert point.seed == hand.seed
        assert point.eval_indices == hand.eval_indices
        assert point.plan.batches == hand.plan.batches


def test_one_point_of_a_sweep_can_be_chosen(project):
    grid = "jobs.numbers.sweep={lora.r: [4, 8]}"
    config = read_config(project, [grid], jobs="numbers-r8,plain", max_steps=5)
    assert [(job.name, job.train.max_steps) for job in config.jobs] == [
        ("numbers-r8", 5),
        ("plain", 5),
    ]


def test_a_resolved_sweep_takes_another_length(project, tmp_path):
    resolved = tmp_path / "config.resolved.yaml"
    grid = "jobs.numbers.sweep={lora.r: [4, 8]}"
    resolved.write_text(resolved_yaml(load_config(project, [grid])))
    config = read_config(resolved, max_steps=5)
    assert {(job.train.max_steps, job.train.epochs) for job in config.jobs} == {(5, None)}


@pytest.mark.parametrize("key", ["train.epochs", "train.max_steps"])
def test_a_swept_length_is_not_undone_silently(project, key):
    with pytest.raises(ConfigError, match=rf"--max-steps would undo the sweep of {key}"):
        read_config(project, [f"jobs.numbers.sweep={{{key}: [1, 2]}}"], max_steps=5)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["lora.r"], "expected key=[values]"),
        (["lora.r=8"], "expected a list of values"),
        (["lora.rank=[8]"], "jobs.numbers.sweep.lora.rank"),
        (["lora.r=[8"], "--set jobs.numbers.sweep"),
    ],
)
def test_wrong_grids_are_explained(lorafusion, project, over, words):
    options = [word for text in over for word in ("--over", text)]
    code, _, err = lorafusion("sweep", project, "numbers", *options)
    assert code == 2 and words in err, err
    assert not (project.parent / "run").exists()


@pytest.mark.parametrize("count", [1, 32])
def test_init_lists_as_many_jobs_as_asked_for(lorafusion, tmp_path, count):
    code, _, err = lorafusion("init", "--directory", tmp_path, "--jobs", count)
    assert code == 0, err
    jobs = load_config(tmp_path / "lorafusion.yaml").jobs
    width = len(str(count))
    assert [job.name for job in jobs] == [f"job-{n:0{width}d}" for n in range(1, count + 1)]
    paths = [job.data.path for job in jobs]
    assert np.unique(paths).size == count and all(str(tmp_path) in path for path in paths)
