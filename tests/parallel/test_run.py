"""Whole runs from `parallel: {data, stage}`: like one device's, replayed, resumed, moved."""

import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest

import lorafusion_jax as lf
from lorafusion_jax.config import (
    BatchingConfig,
    EvalConfig,
    ParallelConfig,
    SaveConfig,
    TrainConfig,
)
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.parallel.run import MeshRun
from lorafusion_jax.parallel.stream import pack_slot
from lorafusion_jax.train import events, prepare
from lorafusion_jax.train.batch import JobRows
from lorafusion_jax.train.checkpoint import Checkpoints, tree_hash
from lorafusion_jax.train.loop import Run
from lorafusion_jax.train.schedule import Schedule
from lorafusion_jax.train.signals import StoppedError
from lorafusion_sched import Job, Microbatch, Plan, Problem, Sample, Stretch
from tests.train.tiny import TILE, dataset, tiny_base

DATA = {"sql": dataset(1, 30), "emoji": dataset(2, 26, 4, 9), "late": dataset(3, 20)}
JOBS = {
    "sql": {
        "lora": lf.LoraConfig(
            r=4,
            dropout=0.1,
            target_modules=("q_proj", "up_proj"),
            rank_pattern={"layers.1.self_attn.q_proj": 2},
        ),
        "optim": lf.AdamW(lr=1e-2, weight_decay=0.1),
        "train": TrainConfig(epochs=1, global_batch_size=5),
    },
    "emoji": {
        "lora": lf.LoraConfig(r=2, alpha=4, target_modules=("q_proj", "down_proj")),
        "optim": lf.AdamW(lr=2e-2, schedule="linear"),
        "train": TrainConfig(max_steps=8, global_batch_size=4),
    },
    "late": {
        "lora": lf.LoraConfig(r=4, target_modules=("q_proj",)),
        "optim": lf.AdamW(lr=1e-2),
        "train": TrainConfig(epochs=1, global_batch_size=6),
    },
}
MESH = (2, 2)
pytestmark = pytest.mark.usefixtures("shared_programs")


def trainer(output, mesh, names=("sql", "emoji", "late"), listener=None, slots=2):
    """Two slots for three jobs: one starts where another has ended."""
    data, stage = mesh
    made = lf.MultiTrainer(
        tiny_base(),
        output=output,
        slots=slots,
        batching=BatchingConfig(tokens_per_microbatch=64, tile=TILE),
        parallel=ParallelConfig(data=data, stage=stage),
        listener=listener,
    )
    for name in names:
        settings = {"eval": EvalConfig(split=6, every=4), "save": SaveConfig(every=3)}
        made.add_job(name, DATA[name], **settings, **JOBS[name])
    return made


def final_state(output) -> str:
    return tree_hash(Checkpoints(output / "checkpoints").restore().leaves)


def losses(results) -> dict:
    return {
        name: [(m["step"], m["loss"], m["eval_loss"]) for m in result.history]
        for name, result in results.items()
    }


def assert_close(results, expected, tolerance=2e-4):
    for name in expected:
        ours, theirs = (
            [(s, lo or 0, ev or 0) for s, lo, ev in losses(x)[name]] for x in (results, expected)
        )
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, err_msg=name)
        adapters = [
            load_peft(x[name].last_adapter.path, tiny_base().model).adapter
            for x in (results, expected)
        ]
        for path, (a, b) in adapters[1].items():
            np.testing.assert_allclose(adapters[0][path][0], a, atol=tolerance)
            np.testing.assert_allclose(adapters[0][path][1], b, atol=tolerance)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("one") / "run", (1, 1)).fit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output, seen = tmp_path_factory.mktemp("whole") / "run", []
    return output, trainer(output, MESH, listener=seen.append).fit(), seen


@pytest.mark.slow
def test_a_resumed_mesh_is_given_the_policies_that_it_chose(whole, tmp_path, monkeypatch):
    output = shutil.copytree(whole[0], tmp_path / "run")
    asked = []

    def plan_stage(step, share, wish, before):
        asked.append((before.policies, before.residuals, share.places))
        raise StoppedError("asked", signal.SIGTERM)

    monkeypatch.setattr(prepare, "plan_stage", plan_stage)
    with pytest.raises(StoppedError, match="asked"):
        trainer(output, MESH).fit()
    [(policies, residuals, places)] = asked
    assert policies == ("none",) * places and residuals == "save"


