"""GGUF files, written here with the gguf package: weights, rotary layout, tokenizer, refusals."""

import numpy as np
import pytest

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models import ModelConfig, load_base
from lorafusion_jax.models.gguf_weights import unpermute
from tests.golden import tiny_families, tiny_llama
from tests.models import test_families
from tests.models.test_golden_logits import assert_golden, packed_logits

gguf = pytest.importorskip("gguf")

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
END_TOKENS = {"bos_token_id": 1, "eos_token_id": 0}
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
    models = tiny_llama if name in tiny_llama.CONFIGS else tiny_families
    config = models.CONFIGS[name]
    parsed = ModelConfig.from_hf(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(parsed.vocab_size)
    writer.add_context_length(parsed.max_position_embeddings)
    writer.add_embedding_length(parsed.hidden_size)
    writer.add_block_count(parsed.num_hidden_layers)
    writer.add_feed_forward_length(parsed.intermediate_size)
    writer.add_head_count(parsed.num_attention_heads)
    writer.add_head_count_kv(parsed.num_key_value_heads)
    writer.add_rope_dimension_count(parsed.head_dim) if arch == "llama" else None
    writer.add_key_length(parsed.head_dim)
    writer.add_rope_freq_base(parsed.rope_theta)
    writer.add_layer_norm_rms_eps(parsed.rms_norm_eps)
    rope = config["rope_parameters"]["rope_type"]
    if rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config["rope_parameters"]["factor"])
    tensors = {gguf_name(key): value for key, value in models.weights(name).items()}
    if rope == "llama3":
        plain = parsed.rope_theta ** -(np.arange(0, parsed.head_dim, 2) / parsed.head_dim)
        tensors["rope_freqs.weight"] = (plain / parsed.rope_frequencies()).astype(np.float32)
    add_tokenizer(writer, pre)
    if change is not None:
        change(writer, tensors)
    for key, value in tensors.items():
        if ".attn_q." in key and arch == "llama":
            value = permuted(value, parsed.num_attention_heads)
        if ".attn_k." in key and arch == "llama":
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


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_other_families_equal_transformers(name, tmp_path):
    base = load_base(write_gguf(tmp_path / "model.gguf", name, arch=name))
    # GGUF keeps the small number in float32.
    hugging_face = (
        tiny_families.CONFIGS[name] | END_TOKENS | {"rms_norm_eps": float(np.float32(1e-5))}
    )
    assert base.config == ModelConfig.from_hf(hugging_face)
    test_families.assert_golden(test_families.logits_of(base, name), name, "float32")


def test_rows_of_other_families_are_not_moved(tmp_path):
    """Control: Llama's layout would be wrong for them."""
    base = load_base(write_gguf(tmp_path / "model.gguf", "qwen3", arch="qwen3"))
    kernel = base.model.model.layers[0].self_attn.q_proj.kernel
    kernel.set_value(unpermute(np.asarray(kernel[...]).T, 3).T)
    with pytest.raises(AssertionError, match="error beyond"):
        test_families.assert_golden(test_families.logits_of(base, "qwen3"), "qwen3", "float32")


def test_qwens_words(tmp_path):
    """As transformers' own tokenizer of the family cuts them."""
    import transformers

    ours = load_base(write_gguf(tmp_path / "model.gguf", "qwen2", arch="qwen2", pre="qwen2"))
    backend = ours.tokenizer.backend_tokenizer
    theirs = transformers.Qwen2Tokenizer(vocab=ours.tokenizer.get_vocab(), merges=[])
    text = "I'LL pay 1234 €/kg,\n\n  don't!!\r\n\tÅngström née  x"
    cut = [
        [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(text))]
        for tokenizer in (backend, theirs.backend_tokenizer)
    ]  # fmt: skip
    assert cut[0] == cut[1] and len(cut[0]) > 15
    plain = load_base(write_gguf(tmp_path / "plain.gguf", "qwen2", arch="qwen2", pre="gpt-2"))
    other = plain.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in other] != cut[0]


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
    assert "architecture 'phi3'" in refusal(write_gguf(path, "tied", arch="phi3"))
    assert "SentencePiece" in refusal(write_gguf(path, "tied", arch="gemma2"))
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
