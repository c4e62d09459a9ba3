"""What only a GPU can show: replay with our kernels, also beside other work, and a full device.

Run by `make scoreboard-gpu`, which writes docs/results/<device>/reliability.json.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.lora import linear
from lorafusion_jax.train import events, programs, stored
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.signals import StoppedError
from pallas_kernels import tables
from pallas_kernels.lora import mosaic_gpu
from tests.kernels.oracle import make_problem, run
from tests.reliability.gpu_run import RANKS, trainer, wide_base
from tests.tolerance import assert_bit_equal
from tests.train.conftest import _compile_once
from tests.train.test_trainer import final_state, metrics, stop_after
from tests.train.tiny import frozen_leaves

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]


def child(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Starts a module of the tests in a process of its own."""
    paths = [str(ROOT), str(ROOT / "sched"), *filter(None, sys.path)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **variables,
    }
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def base():
    return wide_base()


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Compiles once: a layer of Mosaic kernels takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_compile", _compile_once)
        yield


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The same run in another process, which works while this one does."""
    output = tmp_path_factory.mktemp("elsewhere") / "run"
    process = child("tests.reliability.gpu_run", output)
    yield output, process
    process.kill()


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory, shared_programs):
    """A run for which only our kernels would do: a fall back to XLA is an error."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fused_multi_lora", "fused_gated_mlp"):
            ours = partial(getattr(linear, name), implementation="mosaic_gpu")
            patch.setattr(linear, name, ours)
        # A program that another test has left on disk would not have asked for them.
        patch.setattr(stored, "_environment", lambda: "only our kernels")
        trainer(base, output).fit()
    return output


@pytest.mark.scenario("B5")
def test_two_processes_have_the_same_bits(elsewhere, whole):
    """Each compiles for itself, and XLA chooses its algorithms anew."""
    output, process = elsewhere
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert final_state(output) == final_state(whole)
    assert metrics(output) == metrics(whole)


@pytest.mark.scenario("B5")
@pytest.mark.parametrize("stop", [3, 11, 20])
def test_three_resumes_have_the_same_bits(base, whole, tmp_path, stop):
    with pytest.raises(StoppedError):
        trainer(base, tmp_path / "run", listener=stop_after(stop)).fit()
    trainer(base, tmp_path / "run").fit()
    assert final_state(tmp_path / "run") == final_state(whole)


@pytest.mark.scenario("B5")
def test_another_seed_would_be_seen(base, whole, tmp_path):
    """The twin."""
    trainer(base, tmp_path / "run", seed=1).fit()
    assert final_state(tmp_path / "run") != final_state(whole)


def exported(output: Path, name: str) -> bytes:
    """The bytes of a job's last adapter."""
    return (output / "jobs" / name / "adapter_last" / "adapter_model.safetensors").read_bytes()


@pytest.mark.scenario("C2", "C9", "G2")
def test_a_neighbours_tokens_the_base_and_the_devices_memory(base, whole, tmp_path):
    """One more run, in which a job has other tokens: that job alone gets another adapter.

    The base model keeps its bits, and the device's memory and arrays stay as many as they were.
    """
    before, used = frozen_leaves(base), []

    def look(event):
        if isinstance(event, events.MicrobatchDone):
            stats = jax.local_devices()[0].memory_stats() or {}
            used.append((stats.get("bytes_in_use", 0), len(jax.live_arrays())))

    trainer(base, tmp_path / "run", other="b", listener=look).fit()
    same = {name: exported(tmp_path / "run", name) == exported(whole, name) for name in RANKS}
    assert same == {"a": True, "b": False, "c": True, "d": True}
    assert_bit_equal(frozen_leaves(base), before)
    half = len(used) // 2
    for early, late in zip(
        *(map(max, zip(*part, strict=True)) for part in (used[:half], used[half:])), strict=True
    ):
        assert late <= 1.02 * early + 8, used


@pytest.mark.scenario("C7")
def test_ranks_beyond_a_jobs_own_stay_zero(whole):
    restored = Checkpoints(whole / "checkpoints").restore()
    assert restored is not None
    stacks = {k: v for k, v in restored.leaves.items() if v.ndim == 3 and v.shape[1] == 64}
    assert len(stacks) > 50
    for name, slot in restored.progress["slots"].items():
        rank = RANKS[name]
        assert all((leaf[slot, rank:] == 0).all() for leaf in stacks.values()), name
        assert all((v[slot, :rank] != 0).any() for k, v in stacks.items() if k.startswith("bank/"))


REPETITIONS = 200


def different_bits(step, repetitions: int) -> int:
    """Counts the elements that differ from the first result, over all repetitions."""
    differ = jax.jit(
        lambda one, other: sum(
            jnp.sum(a != b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
        )
    )
    first = step()
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(first))
    return sum(int(count) for count in [differ(first, step()) for _ in range(repetitions)])


def large_problem():
    tiles = tuple(np.random.default_rng(0).integers(-1, 4, 32))
    return make_problem(
        dtype=jnp.bfloat16, tiles=tiles, tile_rows=128, k=2048, ns=(2048, 512), rank=16,
        rates=(0.1, 0.0, 0.2, 0.1), scales=(1.0,) * 4, padding=(7, 300),
    )  # fmt: skip


@pytest.fixture
def other_work():
    """Another process with which the device's time is shared."""
    process = child("tests.reliability.gpu_load")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line == "busy\n":
            break
    assert said and said[-1] == "busy\n", said
    yield process
    assert process.poll() is None, "it was to last"
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.scenario("B6")
def test_kernels_repeat_their_bits_beside_other_work(other_work):
    p = large_problem()
    step = jax.jit(partial(run, mosaic_gpu))
    assert different_bits(lambda: step(p), REPETITIONS) == 0


@pytest.mark.scenario("B6")
def test_sums_in_the_order_of_arrival_would_be_seen(other_work):
    """The twin: atomic additions do not repeat their bits."""
    p = large_problem()
    with tables.atomic_gradients():
        step = jax.jit(lambda p: run(mosaic_gpu, p))
        assert different_bits(lambda: step(p), REPETITIONS) > 0


@pytest.mark.scenario("G1")
@pytest.mark.parametrize("moment", ["start", "step"])
def test_a_full_device_is_explained_and_the_last_checkpoint_is_intact(
    base, whole, tmp_path, moment
):
    """In a process that may have little of the device, so that nobody else's memory is filled."""
    output = tmp_path / "run"
    with pytest.raises(StoppedError):
        trainer(base, output, listener=stop_after(11)).fit()
    other = child(
        "tests.reliability.gpu_run", output, moment, XLA_PYTHON_CLIENT_MEM_FRACTION="0.03"
    )
    said, _ = other.communicate(timeout=400)
    assert other.returncode == 5, said[-3000:]
    assert "full\n" in said and "out of device memory" in said, said[-3000:]
    assert "tokens_per_microbatch" in said and "the last checkpoint is intact" in said
    if moment == "step":
        assert "was planned to need" in said and "the device has" in said
    trainer(base, output).fit()
    assert final_state(output) == final_state(whole)
