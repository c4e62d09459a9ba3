"""A decoder over one packed row of tokens, as explicit NNX modules.

What model families differ in comes from features of `ModelConfig`; no family is named here.

Module paths are Hugging Face's (`model.layers.0.self_attn.q_proj`), so adapter paths are too.
There is no batch axis: T tokens of many samples lie in one row, and `Segments` says where each
sample starts. Every layer is a set of leaves of its own, never a slice of a stack: slices of frozen
weights inside a scan are copies. Layers of one structure share one traced function (`_run_layer`).

Normalization, rotary embedding and softmax are computed in float32 whatever the weights' dtype.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lorafusion_jax.lora.linear import (
    LoraContext,
    MultiLoRALinear,
    can_join,
    grouped_linear,
    joined_mlp,
)
from lorafusion_jax.models.attention import Segments, attention_and_flags, cached_attention
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.fused import norm_beside, rms_norm
from lorafusion_jax.models.rotary import LayerView, rotary_tables, rotate
from pallas_kernels.activation import Activation, gated

type Remat = Literal["none", "mlp", "attention", "full"]
REMAT_POLICIES: tuple[str, ...] = get_args(Remat.__value__)

# Input groups: projections that read the same activation share dropout and one fused op.
_QKV, _O, _GATE_UP, _DOWN = range(4)
_SITES_PER_LAYER = 8


class KVCache(NamedTuple):
    """Keys and values of B sequences in one layer; row j holds position j."""

    k: Float[Array, "B L G D"]
    v: Float[Array, "B L G D"]


class RMSNorm(nnx.Module):
    """Root-mean-square normalization of the last axis in float32, times offset + weight."""

    def __init__(self, size: int, eps: float, offset: float = 0.0, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.full(size, 1 - offset, dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        acc = jnp.promote_types(x.dtype, jnp.float32)
        return rms_norm(x, self.offset + self.weight[...].astype(acc), self.eps)

    def beside(self, x: Float[Array, "T d"]) -> tuple[Float[Array, "T d"], Float[Array, "T d"]]:
        """Returns x, for what else it is used for, and the norm of it: see `norm_beside`."""
        return norm_beside(x, self.weight[...], self.eps, self.offset)


def final_norm(config: ModelConfig, *, dtype: DTypeLike) -> RMSNorm:
    """Returns the norm between the last layer and the head, its weight yet to be set."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset, dtype=dtype)


class TokenEmbedding(nnx.Module):
    """Frozen table of token embeddings, [vocabulary, hidden], and what they are multiplied by."""

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((vocab_size, hidden_size), dtype))
        self.scale = scale

    def __call__(self, tokens: Int[Array, " T"]) -> Float[Array, "T d"]:
        return scaled_embedding(self.weight[...][tokens], self.scale)


def scaled_embedding(x: Float[Array, "T d"], scale: float) -> Float[Array, "T d"]:
    """Multiplies embedded tokens by a scale that is rounded to their dtype first."""
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


