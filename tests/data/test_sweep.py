"""Sweeps: one job of the file, a job for each combination, each as if written by hand."""

import pytest

from lorafusion_jax.config import config_diff, config_from_dict, load_config, resolved_yaml
from lorafusion_jax.errors import ConfigError


def raw(sweep=None, **job):
    sql = {"name": "sql", "data": {"path": "a.jsonl"}, **job}
    return {
        "base": {"model": "m"},
        "output": "o",
        "defaults": {"lora": {"r": 4}, "train": {"epochs": 3}},
        "jobs": [sql | ({"sweep": sweep} if sweep else {}), {"name": "b", "data": {"path": "b"}}],
    }


GRID = {"lora.r": [8, 32], "optim.learning_rate": [1e-4, 0.01]}


def test_every_combination_is_a_job_of_its_own():
    config = config_from_dict(raw(GRID))
    assert [job.name for job in config.jobs] == [
        "sql-r8-lr0.0001",
        "sql-r8-lr0.01",
        "sql-r32-lr0.0001",
        "sql-r32-lr0.01",
        "b",
    ]
    assert [(job.lora.r, job.optim.lr) for job in config.jobs[:4]] == [
        (8, 1e-4),
        (8, 0.01),
        (32, 1e-4),
        (32, 0.01),
    ]
    assert config.jobs[1].swept.values == {"lora.r": 8, "optim.lr": 0.01}
    assert {job.identity for job in config.jobs} == {"sql", "b"}


def test_each_is_the_job_one_would_write_by_hand_but_for_its_name():
    swept = config_from_dict(raw(GRID)).jobs[2]
    hand = config_from_dict(raw(lora={"r": 32}, optim={"lr": 1e-4})).jobs[0]
    assert swept.model_copy(update={"name": "sql", "swept": None}) == hand


def test_a_swept_key_replaces_its_rivals():
    config = config_from_dict(raw({"train.max_steps": [5, 9]}))
    assert [(job.train.epochs, job.train.max_steps) for job in config.jobs[:2]] == [
        (None, 5),
        (None, 9),
    ]
    deep = config_from_dict(raw({"train.early_stopping.patience": [1, 2]}))
    assert deep.jobs[1].train.early_stopping.patience == 2


def test_a_section_that_was_switched_off_is_swept():
    config = config_from_dict(
        raw({"train.early_stopping.patience": [1, 2]}, train={"early_stopping": None})
    )
    assert [job.train.early_stopping.patience for job in config.jobs[:2]] == [1, 2]


@pytest.mark.parametrize(
    ("sweep", "job", "words"),
    [
        ({"lora.r.x": [1, 2]}, {"lora": {"r": 8}}, "lora.r: got a section"),
        ({"lora.r": [1, 2]}, {"lora": 5}, "sql.lora: got 5, expected a section"),
        ({"lora.alpha": [1, 2], "lora.lora_alpha": [3, 4]}, {}, 'beside "lora.alpha"'),
        ({"train.epochs": [1, 2], "train.max_steps": [3, 4]}, {}, 'beside "train.epochs"'),
    ],
)
def test_a_key_that_has_no_place_or_that_another_replaces_is_refused(sweep, job, words):
    with pytest.raises(ConfigError) as refusal:
        config_from_dict(raw(sweep, **job))
    assert words in str(refusal.value)


def test_the_resolved_file_is_read_back_as_it_is(tmp_path):
    config = config_from_dict(raw({"lora.target_modules": [["q_proj"], "all-linear"]}))
    assert [job.name for job in config.jobs[:2]] == [
        "sql-target_modulesq_proj",
        "sql-target_modulesall_linear",
    ]
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(config))
    again = load_config(path)
    assert [job.name for job in again.jobs] == [job.name for job in config.jobs]
    assert again.jobs[0].swept.values == {"lora.target_modules": ["q_proj"]}
    keys = {change.key for change in config_diff(config, again)}
    assert keys <= {"base.model", "output", *(f"jobs.{j.name}.data.path" for j in config.jobs)}


def test_long_or_equal_names_are_numbered():
    config = config_from_dict(raw({"data.path": ["a" * 80, "b" * 80]}))
    assert [job.name for job in config.jobs[:2]] == ["sql-01", "sql-02"]
    same = config_from_dict(raw({"data.format": ["auto", "text"], "data.path": ["x/y", "x y"]}))
    assert [job.name for job in same.jobs[:4]] == [f"sql-0{n}" for n in range(1, 5)]


def test_a_name_that_is_taken_is_refused():
    taken = raw({"lora.r": [8]})
    taken["jobs"][1]["name"] = "SQL-R8"
    with pytest.raises(ConfigError, match=r"jobs\.sql\.sweep: gives a job 'sql-r8', which is ther"):
        config_from_dict(taken)


def test_overrides_reach_the_job_of_the_file():
    config = config_from_dict(raw(GRID), ["jobs.sql.train.max_steps=2", "jobs.sql.lora.alpha=64"])
    assert all(job.train.max_steps == 2 and job.lora.alpha == 64 for job in config.jobs[:4])
    added = config_from_dict(raw(), ["jobs.sql.sweep={lora.r: [1, 2]}"])
    assert [job.name for job in added.jobs] == ["sql-r1", "sql-r2", "b"]
