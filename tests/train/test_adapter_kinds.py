"""Whole runs of adapters that are not plain: patterns, LoRA+, a start from a PEFT folder."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorafusion_jax as lf
from lorafusion_jax.config import BatchingConfig, EvalConfig, SaveConfig, TrainConfig
from lorafusion_jax.errors import AdapterError, ConfigError
from lorafusion_jax.lora.bank import (
    empty_bank,
    init_adapter,
    read_slot,
    with_patterns,
    write_slot,
)
from lorafusion_jax.lora.peft_io import load_peft
from lorafusion_jax.train.checkpoint import Checkpoints, leaves_of, tree_hash
from lorafusion_jax.train.resume import restore_state
from lorafusion_jax.train.step import init_state
from tests.tolerance import assert_bit_equal
from tests.train.tiny import TILE, dataset, tiny_base

pytestmark = pytest.mark.usefixtures("shared_programs")

DATA = {"plain": dataset(1, 12), "odd": dataset(2, 12)}
PLAIN = lf.LoraConfig(r=4, alpha=8.0)
ODD = lf.LoraConfig(
    r=4, alpha=8.0, rank_pattern={"q_proj": 2, "layers.1.*": 8}, alpha_pattern={"o_proj": 3.0}
)


def fit(output, odd=ODD, optim=None, steps=3):
    trainer = lf.MultiTrainer(
        tiny_base(),
        output=output,
        batching=BatchingConfig(tokens_per_microbatch=64, tile=TILE),
    )
    for name in DATA:
        trainer.add_job(
            name,
            DATA[name],
            lora=odd if name == "odd" else PLAIN,
            optim=optim if name == "odd" and optim else lf.AdamW(lr=1e-2),
            train=TrainConfig(max_steps=steps, global_batch_size=4),
            eval=EvalConfig(split=0),
            save=SaveConfig(every=2),
        )
    return trainer.fit()


def adapter(output, name):
    return load_peft(lf.open_run(output).adapter(name)).adapter


@pytest.fixture(scope="module")
def patterned(tmp_path_factory):
    output = tmp_path_factory.mktemp("patterned") / "run"
    fit(output)
    return output


def test_a_patterned_job_trains_each_module_at_its_rank(patterned):
    trained, base = adapter(patterned, "odd"), tiny_base()
    spec = lf.LoraSpec.from_config(ODD)
    assert {a.shape[0] for a, _ in trained.values()} == {2, 4, 8}
    for path, (a, b) in trained.items():
        assert a.shape[0] == spec.rank_of(path)
        assert (np.abs(b).max(axis=1) > 0).all(), path  # every row of B has learnt something
    loaded = load_peft(lf.open_run(patterned).adapter("odd"), base.model).spec
    assert (loaded.rank_pattern, loaded.alpha_pattern) == (spec.rank_pattern, spec.alpha_pattern)


def test_a_joining_pattern_keeps_the_ranks_of_the_jobs_that_are_there():
    shapes, plain, odd = {"m": (6, 8), "n": (8, 6)}, lf.LoraSpec(r=4), lf.LoraSpec.from_config(ODD)
    bank = write_slot(empty_bank(shapes, 1, 4), 0, plain, 1)
    saved = leaves_of(init_state(bank, ("adamw",)))
    fresh = init_state(with_patterns(empty_bank(shapes, 2, 8), ["m"]), ("adamw",))
    bank = restore_state(fresh, saved, joined=True).bank
    assert bank.rank.tolist() == [4, 0]
    assert bank.ranks["m"].tolist() == [4, 0] and bank.ratios["m"].tolist() == [1, 1]
    bank = write_slot(bank, 1, odd, 2, ["m"])
    assert_bit_equal(read_slot(bank, 0), init_adapter(shapes, plain, 1))


def test_a_job_goes_on_from_an_adapter_and_resumes_only_with_the_same(patterned, tmp_path):
    start = lf.open_run(patterned).adapter("odd")
    onward = ODD.model_copy(update={"init_from": str(start)})
    still = lf.AdamW(lr=1e-30, warmup_steps=0, schedule="constant")
    fit(tmp_path / "run", odd=onward, optim=still, steps=2)
    assert_bit_equal(adapter(tmp_path / "run", "odd"), adapter(patterned, "odd"))
    with pytest.raises(AdapterError, match=r"jobs\.odd\.lora\.rank_pattern"):
        fit(tmp_path / "no", odd=PLAIN.model_copy(update={"init_from": str(start)}))
    assert not (tmp_path / "no").exists()
    hashed = tree_hash(Checkpoints(tmp_path / "run" / "checkpoints").restore().leaves)
    fit(tmp_path / "run", odd=onward, optim=still, steps=2)
    assert tree_hash(Checkpoints(tmp_path / "run" / "checkpoints").restore().leaves) == hashed
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((start / "adapter_config.json").read_bytes())
    weights = load_file(start / "adapter_model.safetensors")
    weights = {name: 2 * tensor for name, tensor in weights.items()}
    save_file(weights, other / "adapter_model.safetensors", {"format": "pt"})
    changed = ODD.model_copy(update={"init_from": str(other)})
    with pytest.raises(ConfigError, match=r"jobs\.odd\.data"):
        fit(tmp_path / "run", odd=changed, optim=still, steps=2)
