"""PEFT folders: what is written, what is refused, and the round trip."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora import peft_io
from lorafusion_jax.lora.linear import MultiLoRALinear
from lorafusion_jax.lora.peft_io import load_peft, save_peft
from lorafusion_jax.lora.targets import LoraSpec
from tests.tolerance import assert_bit_equal

SPEC = LoraSpec(r=2, alpha=3, dropout=0.1, use_rslora=True, init="gaussian")
PREFIX = "base_model.model."


def _adapter(paths=("layers.0.up", "layers.0.down"), r=2):
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(paths)))
    return {
        path: (jax.random.normal(next(keys), (r, 4)), jax.random.normal(next(keys), (r, 6)))
        for path in paths
    }


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _saved(tmp_path, spec=SPEC, **kwargs):
    return save_peft(tmp_path / "adapter", _adapter(), spec, "base", **kwargs)


def test_names_orientation_and_metadata(tmp_path):
    directory = _saved(tmp_path)
    tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    for path, (a, b) in _adapter().items():
        np.testing.assert_array_equal(tensors.pop(f"{PREFIX}{path}.lora_A.weight"), a)
        np.testing.assert_array_equal(tensors.pop(f"{PREFIX}{path}.lora_B.weight"), b.T)
    assert not tensors
    with safetensors.safe_open(directory / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_config_has_pefts_fields(tmp_path):
    config = json.loads((_saved(tmp_path) / "adapter_config.json").read_text())
    assert config == {
        "alpha_pattern": {}, "base_model_name_or_path": "base", "bias": "none",
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": "gaussian", "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 3, "lora_dropout": 0.1, "modules_to_save": None, "peft_type": "LORA",
        "peft_version": "0.21.2", "r": 2, "rank_pattern": {}, "revision": None,
        "target_modules": ["down", "up"], "task_type": "CAUSAL_LM", "use_dora": False,
        "use_rslora": True,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        LoraSpec(r=2, alpha=1.5),
        LoraSpec(r=2, target_modules=("up", "down"), exclude_modules=("head",)),
        LoraSpec(r=2, target_modules=r"layers\.0\..*", exclude_modules=".*q"),
        LoraSpec(
            r=2, target_modules=("up", "down"), layers_to_transform=[0], layers_pattern="layers"
        ),
        # The order of patterns counts, and is not the alphabet's.
        LoraSpec(r=9, rank_pattern={"layers.0.up": 2, "down": 2}, alpha_pattern={"up": 0.5}),
    ],
)
@pytest.mark.scenario("F7")
def test_export_import_export_is_byte_identical(tmp_path, spec, dtype):
    first = save_peft(tmp_path / "one", _adapter(), spec, "base", dtype)
    loaded = load_peft(first)
    second = save_peft(
        tmp_path / "two", loaded.adapter, loaded.spec, loaded.base_model_name_or_path, loaded.dtype
    )
    assert _files(first) == _files(second)
    assert loaded.spec.scale == spec.scale and loaded.dtype == dtype


def test_float32_comes_back_bit_for_bit(tmp_path):
    adapter = jax.tree.map(np.asarray, _adapter())
    assert_bit_equal(load_peft(_saved(tmp_path)).adapter, adapter)


def test_an_older_adapter_is_replaced_as_a_whole(tmp_path):
    _saved(tmp_path)
    save_peft(tmp_path / "adapter", _adapter(["other"]), LoraSpec(r=2), "base")
    assert list(load_peft(tmp_path / "adapter").adapter) == ["other"]
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_failed_save_leaves_the_older_adapter(tmp_path, monkeypatch):
    before = _files(_saved(tmp_path))

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_io, "write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_peft(tmp_path / "adapter", _adapter(["other"]), LoraSpec(r=2), "base")
    assert _files(tmp_path / "adapter") == before and os.listdir(tmp_path) == ["adapter"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.tex").write_text("years of work")
    with pytest.raises(AdapterError, match=r"thesis\.tex"):
        _saved(tmp_path)
    assert (tmp_path / "adapter" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_adapters_are_not_saved(tmp_path, value):
    adapter = _adapter()
    a, b = adapter["layers.0.up"]
    for broken, words in (
        (adapter | {"layers.0.up": (a, b.at[1, 2].set(value))}, r"layers\.0\.up: lora_B holds"),
        (_adapter(r=3), "expected 2 rows"),
        ({}, "no modules"),
    ):
        with pytest.raises(AdapterError, match=words):
            save_peft(tmp_path / "adapter", broken, SPEC, "base")
    assert not list(tmp_path.iterdir())


def test_bfloat16_overflow_is_not_saved(tmp_path):
    adapter = {"up": (jnp.full((2, 4), 3.4e38), jnp.zeros((2, 6)))}
    with pytest.raises(AdapterError, match="infinity"):
        save_peft(tmp_path / "adapter", adapter, SPEC, "base", "bfloat16")


def _with_config(directory, **changes):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"peft_type": ...}, "peft_type is missing"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"up": 4}}, "expected axis 0 to be r=4"),
        ({"rank_pattern": {"up": 0}}, "rank_pattern: up: 0"),
        ({"rank_pattern": ["up"]}, "rank_pattern="),
        ({"alpha_pattern": {"up": "4"}}, "alpha_pattern="),
        ({"alpha_pattern": {"(": 4}}, "regular expression"),
        ({"layers_to_transform": [7]}, r"layers\.0\.down is not among"),
        ({"layers_to_transform": "0"}, "layers_to_transform="),
        ({"layers_pattern": ["blocks"]}, "layers_pattern needs layers_to_transform"),
        ({"invented_in_2030": 1}, "invented_in_2030"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": "2"}, "r='2'"),
        ({"r": True}, "r=True"),
        ({"r": 0}, "r=0"),
        ({"r": 3}, r"\[2, 4\], expected axis 0 to be r=3"),
        ({"lora_alpha": 0}, "alpha=0"),
        ({"lora_alpha": -1}, "alpha=-1"),
        ({"lora_alpha": ...}, "lora_alpha is missing"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"lora_dropout": 2}, "dropout=2"),
        ({"use_rslora": 1}, "use_rslora=1"),
        ({"target_modules": None}, "target_modules=None"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["up"]}, r"layers\.0\.down is not among"),
        ({"target_modules": "("}, "regular expression"),
        ({"exclude_modules": ["down"]}, r"layers\.0\.down is not among"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3"),
    ],
)
@pytest.mark.scenario("F6")
def test_configs_that_are_not_plain_lora_are_refused_by_key(tmp_path, changes, words):
    directory = _saved(tmp_path)
    _with_config(directory, **changes)
    with pytest.raises(AdapterError, match=words):
        load_peft(directory)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"use_rslora": True}, 3 / 2**0.5),
        ({"use_rslora": False}, 1.5),
        ({"use_rslora": ...}, 1.5),
        ({"lora_alpha": 0.5, "use_rslora": False}, 0.25),
    ],
)
@pytest.mark.scenario("F6")
def test_scale_is_pefts(tmp_path, changes, scale):
    directory = _saved(tmp_path)
    _with_config(directory, **changes)
    assert load_peft(directory).spec.scale == scale


def test_what_newer_peft_writes_by_default_is_accepted(tmp_path):
    directory = _saved(tmp_path)
    _with_config(
        directory, megatron_core="megatron.core", qalora_group_size=16, velora_config=None,
        loftq_config={}, auto_mapping={"base_model_class": "X"}, target_parameters=None,
    )  # fmt: skip
    load_peft(directory)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"r": 1, "r": 2}', b'{"r": NaN}', b"\xff", b" " * (2 << 20)]
)
@pytest.mark.scenario("F6")
def test_config_text_is_not_believed(tmp_path, text):
    directory = _saved(tmp_path)
    (directory / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_peft(directory)


A, B = f"{PREFIX}layers.0.up.lora_A.weight", f"{PREFIX}layers.0.up.lora_B.weight"
DOWN = f"{PREFIX}layers.0.down.lora_"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({A: np.full((2, 4), np.nan, np.float32)}, r"up\.lora_A\.weight' holds NaN"),
        ({B: np.full((6, 2), np.inf, np.float32)}, r"up\.lora_B\.weight' holds NaN or infinity"),
        ({A: ...}, r"layers\.0\.up has no lora_A"),
        ({B: ...}, r"layers\.0\.up has no lora_B"),
        ({A: np.zeros((4, 2), np.float32)}, "expected axis 0 to be r=2"),
        ({B: np.zeros((2, 6), np.float32)}, "expected axis 1 to be r=2"),
        ({A: np.zeros((2, 4, 1), np.float32)}, "expected axis 0"),
        ({A: np.zeros((2, 4), np.float16)}, "mixed dtypes"),
        ({f"{PREFIX}layers.0.up.lora_magnitude_vector": np.zeros(6, np.float32)}, "DoRA"),
        ({f"{PREFIX}embed.lora_embedding_A": np.zeros((2, 8), np.float32)}, "embedding"),
        ({f"{PREFIX}layers.0.up.lora_B.bias": np.zeros(6, np.float32)}, "bias"),
        ({f"{PREFIX}lm_head.weight": np.zeros((6, 2), np.float32)}, "not a LoRA weight"),
        ({"layers.0.up.lora_A.weight": np.zeros((2, 4), np.float32)}, "not a LoRA weight"),
        ({f"{PREFIX}q.lora_A.weight": np.zeros((2, 4), np.float32)}, "q has no lora_B"),
        ({A: np.zeros((2, 4), np.int32)}, "dtype 'I32'"),
        ({A: ..., B: ..., f"{DOWN}A.weight": ..., f"{DOWN}B.weight": ...}, "no tensors"),
    ],
)
@pytest.mark.scenario("F6")
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, changes, words):
    directory = _saved(tmp_path)
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path) | changes
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not ...}, path)
    with pytest.raises(AdapterError, match=words):
        load_peft(directory)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter_config\.json; .* sub-folder 'adapter'"):
        load_peft(_saved(tmp_path).parent)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").touch()
    with pytest.raises(AdapterError, match="pickle"):
        load_peft(tmp_path / "adapter")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = MultiLoRALinear(4, 6, rngs=rngs)
        self.down = MultiLoRALinear(4, 6, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, layers=1):
        self.layers = nnx.List([Block(nnx.Rngs(0)) for _ in range(layers)])


@pytest.mark.scenario("F6")
def test_the_model_it_is_meant_for_must_fit(tmp_path):
    directory = _saved(tmp_path)
    load_peft(directory, Model())
    with pytest.raises(AdapterError, match=r"also names 'layers\.1\.down'"):
        load_peft(directory, Model(layers=2))
    with pytest.raises(AdapterError, match=r"no module 'layers\.0\.down'"):
        load_peft(directory, Model(layers=0))
    wide = Model()
    wide.layers[0].up = MultiLoRALinear(4, 8, rngs=nnx.Rngs(0))
    with pytest.raises(AdapterError, match="4 to 6 values, the model's linear 4 to 8"):
        load_peft(directory, wide)
