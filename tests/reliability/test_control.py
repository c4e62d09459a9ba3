"""Requests to a running process: what they change, what they leave alone, and what is refused."""

import dataclasses
import json
import os
import shutil

import pytest

from lorafusion_jax.cli import main
from lorafusion_jax.config import EvalConfig, SpikeConfig, TrainConfig
from lorafusion_jax.train import control, events, replan
from lorafusion_jax.train import trainer as trainer_module
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.control import Add, Cancel
from lorafusion_jax.train.jobs import resolve_job
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_jax.train.signals import StoppedError
from tests.train.test_trainer import DATA, final_state, metrics, stop_after, trainer
from tests.train.tiny import dataset

pytestmark = pytest.mark.usefixtures("shared_programs", "soon", "late_data")


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(replan, "HEAD_START", 2)


@pytest.fixture
def late_data(monkeypatch):
    """Data of jobs that join, which this base model could not tokenise."""
    real = resolve_job

    def resolve(config, data, *args):
        return real(
            config, DATA[config.name] if isinstance(data, type(config.data)) else data, *args
        )

    monkeypatch.setattr(trainer_module, "resolve_job", resolve)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, trainer(output).fit()


LATE = trainer("unused", ("late",)).config.jobs[0]
ADD = Add(
    jobs=(LATE.model_copy(update={"data": LATE.data.model_copy(update={"path": "late.jsonl"})}),)
)


def asking(output, request, *, after: int = 2, also=lambda event: None):
    """A listener that leaves a request once so many microbatches are done."""
    left = [request]

    def listen(event):
        also(event)
        if isinstance(event, events.MicrobatchDone) and event.index >= after and left:
            control.send(RunFolder(output), left.pop())

    return listen


def weights(output, job: str) -> list[bytes]:
    folders = [output / "jobs" / job / name for name in ("adapter", "adapter_last")]
    return [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]


def requests(output) -> list[str]:
    return os.listdir(output / "control") if (output / "control").exists() else []


@pytest.mark.scenario("C8")
def test_cancelled_and_the_others_keep_every_bit(tmp_path, whole):
    output, seen = tmp_path / "run", []
    results = trainer(output, listener=asking(output, Cancel(job="emoji"), also=seen.append)).fit()
    assert results["emoji"].status == "cancelled" and 0 < results["emoji"].steps < 8
    assert results["emoji"].last_adapter.path.is_dir()
    assert weights(output, "sql") == weights(whole[0], "sql")
    assert not requests(output)
    assert any(
        e.message.startswith("emoji is cancelled") for e in seen if isinstance(e, events.Notice)
    )
    again = trainer(output).fit()  # nothing is left to do, also not of the cancelled job
    assert again["emoji"].steps == results["emoji"].steps


@pytest.mark.scenario("C8")
def test_a_job_joins_and_the_others_keep_every_bit(tmp_path, whole):
    output = tmp_path / "run"
    results = trainer(output, listener=asking(output, ADD)).fit()
    assert (results["late"].status, results["late"].steps) == ("done", 3)
    for job in ("sql", "emoji"):
        assert weights(output, job) == weights(whole[0], job)
    assert [job.name for job in RunFolder(output).config.jobs] == ["sql", "emoji", "late"]
    assert "| late |" in (output / "summary.md").read_text()
    # Stopped with the change half made, and resumed by a user whose configuration lacks the job.
    parts = tmp_path / "parts"
    with pytest.raises(StoppedError):
        trainer(parts, listener=asking(parts, ADD, also=stop_after(5))).fit()
    assert trainer(parts).fit()["late"].steps == 3
    assert final_state(parts) == final_state(output)
    assert metrics(parts) == metrics(output)


@pytest.mark.slow
@pytest.mark.scenario("C8")
def test_packing_the_rest_anew_would_change_bits(tmp_path, whole, monkeypatch):
    """The twin: a job that joins the microbatches of the others."""
    real = replan.Replanner.request
    monkeypatch.setattr(
        replan.Replanner,
        "request",
        lambda *args, **kwargs: real(*args, **kwargs | {"repack": True}),
    )
    output = tmp_path / "run"
    trainer(output, listener=asking(output, ADD)).fit()
    assert [weights(output, job) == weights(whole[0], job) for job in ("sql", "emoji")] != [
        True
    ] * 2


BIG = LATE.model_copy(update={"lora": LATE.lora.model_copy(update={"r": 64})})


