"""What one stage computes: its decoder layers, forward and backward, without any exchange.

The backward of a microbatch runs ticks after its forward. What must wait in between goes through a
ring buffer: everything the backward needs (`save`), or only the stage's input, from which the
forward is computed again (`recompute`). Frozen weights, adapters and whatever can be rebuilt from
the schedule's row never enter the ring.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from lorafusion_jax.lora.bank import AdapterBank, lora_context, multi_linears
from lorafusion_jax.lora.linear import LoraContext
from lorafusion_jax.models.attention import Demands, Segments
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import (
    DecoderLayer,
    Remat,
    final_norm,
    layer_site,
    run_layer,
)
from lorafusion_jax.models.rotary import RotaryTables, rotary_tables, traced_view
from lorafusion_jax.parallel.layout import suffixes_at
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.optimizer import Adapters

type Residuals = Literal["save", "recompute"]
type LayerWeights = dict[str, Array]
"""Frozen arrays of one layer by their path inside it."""

type Rings = list[list[Array]]
"""What layers keep of several microbatches: of each place, arrays with a leading ring axis."""


class RowInputs(NamedTuple):
    """What layers need to know of a microbatch beside its hidden states."""

    rotary: RotaryTables
    segments: Segments
    context: LoraContext | None
    ratios: dict[str, Float[Array, " slots"]]


@dataclass(frozen=True)
class StageModel:
    """The layers of one stage; the same program on every stage.

    Attributes:
        config: shape of the whole model.
        dtype: of weights and activations.
        places: layer places of a stage.
        place_paths: modules with adapters (`Layout.place_paths`).
        residuals: what waits for the backward.
        remat: what each layer place computes again in the backward rather than keep.
        deterministic: take only what repeats its bits.
    """

    config: ModelConfig
    dtype: jnp.dtype
    places: int
    place_paths: tuple[str, ...]
    residuals: Residuals
    remat: tuple[Remat, ...]
    deterministic: bool = False

    @cached_property
    def _graphdefs(self) -> tuple[nnx.GraphDef, ...]:
        return tuple(
            _layer_structure(self.config, self.dtype, suffixes_at(place, self.place_paths))
            for place in range(self.places)
        )

    def inputs(self, batch: PackedBatch, bank: AdapterBank, *, train: bool) -> RowInputs:
        """Rebuilds from a schedule row what its layers need."""
        demands = Demands(self.deterministic, batch.longest.rows)
        return RowInputs(
            rotary_tables(self.config, batch.positions),
            Segments(batch.segment_start, batch.segment_offsets, demands),
            lora_context(bank, batch.tile_adapter, batch.row_key, train=train),
            bank.ratios,
        )

    def forward(
        self,
        x: Float[Array, "C d"],
        adapters: Adapters,
        weights: Sequence[LayerWeights],
        inputs: RowInputs,
        first_layer: Int[Array, ""],
    ) -> Float[Array, "C d"]:
        """Runs the layers of a stage."""
        for place in range(self.places):
            part = self._adapters_at(place, adapters)
            x = self._run(place, "none", x, part, weights[place], inputs, first_layer + place)
        return x

    def forward_saving(
        self,
        rings: Rings,
        at: Int[Array, ""],
        x: Float[Array, "C d"],
        adapters: Adapters,
        weights: Sequence[LayerWeights],
        inputs: RowInputs,
        first_layer: Int[Array, ""],
    ) -> tuple[Float[Array, "C d"], Rings]:
        """Runs `forward`; puts what waits for the backward into the rings, at a place of theirs."""
        filled = []
        for place, ring in enumerate(rings):
            part = self._adapters_at(place, adapters)
            args = (x, part, weights[place], inputs, first_layer + place)
            x, pullback = self._vjp(place, *args)
            kept = _waiting(place, pullback)
            ring = [put_at(whole, one, at) for whole, one in zip(ring, kept, strict=True)]
            # XLA takes a write for a new ring and puts it off: without the barrier what all layers
            # keep exists twice at the end of the forward.
            x, ring = lax.optimization_barrier((x, ring))
            filled.append(ring)
        return x, filled

    def backward_saved(
        self,
        rings: Rings,
        at: Int[Array, ""],
        dy: Float[Array, "C d"],
        x: Float[Array, "C d"],
        adapters: Adapters,
        weights: Sequence[LayerWeights],
        inputs: RowInputs,
        first_layer: Int[Array, ""],
    ) -> tuple[Float[Array, "C d"], Adapters]:
        """Returns the gradients of input and adapters from what `forward_saving` kept."""
        grads: Adapters = {"a": {}, "b": {}}
        for place in reversed(range(self.places)):
            part = self._adapters_at(place, adapters)
            args = (x, part, weights[place], inputs, first_layer + place)
            # Traced for its structure only: what it computes is not used.
            pullback = jax.eval_shape(partial(self._vjp, place), *args)[1]
            # As above: reads of all layers would come first.
            dy, ring = lax.optimization_barrier((dy, rings[place]))
            waiting = [whole[at] for whole in ring]
            given = waiting.pop() if _input_waits(place, pullback) else x
            kept = iter(waiting)
            pullback.opaque_residuals = [
                next(kept) if shape.size else jnp.zeros(shape.shape, shape.dtype)
                for shape in pullback.opaque_residuals
            ]
            pullback.args_res = [given, *args[1:]]
            dy, found = pullback(dy)[:2]
            grads = {side: grads[side] | found[side] for side in grads}
        return dy, grads

    def backward_recomputing(
        self, dy: Float[Array, "C d"], x, adapters, weights, inputs, first_layer
    ) -> tuple[Float[Array, "C d"], Adapters]:
        """Returns the gradients of input and adapters, computing the forward again."""

        def forward(x, adapters):
            for place in range(self.places):
                part = self._adapters_at(place, adapters)
                args = (x, part, weights[place], inputs, first_layer + place)
                x = self._run(place, self.remat[place], *args)
            return x

        return jax.vjp(forward, x, adapters)[1](dy)

    def saved_shapes(
        self, batch: PackedBatch, bank: AdapterBank
    ) -> tuple[jax.ShapeDtypeStruct, list[list[jax.ShapeDtypeStruct]]]:
        """Returns the hidden states of one microbatch, and what must wait for its backward.

        Args:
            batch: a microbatch, or its shapes.
            bank: adapters of a stage, or their shapes.
        """
        hidden = jax.ShapeDtypeStruct((*batch.tokens.shape, self.config.hidden_size), self.dtype)
        if self.residuals == "recompute":
            return hidden, []
        weights = layer_shapes(self.config, self.dtype)
        number = jax.ShapeDtypeStruct((), jnp.int32)

        def keep(place, x, weights, batch, bank, number):
            part = self._adapters_at(place, {"a": bank.a, "b": bank.b})
            inputs = self.inputs(batch, bank, train=True)
            return _waiting(place, self._vjp(place, x, part, weights, inputs, number)[1])

        return hidden, [
            jax.eval_shape(partial(keep, place), hidden, weights, batch, bank, number)
            for place in range(self.places)
        ]

    def _vjp(self, place: int, *args) -> tuple[Array, Any]:
        """One layer's output and its pullback."""
        # Arguments leave holes among the residuals, to be filled by the backward; jax knows them by
        # identity, so each layer's weights must be arrays of their own.
        saveable = (place > 0, False, False, False, False)
        moving = (True, True, False, False, False)
        layer = partial(self._run, place, self.remat[place])
        return jax.vjp(layer, *args, saveable_args=saveable, in_nzs=moving)

    def _run(
        self,
        place: int,
        remat: Remat,
        x: Float[Array, "C d"],
        adapters: Adapters,
        weights: LayerWeights,
        inputs: RowInputs,
        number: Int[Array, ""],
    ) -> Float[Array, "C d"]:
        """Runs the layer at a place; `number` is that of the whole model."""
        layer = self._merge(place, weights, adapters, inputs.ratios)
        view = traced_view(self.config, inputs.rotary, number)
        site = layer_site(number)
        return run_layer(layer, x, view, inputs.segments, inputs.context, site, remat=remat)

    def _adapters_at(self, place: int, adapters: Adapters) -> Adapters:
        """The adapters of one layer place."""
        start = f"layers.{place}."
        return {
            side: {path: stack for path, stack in stacks.items() if path.startswith(start)}
            for side, stacks in adapters.items()
        }

    def _merge(
        self, place: int, weights: LayerWeights, adapters: Adapters, ratios: dict[str, Array]
    ) -> DecoderLayer:
        leaves: dict[tuple, nnx.Variable] = {
            tuple(name.split(".")): nnx.Param(array) for name, array in weights.items()
        }
        for suffix in suffixes_at(place, self.place_paths):
            for name in ("a", "b"):
                path = f"layers.{place}.{suffix}"
                stack = adapters[name][path]
                if name == "b" and path in ratios:  # as `merge_adapters` does
                    stack = stack * ratios[path].astype(stack.dtype)[:, None, None]
                leaves[(*suffix.split("."), f"lora_{name}")] = nnx.LoRAParam(stack)
        return nnx.merge(self._graphdefs[place], nnx.from_flat_state(leaves))


