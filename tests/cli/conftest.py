"""A base model of two layers, data for three jobs and a configuration, made in a second."""

import json
from pathlib import Path

import numpy as np
import pytest

from lorafusion_jax.cli import main

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf"}


def write_tokenizer(directory: Path) -> int:
    """Writes a byte-level tokenizer; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*WORDS, *WORDS.values()] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(directory)
    return len(fast)


def write_model(directory: Path, seed: int = 0) -> Path:
    """Writes a random Llama of two layers as a Hugging Face directory."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    vocab = write_tokenizer(directory)
    d, heads, kv_heads, head_dim, ffn, layers = 32, 2, 1, 16, 48, 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (heads * head_dim, d),
            f"{at}.self_attn.k_proj.weight": (kv_heads * head_dim, d),
            f"{at}.self_attn.v_proj.weight": (kv_heads * head_dim, d),
            f"{at}.self_attn.o_proj.weight": (d, heads * head_dim),
            f"{at}.mlp.gate_proj.weight": (ffn, d),
            f"{at}.mlp.up_proj.weight": (ffn, d),
            f"{at}.mlp.down_proj.weight": (d, ffn),
            f"{at}.input_layernorm.weight": (d,),
            f"{at}.post_attention_layernorm.weight": (d,),
        }
    tensors = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Returns the directory of a random two-layer Llama."""
    return write_model(tmp_path_factory.mktemp("base") / "tiny-llama")


CONFIG = """\
version: 1
base: {{model: {model}, dtype: float32}}
output: run
batching: {{tokens_per_microbatch: 128, max_length: 48, tile: 16}}
report: {{every: 1}}
defaults:
  lora: {{r: 4, alpha: 8}}
  optim: {{lr: 1.0e-2}}
  train: {{max_steps: 4, global_batch_size: 2}}
  eval: {{split: 2, every: 2}}
  save: {{every: 2}}
jobs:
  - name: numbers
    data: {{path: data/numbers.jsonl}}
  - name: chat
    data: {{path: data/chat.jsonl}}
    lora: {{r: 2, dropout: 0.1}}
    train: {{max_steps: 3}}
  - name: plain
    data: {{path: data/plain.jsonl}}
    train: {{max_steps: 2, global_batch_size: 3}}
"""


def write_project(folder: Path, model: Path) -> Path:
    """Writes data and configuration; returns the configuration's path."""
    pairs = list(WORDS.items()) * 2
    write_jsonl(
        folder / "data/numbers.jsonl",
        [{"prompt": f"German for {a} =", "completion": f" {b}"} for a, b in pairs],
    )
    write_jsonl(
        folder / "data/chat.jsonl",
        [
            {"messages": [{"role": "user", "content": b}, {"role": "assistant", "content": a}]}
            for a, b in pairs
        ],
    )
    write_jsonl(folder / "data/plain.jsonl", [{"text": f"{a} is {b}"} for a, b in pairs])
    path = folder / "lorafusion.yaml"
    path.write_text(CONFIG.format(model=model))
    return path


@pytest.fixture(scope="session")
def make_project(tiny_model):
    """Writes a project of three tiny jobs into a folder; returns its configuration."""
    return lambda folder: write_project(folder, tiny_model)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, make_project):
    """Returns (configuration, run folder) of three adapters trained by the command."""
    config = make_project(tmp_path_factory.mktemp("project"))
    assert main(["train", str(config), "--plain", "--samples", "1"]) == 0
    return config, config.parent / "run"


@pytest.fixture
def project(tmp_path, make_project) -> Path:
    """Returns the configuration of a fresh project of three tiny jobs."""
    return make_project(tmp_path)


@pytest.fixture
def lorafusion(capsys):
    """Runs the command in this process: lorafusion(*words) -> (exit code, stdout, stderr)."""

    def run(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run