@pytest.mark.scenario("C8", "F4")
def test_what_cannot_be_obeyed_is_refused_and_changes_nothing(tmp_path, whole):
    output, seen = tmp_path / "run", []
    box, outside = output / "control", tmp_path / "outside"
    outside.write_text('{"action": "cancel", "job": "sql"}')
    climbing = json.loads(ADD.model_dump_json())
    climbing["jobs"][0]["name"] = "../x"
    contents = {
        "garbage": b"\x00\xff{",
        "nested": b"[" * 100_000,
        "unknown job": b'{"action": "cancel", "job": "nobody"}',
        "unknown action": b'{"action": "run", "job": "sql"}',
        "more keys": b'{"action": "cancel", "job": "sql", "then": 1}',
        "climbing": json.dumps(climbing).encode(),
        "taken": Add(jobs=(trainer("x").config.jobs[0],)).model_dump_json().encode(),
        "no room": Add(jobs=(BIG,)).model_dump_json().encode(),
        "huge": b" " * (control.MAX_BYTES + 1),
    }

    def listen(event):
        seen.append(event)
        if isinstance(event, events.MicrobatchDone) and event.index == 2:
            box.mkdir()
            for name, content in contents.items():
                (box / name).write_bytes(content)
            (box / "link").symlink_to(outside)

    trainer(output, listener=listen).fit()
    notices = [e.message for e in seen if isinstance(e, events.Notice)]
    refused = [message for message in notices if message.startswith("request refused")]
    assert len(refused) == len(contents) + 1
    for words in (
        "'nobody'",
        "in the run already",
        "rank 64, the running process has room",
        "name",
    ):
        assert any(words in message for message in refused), words
    assert not requests(output) and outside.exists()
    assert final_state(output) == final_state(whole[0])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "outside"}


@pytest.mark.scenario("C8")
def test_a_sample_for_which_there_is_no_room_is_refused_and_leaves_no_trace(tmp_path, monkeypatch):
    """Longer than any microbatch of training, or of evaluation; a folder is no request."""
    output, seen = tmp_path / "run", []
    long = dataset(4, 20, 60, 90)
    monkeypatch.setitem(DATA, "late", long)
    held_out = ADD.jobs[0].model_copy(update={"name": "held_out"})
    monkeypatch.setitem(DATA, "held_out", long)
    everything = held_out.model_copy(update={"eval": EvalConfig(split=0)})
    requests_left = [Add(jobs=(everything,)), Add(jobs=(held_out,))]

    def listen(event):
        seen.append(event)
        if isinstance(event, events.MicrobatchDone) and event.index == 2:
            for request in requests_left:
                control.send(RunFolder(output), request)
            (output / "control" / "folder").mkdir()

    results = trainer(output, listener=listen).fit()
    notices = [e.message for e in seen if isinstance(e, events.Notice)]
    refused = [message for message in notices if message.startswith("request refused")]
    assert len(refused) == 2 and "for a held-out sample" in refused[1]
    assert set(results) == {"sql", "emoji"} == set(RunFolder(output).jobs)
    assert requests(output) == ["folder"]
    assert trainer(output).fit().keys() == results.keys()


@pytest.mark.scenario("C8")
def test_a_job_is_cancelled_before_it_has_joined(tmp_path, whole):
    output, seen = tmp_path / "run", []

    def listen(event):
        seen.append(event)
        if isinstance(event, events.MicrobatchDone) and event.index == 2:
            control.send(RunFolder(output), ADD)
            control.send(RunFolder(output), Cancel(job="late"))

    results = trainer(output, listener=listen).fit()
    assert (results["late"].status, results["late"].steps) == ("cancelled", 0)
    for job in ("sql", "emoji"):
        assert weights(output, job) == weights(whole[0], job)
    assert trainer(output).fit()["late"].status == "cancelled"


@pytest.mark.scenario("C8", "G8")
def test_a_job_with_a_spike_guard_joins_a_run_without_one(tmp_path, whole):
    guarded = ADD.jobs[0].train.model_copy(update={"spike": SPIKE})
    request = Add(jobs=(ADD.jobs[0].model_copy(update={"train": guarded}),))
    results = trainer(tmp_path / "run", listener=asking(tmp_path / "run", request)).fit()
    assert (results["late"].status, results["late"].steps) == ("done", 3)
    for job in ("sql", "emoji"):
        assert weights(tmp_path / "run", job) == weights(whole[0], job)


@pytest.mark.scenario("C8")
def test_the_sizes_of_microbatches_are_those_of_the_run_after_a_resume_too(tmp_path):
    """The data of all jobs would fill larger ones than those the run was started with."""
    output = tmp_path / "run"
    emoji = trainer("unused", ("emoji",)).config.jobs[0]
    like = {"lora": emoji.lora, "optim": emoji.optim, "eval": EvalConfig(split=0)}
    request = Add(jobs=(ADD.jobs[0].model_copy(update=like),))
    also = stop_after(4)
    with pytest.raises(StoppedError):
        trainer(output, ("emoji",), listener=asking(output, request, after=1, also=also)).fit()
    sizes = Checkpoints(output / "checkpoints").restore().progress["capacities"]
    assert sizes[-1] < 64
    assert trainer(output, ("emoji",)).fit()["late"].status == "done"
    assert Checkpoints(output / "checkpoints").restore().progress["capacities"] == sizes


