"""GGUF files, written here with the gguf package: weights, rotary layout, tokenizer, refusals."""

import numpy as np
import pytest

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models import ModelConfig, load_base
from tests.golden import tiny_llama
from tests.models.test_golden_logits import assert_golden, packed_logits

gguf = pytest.importorskip("gguf")

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
SPECIAL = ["<|end|>", "<|start|>"]


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{suffix}"
    _, _, index, kind = stem.split(".", 3)
    return f"blk.{index}.{NAMES[kind]}.{suffix}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half and row i of its second half become neighbours."""
    order = []
    per_head = rows.shape[0] // heads
    for head in range(heads):
        for i in range(per_head // 2):
            order += [head * per_head + i, head * per_head + per_head // 2 + i]
    return np.ascontiguousarray(rows[order])


def add_tokenizer(writer, pre="smollm"):
    """Bytes as tokens, two special ones and three merges."""
    from tokenizers import pre_tokenizers

    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["12", "Ġa", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["1 2", "Ġ a", "a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template(
        "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    )
    return tokens


def write_gguf(
    path, name, *, arch="llama", tokenizer=True, quantized=False, change=None, pre="smollm"
):
    config = tiny_llama.CONFIGS[name]
    parsed = ModelConfig.from_hf(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(parsed.vocab_size)
    writer.add_context_length(parsed.max_position_embeddings)
    writer.add_embedding_length(parsed.hidden_size)
    writer.add_block_count(parsed.num_hidden_layers)
    writer.add_feed_forward_length(parsed.intermediate_size)
    writer.add_head_count(parsed.num_attention_heads)
    writer.add_head_count_kv(parsed.num_key_value_heads)
    writer.add_rope_dimension_count(parsed.head_dim)
    writer.add_rope_freq_base(parsed.rope_theta)
    writer.add_layer_norm_rms_eps(parsed.rms_norm_eps)
    rope = config["rope_parameters"]["rope_type"]
    if rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_parameters"]["factor"])
    tensors = {gguf_name(key): value for key, value in tiny_llama.weights(name).items()}
    if rope == "llama3":
        plain = parsed.rope_theta ** -(np.arange(0, parsed.head_dim, 2) / parsed.head_dim)
        tensors["rope_freqs.weight"] = (plain / parsed.rope_frequencies()).astype(np.float32)
    add_tokenizer(writer, pre)
    if change is not None:
        change(writer, tensors)
    for key, value in tensors.items():
        if ".attn_q." in key:
            value = permuted(value, parsed.num_attention_heads)
        if ".attn_k." in key:
            value = permuted(value, parsed.num_key_value_heads)
        if quantized and value.shape[-1] % 32 == 0 and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", list(tiny_llama.CONFIGS))
def test_logits_equal_transformers(name, tmp_path):
    base = load_base(write_gguf(tmp_path / "model.gguf", name))
    assert_golden(packed_logits(base, name), name, "float32")


def test_quantized_weights_are_close(tmp_path):
    base = load_base(write_gguf(tmp_path / "model.gguf", "tied", quantized=True))
    exact = load_base(write_gguf(tmp_path / "exact.gguf", "tied"))
    logits, expected = packed_logits(base, "tied"), packed_logits(exact, "tied")
    error = np.abs(logits - expected).max()
    assert 1e-4 < error < 0.1


def test_configuration_and_names(tmp_path):
    base = load_base(write_gguf(tmp_path / "tiny.Q8_0.gguf", "tied"))
    assert base.name == "tiny.Q8_0" and base.config.tie_word_embeddings
    assert (base.config.bos_token_id, base.config.eos_token_ids) == (1, (0,))
    assert not load_base(
        write_gguf(tmp_path / "untied.gguf", "untied_odd")
    ).config.tie_word_embeddings


def test_tokenizer(tmp_path):
    """Digits stand alone (no merge of 1 and 2), spaces belong to words, bytes round-trip."""
    base = load_base(write_gguf(tmp_path / "model.gguf", "tied"))
    tokenizer = base.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12 ab")) == ["1", "2", "Ġa", "b"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab")) == ["ab"]
    text = "<|start|>né 🦄\n<|end|>"
    assert tokenizer.encode(text)[0] == 1 and tokenizer.encode(text)[-1] == 0
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "né 🦄\n"
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|start|>a<|end|>"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|end|>",
        "<|end|>",
        "<|start|>",
    )


def test_another_pre_tokenizer(tmp_path):
    """Control: without the digits rule the merge applies."""
    base = load_base(write_gguf(tmp_path / "model.gguf", "tied", pre="gpt-2"))
    assert base.tokenizer.convert_ids_to_tokens(base.tokenizer.encode("12")) == ["12"]


def refusal(path) -> str:
    with pytest.raises(ModelError) as error:
        _ = load_base(path).tokenizer
    return str(error.value)


def test_refusals(tmp_path):
    path = tmp_path / "model.gguf"
    assert "architecture 'qwen3'" in refusal(write_gguf(path, "tied", arch="qwen3"))
    assert "'llama-bpe' is not supported" in refusal(write_gguf(path, "tied", pre="llama-bpe"))

    def yarn(writer, tensors):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    assert "rope scaling 'yarn'" in refusal(write_gguf(path, "tied", change=yarn))

    def extra(writer, tensors):
        tensors["blk.0.attn_qkv.weight"] = tensors.pop("blk.0.attn_v.weight")

    text = refusal(write_gguf(path, "tied", change=extra))
    assert "missing: model.layers.0.self_attn.v_proj.weight" in text
    assert "unexpected: blk.0.attn_qkv.weight" in text
    path.write_bytes(path.read_bytes()[:1000])
    assert "not a readable GGUF file" in refusal(path)
    path.write_bytes(b"nonsense")
    assert "not a readable GGUF file" in refusal(path)
