"""Metric sinks: they get the metrics, and no failure of theirs reaches training."""

import sys
import types

import pytest

import lorafusion_jax as lf
from lorafusion_jax.config import (
    BatchingConfig,
    EvalConfig,
    ReportConfig,
    RunConfig,
    SaveConfig,
    TrainConfig,
)
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.train import events, sinks
from lorafusion_jax.train.run_folder import RunFolder
from tests.train.tiny import TILE, dataset, tiny_base

pytestmark = pytest.mark.usefixtures("shared_programs")


def config(*to, every=2) -> RunConfig:
    report = {"to": list(to), "every": every, "project": "mine"}
    jobs = [{"name": "sql", "data": {"path": "x"}}]
    raw = {"base": {"model": "m"}, "output": "o", "report": report, "jobs": jobs}
    return RunConfig.model_validate(raw)


def step(number, job="sql", total=5):
    return events.StepDone(job, number, total, 1.5, 10 * number, 1e-3, 0.5, True, number)


def evaluated(number):
    return events.Evaluated("sql", number, 2.5, 0.1, 0.0, 4, True, number)


class Run:
    """What wandb.init returns: remembers everything."""

    def __init__(self, fail=()):
        self.logged, self.defined, self.finished, self._fail = [], [], 0, set(fail)

    def log(self, values):
        if "log" in self._fail:
            raise ConnectionError("the service is away\nmore")
        self.logged.append(values)

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def finish(self):
        self.finished += 1
        if "finish" in self._fail:
            raise ConnectionError


def fake(monkeypatch, name, run, fail=False):
    module, asked = types.ModuleType(name), []

    def init(**options):
        asked.append(options)
        if fail:
            raise RuntimeError("no API key")
        return run

    vars(module).update(init=init, log=run.log, finish=run.finish)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sinks, "check_sinks", lambda names: None)
    return asked


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_metrics_of_every_job(monkeypatch, tmp_path, name):
    run, notices = Run(), []
    asked = fake(monkeypatch, name, run)
    with sinks.Sinks(config(name), RunFolder(tmp_path / "out"), {}, notices.append) as told:
        for event in (evaluated(0), step(1), step(2), step(3), step(1, "b"), step(5)):
            told(event)
    assert asked[0]["project"] == "mine" and asked[0]["name"] == "out"
    assert asked[0]["resume"] == "allow" and asked[0]["config"]["jobs"][0]["name"] == "sql"
    assert run.logged[0] == {
        "sql/step": 0,
        "sql/eval_loss": 2.5,
        "sql/token_accuracy": 0.1,
        "sql/exact_match": 0.0,
    }
    assert [line.get("sql/step", line.get("b/step")) for line in run.logged] == [0, 1, 2, 1, 5]
    assert run.logged[2]["sql/loss"] == 1.5 and run.logged[2]["sql/tokens"] == 20.0
    assert run.finished == 1 and not notices
    if name == "wandb":
        assert run.defined == [("sql/*", "sql/step"), ("b/*", "b/step")]


@pytest.mark.parametrize(
    ("fail", "words"),
    [("init", "no API key"), ("log", "the service is away"), ("finish", "ConnectionError")],
)
def test_a_failure_is_one_notice_and_nothing_else(monkeypatch, tmp_path, fail, words):
    run, notices = Run(fail=[fail]), []
    fake(monkeypatch, "wandb", run, fail=fail == "init")
    with sinks.Sinks(config("wandb"), RunFolder(tmp_path), {}, notices.append) as told:
        for number in (1, 2, 5):
            told(step(number))
    (notice,) = notices
    assert notice.message == f"report.to: wandb failed and is left out from here on: {words}"


def test_one_sink_goes_on_without_the_other(monkeypatch, tmp_path):
    broken, whole, notices = Run(fail=["log"]), Run(), []
    fake(monkeypatch, "wandb", broken)
    fake(monkeypatch, "trackio", whole)
    with sinks.Sinks(config("wandb", "trackio"), RunFolder(tmp_path), {}, notices.append) as told:
        told(step(1))
        told(step(2))
    assert len(whole.logged) == 2 and len(notices) == 1


def test_a_missing_package_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    trainer = lf.MultiTrainer(
        tiny_base(), output=tmp_path / "run", report=ReportConfig(to=["tensorboard"])
    )
    trainer.add_job("sql", dataset(1, 8))
    with pytest.raises(ConfigError, match=r"tensorboardX: pip install 'lorafusion-jax\[tensor"):
        trainer.fit()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="wandb needs the package wandb: pip install wandb"):
        sinks.check_sinks(["wandb"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_of_a_real_run_hold_its_metrics(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    trainer = lf.MultiTrainer(
        tiny_base(),
        output=tmp_path / "run",
        batching=BatchingConfig(tokens_per_microbatch=64, tile=TILE),
        report=ReportConfig(every=1, to=["tensorboard"]),
    )
    length = TrainConfig(max_steps=3, global_batch_size=4)
    for name in ("a", "b"):
        data = dataset(1, 12)
        split = EvalConfig(split=2, every=3)
        lora = lf.LoraConfig(r=4, alpha=8.0)
        trainer.add_job(name, data, lora=lora, train=length, eval=split, save=SaveConfig(every=9))
    results = trainer.fit()
    for name in ("a", "b"):
        (path,) = (tmp_path / "run" / "tensorboard" / name).iterdir()
        values = {
            (v.tag, event.step): v.simple_value
            for event in map(Event.FromString, records(path.read_bytes()))
            for v in event.summary.value
        }
        for line in results[name].history:
            key = "loss" if line["loss"] is not None else "eval_loss"
            assert values[key, line["step"]] == pytest.approx(line[key], rel=1e-6)
        assert {tag for tag, _ in values} >= {"loss", "lr", "grad_norm", "tokens", "exact_match"}


def records(content: bytes) -> list[bytes]:
    """The records of a TFRecord file: length, its checksum, content, its checksum."""
    found, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        found.append(content[at + 12 : at + 12 + size])
        at += 16 + size
    return found
