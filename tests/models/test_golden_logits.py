"""Logits of tiny models, loaded from directories written here, against transformers' (committed).

The samples of a model are packed into one row with padding, which transformers never sees.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lorafusion_jax.models import load_base
from lorafusion_jax.models.hf_weights import Base
from tests.golden import tiny_llama
from tests.models.tiny import packed
from tests.tolerance import assert_bit_equal, assert_error_ratio

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "logits.npz")
ROWS = 32


def write_model(directory: Path, name: str, *, shards: int = 1, config: dict | None = None) -> Path:
    """Writes a model of tiny_llama as a Hugging Face directory."""
    (directory / "config.json").write_text(json.dumps(config or tiny_llama.CONFIGS[name]))
    tensors = tiny_llama.weights(name)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def packed_logits(base: Base, name: str, lengths=tiny_llama.SAMPLE_LENGTHS) -> np.ndarray:
    """Logits of all samples of a model, computed in one packed row."""
    tokens = np.zeros(ROWS, np.int32)
    real = np.concatenate(tiny_llama.samples(name))
    tokens[: len(real)] = real
    positions, segments = packed(lengths, ROWS)
    graphdef, state = nnx.split(base.model)

    @jax.jit
    def run(state, tokens):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, positions, segments))

    return np.asarray(run(state, jnp.asarray(tokens)))[: len(real)]


def assert_golden(logits: np.ndarray, name: str, dtype: str) -> float:
    return assert_error_ratio(logits, GOLDEN[f"{name}.{dtype}"], GOLDEN[f"{name}.float64"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(tiny_llama.CONFIGS))
def test_logits_equal_transformers(name, dtype, tmp_path):
    base = load_base(write_model(tmp_path, name), dtype)
    assert_golden(packed_logits(base, name), name, dtype)


def test_shards_give_the_same_bits(tmp_path):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    single.mkdir(), sharded.mkdir()
    bases = (
        load_base(write_model(single, "llama3_rope")),
        load_base(write_model(sharded, "llama3_rope", shards=3)),
    )
    assert_bit_equal(*(nnx.split(base.model)[1] for base in bases))


def without_rope_scaling(base: Base) -> Base:
    base.model.config = dataclasses.replace(base.config, rope_scaling=None)
    return base


def neighbouring_pairs(base: Base) -> Base:
    """Rotary layout of GGUF files, left as it is."""
    for layer in base.model.model.layers:
        kernel = layer.self_attn.q_proj.kernel
        rows = kernel[...].T.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
        kernel.set_value(rows.T)
    return base


def untransposed_o_proj(base: Base) -> Base:
    kernel = base.model.model.layers[0].self_attn.o_proj.kernel
    kernel.set_value(kernel[...].T)
    return base


def larger_epsilon(base: Base) -> Base:
    base.model.model.norm.eps = 1e-4
    return base


@pytest.mark.parametrize(
    "mistake", [without_rope_scaling, neighbouring_pairs, untransposed_o_proj, larger_epsilon]
)
def test_mistakes_are_caught(mistake, tmp_path):
    base = mistake(load_base(write_model(tmp_path, "llama3_rope")))
    with pytest.raises(AssertionError, match="error beyond"):
        assert_golden(packed_logits(base, "llama3_rope"), "llama3_rope", "float32")


def test_samples_that_see_each_other_are_caught(tmp_path):
    base = load_base(write_model(tmp_path, "tied"))
    with pytest.raises(AssertionError, match="error beyond"):
        assert_golden(packed_logits(base, "tied", lengths=[20]), "tied", "float32")