class OutputHead(nnx.Module):
    """Frozen output head of a model that does not share it with the embedding, [vocabulary, d]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.zeros((vocab_size, hidden_size), dtype))


def _linear(use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
    return partial(MultiLoRALinear, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary embedding.

    Args:
        config: of the model.
        window: tokens that a token sees at most, where `LayerView.slides` does not say otherwise.
    """

    def __init__(
        self, config: ModelConfig, window: int | None, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        hidden = config.hidden_size
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        qkv = _linear(config.attention_bias or config.qkv_bias, dtype, rngs)
        self.q_proj = qkv(hidden, q_size)
        self.k_proj = qkv(hidden, kv_size)
        self.v_proj = qkv(hidden, kv_size)
        self.o_proj = _linear(config.attention_bias, dtype, rngs)(q_size, hidden)
        if config.qk_norm:
            norm = (config.head_dim, config.rms_norm_eps, config.norm_offset)
            self.q_norm = RMSNorm(*norm, dtype=dtype)
            self.k_norm = RMSNorm(*norm, dtype=dtype)
        self.head_dim = config.head_dim
        self.has_norms = config.qk_norm
        self.window = window
        self.softcap = config.attention_softcap
        self.scale = config.attention_scale

    def __call__(self, x, view: LayerView, segments: Segments, lora: LoraContext | None, site):
        q, k, v = self._project(x, lora, site)
        attend = self._by_window(view, partial(attention_and_flags, rotary=view.rotary))
        out, bad = attend(q, k, v, segments)
        added = self.o_proj(out.reshape(x.shape[0], -1), lora, site + _O)
        # XLA does this where it adds up the residual stream.
        return added + jnp.where(bad, jnp.nan, 0).astype(added.dtype)[:, None]

    def decode(self, x, view: LayerView, cache: KVCache, positions, lora, site):
        """Adds the new tokens to the cache and attends to it."""
        batch, new = positions.shape
        q, k, v = self._project(x, lora, site)
        q, k, v = (
            heads.reshape(batch, new, -1, self.head_dim)
            for heads in (rotate(q, view.rotary), rotate(k, view.rotary), v)
        )
        rows = jnp.arange(batch)[:, None]
        cache = KVCache(cache.k.at[rows, positions].set(k), cache.v.at[rows, positions].set(v))
        out = self._by_window(view, cached_attention)(q, cache.k, cache.v, positions)
        return self.o_proj(out.reshape(x.shape[0], -1), lora, site + _O), cache

    def _by_window(self, view: LayerView, attend: Callable) -> Callable:
        """The attention of this layer; a choice at run time where it may slide or not.

        A window is part of the program, for kernels that skip what lies beyond it.
        """
        attend = partial(attend, softcap=self.softcap, scale=self.scale)
        if self.window is None:
            return attend
        sliding = partial(attend, window=self.window)
        if view.slides is None:
            return sliding
        return partial(jax.lax.cond, view.slides, sliding, attend)

    def _project(self, x, lora, site):
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            y.reshape(x.shape[0], -1, self.head_dim)
            for y in grouped_linear(linears, x, lora, site + _QKV)
        )
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nnx.Module):
    """Gated feed-forward block."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        linear = _linear(config.mlp_bias, dtype, rngs)
        self.gate_proj = linear(hidden, inner)
        self.up_proj = linear(hidden, inner)
        self.down_proj = linear(inner, hidden)
        self.activation: Activation = config.activation

    def __call__(self, x: Float[Array, "T d"], lora: LoraContext | None, site):
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        if lora is not None and can_join(linears):
            return joined_mlp(linears, x, lora, (site + _GATE_UP, site + _DOWN), self.activation)
        gate, up = grouped_linear(linears[:2], x, lora, site + _GATE_UP)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        return self.down_proj(gated(gate, up, self.activation), lora, site + _DOWN)


class DecoderLayer(nnx.Module):
    """One pre-norm transformer layer, with norms after its two blocks as well if so configured.

    Hugging Face calls the norm before the feed-forward block `post_attention_layernorm`, except
    where there is one after the attention.

    Args:
        config: of the model.
        window: sliding window of the layer (`ModelConfig.layer_window`); for a layer that stands
            for several places, the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        window: int | None = None,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        norm = partial(
            RMSNorm, config.hidden_size, config.rms_norm_eps, config.norm_offset, dtype=dtype
        )
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, window, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.post_norms = config.post_norms

    def __call__(self, x, view: LayerView, segments: Segments, lora, site):
        x = self.attend(x, view, segments, lora, site)
        return self.feed_forward(x, lora, site)

    def attend(self, x, view: LayerView, segments: Segments, lora, site):
        """x and what the attention block adds to it."""
        x, normed = self.input_layernorm.beside(x)
        out = self.self_attn(normed, view, segments, lora, site)
        return x + (self.post_attention_layernorm(out) if self.post_norms else out)

    def feed_forward(self, x, lora, site):
        """x and what the feed-forward block adds to it."""
        if not self.post_norms:
            x, normed = self.post_attention_layernorm.beside(x)
            return x + self.mlp(normed, lora, site)
        x, normed = self.pre_feedforward_layernorm.beside(x)
        out = self.mlp(normed, lora, site)
        return x + self.post_feedforward_layernorm(checkpoint_name(out, "down"))

    def decode(self, x, view: LayerView, cache: KVCache, positions, lora, site):
        """The layer over new tokens, and the cache with them."""
        out, cache = self.self_attn.decode(
            self.input_layernorm(x), view, cache, positions, lora, site
        )
        x = x + (self.post_attention_layernorm(out) if self.post_norms else out)
        return self.feed_forward(x, lora, site), cache


