import contextlib
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from lorafusion_jax.errors import CheckpointError, ConfigError, ResourceError, RunLockedError
from lorafusion_jax.train import checkpoint, manifest
from lorafusion_jax.train.background import BackgroundSaver
from lorafusion_jax.train.checkpoint import (
    Checkpoints,
    leaves_of,
    tree_hash,
    unflatten_like,
)
from lorafusion_jax.train.lock import run_lock
from tests.tolerance import assert_bit_equal


def state(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "bank": {"model.layers.0.q_proj": rng.normal(size=(2, 4, 96)).astype(np.float32)},
        "count": np.arange(3, dtype=np.int32) + seed,
        "frozen": np.array([True, False, False]),
        "nan": np.array([np.nan, -0.0], np.float32),
    }


# 2026-11: orbax 0.12.8 drops coroutines and tasks of its own when it meets a damaged file.
orbax_leaves_tasks = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROGRESS = {"cursor": 3, "jobs": {"sql": {"best_loss": 0.1, "name": "größer"}}, "none": None}


@pytest.fixture
def messages():
    return []


@pytest.fixture
def checkpoints(tmp_path, messages):
    store = Checkpoints(tmp_path / "checkpoints", keep_last=2, say=messages.append)
    store.prepare()
    for step in (1, 2):
        store.save(step, state(step), PROGRESS | {"cursor": step})
    return store


def test_restores_the_newest_bit_by_bit(checkpoints):
    restored = checkpoints.restore()
    assert restored.step == 2
    assert_bit_equal(unflatten_like(state(0), restored.leaves), state(2))
    assert restored.progress == PROGRESS | {"cursor": 2}


def test_restores_a_given_step(checkpoints):
    assert_bit_equal(checkpoints.restore(1).leaves, leaves_of(state(1)))


def test_there_may_be_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "none").restore() is None


def files_of(checkpoints, tmp_path, step):
    return sorted(p for p in (tmp_path / "checkpoints" / str(step)).rglob("*") if p.is_file())


@orbax_leaves_tasks
@pytest.mark.scenario("A3")
def test_a_flipped_bit_anywhere_is_noticed_or_harmless(checkpoints, messages, tmp_path, rng):
    step, spare = tmp_path / "checkpoints" / "2", tmp_path / "spare"
    shutil.copytree(step, spare)
    fallbacks = 0
    files = [path for path in files_of(checkpoints, tmp_path, 2) if path.stat().st_size]
    for path in files:
        for _ in range(-(-50 // len(files))):
            content = bytearray(path.read_bytes())
            position = int(rng.integers(len(content) * 8))
            content[position // 8] ^= 1 << position % 8
            path.write_bytes(content)
            restored = checkpoints.restore()
            expected = state(restored.step)
            assert_bit_equal(restored.leaves, leaves_of(expected))
            assert restored.progress["cursor"] == restored.step
            fallbacks += restored.step == 1
            shutil.rmtree(step)
            shutil.copytree(spare, step)
    assert fallbacks >= 5
    assert len(messages) == fallbacks
    assert all(str(step) in message for message in messages)


@orbax_leaves_tasks
@pytest.mark.scenario("A3")
def test_without_hashes_a_flipped_bit_comes_back_silently(monkeypatch, tmp_path):
    """The negative control of the test above."""
    for module in (checkpoint, manifest):
        monkeypatch.setattr(module, "describe", lambda x: ["", str(x.dtype), list(x.shape)])
    store = Checkpoints(tmp_path)
    store.save(1, state(1), PROGRESS)
    largest = max(tmp_path.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    silent = 0
    for position in range(0, len(content), len(content) // 8):
        flipped = bytearray(content)
        flipped[position] ^= 16
        largest.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            restored, saved = store.restore().leaves, leaves_of(state(1))
            silent += any(restored[k].tobytes() != saved[k].tobytes() for k in saved)
    assert silent


@orbax_leaves_tasks
@pytest.mark.parametrize("damage", ["truncate", "empty", "delete"])
@pytest.mark.scenario("A4")
def test_a_damaged_file_falls_back(checkpoints, messages, tmp_path, damage):
    step, spare = tmp_path / "checkpoints" / "2", tmp_path / "spare"
    shutil.copytree(step, spare)
    fallbacks = 0
    for path in files_of(checkpoints, tmp_path, 2):
        content = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2 if damage == "truncate" else 0])
        restored = checkpoints.restore()
        assert_bit_equal(restored.leaves, leaves_of(state(restored.step)))
        fallbacks += restored.step == 1
        shutil.rmtree(step)
        shutil.copytree(spare, step)
    assert fallbacks >= 3


@orbax_leaves_tasks
@pytest.mark.scenario("A4")
def test_nothing_usable_is_an_error_that_names_all(checkpoints, tmp_path):
    for step in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "state")
    with pytest.raises(CheckpointError, match=r"(?s)no usable checkpoint.*/2.*/1"):
        checkpoints.restore()


def test_another_dtype_is_refused(checkpoints, monkeypatch):
    real = checkpoint.checked_record

    def widened(saved):
        record = real(saved)
        digest, _, shape = record["leaves"]["count"]
        record["leaves"]["count"] = [digest, "float32", shape]
        return record

    monkeypatch.setattr(checkpoint, "checked_record", widened)
    with pytest.raises(CheckpointError, match="count"):
        checkpoints.restore()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree | {"count": tree["count"].astype(np.int64)}, "count: got int32"),
        (lambda tree: tree | {"count": tree["count"][:2]}, "count: got int32"),
        (lambda tree: tree | {"more": tree["count"]}, "more: missing"),
        (lambda tree: {k: v for k, v in tree.items() if k != "count"}, "count: unexpected"),
    ],
)
def test_another_tree_is_refused(checkpoints, change, message):
    with pytest.raises(CheckpointError, match=message):
        unflatten_like(change(state(2)), checkpoints.restore().leaves)


