"""Whole runs on a tiny model: what they write, replay, resume, joins, policies."""

import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorafusion_jax as lf
from lorafusion_jax.config import BatchingConfig, EvalConfig, ReportConfig, SaveConfig, TrainConfig
from lorafusion_jax.errors import CheckpointError, ConfigError, NonFiniteError, RunLockedError
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.train import events, loop
from lorafusion_jax.train.checkpoint import Checkpoints, tree_hash
from lorafusion_jax.train.lock import run_lock
from lorafusion_jax.train.signals import StoppedError
from lorafusion_sched import from_json
from tests.tolerance import assert_bit_equal
from tests.train.tiny import TILE, dataset, frozen_leaves, tiny_base

pytestmark = pytest.mark.usefixtures("shared_programs")

DATA = {"sql": dataset(1, 30), "emoji": dataset(2, 26, 4, 9), "late": dataset(3, 20)}
JOBS = {
    "sql": {
        "lora": lf.LoraConfig(r=8, dropout=0.1),
        "optim": lf.AdamW(lr=1e-2, weight_decay=0.1),
        "train": TrainConfig(epochs=1, global_batch_size=5),
    },
    "emoji": {
        "lora": lf.LoraConfig(r=2, alpha=4, target_modules=("q_proj", "down_proj")),
        "optim": lf.Adam(lr=2e-2, schedule="linear"),
        "train": TrainConfig(max_steps=8, global_batch_size=4),
    },
    "late": {
        "lora": lf.LoraConfig(r=4, use_rslora=True),
        "optim": lf.AdamW(lr=1e-2),
        "train": TrainConfig(epochs=1, global_batch_size=6),
    },
}
EVAL, SAVE = EvalConfig(split=6, every=2), SaveConfig(every=3, keep_last=2)


def trainer(
    output, names=("sql", "emoji"), listener=None, data=DATA, seed=0, slots=None, **changes
):
    made = lf.MultiTrainer(
        tiny_base(),
        output=output,
        seed=seed,
        slots=slots,
        batching=BatchingConfig(tokens_per_microbatch=64, tile=TILE),
        report=ReportConfig(every=1),
        listener=listener,
    )
    for name in names:
        settings = {"eval": EVAL, "save": SAVE} | JOBS[name] | changes.get(name, {})
        made.add_job(name, data[name], **settings)
    return made


def final_state(output: Path) -> str:
    """Hash of the newest checkpoint's arrays."""
    restored = Checkpoints(output / "checkpoints").restore()
    return tree_hash(restored.leaves)


def metrics(output: Path) -> list:
    """All lines of all jobs without their times."""
    folder = lf.open_run(output)
    lines = [(name, line) for name in folder.jobs for line in folder.metrics(name)]
    return [(name, {k: v for k, v in line.items() if k != "time"}) for name, line in lines]