def test_a_mesh_trains_what_one_device_trains(whole, one_device):
    output, results, seen = whole
    assert {(r.status, r.steps) for r in results.values()} == {("done", n) for n in (3, 5, 8)}
    assert_close(results, one_device)
    with pytest.raises(AssertionError):
        assert_close(results, one_device, tolerance=1e-12)
    steps = [(e.job, e.step) for e in seen if isinstance(e, events.StepDone)]
    assert len(steps) == len(set(steps)) == 16
    assert {p.name for p in (output / "jobs" / "sql").iterdir()} >= {"adapter", "adapter_last"}


def stop_after(updates: int):
    seen = 0

    def listen(event):
        nonlocal seen
        if isinstance(event, events.StepDone):
            seen += 1
            if seen == updates:
                os.kill(os.getpid(), signal.SIGTERM)

    return listen


def test_interrupted_and_resumed_has_the_same_bits(whole, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(output, MESH, listener=stop_after(4)).fit()
    results = trainer(output, MESH).fit()
    assert final_state(output) == final_state(whole[0])
    assert losses(results) == losses(whole[1])


@pytest.mark.slow
def test_a_run_moves_to_other_devices(one_device, tmp_path):
    """From a mesh to one device: the plan stays."""
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(output, MESH, listener=stop_after(4)).fit()
    assert_close(trainer(output, (1, 1)).fit(), one_device)


@pytest.mark.slow
def test_a_run_moves_from_one_device_to_a_mesh(one_device, tmp_path):
    """Its plan has no distance between global batches: empty slots keep it exact."""
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(output, (1, 1), listener=stop_after(3)).fit()
    assert_close(trainer(output, MESH).fit(), one_device)


def test_there_is_room_for_the_padding_of_a_plan_of_several_sizes():
    """A plan that one device began: on a mesh its small microbatches have more padding."""
    batch = tuple(Sample(0, i, 12) for i in range(20))
    stretch = Stretch("job", 0, batch, ends=True)
    problem = Problem(jobs=(Job(name="job", batches=(batch,)),), capacities=(256, 8192), tile=TILE)
    plan = Plan(microbatches=(Microbatch((stretch,), 256),), tile=TILE, distance=1, width=1)
    schedule = Schedule(problem, plan, {"job": 0}, {"job": 0}, {"job": 0}, 1)
    samples = [(np.zeros(12, np.int32), np.ones(12, np.bool_))] * 20

    def packed(kind):
        run = object.__new__(kind)
        run._segments = run._longest = 1
        run._make_room(schedule)
        sizes = {"max_segments": run._segments, "longest": run._longest}
        rows = {"job": JobRows(0, 0, samples, {0: 220})}
        for microbatches in (plan.microbatches, (Microbatch((), 8192),)):
            pack_slot(microbatches, rows, capacity=8192, tile=TILE, num_slots=1, **sizes)

    packed(MeshRun)
    with pytest.raises(AssertionError, match="segments, room for"):
        packed(Run)


def test_a_failure_does_not_hide_what_is_due_with_it():
    """A job that ends in the call in which another one fails is evaluated and exported."""
    delivered = []

    def feed():
        run._fed = 4

    def drain():
        run.cursor = run._fed

    run = SimpleNamespace(
        cursor=0,
        redo_until=0,
        _fed=2,
        _stop=4,
        _feed_slots=feed,
        _drain=drain,
        _deliver=lambda index, stretches: delivered.append((index, stretches)),
        _tell_saved=lambda saves: None,
        _microbatches=tuple(Microbatch((Stretch("a", n, (), True),), 16) for n in range(4)),
        _outcomes=SimpleNamespace(failure=RuntimeError()),
        schedule=SimpleNamespace(plan=SimpleNamespace(width=2)),
        goodput=SimpleNamespace(enter=lambda part: None),
        saver=SimpleNamespace(finished=list),
    )
    assert MeshRun.begun.fget(run)  # a signal now must save, though the cursor has not moved
    MeshRun.run_microbatch(run)
    ((index, stretches),) = delivered
    assert index == 3 and [s.batch for s in stretches] == [2, 3]
    run._stop, delivered[:] = 6, []
    MeshRun.run_microbatch(run)
    assert delivered == [(3, [])]


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ((1, 3), ["3 stages", "2 layers", "nearest", "data=1, stage=2"]),
        ((16, 2), ["32 devices", "there are 8", "data=4, stage=2"]),
    ],
)
def test_a_mesh_that_cannot_work_is_refused(mesh, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        trainer(tmp_path / "run", mesh).fit()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run" / "plan.json").exists()