@orbax_leaves_tasks
@pytest.mark.scenario("A4")
def test_what_is_no_checkpoint_is_never_taken_for_one(checkpoints, messages, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "3").write_text("a file")
    (folder / "4").mkdir()
    (folder / "4" / "notes.txt").write_text("mine")
    shutil.copytree(folder / "2", folder / "5")
    (folder / "5" / "_CHECKPOINT_METADATA").unlink()  # holds our manifest
    (folder / "2" / "foreign.bin").write_bytes(b"x")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state" / "more")
    assert checkpoints.steps() == [1, 2, 4, 5]
    assert_bit_equal(checkpoints.restore().leaves, leaves_of(state(2)))
    assert [str(folder / step) in m for step, m in zip("54", messages, strict=True)] == [True] * 2


@pytest.mark.scenario("A4")
def test_another_steps_arrays_are_not_taken_for_its_own(checkpoints, tmp_path):
    """Whole files of orbax, in the wrong place."""
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    assert checkpoints.restore().step == 1


@pytest.mark.scenario("A11")
@pytest.mark.parametrize("step", [1, 2])
def test_an_existing_or_older_step_is_never_replaced(checkpoints, step):
    with pytest.raises(CheckpointError, match=rf"/{step} was not written: expected a step above 2"):
        checkpoints.save(step, state(7), PROGRESS)
    assert_bit_equal(checkpoints.restore().leaves, leaves_of(state(2)))


@pytest.mark.scenario("A11")
def test_saves_in_the_background_back_to_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    done = []
    with BackgroundSaver(checkpoints) as saver:
        for step in range(30):
            changing = state(step)
            done += saver.save(step, changing, {"cursor": step}, None)
            changing["count"] += 1000  # what is saved is what was there at the call
            assert saver.has(step)
        done += saver.wait()
    assert [save.step for save in done] == list(range(30))
    assert all(0 <= save.blocked and 0 < save.seconds for save in done)
    for step in checkpoints.steps():
        assert_bit_equal(checkpoints.load(step).leaves, leaves_of(state(step)))
    assert checkpoints.steps() == [27, 28, 29]


