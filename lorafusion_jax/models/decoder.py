"""A Llama-family decoder over one packed row of tokens, as explicit NNX modules.

Module paths are Hugging Face's (`model.layers.0.self_attn.q_proj`), so adapter paths are too.
There is no batch axis: T tokens of many samples lie in one row, and `Segments` says where each
sample starts. Every layer is a set of leaves of its own, never a slice of a stack: slices of frozen
weights inside a scan are copies. All layers share one traced function (`_run_layer`).

Normalization, rotary embedding and softmax are computed in float32 whatever the weights' dtype.
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lorafusion_jax.lora.linear import LoraContext, MultiLoRALinear, grouped_linear
from lorafusion_jax.models.attention import Segments, attention, cached_attention
from lorafusion_jax.models.config import ModelConfig

type Remat = Literal["none", "attention", "full"]
REMAT_POLICIES: tuple[str, ...] = get_args(Remat.__value__)

# Input groups: projections that read the same activation share dropout and one fused op.
_QKV, _O, _GATE_UP, _DOWN = range(4)
_SITES_PER_LAYER = 8


class Rotary(NamedTuple):
    """Cosine and sine of every token's rotary angles, f32 [T, head_dim / 2]."""

    cos: Float[Array, "T D_2"]
    sin: Float[Array, "T D_2"]


def rotate(x: Float[Array, "T H D"], rotary: Rotary) -> Float[Array, "T H D"]:
    """Rotates pairs (i, i + D / 2) of every head, in float32."""
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, cos.dtype)), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class KVCache(NamedTuple):
    """Keys and values of B sequences in one layer; row j holds position j."""

    k: Float[Array, "B L G D"]
    v: Float[Array, "B L G D"]


class RMSNorm(nnx.Module):
    """Root-mean-square normalization in float32."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "T d"]) -> Float[Array, "T d"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.weight[...].astype(wide.dtype)).astype(x.dtype)


class TokenEmbedding(nnx.Module):
    """Frozen table of token embeddings, [vocabulary, hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((vocab_size, hidden_size), dtype))

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T d"]:
        return self.weight[...][tokens]


class OutputHead(nnx.Module):
    """Frozen output head of a model that does not share it with the embedding, [vocabulary, d]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((vocab_size, hidden_size), dtype))


def _linear(use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
    return partial(MultiLoRALinear, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        linear = _linear(config.attention_bias, dtype, rngs)
        self.q_proj = linear(hidden, q_size)
        self.k_proj = linear(hidden, kv_size)
        self.v_proj = linear(hidden, kv_size)
        self.o_proj = linear(q_size, hidden)
        self.head_dim = config.head_dim

    def __call__(self, x, rotary: Rotary, segments: Segments, lora: LoraContext | None, site):
        q, k, v = self._project(x, rotary, lora, site)
        out = attention(q, k, v, segments)
        return self.o_proj(out.reshape(x.shape[0], -1), lora, site + _O)

    def decode(self, x, rotary: Rotary, cache: KVCache, positions, lora, site):
        """Adds the new tokens to the cache and attends to it."""
        batch, new = positions.shape
        q, k, v = (
            heads.reshape(batch, new, -1, self.head_dim)
            for heads in self._project(x, rotary, lora, site)
        )
        rows = jnp.arange(batch)[:, None]
        cache = KVCache(cache.k.at[rows, positions].set(k), cache.v.at[rows, positions].set(v))
        out = cached_attention(q, cache.k, cache.v, positions)
        return self.o_proj(out.reshape(x.shape[0], -1), lora, site + _O), cache

    def _project(self, x, rotary: Rotary, lora, site):
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            y.reshape(x.shape[0], -1, self.head_dim)
            for y in grouped_linear(linears, x, lora, site + _QKV)
        )
        return rotate(q, rotary), rotate(k, rotary), v


class MLP(nnx.Module):
    """Gated feed-forward block with SiLU."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        linear = _linear(config.mlp_bias, dtype, rngs)
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def __call__(self, x: Float[Array, "T d"], lora: LoraContext | None, site):
        gate, up = grouped_linear((self.gate_proj, self.up_proj), x, lora, site + _GATE_UP)
        return self.down_proj(jax.nn.silu(gate) * up, lora, site + _DOWN)


class DecoderLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, rotary: Rotary, segments: Segments, lora, site):
        x = x + self.attend(x, rotary, segments, lora, site)
        return x + self.mlp(self.post_attention_layernorm(x), lora, site)

    def attend(self, x, rotary: Rotary, segments: Segments, lora, site):
        return self.self_attn(self.input_layernorm(x), rotary, segments, lora, site)

    def decode(self, x, rotary: Rotary, cache: KVCache, positions, lora, site):
        attended, cache = self.self_attn.decode(
            self.input_layernorm(x), rotary, cache, positions, lora, site
        )
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), lora, site), cache


