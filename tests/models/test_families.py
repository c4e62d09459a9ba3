"""Every family's logits against transformers' (committed), and controls for every feature."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lorafusion_jax.models import Decoder, load_base
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.models.rotary import rotary_tables
from lorafusion_jax.parallel.stage import RowInputs, StageModel, flat_arrays
from tests.golden import tiny_families
from tests.models.tiny import packed
from tests.tolerance import assert_error_ratio

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "family_logits.npz")
LENGTHS = tiny_families.SAMPLE_LENGTHS
ROWS = 16


def write_family(directory: Path, name: str) -> Path:
    """Writes a model of tiny_families as a Hugging Face directory."""
    (directory / "config.json").write_text(json.dumps(tiny_families.CONFIGS[name]))
    save_file(tiny_families.weights(name), directory / "model.safetensors")
    return directory


def golden(name: str, dtype: str) -> np.ndarray:
    values = GOLDEN[f"{name}.{dtype}"]
    return values if dtype != "bfloat16" else values.view(jnp.bfloat16).astype(np.float32)


def assert_golden(logits: np.ndarray, name: str, dtype: str) -> float:
    return assert_error_ratio(logits, golden(name, dtype), golden(name, "float64"))


def logits_of(base: Base, name: str) -> np.ndarray:
    """Logits of all samples of a model, computed in one packed row."""
    real = np.concatenate(tiny_families.samples(name))
    tokens = np.zeros(ROWS, np.int32)
    tokens[: len(real)] = real
    positions, segments = packed(LENGTHS, ROWS)
    graphdef, state = nnx.split(base.model)

    @jax.jit
    def run(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, positions, segments))

    return np.asarray(run(state, jnp.asarray(tokens)))[: len(real)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(tiny_families.CONFIGS))
def test_logits_equal_transformers(name, dtype, tmp_path):
    base = load_base(write_family(tmp_path, name), dtype)
    assert_golden(logits_of(base, name), name, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(tiny_families.CONFIGS))
def test_logits_on_a_gpu(name, tmp_path):
    assert jax.default_backend() == "gpu"
    base = load_base(write_family(tmp_path, name), "bfloat16")
    assert_golden(logits_of(base, name), name, "bfloat16")


def altered(base: Base, **features) -> Base:
    """The same weights in a model of other features."""
    config = dataclasses.replace(base.config, **features)
    shell = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = nnx.merge(nnx.split(shell)[0], nnx.split(base.model)[1])
    return dataclasses.replace(base, model=model, config=config)


def without_qk_norm(base: Base) -> Base:
    for layer in base.model.model.layers:
        layer.self_attn.has_norms = False
    return base


def without_biases(base: Base) -> Base:
    for layer in base.model.model.layers:
        layer.self_attn.v_proj.bias.set_value(jnp.zeros(10))
    return base


NO_WINDOW = {"sliding_window": None, "sliding_layers": ()}
MISTAKES = {
    "qwen2 without biases": ("qwen2", without_biases),
    "qwen2 with all layers sliding": ("qwen2_windows", {"sliding_layers": (True,) * 3}),
    "qwen3 without q/k norm": ("qwen3", without_qk_norm),
    "mistral without window": ("mistral", NO_WINDOW),
    "mistral with a window one wider": ("mistral", {"sliding_window": 5}),
    "gemma2 without attention cap": ("gemma2", {"attention_softcap": None}),
    "gemma2 without logit cap": ("gemma2", {"logit_softcap": None}),
    "gemma2 scaled by head_dim": ("gemma2", {"attention_scale": None}),
    "gemma2 without embedding scale": ("gemma2", {"embedding_scale": 1.0}),
    "gemma2 with plain norms": ("gemma2", {"norm_offset": 0.0}),
    "gemma2 with silu": ("gemma2", {"activation": "silu"}),
    "gemma2 sliding elsewhere": ("gemma2", {"sliding_layers": (False, True, False)}),
    "gemma3 without windows": ("gemma3_text", NO_WINDOW),
    "gemma3 with one rotary base": ("gemma3_text", {"local_rope_theta": None}),
    "gemma3 with unscaled rotary": ("gemma3_text", {"rope_scaling": None}),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_caught(mistake, tmp_path):
    name, change = MISTAKES[mistake]
    base = load_base(write_family(tmp_path, name))
    base = change(base) if callable(change) else altered(base, **change)
    with pytest.raises(AssertionError, match="error beyond"):
        assert_golden(logits_of(base, name), name, "float32")


def test_layers_of_a_structure_share_one_trace(tmp_path):
    """Two structures in a model of sliding and other layers, one trace each."""
    base = load_base(write_family(tmp_path, "gemma3_text"))
    graphdef, state = nnx.split(base.model)
    positions, segments = packed([4], 4)
    jaxpr = jax.make_jaxpr(lambda s: nnx.merge(graphdef, s)(positions, positions, segments))(state)
    layers = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "_run_layer"]
    assert len(layers) == 3 and len({id(eqn.params["jaxpr"]) for eqn in layers}) == 2


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_decoding_with_a_cache_equals_the_golden(name, tmp_path):
    """Two prompts of different lengths side by side, then token by token beyond the window."""
    model = load_base(write_family(tmp_path, name)).model
    samples = tiny_families.samples(name)
    tokens = np.zeros((2, max(LENGTHS)), np.int32)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample)] = sample
    step = jax.jit(lambda *args: model.decode(*args))
    positions = np.broadcast_to(np.arange(2), (2, 2))
    hidden, caches = step(tokens[:, :2], positions, model.init_cache(2, max(LENGTHS)))
    found = [hidden]
    for i in range(2, max(LENGTHS)):
        hidden, caches = step(tokens[:, i : i + 1], np.full((2, 1), i), caches)
        found.append(hidden)
    logits = np.asarray(model.logits(jnp.concatenate(found, axis=1)))
    kept = np.concatenate([logits[row, :length] for row, length in enumerate(LENGTHS)])
    assert_golden(kept, name, "float32")


@pytest.mark.parametrize("name", ["qwen2_windows", "gemma3_text"])
def test_one_program_runs_whichever_layer(name, tmp_path):
    """As a stage of the pipeline does: windows and rotary bases are chosen at run time."""
    base = load_base(write_family(tmp_path, name))
    layers, config = base.model.model.layers, base.config
    positions, segments = packed(LENGTHS, ROWS)
    stage = StageModel(config, jnp.dtype("float32"), 1, (), "save", ("none",))

    @jax.jit
    def run(x, weights, number):
        inputs = RowInputs(rotary_tables(config, positions), segments, None, {})
        return stage.forward(x, {"a": {}, "b": {}}, [weights], inputs, number)

    def hidden(order) -> np.ndarray:
        real = np.concatenate(tiny_families.samples(name))
        x = base.model.model.embed_tokens(jnp.asarray(np.resize(real, ROWS)))
        for layer, number in zip(layers, order, strict=True):
            x = run(x, flat_arrays(layer), jnp.int32(number))
        return np.asarray(base.model.logits(base.model.model.norm(x)))[: len(real)]

    assert_golden(hidden([0, 1, 2]), name, "float32")
    assert run._cache_size() == 1
    with pytest.raises(AssertionError, match="error beyond"):
        assert_golden(hidden([1, 1, 1]), name, "float32")
