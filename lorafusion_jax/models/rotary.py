"""Rotary embedding, and what a layer's place decides: its angles and whether it slides."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lorafusion_jax.models.config import ModelConfig


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


class LayerView(NamedTuple):
    """What a layer's place in the model decides about its attention.

    Attributes:
        rotary: its rotary angles.
        slides: whether its sliding window applies, for a layer that stands for several places; None
            where the layer itself knows.
    """

    rotary: Rotary
    slides: Bool[Array, ""] | None = None


class RotaryTables(NamedTuple):
    """Rotary angles of the layers without a window, and of those with one if they differ."""

    whole: Rotary
    local: Rotary | None

    def of(self, slides: bool) -> Rotary:
        """Returns the angles of one layer."""
        return self.local if slides and self.local is not None else self.whole


def rotary_tables(config: ModelConfig, positions: Int[Array, " T"]) -> RotaryTables:
    """Returns cosine and sine of the rotary angles at the given positions."""

    def angles(frequencies: np.ndarray) -> Rotary:
        turned = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)
        return Rotary(jnp.cos(turned), jnp.sin(turned))

    differs = config.local_rope_theta is not None and any(config.sliding_layers)
    local = angles(config.rope_frequencies(local=True)) if differs else None
    return RotaryTables(angles(config.rope_frequencies()), local)


def traced_view(config: ModelConfig, tables: RotaryTables, layer: Int[Array, ""]) -> LayerView:
    """Returns the view of a layer whose number is only known at run time.

    The layer must have been made with the window of the model.
    """
    if not config.mixed_layers:
        return LayerView(tables.of(config.is_sliding(0)))
    slides = jnp.asarray(config.sliding_layers)[layer]
    rotary = tables.whole
    if tables.local is not None:
        rotary = jax.tree.map(partial(jnp.where, slides), tables.local, tables.whole)
    return LayerView(rotary, slides)
