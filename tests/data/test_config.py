"""The run configuration: what a file means, what overrides change, what a resume accepts."""

import pytest
import yaml
from pydantic import ValidationError

from lorafusion_jax.config import (
    EvalConfig,
    LoraConfig,
    config_diff,
    config_from_dict,
    load_config,
    resolved_yaml,
    template_yaml,
)
from lorafusion_jax.errors import ConfigError

YAML = """\
base: {model: ./m, dtype: float32}
output: runs/x
defaults:
  lora: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj]}
  optim: {learning_rate: 2e-4, warmup_steps: 5}
  train: {epochs: 2, global_batch_size: 8}
  eval: {split: 48}
jobs:
  - name: sql
    data: {path: data/sql.jsonl}
    train: {max_steps: 30}
    optim: {warmup_ratio: 0.5}
  - name: em.oji
    data: {path: /abs/emoji.jsonl, format: chat}
    lora:
    eval: {path: held_out.jsonl}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    return file


def test_a_job_inherits_what_it_does_not_set(path):
    sql, emoji = load_config(path).jobs
    assert (sql.lora.r, sql.lora.alpha, sql.optim.lr) == (16, 32, 2e-4)
    assert sql.lora.target_modules == ("q_proj", "v_proj")
    assert emoji.lora == sql.lora  # an empty section sets nothing
    assert emoji.train.epochs == 2 and emoji.train.global_batch_size == 8


def test_of_exclusive_settings_the_jobs_own_wins(path):
    sql, emoji = load_config(path).jobs
    assert (sql.train.epochs, sql.train.max_steps) == (None, 30)
    assert (sql.optim.warmup_ratio, sql.optim.warmup_steps) == (0.5, None)
    assert (emoji.eval.split, emoji.eval.path) == (0, str(path.parent / "held_out.jsonl"))
    assert sql.eval.split == 48 and sql.eval.path is None


def test_relative_paths_start_at_the_file(path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    config = load_config(path)
    assert config.base.model == str(path.parent / "m")
    assert config.output == str(path.parent / "runs/x")
    assert [job.data.path for job in config.jobs] == [
        str(path.parent / "data/sql.jsonl"),
        "/abs/emoji.jsonl",
    ]


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("jobs.sql.lora.r=32", lambda c: c.jobs[0].lora.r, 32),
        ("jobs.em.oji.lora.r=4", lambda c: c.jobs[1].lora.r, 4),
        ("defaults.lora.dropout=0.1", lambda c: c.jobs[1].lora.dropout, 0.1),
        ("jobs.sql.train.num_train_epochs=3", lambda c: c.jobs[0].train.max_steps, None),
        (
            "jobs.sql.lora.target_modules=[o_proj]",
            lambda c: c.jobs[0].lora.target_modules[0],
            "o_proj",
        ),
        ("jobs.sql.optim.max_grad_norm=null", lambda c: c.jobs[0].optim.max_grad_norm, None),
        ("batching.max_length=64", lambda c: c.batching.max_length, 64),
    ],
)
def test_overrides(path, override, read, value):
    assert read(load_config(path)) != value
    assert read(load_config(path, [override])) == value


def test_toml_says_the_same(path, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        """
output = "runs/x"
[base]
model = "./m"
dtype = "float32"
[defaults]
lora = {r = 16, lora_alpha = 32, target_modules = ["q_proj", "v_proj"]}
optim = {learning_rate = 2e-4, warmup_steps = 5}
train = {epochs = 2, global_batch_size = 8}
eval = {split = 48}
[[jobs]]
name = "sql"
data = {path = "data/sql.jsonl"}
train = {max_steps = 30}
optim = {warmup_ratio = 0.5}
[[jobs]]
name = "em.oji"
data = {path = "/abs/emoji.jsonl", format = "chat"}
eval = {path = "held_out.jsonl"}
"""
    )
    assert load_config(toml) == load_config(path)


def test_resolved_yaml_is_complete_and_stable(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved_yaml(config))
    assert load_config(again) == config
    assert resolved_yaml(load_config(again)) == resolved_yaml(config)
    assert yaml.safe_load(resolved_yaml(config))["jobs"][0]["optim"]["eps"] == 1e-8


def test_yaml_12_scalars(path):
    path.write_text(YAML.replace("name: sql", "name: no").replace("2e-4", "2E-4"))
    config = load_config(path)
    assert config.jobs[0].name == "no" and config.jobs[0].optim.lr == 2e-4


def test_the_template_is_valid(tmp_path):
    file = tmp_path / "lorafusion.yaml"
    file.write_text(template_yaml())
    config = load_config(file)
    assert [job.name for job in config.jobs] == ["first", "second"]
    assert config.jobs[1].train.epochs is None


def test_records_are_strict_and_frozen():
    with pytest.raises(ValidationError):
        LoraConfig(r="16")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        LoraConfig(r=True)
    with pytest.raises(ValidationError):
        LoraConfig().r = 3  # type: ignore[misc]
    assert EvalConfig(split=48).split == 48


def test_the_given_dict_is_not_changed():
    raw = yaml.safe_load(YAML.replace("2e-4", "0.0002"))
    before = yaml.safe_dump(raw)
    config_from_dict(raw, ["seed=3", "jobs.sql.lora.r=2"])
    assert yaml.safe_dump(raw) == before


@pytest.mark.parametrize(
    ("override", "key", "kind"),
    [
        ("jobs.sql.lora.r=32", "jobs.sql.lora.r", "refused"),
        ("jobs.sql.optim.lr=1.0", "jobs.sql.optim.lr", "refused"),
        ("jobs.sql.train.max_steps=31", "jobs.sql.train.max_steps", "refused"),
        ("seed=1", "seed", "refused"),
        ("batching.tile=16", "batching.tile", "refused"),
        ("jobs.sql.save.every=5", "jobs.sql.save.every", "allowed"),
        ("jobs.em.oji.eval.every=5", "jobs.em.oji.eval.every", "allowed"),
        ("report.every=5", "report.every", "allowed"),
        ("output=other", "output", "allowed"),
        ("jobs.sql.data.path=moved.jsonl", "jobs.sql.data.path", "path"),
        ("base.model=moved", "base.model", "path"),
    ],
)
@pytest.mark.scenario("A9")
def test_diff_says_what_a_resume_may_change(path, override, key, kind):
    old, new = load_config(path), load_config(path, [override])
    assert config_diff(old, old) == []
    (change,) = config_diff(old, new)
    assert (change.key, change.kind) == (key, kind)
    assert str(change).startswith(f"{key}: ") and " -> " in str(change)


@pytest.mark.scenario("A9")
def test_diff_of_jobs(path):
    both = load_config(path)
    one = both.model_copy(update={"jobs": both.jobs[:1]})
    swapped = both.model_copy(update={"jobs": both.jobs[::-1]})
    assert [(c.key, c.kind) for c in config_diff(one, both)] == [("jobs.em.oji", "allowed")]
    assert [(c.key, c.kind) for c in config_diff(both, one)] == [("jobs.em.oji", "refused")]
    assert config_diff(both, swapped) == []


@pytest.mark.scenario("F3")
def test_all_problems_are_listed_at_once_in_file_order(path):
    path.write_text(
        YAML.replace("r: 16", "rank: 16").replace("epochs: 2", "epochs: 0") + "sweep: 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["jobs.sqk.lora.r=1", "seed=x"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 problems in the configuration"
    assert [line.split(": ")[1] for line in lines[1:]] == [
        "jobs.sqk.lora.r",
        "seed",
        "defaults.lora.rank",
        "defaults.train.epochs",
        "sweep",
    ]
    assert f"{path}:4: " in lines[3] and 'did you mean "sql"' in lines[1]