class DecoderStack(nnx.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = TokenEmbedding(
            config.vocab_size, config.hidden_size, config.embedding_scale, dtype=dtype
        )
        self.layers = nnx.List(
            DecoderLayer(config, config.layer_window(i), dtype=dtype, rngs=rngs)
            for i in range(config.num_hidden_layers)
        )
        self.norm = final_norm(config, dtype=dtype)


class Decoder(nnx.Module):
    """A causal language model.

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
            remat: what the backward pass computes again instead of storing: "none"; "mlp", norms
                and activations of the feed-forward blocks, but no large product; "attention", also
                the whole attention block of each layer; "full", each whole layer. Nothing quadratic
                in T is ever stored.

        Returns:
            The hidden state after the final norm; `logits` or `head_weight` take it further.

        Raises:
            ValueError: unknown remat policy.
        """
        if remat not in REMAT_POLICIES:
            raise ValueError(f"{remat=} is unknown: expected one of {REMAT_POLICIES}")
        x = self.model.embed_tokens(tokens)
        tables = rotary_tables(self.config, positions)
        for index, layer in enumerate(self.model.layers):
            view = LayerView(tables.of(self.config.is_sliding(index)))
            x = run_layer(layer, x, view, segments, lora, layer_site(index), remat=remat)
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
        tables = rotary_tables(self.config, positions.reshape(-1))
        updated = []
        for index, (layer, cache) in enumerate(zip(self.model.layers, caches, strict=True)):
            graphdef, state = nnx.split(layer)
            view = LayerView(tables.of(self.config.is_sliding(index)))
            x, cache = _decode_layer(
                graphdef, state, x, view, cache, positions, lora, layer_site(index)
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
        head = self.head_weight()
        logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=acc)
        if (cap := self.config.logit_softcap) is None:
            return logits
        return cap * jnp.tanh(logits / cap)


def layer_site(layer: int | Int[Array, ""]) -> Int[Array, ""]:
    """Returns the first of a layer's sites, which tell dropout masks apart."""
    return jnp.asarray(_SITES_PER_LAYER * layer, jnp.int32)


def run_layer(
    layer: DecoderLayer,
    x: Float[Array, "T d"],
    view: LayerView,
    segments: Segments,
    lora: LoraContext | None,
    site: Int[Array, ""],
    *,
    remat: Remat = "none",
) -> Float[Array, "T d"]:
    """Runs one layer under a remat policy; `site` is its `layer_site`."""
    graphdef, state = nnx.split(layer)
    return _run_layer(graphdef, remat, state, x, view, segments, lora, site)


# One traced function for all layers of a structure: `view` and `site` are traced.
@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(graphdef, remat: str, state, x, view, segments, lora, site):
    args = (view, segments, lora, site)
    if remat == "full":
        return jax.checkpoint(_layer, static_argnums=0)(graphdef, state, x, *args)
    if remat in ("mlp", "attention"):
        attend = jax.checkpoint(_attend, static_argnums=0) if remat == "attention" else _attend
        x = attend(graphdef, state, x, *args)
        keep = jax.checkpoint_policies.save_only_these_names("gate", "up", "down")
        feed_forward = jax.checkpoint(_feed_forward, static_argnums=0, policy=keep)
        return feed_forward(graphdef, state, x, lora, site)
    return _layer(graphdef, state, x, *args)


def _layer(graphdef, state, x, *args):
    return nnx.merge(graphdef, state)(x, *args)


def _attend(graphdef, state, x, *args):
    return nnx.merge(graphdef, state).attend(x, *args)


def _feed_forward(graphdef, state, x, lora, site):
    return nnx.merge(graphdef, state).feed_forward(x, lora, site)


@partial(jax.jit, static_argnums=0)
def _decode_layer(graphdef, state, x, view, cache, positions, lora, site):
    layer = nnx.merge(graphdef, state)
    return layer.decode(x, view, cache, positions, lora, site)