def _layer_structure(
    config: ModelConfig, dtype: jnp.dtype, suffixes: Sequence[str]
) -> nnx.GraphDef:
    """Structure of a layer with adapters at these modules; allocates nothing."""

    def make() -> DecoderLayer:
        layer = DecoderLayer(config, config.sliding_window, dtype=dtype, rngs=nnx.Rngs(0))
        linears = multi_linears(layer)
        for suffix in suffixes:
            shape = linears[suffix].kernel[...].shape
            linears[suffix].set_stacks(*(jnp.zeros((1, 1, size)) for size in shape))
        return layer

    return nnx.split(nnx.eval_shape(make))[0]


def layer_shapes(config: ModelConfig, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the frozen arrays of a layer by their path inside it."""
    layer = nnx.eval_shape(lambda: DecoderLayer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    return flat_arrays(layer)


def flat_arrays(module: nnx.Module) -> dict[str, Any]:
    """Returns the arrays of a module by path."""
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


def apply_final_norm(
    config: ModelConfig, x: Float[Array, "C d"], weight: Float[Array, " d"]
) -> Float[Array, "C d"]:
    """Applies the norm between the last layer and the head."""
    structure = nnx.eval_shape(lambda: final_norm(config, dtype=weight.dtype))
    leaves: dict[tuple, nnx.Variable] = {("weight",): nnx.Param(weight)}
    return nnx.merge(nnx.split(structure)[0], nnx.from_flat_state(leaves))(x)


def _waiting(place: int, pullback: Any) -> list[Any]:
    """What a layer's backward needs, in the order of its rings: residuals, and perhaps its input.

    jax keeps an argument that the backward reads as it is apart from the residuals. Arrays of no
    elements are left out: XLA's partitioner dies of them.
    """
    kept = [array for array in pullback.opaque_residuals if array.size]
    return [*kept, pullback.args_res[0]] if _input_waits(place, pullback) else kept


def _input_waits(place: int, pullback: Any) -> bool:
    """Whether a layer's input must wait; the first one's is in the ring of the stage's inputs."""
    return place > 0 and hasattr(pullback.args_res[0], "shape")


def policies_at(remat: Remat | Sequence[Remat], places: int) -> tuple[Remat, ...]:
    """Returns the policy of each layer place; one policy stands for all of them."""
    return (remat,) * places if isinstance(remat, str) else tuple(remat)


def put_at(ring: Array, value: Array, at) -> Array:
    """Returns a ring with another value at a place."""
    return lax.dynamic_update_index_in_dim(ring, value, at, 0)