def stop_after(microbatches: int):
    """A listener that sends SIGTERM once so many microbatches are done."""
    seen = 0

    def listen(event):
        nonlocal seen
        if isinstance(event, events.MicrobatchDone):
            seen += 1
            if seen == microbatches:
                os.kill(os.getpid(), signal.SIGTERM)

    return listen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, its results and its events."""
    output, seen = tmp_path_factory.mktemp("whole") / "run", []
    before = frozen_leaves(tiny_base())
    results = trainer(output, listener=seen.append).fit()
    assert_bit_equal(frozen_leaves(tiny_base()), before)
    return output, results, seen


def test_the_folder_holds_what_the_layout_says(whole):
    output, _, _ = whole
    names = {path.name for path in output.iterdir()} - {".lock"}
    assert names == {
        "checkpoints",
        "config.resolved.yaml",
        "environment.json",
        "events.jsonl",
        "jobs",
        "plan.json",
        "status.json",
        "summary.md",
        "train.log",
    }
    for name in ("sql", "emoji"):
        job = {path.name for path in (output / "jobs" / name).iterdir()}
        assert job == {"metrics.jsonl", "adapter", "adapter_last"}
    assert "| sql | 8 | 5 |" in (output / "summary.md").read_text()
    assert lf.open_run(output).config.jobs[1].lora.r == 2


def test_results_tell_how_it_went(whole):
    _, results, _ = whole
    assert list(results) == ["sql", "emoji"]
    sql = results["sql"]
    assert (sql.status, sql.steps, sql.rejected) == ("done", 5, 0)
    evaluated = [line["eval_loss"] for line in sql.history if line["eval_loss"] is not None]
    assert evaluated[0] == sql.base_eval_loss and evaluated[-1] == sql.eval_loss
    assert sql.best_eval_loss == min(evaluated[1:])
    assert len(evaluated) == 4  # the base, steps 2 and 4, the end
    steps = [line["step"] for line in sql.history if line["eval_loss"] is None]
    assert steps == [1, 2, 3, 4, 5]
    assert results["emoji"].steps == 8


def test_adapters_are_peft_folders(whole, tmp_path):
    output, results, _ = whole
    loaded = load_peft(results["emoji"].adapter.save_peft(tmp_path / "copy"), tiny_base().model)
    assert loaded.spec.r == 2
    assert {path.rpartition(".")[2] for path in loaded.adapter} == {"q_proj", "down_proj"}
    last = load_peft(output / "jobs" / "sql" / "adapter_last", tiny_base().model)
    assert all(np.abs(b).max() > 0 for _, b in last.adapter.values())
    with pytest.raises(lf.errors.AdapterError, match="not empty"):
        results["sql"].adapter.save_peft(tmp_path / "copy")


def test_events_come_in_order(whole):
    _, _, seen = whole
    kinds = [type(event).__name__ for event in seen]
    assert kinds[0] == "RunPlanned" and kinds[-1] == "RunEnded"
    planned = seen[0]
    assert [job.steps for job in planned.jobs] == [5, 8]
    assert planned.padding < planned.padding_alone
    first_step = kinds.index("StepDone")
    bases = [i for i, e in enumerate(seen) if isinstance(e, events.Evaluated) and e.step == 0]
    assert len(bases) == 2 and max(bases) < first_step
    assert kinds.count("MicrobatchDone") == planned.microbatches
    assert {e.job for e in seen if isinstance(e, events.JobEnded)} == {"sql", "emoji"}


def test_two_runs_have_the_same_bits(whole, tmp_path):
    output, results, _ = whole
    again = trainer(tmp_path / "run").fit()
    assert final_state(tmp_path / "run") == final_state(output)
    assert metrics(tmp_path / "run") == metrics(output)
    for name in results:
        for which in ("adapter", "last_adapter"):
            old, new = getattr(results[name], which).path, getattr(again[name], which).path
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                assert (old / file).read_bytes() == (new / file).read_bytes()


def test_another_seed_has_other_bits(whole, tmp_path):
    trainer(tmp_path / "run", seed=1).fit()
    assert final_state(tmp_path / "run") != final_state(whole[0])


@pytest.mark.parametrize(
    "stop", [2, 4, 7, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3, 5, 6, 8, 9, 10))]
)
@pytest.mark.scenario("B2", "B3")
def test_stopped_anywhere_and_resumed_has_the_same_bits(whole, tmp_path, stop):
    output = tmp_path / "run"
    with pytest.raises(StoppedError, match="the same command goes on") as error:
        trainer(output, listener=stop_after(stop)).fit()
    assert error.value.exit_code == 128 + signal.SIGTERM
    plan = from_json((output / "plan.json").read_text())
    assert stop <= max(Checkpoints(output / "checkpoints").steps()) < len(plan.microbatches)
    results = trainer(output).fit()
    assert final_state(output) == final_state(whole[0])
    assert metrics(output) == metrics(whole[0])
    assert results["sql"].best_eval_loss == whole[1]["sql"].best_eval_loss


@pytest.mark.scenario("B3")
def test_some_of_these_stops_were_inside_a_global_batch(whole):
    plan = from_json((whole[0] / "plan.json").read_text())
    assert any(not stretch.ends for stretch in plan.microbatches[3].stretches)


@pytest.mark.scenario("B2", "B3")
def test_a_lost_accumulator_would_be_seen(whole, tmp_path, monkeypatch):
    """The negative control of resuming inside a global batch."""
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(output, listener=stop_after(4)).fit()
    real = loop.Run.__post_init__

    def forgetful(run):
        real(run)
        run.state = run.state._replace(grads=jax.tree.map(jnp.zeros_like, run.state.grads))

    monkeypatch.setattr(loop.Run, "__post_init__", forgetful)
    trainer(output).fit()
    assert final_state(output) != final_state(whole[0])


@pytest.mark.scenario("G6")
def test_a_killed_run_redoes_what_was_not_saved(whole, tmp_path):
    """No clean stop: the listener dies, as a killed process would, between checkpoints."""
    output = tmp_path / "run"

    class Killed(BaseException):
        pass

    def die(event):
        if isinstance(event, events.StepDone) and (event.job, event.step) == ("emoji", 5):
            raise Killed

    with pytest.raises(Killed):
        trainer(output, listener=die).fit()
    with open(output / "jobs" / "sql" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "cut')
    trainer(output).fit()
    assert final_state(output) == final_state(whole[0])
    assert metrics(output) == metrics(whole[0])


def test_only_the_dispatching_thread_allocates_on_the_device(tmp_path, monkeypatch):
    """On an H100 an 8B model ran out of memory, with 56 GiB free, where the packing thread did."""
    put, threads = jax.device_put, []

    def spy(*args, **kwargs):
        threads.append(threading.current_thread())
        return put(*args, **kwargs)

    monkeypatch.setattr(jax, "device_put", spy)
    packed, pack = [], loop.Run._pack

    def keep(run, want):
        packed.append(pack(run, want))
        return packed[-1]

    monkeypatch.setattr(loop.Run, "_pack", keep)
    trainer(tmp_path / "out").fit()
    assert threads and set(threads) == {threading.main_thread()}
    assert packed and not any(isinstance(x, jax.Array) for x in jax.tree.leaves(packed))


def test_a_finished_run_is_left_alone(whole):
    output, results, _ = whole
    before = final_state(output)
    again = trainer(output).fit()
    assert final_state(output) == before
    assert again["sql"].best_eval_loss == results["sql"].best_eval_loss


def test_never_starts_over(tmp_path, whole):
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(output, seed=3, listener=stop_after(2)).fit()
    (output / "notes.txt").write_text("mine")
    said: list[events.Event] = []
    trainer(output, listener=said.append).fit(resume="never")
    assert f"--resume never: removed the run that was in {output}" in {
        event.message for event in said if isinstance(event, events.Notice)
    }
    assert final_state(output) == final_state(whole[0])
    assert (output / "notes.txt").read_text() == "mine"


def test_going_on_in_another_folder(tmp_path, whole):
    with pytest.raises(StoppedError):
        trainer(tmp_path / "a", listener=stop_after(4)).fit()
    trainer(tmp_path / "b").fit(resume=str(tmp_path / "a"))
    assert final_state(tmp_path / "b") == final_state(whole[0])
    assert metrics(tmp_path / "b") == metrics(whole[0])
    with pytest.raises(ConfigError, match="expected auto, never"):
        trainer(tmp_path / "c").fit(resume=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "change, key",
    [
        ({"sql": {"lora": lf.LoraConfig(r=4, dropout=0.1)}}, "jobs.sql.lora.r: 8 -> 4"),
        ({"emoji": {"optim": lf.Adam(lr=1.0, schedule="linear")}}, "jobs.emoji.optim.lr"),
        ({"names": ("sql",)}, "jobs.emoji: 'present' -> nothing"),
        ({"data": DATA | {"sql": dataset(8, 30)}}, "jobs.sql.data"),
        ({"seed": 1}, "seed: 0 -> 1"),
    ],
)
@pytest.mark.scenario("A9")
def test_a_changed_run_is_refused_with_a_diff(whole, change, key):
    before = final_state(whole[0])
    with pytest.raises(ConfigError, match=r"not the run") as error:
        trainer(whole[0], **change).fit()
    assert key in str(error.value)
    assert final_state(whole[0]) == before


@pytest.mark.scenario("A9")
def test_how_often_to_save_may_change(tmp_path, whole):
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(output, listener=stop_after(4)).fit()
    trainer(output, sql={"save": SaveConfig(every=1)}).fit()
    assert final_state(output) == final_state(whole[0])


def test_a_job_joins_and_leaves_the_others_alone(tmp_path, whole):
    output, seen = tmp_path / "run", []
    with pytest.raises(StoppedError):
        trainer(output, listener=stop_after(4)).fit()
    results = trainer(output, ("sql", "emoji", "late"), listener=seen.append).fit()
    assert any(isinstance(e, events.Notice) and e.message == "late joins" for e in seen)
    assert [results[name].steps for name in results] == [5, 8, 3]
    assert load_peft(results["late"].adapter.path, tiny_base().model).spec.use_rslora
    # Other neighbours, other shapes: close, not equal.
    for name in ("sql", "emoji"):
        assert results[name].eval_loss == pytest.approx(whole[1][name].eval_loss, rel=1e-3)


def test_fewer_slots_than_jobs(tmp_path):
    names, seen = ("sql", "emoji", "late"), []
    results = trainer(tmp_path / "two", names, listener=seen.append, slots=2).fit()
    assert seen[0].slots == 2
    kinds = [(type(e).__name__, getattr(e, "job", None)) for e in seen]
    assert kinds.index(("JobEnded", "sql")) < kinds.index(("StepDone", "late"))
    # In the slot of another job, but not in its traces.
    side_by_side = trainer(tmp_path / "three", names).fit()
    for name in names:
        assert results[name].eval_loss == pytest.approx(side_by_side[name].eval_loss, rel=1e-3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's tasks
@pytest.mark.scenario("A3")
def test_a_damaged_checkpoint_is_named_and_an_older_one_used(whole, tmp_path):
    output, seen = tmp_path / "run", []
    with pytest.raises(StoppedError):
        trainer(output, listener=stop_after(8)).fit()
    steps = Checkpoints(output / "checkpoints").steps()
    assert len(steps) >= 2
    largest = max(
        (output / "checkpoints" / str(steps[-1])).rglob("*"), key=lambda p: p.stat().st_size
    )
    content = bytearray(largest.read_bytes())
    middle = slice(len(content) // 3, 2 * len(content) // 3)  # one bit may hit an unused byte
    content[middle] = bytes(255 - byte for byte in content[middle])
    largest.write_bytes(content)
    trainer(output, listener=seen.append).fit()
    notices = [e.message for e in seen if isinstance(e, events.Notice)]
    assert any(f"checkpoints/{steps[-1]}" in message for message in notices)
    assert final_state(output) == final_state(whole[0])


def test_no_usable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(output, listener=stop_after(2)).fit()
    for path in (output / "checkpoints").rglob("_CHECKPOINT_METADATA"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        trainer(output).fit()


@pytest.mark.scenario("A8")
def test_one_trainer_per_folder(tmp_path):
    with run_lock(tmp_path), pytest.raises(RunLockedError, match=f"pid {os.getpid()}"):
        trainer(tmp_path).fit()


def poisoned(monkeypatch, job: str, batch: int) -> None:
    """Makes the loss of one global batch of a job infinite."""
    real = loop.Run._pack

    def pack(run, want):
        packed = real(run, want)
        slot = run.schedule.slot[job]
        for stretch in run.schedule.plan.microbatches[want.index].stretches:
            if stretch.job == job and stretch.batch == batch:
                mine = np.repeat(packed.tile_adapter == slot, TILE) & (packed.loss_weight > 0)
                weight = np.where(mine, np.float32(np.inf), packed.loss_weight)
                packed = packed._replace(loss_weight=weight)
        return packed

    monkeypatch.setattr(loop.Run, "_pack", pack)


@pytest.mark.parametrize("policy", ["skip", "freeze"])
@pytest.mark.scenario("C3")
def test_a_non_finite_batch_is_rejected_reported_and_alone(tmp_path, whole, monkeypatch, policy):
    poisoned(monkeypatch, "sql", 1)
    seen, settings = [], TrainConfig(epochs=1, global_batch_size=5, on_nonfinite=policy)
    results = trainer(tmp_path / "run", listener=seen.append, sql={"train": settings}).fit()
    assert (results["sql"].rejected, results["emoji"].rejected) == (1, 0)
    assert results["sql"].status == ("done" if policy == "skip" else "frozen")
    assert any(isinstance(e, events.Notice) and "sql: step 2 rejected" in e.message for e in seen)
    clean, dirty = (x["emoji"].last_adapter.path for x in (whole[1], results))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (clean / file).read_bytes() == (dirty / file).read_bytes()
    rejected = [line for line in results["sql"].history if line.get("applied") is False]
    assert [line["step"] for line in rejected] == [2] and rejected[0]["loss"] is None


@pytest.mark.scenario("C3")
def test_stop_saves_everything_and_goes_on_after_the_rejected_batch(tmp_path, monkeypatch):
    poisoned(monkeypatch, "sql", 1)
    settings = TrainConfig(epochs=1, global_batch_size=5, on_nonfinite="stop")
    with pytest.raises(NonFiniteError, match="sql: step 2 rejected") as error:
        trainer(tmp_path / "run", sql={"train": settings}).fit()
    assert error.value.exit_code == 4
    results = trainer(tmp_path / "run", sql={"train": settings}).fit()
    assert results["sql"].rejected == 1 and results["sql"].steps == 5


@pytest.mark.scenario("C3")
def test_a_signal_does_not_hide_that_a_policy_stops_the_run(tmp_path, whole, monkeypatch):
    """The bad batch is under way when the signal comes; its outcome is known after the save."""
    poisoned(monkeypatch, "sql", 1)
    plan = from_json((whole[0] / "plan.json").read_text())
    ends = [
        index
        for index, microbatch in enumerate(plan.microbatches)
        for s in microbatch.stretches
        if s.job == "sql" and s.batch == 1 and s.ends
    ]
    settings = {
        "train": TrainConfig(epochs=1, global_batch_size=5, on_nonfinite="stop"),
        "eval": EvalConfig(split=6, every=100),
        "save": SaveConfig(every=100),
    }
    quiet = {"eval": EvalConfig(split=6, every=100), "save": SaveConfig(every=100)}
    with pytest.raises(NonFiniteError, match="sql: step 2 rejected"):
        trainer(tmp_path / "run", listener=stop_after(ends[0]), sql=settings, emoji=quiet).fit()
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [ends[0] + 2]


def test_a_bad_job_is_refused_before_anything_is_written(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(lf.errors.LoraFusionError):
        made = trainer(tmp_path / "run")
        made.add_job("bad", rows)  # this base has no tokenizer
        made.fit()
    with pytest.raises(ConfigError, match="name"):
        trainer(tmp_path / "run").add_job("../x", DATA["sql"])
    with pytest.raises(ConfigError, match="at least 1"):
        trainer(tmp_path / "run", ()).fit()
    assert not (tmp_path / "run").exists()


def test_results_print_as_a_line_for_each_job(whole):
    output, results, _ = whole
    first, *lines = repr(results).splitlines()
    assert str(output) in first and len(lines) == len(results)
    assert all(
        f"{name}: done after {job.steps} steps" in repr(results) for name, job in results.items()
    )
