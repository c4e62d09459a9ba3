"""`train.spike` on a mesh: the step is skipped alone, and a resumed run skips the same."""

import numpy as np
import pytest

from lorafusion_jax.config.schema import SpikeConfig, TrainConfig
from lorafusion_jax.errors import LossSpikeError
from lorafusion_jax.parallel import run
from lorafusion_jax.train.signals import StoppedError
from tests.parallel import test_run
from tests.parallel.test_run import final_state, stop_after, trainer

MESH = (1, 2)
pytestmark = pytest.mark.usefixtures("shared_programs")


def guarded(monkeypatch, steps=14):
    """Guards job emoji with a window of four steps; calls are short, so losses are known soon."""
    monkeypatch.setattr(run, "TICKS", 4)
    spike = SpikeConfig(window=4, sigmas=6.0, max_consecutive=2)
    train = TrainConfig(max_steps=steps, global_batch_size=4, spike=spike)
    jobs = test_run.JOBS | {"emoji": test_run.JOBS["emoji"] | {"train": train}}
    monkeypatch.setattr(test_run, "JOBS", jobs)


def spiking(monkeypatch, batches: set[int], factor: float = 50.0):
    """Multiplies the loss of some global batches of emoji."""
    real = run.pack_slot

    def pack(microbatches, jobs, **sizes):
        slot = real(microbatches, jobs, **sizes)
        for rank, microbatch in enumerate(microbatches):
            if any(s.job == "emoji" and s.batch in batches for s in microbatch.stretches):
                batch = slot.batches[rank]
                mine = np.repeat(batch.tile_adapter == jobs["emoji"].slot, sizes["tile"])
                weight = np.where(mine, batch.loss_weight * np.float32(factor), batch.loss_weight)
                made = (*slot.batches[:rank], batch._replace(loss_weight=weight))
                slot = slot._replace(batches=(*made, *slot.batches[rank + 1 :]))
        return slot

    monkeypatch.setattr(run, "pack_slot", pack)


@pytest.mark.slow
@pytest.mark.scenario("G8")
def test_a_spike_on_a_mesh_is_skipped_alone(tmp_path, monkeypatch):
    guarded(monkeypatch)
    names = ("sql", "emoji")
    calm = trainer(tmp_path / "calm", MESH, names=names).fit()
    assert calm["emoji"].rejected == 0
    spiking(monkeypatch, {10})
    results = trainer(tmp_path / "run", MESH, names=names).fit()
    assert (results["emoji"].rejected, results["sql"].rejected) == (1, 0)
    skipped = [line for line in results["emoji"].history if line.get("applied") is False]
    assert [line["step"] for line in skipped] == [11]
    with pytest.raises(StoppedError):
        trainer(tmp_path / "parts", MESH, names=names, listener=stop_after(7)).fit()
    trainer(tmp_path / "parts", MESH, names=names).fit()
    assert final_state(tmp_path / "parts") == final_state(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.scenario("G8")
def test_too_many_spikes_on_a_mesh_stop_the_run(tmp_path, monkeypatch):
    guarded(monkeypatch)
    spiking(monkeypatch, {9, 10})
    with pytest.raises(LossSpikeError, match=r"emoji: step 11 skipped.*2 in a row"):
        trainer(tmp_path / "run", MESH, names=("emoji",)).fit()
