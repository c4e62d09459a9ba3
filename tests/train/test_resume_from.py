"""Going on from where the user says: typed errors, whatever lies there and however it is said."""

import json
import os
import shutil
import signal

import pytest

from lorafusion_jax.errors import CheckpointError, ConfigError
from lorafusion_jax.train import drive
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.signals import StoppedError
from lorafusion_jax.train.together import _resume_of_others
from tests.train.test_trainer import final_state, metrics, stop_after, trainer

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its fourth microbatch."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(StoppedError, match=r"after microbatch 4 of .*everything is saved"):
        trainer(output, listener=stop_after(4)).fit()
    return output


def copy_of(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ("checkpoints", "4"),
        pytest.param(".", ".", marks=pytest.mark.slow),
        pytest.param("checkpoints", "..", marks=pytest.mark.slow),
    ],
)
def test_a_relative_path_is_said_from_inside_the_run(stopped, tmp_path, monkeypatch, inside, said):
    source = copy_of(stopped, tmp_path)
    monkeypatch.chdir(source / inside)
    trainer(tmp_path / "next").fit(resume=said)
    trainer(source).fit()
    assert final_state(tmp_path / "next") == final_state(source)
    assert metrics(tmp_path / "next") == metrics(source)


@pytest.mark.parametrize(
    ("inside", "said"), [("checkpoints/4", "."), ("checkpoints", "4"), (".", "."), ("jobs", "..")]
)
def test_other_processes_find_the_step_of_the_first_one(stopped, monkeypatch, inside, said):
    """By the step, as the first process may have passed over a damaged one."""
    monkeypatch.chdir(stopped / inside)
    assert _resume_of_others(stopped, said, 4) == str(stopped / "checkpoints" / "4")
    assert _resume_of_others(stopped, "auto", 4) == str(stopped / "checkpoints" / "4")


def test_a_run_without_its_jobs_and_a_checkpoint_without_its_run(stopped, tmp_path):
    source = copy_of(stopped, tmp_path)
    shutil.rmtree(source / "jobs")
    trainer(tmp_path / "next").fit(resume=str(source))
    shutil.move(source / "checkpoints" / "4", tmp_path / "4")
    trainer(tmp_path / "other").fit(resume=str(tmp_path / "4"))
    assert final_state(tmp_path / "next") == final_state(tmp_path / "other")


@pytest.mark.parametrize("said", ["", "/", "no/such", "checkpoints/²", "jobs", "plan.json"])
def test_what_is_no_run_is_refused(stopped, tmp_path, monkeypatch, said):
    (tmp_path / "checkpoints" / "²").mkdir(parents=True)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "jobs" if said == "" else tmp_path)
    with pytest.raises((ConfigError, CheckpointError)):
        trainer(tmp_path / "next").fit(resume=said)
    assert not (tmp_path / "next" / "jobs").exists()


@pytest.mark.parametrize("added", [(), ("sql",)])
@pytest.mark.scenario("A13")
def test_a_saved_configuration_that_is_none_any_more(stopped, tmp_path, monkeypatch, added):
    """As of a release that knew other settings."""
    source = copy_of(stopped, tmp_path)
    real = Checkpoints.load

    def load(store, step):
        restored = real(store, step)
        config = json.loads(json.dumps(restored.progress["config"]))
        config["train"]["momentum_of_the_moon"] = 1
        return restored._replace(
            progress=restored.progress | {"config": config, "added": list(added)}
        )

    monkeypatch.setattr(Checkpoints, "load", load)
    names = ("sql", "emoji") if not added else ("emoji",)
    with pytest.raises(CheckpointError, match=r"train\.momentum_of_the_moon") as error:
        trainer(source, names).fit()
    assert "--resume never" in str(error.value) and error.value.exit_code == 3


def test_a_signal_before_the_first_microbatch_does_not_speak_of_saving(tmp_path, monkeypatch):
    real = drive.Run.compile_ahead

    def compile_ahead(run):
        real(run)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(drive.Run, "compile_ahead", compile_ahead)
    with pytest.raises(StoppedError, match="before the first microbatch") as error:
        trainer(tmp_path / "run").fit()
    assert error.value.exit_code == 143 and "saved" not in str(error.value)
    assert not Checkpoints(tmp_path / "run" / "checkpoints").steps()
