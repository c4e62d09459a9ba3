"""What a run chose by itself is kept when it goes on; so its bits do not depend on a restart."""

import json

import pytest

from lorafusion_jax.errors import ResourceError
from lorafusion_jax.train import choices, prepare
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.choices import Choices, kept, plan_memory
from lorafusion_jax.train.memory import Step, predict
from lorafusion_jax.train.signals import StoppedError
from tests.train.test_trainer import final_state, stop_after, trainer
from tests.train.tiny import CONFIG

pytestmark = pytest.mark.usefixtures("shared_programs")
STEP = Step(CONFIG, capacity=64, slots=2, r_max=8, itemsize=4, loss_chunk=16, tile=16)


def saved(output) -> dict:
    """The choices in the newest checkpoint."""
    restored = Checkpoints(output / "checkpoints").restore()
    assert restored is not None
    return restored.progress["choices"]


def device_of(monkeypatch, size: int | None) -> None:
    monkeypatch.setattr(choices, "device_bytes", lambda: size)


def test_auto_remat_stays_as_it_was_wherever_it_fits(monkeypatch):
    small, large = predict(STEP, "full").total, 4 * predict(STEP, "none").total
    device_of(monkeypatch, large)
    assert plan_memory(STEP, "auto")[0] == "none"
    assert plan_memory(STEP, "auto", "full")[0] == "full"
    assert plan_memory(STEP, "mlp", "full")[0] == "mlp"  # the user's word is the last one
    device_of(monkeypatch, small)  # without the head-room that a new run leaves
    assert plan_memory(STEP, "auto", "full")[0] == "full"
    device_of(monkeypatch, int(1.2 * small))
    assert plan_memory(STEP, "auto", "none")[0] != "none"  # on a smaller device
    device_of(monkeypatch, small // 2)
    with pytest.raises(ResourceError, match="a training step needs"):
        plan_memory(STEP, "auto", "full")


def test_sizes_only_grow():
    before = Choices(1, "full", 16, 128, 64, 512)
    fresh = Choices(1, "none", 32, 64, 128, 256)
    assert kept(None, fresh) is fresh
    assert kept(before, fresh) == Choices(1, "none", 16, 128, 128, 512)


def test_a_record_of_an_older_release_is_no_choice():
    record = Choices(1, "full", 16, 128, 64, 512)._asdict()
    assert Choices.from_record(record | {"newer": 1}) == Choices(**record)
    assert Choices.from_record(None) is None
    assert Choices.from_record({"devices": 1}) is None
    of_mesh = Choices(2, "full", 16, 128, 64, 512, ("none", "full"), "recompute")
    assert Choices.from_record(json.loads(json.dumps(of_mesh._asdict()))) == of_mesh
    older = {name: record[name] for name in record if name not in ("policies", "residuals")}
    assert Choices.from_record(older) == Choices(**record)


@pytest.mark.slow
@pytest.mark.scenario("B2")
def test_a_resumed_run_keeps_what_it_chose_on_another_device(tmp_path, monkeypatch):
    """The first process had little memory and chose `full`; the second has plenty."""
    device_of(monkeypatch, 1 << 40)
    with monkeypatch.context() as patch:
        patch.setattr(choices, "choose_remat", lambda step, available: ("full", None))
        patch.setattr(prepare, "segment_bucket", lambda *_: 64)
        patch.setattr(prepare, "_eval_capacity", lambda *_: 96)
        trainer(tmp_path / "whole").fit()
        with pytest.raises(StoppedError):
            trainer(tmp_path / "run", listener=stop_after(4)).fit()
    first = saved(tmp_path / "run")
    assert (first["remat"], first["segments"], first["eval_capacity"]) == ("full", 64, 96)
    trainer(tmp_path / "run").fit()
    assert saved(tmp_path / "run") == first
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.scenario("B2")
def test_choosing_again_would_be_seen(tmp_path, monkeypatch):
    """The twin: without the record, the second process computes other bits."""
    device_of(monkeypatch, 1 << 40)
    monkeypatch.setattr(choices, "choose_remat", lambda step, available: ("full", None))
    with pytest.raises(StoppedError):
        trainer(tmp_path / "run", listener=stop_after(4)).fit()
    monkeypatch.setattr(choices, "choose_remat", lambda step, available: ("none", None))
    monkeypatch.setattr(Choices, "from_record", lambda record: None)
    trainer(tmp_path / "run").fit()
    assert saved(tmp_path / "run")["remat"] == "none"
    monkeypatch.setattr(choices, "choose_remat", lambda step, available: ("full", None))
    trainer(tmp_path / "whole").fit()
    assert final_state(tmp_path / "run") != final_state(tmp_path / "whole")


@pytest.mark.scenario("A13")
def test_a_checkpoint_without_choices_is_gone_on_from(tmp_path, monkeypatch):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Choices, "_asdict", lambda _: {})  # as an older release
        with pytest.raises(StoppedError):
            trainer(output, listener=stop_after(4)).fit()
        assert set(saved(output)) == {"segments", "longest"}
    trainer(output).fit()
    assert saved(output)["remat"] == "none"


def test_a_plan_of_smaller_microbatches_does_not_change_the_policy(monkeypatch):
    step = STEP._replace(capacity=8192)
    device_of(monkeypatch, int(predict(step, "attention").total / 0.9))
    chosen = plan_memory(step, "auto")[0]
    assert chosen == "attention"
    assert plan_memory(step._replace(capacity=1024), "auto", chosen)[0] == chosen
    assert plan_memory(step._replace(capacity=1024), "auto")[0] == "none"