@pytest.mark.scenario("A6", "A11")
def test_what_fails_in_the_background_is_raised_by_the_next_call(checkpoints, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables", full)
    for ask in (BackgroundSaver.wait, lambda saver: saver.save(4, state(4), {}, None)):
        with BackgroundSaver(checkpoints) as saver:
            saver.save(3, state(3), PROGRESS, None)
            with pytest.raises(ResourceError, match="disk is full"):
                ask(saver)
    with pytest.raises(ResourceError), BackgroundSaver(checkpoints) as saver:
        saver.save(3, state(3), PROGRESS, None)  # nobody asks: leaving does
    assert checkpoints.restore().step == 2


@pytest.mark.scenario("A10")
def test_old_steps_go_when_a_newer_one_is_verified(checkpoints):
    checkpoints.save(3, state(3), PROGRESS)
    assert checkpoints.steps() == [2, 3]


@pytest.mark.scenario("A10")
def test_nothing_goes_when_the_newer_one_does_not_verify(checkpoints, monkeypatch):
    def refuse(path, step):
        raise CheckpointError("reads back differently")

    monkeypatch.setattr(checkpoints, "_load", refuse)
    with pytest.raises(CheckpointError, match="reads back"):
        checkpoints.save(3, state(3), PROGRESS)
    assert checkpoints.steps() == [1, 2]


def test_leftovers_are_swept_and_never_taken_for_steps(checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    (folder / "3.orbax-checkpoint-tmp" / "file").touch()
    (folder / "notes.txt").touch()
    assert checkpoints.steps() == [1, 2]
    assert sorted(checkpoints.sweep()) == ["3.orbax-checkpoint-tmp", "notes.txt"]
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.mark.scenario("A6")
@pytest.mark.parametrize(
    "error", [OSError(28, "x"), OSError(122, "x"), ValueError("a No space left")]
)
def test_a_full_disk_is_explained(checkpoints, monkeypatch, tmp_path, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables", full)
    with pytest.raises(
        ResourceError, match=r"disk is full.*earlier checkpoints are intact"
    ) as told:
        checkpoints.save(3, state(3), PROGRESS)
    needed = sum(leaf.nbytes for leaf in leaves_of(state(3)).values())
    assert f"of {needed} bytes" in str(told.value) and str(tmp_path) in str(told.value)
    assert told.value.exit_code == 5
    assert checkpoints.restore().step == 2


@pytest.mark.scenario("A7")
def test_a_folder_that_has_vanished_is_not_made_again(checkpoints, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="has vanished"):
        checkpoints.save(3, state(3), PROGRESS)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.scenario("A7")
def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"file/run cannot be written"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pass

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match="Permission denied"), run_lock(tmp_path):
        pass


@pytest.mark.scenario("A7")
def test_a_read_only_folder_is_named_when_saving(checkpoints, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables", refuse)
    with pytest.raises(CheckpointError, match=rf"written to {tmp_path}.*Permission denied"):
        checkpoints.save(3, state(3), PROGRESS)


def test_hash_sees_names_dtypes_shapes_and_bits():
    base = state(1)
    changed = [
        base | {"count": base["count"].astype(np.int64)},
        base | {"count": base["count"][None]},
        base | {"nan": np.array([np.nan, 0.0], np.float32)},
        {"bank": base["bank"], "counts": base["count"]},
    ]
    hashes = [tree_hash(tree) for tree in (base, *changed)]
    assert len(set(hashes)) == 5
    assert tree_hash(state(1)) == hashes[0]


HOLD = """
import sys, time
from pathlib import Path
from lorafusion_jax.train.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.crash
@pytest.mark.scenario("A8")
def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    ) as child:
        assert child.stdout.readline() == "locked\n"
        with (
            pytest.raises(RunLockedError, match=f"in use by pid {child.pid} on "),
            run_lock(tmp_path),
        ):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
    with run_lock(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / ".lock").read_text()
