"""Merged models: the right values, rounded once, in files that load; refusals."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorafusion_jax.errors import AdapterError, ModelError
from lorafusion_jax.lora.targets import LoraSpec
from lorafusion_jax.models import load_base
from lorafusion_jax.models.merged import save_merged
from tests.golden import tiny_llama
from tests.models.test_gguf import write_gguf
from tests.models.test_golden_logits import write_model
from tests.tolerance import assert_bit_equal

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SPEC = LoraSpec(r=3, alpha=6, target_modules=PATHS, rank_pattern={"down_proj": 2})
WEIGHTS = tiny_llama.weights("tied")


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    directory = write_model(tmp_path / "base", "tied")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "generation_config.json").write_text('{"eos_token_id": 5}')
    (directory / "notes.txt").write_text("not copied")
    return directory


@pytest.fixture
def adapter(rng) -> dict:
    found = {}
    for path in PATHS:
        n, k = WEIGHTS[f"{path}.weight"].shape
        r = SPEC.rank_of(path)
        a, b = (rng.normal(size=(r, width)).astype(np.float32) for width in (k, n))
        found[path] = (a, b)
    return found


def expected(adapter, dtype=np.float32) -> dict:
    """By the definition, in float64: alpha 6 over ranks 3 and 2."""
    values = dict(WEIGHTS)
    for path, scale in zip(PATHS, (2.0, 3.0), strict=True):
        a, b = (np.asarray(x, np.float64) for x in adapter[path])
        name = f"{path}.weight"
        values[name] = WEIGHTS[name].astype(np.float64) + scale * b.T @ a
    return {name: value.astype(dtype) for name, value in values.items()}


def assert_close(found: dict, wanted: dict, ulps: float):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        difference = np.abs(found[name].astype(np.float64) - value.astype(np.float64))
        limit = ulps * float(ml_dtypes.finfo(value.dtype).eps) * np.abs(value.astype(float)).max()
        assert difference.max() <= limit, name


def test_values_files_and_logits(base, adapter, tmp_path):
    out = save_merged(tmp_path / "out", base, adapter, SPEC)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    found = load_file(out / "model.safetensors")
    assert_close(found, expected(adapter), 4)
    assert_bit_equal(found["model.norm.weight"], WEIGHTS["model.norm.weight"])
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )
    with safe_open(out / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it
    loaded = load_base(out)
    kernel = loaded.model.model.layers[0].self_attn.q_proj.kernel[...]
    np.testing.assert_array_equal(kernel, found[f"{PATHS[0]}.weight"].T)


def test_a_wrong_scale_would_be_seen(base, adapter, tmp_path):
    out = save_merged(tmp_path / "out", base, adapter, LoraSpec(r=3, alpha=6.001))
    with pytest.raises(AssertionError, match="q_proj"):
        assert_close(load_file(out / "model.safetensors"), expected(adapter), 4)


def test_bfloat16_is_rounded_once(base, adapter, tmp_path):
    """The base's dtype is kept; merging is in float32, not in bfloat16."""
    halved = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in WEIGHTS.items()}
    save_file(halved, base / "model.safetensors")
    found = load_file(save_merged(tmp_path / "out", base, adapter, SPEC) / "model.safetensors")
    wanted = expected(adapter, ml_dtypes.bfloat16)  # the weights are bf16-exact
    name = f"{PATHS[0]}.weight"
    assert np.mean(found[name] == wanted[name]) > 0.99  # all but ties that float32 sees elsewhere
    assert_close(found, wanted, 1)
    a, b = adapter[PATHS[0]]
    twice = halved[name] + (2 * b.T @ a).astype(ml_dtypes.bfloat16)
    assert np.mean(twice == wanted[name]) < 0.99  # the test would see a sum in bfloat16


def test_dtype_can_be_chosen(base, adapter, tmp_path):
    out = save_merged(tmp_path / "out", base, adapter, SPEC, dtype="bfloat16")
    assert all(x.dtype == ml_dtypes.bfloat16 for x in load_file(out / "model.safetensors").values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards(base, adapter, tmp_path):
    """No file is larger than asked, unless a tensor is; together they are the single file."""
    whole = save_merged(tmp_path / "whole", base, adapter, SPEC)
    limit = 8000
    out = save_merged(tmp_path / "out", base, adapter, SPEC, max_shard_bytes=limit)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == {file.name for file in files}
    together = {}
    for file in files:
        tensors = load_file(file)
        assert sum(x.nbytes for x in tensors.values()) <= limit or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        together |= tensors
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in together.values())
    assert_bit_equal(dict(sorted(together.items())), load_file(whole / "model.safetensors"))
    assert_bit_equal(nnx.state(load_base(out).model), nnx.state(load_base(whole).model))


def test_refusals(base, adapter, tmp_path):
    with pytest.raises(AdapterError, match="not empty"):
        save_merged(base, base, adapter, SPEC)
    unknown = {"model.layers.7.mlp.up_proj": adapter[PATHS[0]]}
    with pytest.raises(AdapterError, match=r"no model\.layers\.7\.mlp\.up_proj\.weight"):
        save_merged(tmp_path / "out", base, unknown, SPEC)
    with pytest.raises(AdapterError, match=r"q_proj\.weight is \[32, 32\]"):
        save_merged(tmp_path / "out", base, {PATHS[0]: adapter[PATHS[1]]}, SPEC)
    huge = {PATHS[0]: tuple(np.full_like(x, 1e30) for x in adapter[PATHS[0]])}
    with pytest.raises(ModelError, match="do not fit"):
        save_merged(tmp_path / "out", base, huge, SPEC)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]  # nothing is left behind


def test_from_a_gguf_file(adapter, tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "model.gguf", "tied")
    out = save_merged(tmp_path / "out", path, adapter, SPEC, dtype="float32")
    assert_close(load_file(out / "model.safetensors"), expected(adapter), 4)
    loaded, original = load_base(out), load_base(path)
    assert loaded.config == original.config
    assert loaded.tokenizer.encode("12 ab") == original.tokenizer.encode("12 ab")
    half = save_merged(tmp_path / "half", path, adapter, SPEC)
    assert load_base(half, "bfloat16").model.model.norm.weight[...].dtype == jnp.bfloat16
    with pytest.raises(ModelError, match="rope scaling 'factors'"):
        scaled = write_gguf(tmp_path / "scaled.gguf", "llama3_rope")
        save_merged(tmp_path / "scaled", scaled, adapter, SPEC)