def test_the_command_leaves_whole_requests(tmp_path, whole, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    assert main(["jobs", "cancel", str(output), "nobody"]) == 2
    assert main(["jobs", "cancel", str(tmp_path), "sql"]) == 2
    assert "there are: sql, emoji" in capsys.readouterr()[1]
    assert main(["jobs", "cancel", str(output), "sql"]) == 2
    assert "sql has ended already (done)" in capsys.readouterr()[1]
    assert control.waiting(RunFolder(output)) == []
    events = output / "events.jsonl"
    begun = [line for line in events.read_text().splitlines(True) if "JobEnded" not in line]
    events.write_text("".join(begun))
    assert main(["jobs", "cancel", str(output), "sql"]) == 0
    assert "when the run goes on" in capsys.readouterr()[0]
    (path,) = control.waiting(RunFolder(output))
    assert control.read(path) == Cancel(job="sql")


SPIKE = SpikeConfig(window=4, sigmas=6.0, max_consecutive=2)
GUARDED = {"sql": {"train": TrainConfig(max_steps=10, global_batch_size=5, spike=SPIKE)}}


def spiking(monkeypatch, batches: set[int], factor: float = 50.0):
    """Multiplies the loss of some global batches of sql."""
    import numpy as np

    from lorafusion_jax.train import loop

    real = loop.Run._pack

    def pack(run, want):
        packed = real(run, want)
        stretches = run.schedule.plan.microbatches[want.index].stretches
        if any(s.job == "sql" and s.batch in batches for s in stretches):
            mine = np.repeat(packed.tile_adapter == run.schedule.slot["sql"], 16)
            weight = np.where(mine, packed.loss_weight * np.float32(factor), packed.loss_weight)
            packed = packed._replace(loss_weight=weight)
        return packed

    monkeypatch.setattr(loop.Run, "_pack", pack)


@pytest.mark.scenario("G8")
def test_a_spike_is_skipped_alone(tmp_path, monkeypatch):
    calm = trainer(tmp_path / "calm", **GUARDED).fit()
    assert calm["sql"].rejected == 0
    spiking(monkeypatch, {7})
    seen = []
    results = trainer(tmp_path / "run", listener=seen.append, **GUARDED).fit()
    assert (results["sql"].rejected, results["emoji"].rejected) == (1, 0)
    assert results["sql"].status == "done"
    assert weights(tmp_path / "run", "emoji") == weights(tmp_path / "calm", "emoji")
    skipped = [line for line in results["sql"].history if line.get("applied") is False]
    assert [line["step"] for line in skipped] == [8] and skipped[0]["loss"] > 50
    assert any("step 8 skipped" in e.message for e in seen if isinstance(e, events.Notice))
    # The same when stopped and resumed: the losses that decide are part of the checkpoint.
    with pytest.raises(StoppedError):
        trainer(tmp_path / "parts", listener=stop_after(9), **GUARDED).fit()
    trainer(tmp_path / "parts", **GUARDED).fit()
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "run")


@pytest.mark.scenario("G8")
def test_too_many_spikes_stop_the_run_with_everything_saved(tmp_path, monkeypatch):
    from lorafusion_jax.errors import LossSpikeError

    spiking(monkeypatch, {6, 7, 8})
    with pytest.raises(LossSpikeError, match=r"sql: step 8 skipped.*2 in a row.*stopped") as error:
        trainer(tmp_path / "run", **GUARDED).fit()
    assert error.value.exit_code == 4
    lines = RunFolder(tmp_path / "run").metrics("sql")
    assert [x["step"] for x in lines if x.get("applied") is False] == [7, 8]  # flushed before


@pytest.mark.slow
@pytest.mark.scenario("G8")
def test_without_a_guard_a_spike_is_applied(tmp_path, monkeypatch):
    """The twin."""
    spiking(monkeypatch, {7})
    settings = {"train": TrainConfig(max_steps=10, global_batch_size=5)}
    assert trainer(tmp_path / "run", sql=settings).fit()["sql"].rejected == 0


@pytest.mark.scenario("G6")
def test_a_closed_terminal_does_not_stop_training(tmp_path, whole):
    told = []

    def listen(event):
        told.append(event)
        if len(told) == 4:
            raise BrokenPipeError(32, "Broken pipe")

    trainer(tmp_path / "run", listener=listen).fit()
    assert len(told) == 4
    assert final_state(tmp_path / "run") == final_state(whole[0])


@pytest.mark.scenario("G7")
def test_every_second_of_a_run_belongs_to_one_part(tmp_path):
    seen = []
    trainer(tmp_path / "run", listener=seen.append).fit()
    ended = seen[-1]
    assert isinstance(ended, events.RunEnded)
    assert {"start", "compile", "train", "evaluate", "save"} <= set(ended.parts)
    assert sum(ended.parts.values()) == pytest.approx(ended.seconds)
    assert dataclasses.asdict(ended)["parts"] == RunFolder(tmp_path / "run").events()[-1]["parts"]
