"""A wider random model against transformers, live: packed logits and greedy generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax.generate import generate
from lorafusion_jax.models import load_base
from tests.models.tiny import packed
from tests.tolerance import assert_error_ratio

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

LENGTHS, ROWS = (70, 33, 20), 128


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model that transformers itself initialised and saved."""
    import transformers

    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = transformers.LlamaConfig(
        vocab_size=503,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=rope,
        initializer_range=0.1,
        eos_token_id=1,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def torch_logits(directory, samples, dtype) -> np.ndarray:
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        rows = [model(torch.from_numpy(tokens)[None]).logits[0] for tokens in samples]
    return torch.cat(rows).to(torch.float64).numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits(directory, rng, dtype):
    samples = [rng.integers(0, 503, length) for length in LENGTHS]
    base = load_base(directory, dtype)
    tokens = np.zeros(ROWS, np.int32)
    tokens[: sum(LENGTHS)] = np.concatenate(samples)
    graphdef, state = nnx.split(base.model)

    @jax.jit
    def run(state, tokens, where):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, *where))

    with jax.default_matmul_precision("highest"):
        logits = run(state, jnp.asarray(tokens), packed(LENGTHS, ROWS))[: sum(LENGTHS)]
    truth = torch_logits(directory, samples, torch.float64)
    reference = torch_logits(directory, samples, getattr(torch, dtype))
    assert_error_ratio(np.asarray(logits), reference, truth)


def test_greedy_generation(directory, rng):
    import transformers

    class Numbers:
        eos_token_id = 1

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    base = dataclasses.replace(load_base(directory), make_tokenizer=Numbers)
    prompts = [rng.integers(2, 503, length).tolist() for length in (5, 17)]
    texts = generate(base, None, prompts, max_new_tokens=12)
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
        expected = [int(i) for i in out[len(prompt) :] if i != 1]
        assert text == " ".join(map(str, expected))
