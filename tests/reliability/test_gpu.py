"""What only a GPU can show: replay with our kernels, and a device that is full.

Run by `make scoreboard-gpu`, which writes docs/results/<device>/reliability.json.
"""

import jax
import numpy as np
import pytest

import lorafusion_jax as lf
from lorafusion_jax.config import (
    BatchingConfig,
    EvalConfig,
    RunTrainConfig,
    SaveConfig,
    TrainConfig,
)
from lorafusion_jax.errors import ResourceError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.hf_weights import random_base
from lorafusion_jax.train.signals import StoppedError
from tests.train.test_trainer import final_state, metrics, stop_after
from tests.train.tiny import dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
WIDE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def base():
    return random_base(ModelConfig.from_hf(WIDE), 0)


def trainer(base, output, *, listener=None, tokens=1024, deterministic=True):
    """Four jobs with dropout, 20 steps each, in tiles that the kernels take."""
    made = lf.MultiTrainer(
        base,
        output=output,
        batching=BatchingConfig(tokens_per_microbatch=tokens, tile=128),
        train=RunTrainConfig(deterministic=deterministic),
        listener=listener,
    )
    for number, (name, r) in enumerate({"a": 16, "b": 8, "c": 64, "d": 4}.items()):
        made.add_job(
            name,
            dataset(number, 48, 30, 120),
            lora=lf.LoraConfig(r=r, dropout=0.1),
            optim=lf.AdamW(lr=1e-3),
            train=TrainConfig(max_steps=20, global_batch_size=6),
            eval=EvalConfig(split=6, every=10),
            save=SaveConfig(every=5),
        )
    return made


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    trainer(base, output).fit()
    return output


@pytest.mark.scenario("B5")
def test_two_runs_have_the_same_bits(base, whole, tmp_path):
    trainer(base, tmp_path / "run").fit()
    assert final_state(tmp_path / "run") == final_state(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


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
    made = trainer(base, tmp_path / "run")
    made._seed = 1
    made.fit()
    assert final_state(tmp_path / "run") != final_state(whole)


@pytest.mark.scenario("G1")
def test_a_full_device_is_explained_and_the_last_checkpoint_is_intact(base, whole, tmp_path):
    stats = jax.local_devices()[0].memory_stats()
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    ballast = jax.numpy.zeros(max(free - (64 << 20), 1), np.uint8)  # all but 64 MiB
    ballast.block_until_ready()
    output = tmp_path / "run"
    try:
        with pytest.raises(ResourceError) as error:
            trainer(base, output, tokens=65_536).fit()
    finally:
        ballast.delete()
    assert error.value.exit_code == 5
    assert "tokens_per_microbatch" in str(error.value)
    trainer(base, output).fit(resume="never")
    assert final_state(output) == final_state(whole)
