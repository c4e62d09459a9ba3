"""Runs that are killed, stopped, starved of disk and started again end with the same bits.

Real processes and real signals; see `child` for how they are made.
"""

import random
import signal
import time

import numpy as np
import pytest

from lorafusion_jax.train.checkpoint import FAULT_POINTS, Checkpoints, tree_hash
from lorafusion_jax.train.run_folder import RunFolder
from tests.reliability.nursery import nursery

pytestmark = [
    pytest.mark.crash,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def some(values, *quick):
    """All values as parameters, those that are not named here marked as slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with nursery(tmp_path_factory.mktemp("nursery")) as made:
        yield made


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    runs.run(output)
    return output


def final_hash(output) -> str:
    restored = Checkpoints(output / "checkpoints").restore()
    assert restored is not None
    return tree_hash(restored.leaves)


def metrics(output) -> list:
    """All lines of all jobs without their times."""
    folder = RunFolder(output)
    lines = [(name, line) for name in folder.jobs for line in folder.metrics(name)]
    return [(name, {k: v for k, v in line.items() if k != "time"}) for name, line in lines]


def same_end(output, whole) -> None:
    """The run ended as the uninterrupted one, metrics included: no line twice, none missing."""
    assert final_hash(output) == final_hash(whole)
    assert metrics(output) == metrics(whole)
    assert not Checkpoints(output / "checkpoints").leftovers()


@pytest.mark.scenario("A1", "G6")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(runs, whole, tmp_path, kills):
    choice = random.Random(kills)
    output, done, saved = tmp_path / "run", 0, -1
    for number in range(kills):
        child = runs.start(output)
        child.until("RunPlanned")
        start = child.numbers("RunPlanned")[0]
        assert start >= saved, "a reported checkpoint was lost"
        if start + 2 < total(whole):
            child.until("MicrobatchDone", choice.randint(1, 2))
        time.sleep(choice.random() * 0.05)
        child.kill()
        code = child.end()
        assert code in (-signal.SIGKILL, 0), (number, code)
        saved = max([saved, *child.numbers("CheckpointSaved")])
        done = max([done, *child.numbers("MicrobatchDone")])
    runs.run(output)
    same_end(output, whole)


def total(output) -> int:
    """Microbatches of a finished run."""
    return max(Checkpoints(output / "checkpoints").steps())


@pytest.mark.scenario("A1")
def test_a_lost_moment_would_be_seen(whole, tmp_path):
    """The twin: one number of the final state changed by the smallest amount."""
    restored = Checkpoints(whole / "checkpoints").restore()
    leaves = dict(restored.leaves)
    name = next(n for n, x in leaves.items() if n.startswith("opt/moments") and x.any())
    leaves[name] = np.nextafter(leaves[name], np.float32(1))
    assert tree_hash(leaves) != final_hash(whole)


@pytest.mark.scenario("A2")
@pytest.mark.parametrize("point", some(FAULT_POINTS, "written", "pruning"))
def test_death_at_each_point_of_a_save(runs, whole, tmp_path, point):
    output = tmp_path / "run"
    child = runs.start(output, die_at=f"{point}:3", config={"save": {"keep_last": 1}})
    assert child.end() == -signal.SIGKILL
    visible = Checkpoints(output / "checkpoints").steps()
    assert visible
    for step in visible:  # every step that has a name is whole
        Checkpoints(output / "checkpoints").load(step)
    child = runs.run(output, config={"save": {"keep_last": 1}})
    assert child.numbers("RunPlanned") == [visible[-1]]
    same_end(output, whole)


@pytest.mark.scenario("A5")
@pytest.mark.parametrize(
    "moment", some(["Compiling", "MicrobatchDone", "written", "Evaluated"], "written")
)
def test_a_signal_ends_the_step_saves_and_leaves(runs, whole, tmp_path, moment):
    output = tmp_path / "run"
    signum = signal.SIGINT if moment == "Evaluated" else signal.SIGTERM
    child = runs.start(output, slow_at=moment)
    child.until(moment)
    sent = time.monotonic()
    child.kill(signum)
    assert child.end() == 128 + signum
    assert time.monotonic() - sent < 30
    before_the_first = moment in ("Compiling", "Evaluated")  # base models come first
    said = "the same command starts" if before_the_first else "the same command goes on"
    assert any(said in line for line in child.seen), child.seen
    at = max(Checkpoints(output / "checkpoints").steps(), default=0)
    child = runs.run(output)
    assert child.numbers("RunPlanned") == [at]
    same_end(output, whole)


@pytest.mark.slow
@pytest.mark.scenario("A5")
def test_the_second_signal_leaves_at_once_and_the_last_step_is_intact(runs, whole, tmp_path):
    output = tmp_path / "run"
    child = runs.start(output, slow_at="written")
    child.until("CheckpointSaved")
    child.until("written")
    child.kill(signal.SIGTERM)
    time.sleep(0.1)
    child.kill(signal.SIGTERM)
    assert child.end() == 143
    saved = child.numbers("CheckpointSaved")[-1]
    child = runs.run(output)
    assert child.numbers("RunPlanned")[0] >= saved
    same_end(output, whole)


@pytest.mark.scenario("A6")
def test_a_full_disk_leaves_the_earlier_steps_and_the_run_goes_on_later(runs, whole, tmp_path):
    output = tmp_path / "run"
    child = runs.start(output, file_limit=20_000)  # bytes; a checkpoint's files need more
    assert child.end() == 5
    assert "the disk is full" in child.seen[-1] and str(output) in child.seen[-1]
    steps = Checkpoints(output / "checkpoints").steps()
    assert steps
    for step in steps:
        Checkpoints(output / "checkpoints").load(step)
    runs.run(output)
    same_end(output, whole)


@pytest.mark.slow
@pytest.mark.scenario("B1")
def test_two_processes_with_other_hash_seeds_have_the_same_bits(runs, tmp_path):
    outputs = [tmp_path / name for name in "ab"]
    order = {"jobs": 4, "steps": 20, "save_every": 10}
    runs.run(outputs[0], **order)
    (tmp_path / "other").mkdir()
    with nursery(tmp_path / "other", hash_seed=7) as others:
        others.run(outputs[1], **order)
    assert final_hash(outputs[0]) == final_hash(outputs[1])
    assert metrics(outputs[0]) == metrics(outputs[1])
    for path in sorted(outputs[0].glob("jobs/*/adapter*/*")):
        other = outputs[1] / path.relative_to(outputs[0])
        assert path.read_bytes() == other.read_bytes(), path
