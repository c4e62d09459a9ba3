"""A Qwen3 of Tunix, adapted by `FusedLoraProvider`, trained by Tunix's own `PeftTrainer`.

Tunix is not among this project's dependencies (1.6 GB). To run this, in an environment of its own:

    pip install "jax==0.11.2" "flax==0.12.12" "qwix==0.1.8" "google-tunix==0.1.7" pytest
    python -m pytest -s tests/lora/test_tunix.py
"""

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

if importlib.util.find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of Tunix and its own

STEPS, BATCH, LENGTH, VOCAB = 30, 4, 16, 64


def adapted(provider_type):
    """Returns a two-layer Qwen3 whose adapters start alike for both providers."""
    import qwix
    from tunix.models.qwen3.model import ModelConfig, Qwen3

    config = ModelConfig(
        num_layers=2,
        vocab_size=VOCAB,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    model = Qwen3(config, rngs=nnx.Rngs(0))
    provider = provider_type(
        module_path=".*_proj",
        rank=4,
        alpha=8.0,
        lora_a_initializer=jax.nn.initializers.normal(0.2),
    )
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())


def model_input(batch):
    from tunix.sft import utils

    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def batches():
    """Sequences that count upwards from random starts: the next token can be learnt."""
    from tunix.sft.peft_trainer import TrainingInput

    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        start = rng.integers(0, VOCAB, (BATCH, 1))
        tokens = jnp.asarray((start + np.arange(LENGTH)) % VOCAB, jnp.int32)
        yield TrainingInput(tokens, jnp.ones_like(tokens, bool))


def loss_of(model, batch):
    given = model_input(batch)
    logits, _ = model(given["input_tokens"], given["positions"], None, given["attention_mask"])
    targets = batch.input_tokens[:, 1:]
    return float(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets).mean())


def train(provider_type):
    """Trains with Tunix; returns loss before, loss after, and the adapters."""
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    model = adapted(provider_type)
    probe = next(batches())
    before = loss_of(model, probe)
    trainer = PeftTrainer(
        model, optax.adamw(3e-2), TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS)
    ).with_gen_model_input_fn(model_input)
    trainer.train(list(batches()))
    assert trainer.train_steps == STEPS
    return before, loss_of(model, probe), nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


def test_peft_trainer_trains_through_the_fused_op(monkeypatch):
    import qwix

    from lorafusion_jax.lora import qwix_plugin

    fused, shapes = qwix_plugin.fused_lora, []

    def counted(x, w, *args, **kwargs):
        shapes.append(w.shape)
        return fused(x, w, *args, **kwargs)

    monkeypatch.setattr(qwix_plugin, "fused_lora", counted)
    theirs = train(qwix.LoraProvider)
    assert not shapes
    ours = train(qwix_plugin.FusedLoraProvider)
    # Seven projections in each of two layers, whenever the model is traced or called.
    assert shapes and len(shapes) % 14 == 0
    for name in ("jax", "flax", "qwix", "google-tunix"):
        print(f"{name} {importlib.metadata.version(name)}")
    print("Qwen3 of 2 layers: all 14 projections go through the fused op")
    for name, (before, after, _) in {"Qwix's own path": theirs, "fused op": ours}.items():
        print(f"{name}: loss {before:.6f} -> {after:.6f} in {STEPS} steps of PeftTrainer")
    assert ours[1] < 0.75 * ours[0]
    assert abs(ours[0] - theirs[0]) < 1e-4 and abs(ours[1] - theirs[1]) < 1e-3 * theirs[1]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ours[2], theirs[2])
    print(f"largest difference of an adapter's weight: {max(jax.tree.leaves(moved)):.1e}")
