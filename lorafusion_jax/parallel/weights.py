"""Frozen weights on the mesh: each layer on its stage, vocabulary split over stages."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, PyTree

from lorafusion_jax.models import ModelConfig
from lorafusion_jax.parallel.layout import Layout
from lorafusion_jax.parallel.mesh import PER_STAGE, REPLICATED, STAGE
from lorafusion_jax.parallel.stage import LayerWeights, layer_shapes
from lorafusion_jax.parallel.state import mesh_sizes
from lorafusion_jax.parallel.vocabulary import padded_vocabulary


class Frozen(NamedTuple):
    """The frozen weights; axis 0 of all but the norm concatenates the stages.

    Attributes:
        layers: arrays of each layer place.
        norm: of the hidden states before the head.
        embedding: this stage's rows of the embedding.
        head: this stage's rows of the head, None where it is the embedding.
    """

    layers: list[LayerWeights]
    norm: Float[Array, " d"]
    embedding: Float[Array, "V_S d"]
    head: Float[Array, "V_S d"] | None

    @property
    def head_rows(self) -> Float[Array, "V_S d"]:
        """The head, tied or not."""
        return self.embedding if self.head is None else self.head


def frozen_specs(frozen: Frozen) -> PyTree:
    """Returns how the weights lie on the mesh."""
    return jax.tree.map(lambda _: PER_STAGE, frozen)._replace(norm=REPLICATED)


def random_weights(
    config: ModelConfig, dtype: jnp.dtype, layout: Layout, mesh: Mesh, seed: int
) -> Frozen:
    """Makes random weights on their devices, for benchmarks: never whole anywhere.

    Unlike those of `random_base`, they depend on the number of stages.
    """
    stages = mesh_sizes(mesh)[1]
    shapes = layer_shapes(config, dtype)
    root = jax.random.key(seed, impl="threefry2x32")
    stage_key = NamedSharding(mesh, PER_STAGE)

    @cache
    def maker(shape: tuple[int, ...], fan_in: int) -> Callable[[Array, Array], Array]:
        """One program for all tensors of a shape."""

        def local(root: Array, number: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(root, number), jax.lax.axis_index(STAGE))
            return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

        make = jax.shard_map(
            local, mesh=mesh, in_specs=REPLICATED, out_specs=PER_STAGE, check_vma=False
        )
        return jax.jit(make, out_shardings=stage_key)

    def normal(number: int, shape: tuple[int, ...], fan_in: int) -> Array:
        made = maker(shape, fan_in)(root, jnp.uint32(number))
        # See `models.weights.random_decoder`.
        return jax.block_until_ready(made)

    layers: list[LayerWeights] = []
    number = 0
    for _ in range(layout.places):
        weights: LayerWeights = {}
        for name, shape in shapes.items():
            number += 1
            if name.endswith("norm.weight"):
                ones = jnp.full(stages * shape.shape[0], 1 - config.norm_offset, dtype)
                weights[name] = jax.device_put(ones, stage_key)
            else:
                weights[name] = normal(number, shape.shape, shape.shape[0])
        layers.append(weights)
    d, share = config.hidden_size, padded_vocabulary(config.vocab_size, stages) // stages
    ones = jnp.full(d, 1 - config.norm_offset, dtype)
    norm = jax.device_put(ones, NamedSharding(mesh, REPLICATED))
    embedding = normal(number + 1, (share, d), d)
    head = None if config.tie_word_embeddings else normal(number + 2, (share, d), d)
    return Frozen(layers, norm, embedding, head)
