"""The engine's arrays: what training changes, and what is on its way through the pipeline.

Shapes below are those of one device. Across the mesh, axis 0 of the adapters, moments and module
flags concatenates the stages, and axis 0 of everything in `Sums` and `Flow` all devices (see
`mesh.PER_STAGE`, `mesh.PER_DEVICE`); the rest is the same everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from lorafusion_jax.lora.bank import AdapterBank, empty_bank, with_patterns
from lorafusion_jax.parallel.mesh import DATA, PER_DEVICE, PER_STAGE, REPLICATED, STAGE
from lorafusion_jax.train import optimizer
from lorafusion_jax.train.optimizer import Adapters, OptState


class Sums(NamedTuple):
    """What each slot's global batch has summed up so far on one device.

    Attributes:
        grads: float32 gradients of this stage's adapters, from this data rank's microbatches.
        loss: weighted loss of this data rank's microbatches; the same on all stages.
        tokens: supervised tokens, likewise.
    """

    grads: Adapters
    loss: Float[Array, " slots"]
    tokens: Int[Array, " slots"]


class Flow(NamedTuple):
    """What one device keeps of microbatches on their way; dead once the pipeline is drained.

    Attributes:
        inputs: ring of this stage's inputs.
        saved: rings of residuals by layer place, empty when they are recomputed.
        versions: ring of the adapters' versions that the forward used.
        activation: what the stage before sent.
        gradient: what the stage after sent.
        hidden: the last stage's output, broadcast for the head.
        head_gradient: its gradient after the final norm; of this stage's vocabulary alone, or in
            order "bfh" of all.
        embedded: embedding of the microbatch that enters next.
        stale: forwards that used a wrong version, and backwards whose adapters had moved.
    """

    inputs: Float[Array, "R C d"]
    saved: list[list[Array]]
    versions: Int[Array, "R slots"]
    activation: Float[Array, "C d"]
    gradient: Float[Array, "C d"]
    hidden: Float[Array, "C d"]
    head_gradient: Float[Array, "C d"]
    embedded: Float[Array, "C d"]
    stale: Int[Array, " 2"]


class StreamState(NamedTuple):
    """All that a chunk of ticks changes; donated to it.

    Attributes:
        bank: adapters of this stage, by `Layout.place_paths`.
        opt: their optimizer state.
        version: global batches that ended since each slot's job began.
        sums: accumulators of this device.
        flow: microbatches on their way.
    """

    bank: AdapterBank
    opt: OptState
    version: Int[Array, " slots"]
    sums: Sums
    flow: Flow


_STAGED = ("a", "b", "targeted", "ranks", "ratios")


def state_specs(state: StreamState) -> StreamState:
    """Returns how each leaf of a state lies on the mesh."""

    everywhere: PyTree = REPLICATED
    opt = _all_of(state.opt, REPLICATED)._replace(moments=_all_of(state.opt.moments, PER_STAGE))
    return StreamState(
        bank_specs(state.bank),
        opt,
        everywhere,
        _all_of(state.sums, PER_DEVICE),
        _all_of(state.flow, PER_DEVICE),
    )


def bank_specs(bank: AdapterBank) -> AdapterBank:
    """Returns how the adapters lie on the mesh."""
    staged = {name: _all_of(getattr(bank, name), PER_STAGE) for name in _STAGED}
    return _all_of(bank, REPLICATED)._replace(**staged)


def _all_of(tree: PyTree, spec: PartitionSpec) -> PyTree:
    return jax.tree.map(lambda _: spec, tree)


def zero_state(
    mesh: Mesh,
    bank: AdapterBank,
    optimizers: tuple[str, ...],
    ring: int,
    hidden: jax.ShapeDtypeStruct,
    saved: list[list[jax.ShapeDtypeStruct]],
) -> StreamState:
    """Makes the state of free slots and an empty pipeline, each device its own part.

    Args:
        mesh: (data, stage).
        bank: shapes of a stage's adapters (`bank_shapes`).
        optimizers: names in use.
        ring: microbatches that the rings hold.
        hidden: hidden states of one microbatch.
        saved: residuals of one microbatch by layer place.
    """

    def local() -> StreamState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), bank)
        params: Adapters = {"a": zeros.a, "b": zeros.b}
        num_slots = bank.rank.shape[0]
        slots = jnp.zeros(num_slots, jnp.int32)
        sums = Sums(params, jnp.zeros(num_slots, jnp.float32), slots)
        opt = optimizer.init(params, optimizers, num_slots)
        return StreamState(zeros, opt, slots, sums, _empty_flow(ring, hidden, saved, num_slots))

    specs = state_specs(jax.eval_shape(local))
    make = jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False)
    return jax.jit(make)()


def bank_shapes(
    widths: dict[str, tuple[int, int]], num_slots: int, r_max: int, patterned: Sequence[str] = ()
) -> AdapterBank:
    """Returns the shapes of a stage's adapters.

    Args:
        widths: (in, out) of each module, by place path.
        num_slots: adapter slots.
        r_max: largest rank.
        patterned: place paths with ranks and scale ratios of their own.
    """
    return jax.eval_shape(lambda: with_patterns(empty_bank(widths, num_slots, r_max), patterned))


def _empty_flow(
    ring: int,
    hidden: jax.ShapeDtypeStruct,
    saved: list[list[jax.ShapeDtypeStruct]],
    num_slots: int,
) -> Flow:
    zeros = jnp.zeros(hidden.shape, hidden.dtype)
    return Flow(
        inputs=jnp.zeros((ring, *hidden.shape), hidden.dtype),
        saved=jax.tree.map(lambda s: jnp.zeros((ring, *s.shape), s.dtype), saved),
        versions=jnp.zeros((ring, num_slots), jnp.int32),
        activation=zeros,
        gradient=zeros,
        hidden=zeros,
        head_gradient=zeros,
        embedded=zeros,
        stale=jnp.zeros(2, jnp.int32),
    )


def mesh_sizes(mesh: Mesh) -> tuple[int, int]:
    """Returns (data, stage)."""
    return mesh.shape[DATA], mesh.shape[STAGE]
