"""Loading of directories: exact names and shapes or a refusal that says what is wrong."""

import inspect
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models import load_base
from tests.golden import tiny_llama
from tests.models.test_golden_logits import write_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSORS = tiny_llama.weights("tied")


def refusal(path) -> str:
    with pytest.raises(ModelError) as error:
        load_base(path)
    return str(error.value)


def save(directory, tensors):
    save_file(tensors, directory / SINGLE)


@pytest.fixture
def directory(tmp_path):
    return write_model(tmp_path, "tied")


def test_weights_lie_where_they_belong(directory):
    base = load_base(directory)
    layer = base.model.model.layers[1]
    kernel = layer.self_attn.k_proj.kernel[...]
    expected = TENSORS["model.layers.1.self_attn.k_proj.weight"].T
    np.testing.assert_array_equal(kernel, expected)
    assert (base.name, base.path) == (directory.name, str(directory))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(base.model))


@pytest.mark.parametrize("stored", [np.float16, jnp.bfloat16, np.float32])
def test_stored_dtypes(directory, stored):
    save(directory, {name: tensor.astype(stored) for name, tensor in TENSORS.items()})
    base = load_base(directory, "bfloat16")
    norm = base.model.model.norm.weight[...]
    assert norm.dtype == jnp.bfloat16
    expected = TENSORS["model.norm.weight"].astype(stored).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(norm), expected)


def test_missing_unexpected_and_misshapen_tensors_are_named(directory):
    changed = dict(TENSORS)
    del changed["model.norm.weight"], changed["model.layers.1.mlp.up_proj.weight"]
    changed["model.layers.7.mlp.up_proj.weight"] = np.zeros((1, 1), np.float32)
    name = "model.layers.0.self_attn.v_proj.weight"
    changed[name] = np.ascontiguousarray(changed[name].T)
    save(directory, changed)
    text = refusal(directory)
    assert "2 missing: model.layers.1.mlp.up_proj.weight; model.norm.weight" in text
    assert "1 unexpected: model.layers.7.mlp.up_proj.weight" in text
    assert f"1 misshapen: {name} is [32, 16], expected [16, 32]" in text


def test_many_names_are_counted(directory):
    save(directory, {"model.norm.weight": TENSORS["model.norm.weight"]})
    assert "19 missing: " in refusal(directory) and "and 14 more" in refusal(directory)


def test_a_copy_of_a_tied_head_is_accepted_and_another_head_refused(directory):
    embedding = TENSORS["model.embed_tokens.weight"]
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save(directory, TENSORS | inverse | {"lm_head.weight": embedding})
    assert load_base(directory).model.head_weight().shape == embedding.shape
    save(directory, TENSORS | {"lm_head.weight": embedding + 1})
    assert "tie_word_embeddings" in refusal(directory)


def test_damaged_files(directory):
    data = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(data[:-100])
    assert "not a readable safetensors file" in refusal(directory)
    (directory / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(directory)
    (directory / "config.json").write_text("[]")
    assert "expected a JSON object, got list" in refusal(directory)


def test_dtypes_that_are_no_weights(directory):
    save(directory, TENSORS | {"model.norm.weight": np.ones(32, np.int8)})
    assert "model.norm.weight is I8: expected one of" in refusal(directory)
    with pytest.raises(ModelError, match="dtype 'float16' is not supported"):
        inspect.unwrap(load_base)(directory, "float16")  # under the test suite's type checks


def test_wrong_places(tmp_path, directory):
    assert "no such model" in refusal(tmp_path / "nowhere")
    (directory / SINGLE).rename(directory / "pytorch_model.bin")
    assert "pickled" in refusal(directory)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "absent.safetensors"])
def test_index_leads_nowhere_else(directory, shard):
    save_file(TENSORS, directory.parent / "outside.safetensors")
    (directory / SINGLE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, shard)}))
    assert f"names {shard!r}, which is not in the directory" in refusal(directory)


def test_index_names_a_tensor_that_no_shard_has(directory):
    weight_map = dict.fromkeys([*TENSORS, "model.extra.weight"], SINGLE)
    (directory / SINGLE).rename(directory / "one.safetensors")
    weight_map = dict.fromkeys(weight_map, "one.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "model.extra.weight (1 such) in no shard" in refusal(directory)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "weight_map: expected an object of shards by tensor, got none"),
        ({"weight_map": {}}, "got none"),
        ({"weight_map": None}, "got none"),
        ({"weight_map": ["a"]}, "got list"),
        ({"weight_map": "one.safetensors"}, "got str"),
        ({"weight_map": {"a.weight": 3}}, "weight_map: a.weight: expected a file's name, got '3'"),
        ({"weight_map": {"a.weight": ["b"]}}, "weight_map: a.weight: expected a file's name"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_malformed_index(directory, index, words):
    (directory / SINGLE).rename(directory / "one.safetensors")
    (directory / INDEX).write_text(json.dumps(index))
    message = refusal(directory)
    assert words in message and INDEX in message


def test_generation_config_adds_end_tokens(directory):
    config = tiny_llama.CONFIGS["tied"] | {"eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert load_base(directory).config.eos_token_ids == (2, 5)


def test_tokenizer_of_a_directory(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        _ = load_base(directory).tokenizer
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }} b"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    base = load_base(directory)
    assert base.tokenizer is base.tokenizer
    assert (base.tokenizer.encode("a b"), base.tokenizer.eos_token_id) == ([0, 1], 2)
    message = [{"role": "user", "content": "a"}]
    assert base.tokenizer.apply_chat_template(message, tokenize=False) == "a b"
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        _ = load_base(directory).tokenizer


def test_tokenizer_libraries_are_imported_lazily():
    code = (
        "import sys, lorafusion_jax.models; print({'transformers', 'torch'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_library_that_is_not_needed_is_no_news():
    """Of Python too: the command line sets the same for the whole process."""
    code = (
        "import os; from lorafusion_jax.models import tokenizer; tokenizer._import_fast_class();"
        "print(os.environ.get('TRANSFORMERS_NO_ADVISORY_WARNINGS'))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    words = [sys.executable, "-c", code]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    assert "PyTorch" not in ran.stderr + ran.stdout and ran.stdout.strip() == "None"