class DecoderStack(nnx.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nnx.List(
            DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)


class Decoder(nnx.Module):
    """A Llama-family language model.

    Args:
        config: its shape.
        dtype: dtype of weights and activations.
        rngs: source of the linears' initial values; embedding and head start at zero. Use
            `random_base` for a model with random weights and `load_base` for a real one.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.model = DecoderStack(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = OutputHead(config.vocab_size, config.hidden_size, dtype=dtype)
        self.config = config

    def __call__(
        self,
        tokens: Int[Array, " T"],
        positions: Int[Array, " T"],
        segments: Segments,
        lora: LoraContext | None = None,
        *,
        remat: Remat = "none",
    ) -> Float[Array, "T d"]:
        """Runs the decoder over one packed row.

        Args:
            tokens: token ids; padding rows may hold any valid id.
            positions: position of each token in its own sample.
            segments: where the samples lie.
            lora: routing of rows to the adapters in the linears, None for the base alone.
            remat: what the backward pass computes again instead of storing: "none"; "attention",
                the attention block of each layer; "full", each whole layer. Nothing quadratic in T
                is ever stored.

        Returns:
            The hidden state after the final norm; `logits` or `head_weight` take it further.

        Raises:
            ValueError: unknown remat policy.
        """
        if remat not in REMAT_POLICIES:
            raise ValueError(f"{remat=} is unknown: expected one of {REMAT_POLICIES}")
        x = self.model.embed_tokens(tokens)
        rotary = rotary_angles(self.config, positions)
        for index, layer in enumerate(self.model.layers):
            x = run_layer(layer, x, rotary, segments, lora, layer_site(index), remat=remat)
        return self.model.norm(x)

    def decode(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        caches: tuple[KVCache, ...],
        lora: LoraContext | None = None,
    ) -> tuple[Float[Array, "B S d"], tuple[KVCache, ...]]:
        """Runs S new tokens of B sequences with what the cache holds of them.

        A new token sees the cache rows up to its own position: those must have been written, by
        this call or earlier ones.

        Args:
            tokens: token ids.
            positions: position of each token in its sequence; also its row in the cache.
            caches: one per layer (`init_cache`).
            lora: routing of the B * S rows in C order.

        Returns:
            The hidden state after the final norm, and the caches with the new tokens.
        """
        x = self.model.embed_tokens(tokens.reshape(-1))
        rotary = rotary_angles(self.config, positions.reshape(-1))
        updated = []
        for index, (layer, cache) in enumerate(zip(self.model.layers, caches, strict=True)):
            graphdef, state = nnx.split(layer)
            x, cache = _decode_layer(
                graphdef, state, x, rotary, cache, positions, lora, layer_site(index)
            )
            updated.append(cache)
        return self.model.norm(x).reshape(*tokens.shape, -1), tuple(updated)

    def init_cache(self, batch: int, length: int) -> tuple[KVCache, ...]:
        """Returns an empty cache per layer for `batch` sequences of up to `length` tokens."""
        config = self.config
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        dtype = self.model.embed_tokens.weight[...].dtype
        return tuple(
            KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in self.model.layers
        )

    def head_weight(self) -> Float[Array, "V d"]:
        """Returns the output head, vocabulary first as Hugging Face stores it: never a copy.

        Tied models return the embedding itself. Logits are hidden @ head_weight().T.
        """
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight[...]

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch V"]:
        """Applies the output head; float32 logits (float64 for float64 models)."""
        acc = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", hidden, self.head_weight(), preferred_element_type=acc)


def rotary_angles(config: ModelConfig, positions: Int[Array, " T"]) -> Rotary:
    """Returns cosine and sine of the rotary angles at the given positions."""
    frequencies = jnp.asarray(config.rope_frequencies())
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def layer_site(layer: int | Int[Array, ""]) -> Int[Array, ""]:
    """Returns the first of a layer's sites, which tell dropout masks apart."""
    return jnp.asarray(_SITES_PER_LAYER * layer, jnp.int32)


def run_layer(
    layer: DecoderLayer,
    x: Float[Array, "T d"],
    rotary: Rotary,
    segments: Segments,
    lora: LoraContext | None,
    site: Int[Array, ""],
    *,
    remat: Remat = "none",
) -> Float[Array, "T d"]:
    """Runs one layer under a remat policy; `site` is its `layer_site`."""
    graphdef, state = nnx.split(layer)
    return _run_layer(graphdef, remat, state, x, rotary, segments, lora, site)


# One traced function for all layers: they have the same structure, and `site` is traced.
@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(graphdef, remat: str, state, x, rotary, segments, lora, site):
    args = (rotary, segments, lora, site)
    if remat == "full":
        return jax.checkpoint(_layer, static_argnums=0)(graphdef, state, x, *args)
    if remat == "attention":
        attended = jax.checkpoint(_attend, static_argnums=0)(graphdef, state, x, *args)
        layer = nnx.merge(graphdef, state)
        x = x + attended
        return x + layer.mlp(layer.post_attention_layernorm(x), lora, site)
    return _layer(graphdef, state, x, *args)


def _layer(graphdef, state, x, *args):
    return nnx.merge(graphdef, state)(x, *args)


def _attend(graphdef, state, x, *args):
    return nnx.merge(graphdef, state).attend(x, *args)


@partial(jax.jit, static_argnums=0)
def _decode_layer(graphdef, state, x, rotary, cache, positions, lora, site):
    layer = nnx.merge(graphdef, state)
    return layer.decode(x, rotary, cache, positions, lora, site)
