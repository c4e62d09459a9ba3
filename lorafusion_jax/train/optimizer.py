"""Per-slot optimizers: optax transforms vmapped over adapter slots, each slot gated on its own.

A slot moves only when its own global batch ended and its gradient is finite; otherwise its
parameters, moments and counts keep their bits. Hyper-parameters are arrays, one value per slot, so
jobs with other values, schedules or lengths run the same compiled program. Only the set of
optimizer *names* in use is static.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adam", "sgd")

type Adapters = dict[str, dict[str, Float[Array, "slots r_max _"]]]
"""{"a": {module path: stack}, "b": {module path: stack}}"""


class Hyper(NamedTuple):
    """Hyper-parameters of every slot, all [slots].

    Attributes:
        kind: index into OPTIMIZERS.
        schedule: index into SCHEDULES.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up from 0.
        total_steps: steps at which linear and cosine schedules reach 0.
        b1, b2, eps: as in optax; `b1` is the momentum of sgd.
        weight_decay: decoupled decay of adamw.
        max_grad_norm: clips the slot's own global norm; inf never clips.
        lora_plus_ratio: learning rate of B over that of A.
        freeze_on_nonfinite: a non-finite batch freezes the slot for good.
        loss_limit: a batch whose loss is above it is rejected too; None where no job has a limit.
    """

    kind: Int[Array, " slots"]
    schedule: Int[Array, " slots"]
    lr: Float[Array, " slots"]
    warmup_steps: Int[Array, " slots"]
    total_steps: Int[Array, " slots"]
    b1: Float[Array, " slots"]
    b2: Float[Array, " slots"]
    eps: Float[Array, " slots"]
    weight_decay: Float[Array, " slots"]
    max_grad_norm: Float[Array, " slots"]
    lora_plus_ratio: Float[Array, " slots"]
    freeze_on_nonfinite: Bool[Array, " slots"]
    loss_limit: Float[Array, " slots"] | None = None


class OptState(NamedTuple):
    """State of every slot.

    Attributes:
        moments: optax state per optimizer name in use, slot axis first.
        count: updates applied.
        rejected: global batches rejected because of a non-finite gradient or loss.
        frozen: the slot no longer trains (policy `freeze`).
    """

    moments: dict[str, PyTree]
    count: Int[Array, " slots"]  # pyright: ignore[reportIncompatibleMethodOverride]
    rejected: Int[Array, " slots"]
    frozen: Bool[Array, " slots"]


class UpdateInfo(NamedTuple):
    """What one gated update did, per slot; meaningful where a batch ended."""

    applied: Bool[Array, " slots"]
    grad_norm: Float[Array, " slots"]
    lr: Float[Array, " slots"]


def learning_rate(hyper: Hyper, step: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns the learning rate after `step` applied updates (the formulas of transformers).

    Linear warm-up from 0 over `warmup_steps`, then constant, linear to 0 or half a cosine to 0 at
    `total_steps`.
    """
    step = step.astype(jnp.float32)
    warmup = hyper.warmup_steps.astype(jnp.float32)
    total = hyper.total_steps.astype(jnp.float32)
    progress = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1.0), 0.0, 1.0)
    decay = jnp.select(
        [hyper.schedule == SCHEDULES.index("linear"), hyper.schedule == SCHEDULES.index("cosine")],
        [1.0 - progress, 0.5 * (1.0 + jnp.cos(jnp.pi * progress))],
        1.0,
    )
    rising = step / jnp.maximum(warmup, 1.0)
    return hyper.lr * jnp.where(step < warmup, rising, decay)


def transform(name: str, hyper: Hyper) -> optax.GradientTransformation:
    """Returns one slot's transform before the learning rate; `hyper` holds that slot's scalars."""
    if name == "sgd":
        return optax.trace(hyper.b1)  # pyright: ignore[reportArgumentType]
    adam = optax.scale_by_adam(hyper.b1, hyper.b2, hyper.eps)
    if name == "adam":
        return adam
    if name == "adamw":
        return optax.chain(adam, optax.add_decayed_weights(hyper.weight_decay))
    raise AssertionError(f"unknown optimizer {name!r}; the configuration checks names")


def init(params: Adapters, names: tuple[str, ...], num_slots: int) -> OptState:
    """Returns zero moments and counts for the optimizers in `names`."""
    scalars = Hyper(*(jnp.zeros(()) for _ in Hyper._fields))
    moments = {n: jax.vmap(transform(n, scalars).init, axis_size=num_slots)(params) for n in names}
    return OptState(
        moments=moments,
        count=jnp.zeros(num_slots, jnp.int32),
        rejected=jnp.zeros(num_slots, jnp.int32),
        frozen=jnp.zeros(num_slots, jnp.bool_),
    )


def _where_slot(mask: Bool[Array, " slots"], new: PyTree, old: PyTree) -> PyTree:
    def select(x, y):
        return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(select, new, old)


class _PerSlot(NamedTuple):
    """What moves a stack besides its gradients and moments: [slots] each, the same for all."""

    hyper: Hyper
    lr: Float[Array, " slots"]
    norm: Float[Array, " slots"]
    ended: Bool[Array, " slots"]
    gates: dict[str, Bool[Array, " slots"]]
    """Per optimizer, which slots it moves."""


def _apart[T: PyTree](stack: Array, values: T) -> tuple[Array, T]:
    """Returns a stack and per-slot values apart from those that come with other stacks.

    XLA joins loops that read the same values into kernels of some sixty operands, which are slow to
    run. Behind a barrier each stack has its own; packed into one array, they are one operand more.
    """
    leaves, structure = jax.tree.flatten(values)
    packed = jnp.stack([leaf.astype(jnp.float32) for leaf in leaves])
    stack, packed = jax.lax.optimization_barrier((stack, packed))
    own = [new.astype(old.dtype) for new, old in zip(packed, leaves, strict=True)]
    return stack, structure.unflatten(own)


# Traced and lowered once for each shape, where a model has hundreds of stacks.
@partial(jax.jit, static_argnames="side")
def _update_stack(
    side: str,
    per_slot: _PerSlot,
    moments: dict[str, PyTree],
    params: Float[Array, "slots r_max _"],
    grads: Float[Array, "slots r_max _"],
) -> tuple[Array, Array, dict[str, PyTree]]:
    """Returns new values, gradients and moments of one stack of A (side "a") or B."""
    parts, structure = jax.tree.flatten(moments)
    counts = {i: part for i, part in enumerate(parts) if part.ndim == 1}
    params, (per_slot, counts) = _apart(params, (per_slot, counts))
    moments = structure.unflatten([counts.get(i, part) for i, part in enumerate(parts)])
    hyper, lr, norm, ended, gates = per_slot

    def of_one_slot(name: str, hyper: Hyper, lr, norm, moments, params, grads):
        """Clips as optax does."""
        clipped = jnp.where(norm < hyper.max_grad_norm, grads, grads / norm * hyper.max_grad_norm)
        updates, moments = transform(name, hyper).update(clipped, moments, params)
        rate = lr * hyper.lora_plus_ratio if side == "b" else lr
        return params - rate * updates, moments

    for name, old in moments.items():
        new = jax.vmap(partial(of_one_slot, name))(hyper, lr, norm, old, params, grads)
        params, moments[name] = _where_slot(gates[name], new, (params, old))
    return params, _where_slot(ended, jnp.zeros_like(grads), grads), moments


def _update_stacks(
    per_slot: _PerSlot, moments: dict[str, PyTree], params: Adapters, grads: Adapters
) -> tuple[Adapters, Adapters, dict[str, PyTree]]:
    """Returns new parameters, gradients and moments, stack by stack."""
    stacks, inside = jax.tree.flatten_with_path(params)

    def of_a_stack(part: PyTree) -> bool:
        return jax.tree.structure(part) == inside

    # A moment has the structure of the parameters; a count, one value per slot, serves all stacks.
    parts, around = jax.tree.flatten(moments, is_leaf=of_a_stack)
    columns = [
        inside.flatten_up_to(part) if of_a_stack(part) else [part] * len(stacks) for part in parts
    ]
    rows = zip(stacks, jax.tree.leaves(grads), zip(*columns, strict=True), strict=True)
    updated = [
        _update_stack(path[0].key, per_slot, around.unflatten(held), stack, gradient)
        for (path, stack), gradient, held in rows
    ]
    new_stacks, new_grads, new_moments = zip(*updated, strict=True)
    columns = zip(*map(around.flatten_up_to, new_moments), strict=True)
    moments = around.unflatten(
        inside.unflatten(column) if of_a_stack(part) else column[0]
        for part, column in zip(parts, columns, strict=True)
    )
    return inside.unflatten(new_stacks), inside.unflatten(new_grads), moments


def slot_norms(grads: Adapters) -> Float[Array, " slots"]:
    """Returns the norm of each slot's whole gradient.

    Sums short pieces of rows first and puts them side by side for one last sum: summed stack by
    stack, a GPU would start two kernels for each of some hundred of them.
    """
    pieces = []
    for stack in jax.tree.leaves(grads):
        length = min(512, stack.shape[-1] & -stack.shape[-1])  # a power of two that divides a row
        squares = jnp.square(stack).reshape(stack.shape[0], -1, length)
        pieces.append(jnp.sum(squares, axis=-1))
    return jnp.sqrt(jnp.sum(jnp.concatenate(pieces, axis=1), axis=1))


def gated_update(
    params: Adapters,
    state: OptState,
    grads: Adapters,
    loss: Float[Array, " slots"],
    ended: Bool[Array, " slots"],
    hyper: Hyper,
    norm: Float[Array, " slots"] | None = None,
) -> tuple[Adapters, Adapters, OptState, UpdateInfo]:
    """Updates the slots whose global batch ended with finite loss and gradient; freezes the rest.

    A non-finite gradient, gradient norm or loss rejects the slot's whole global batch: its
    parameters, moments and count keep their bits and the rejection is counted. No value of one
    slot reaches another.

    Args:
        params: adapter stacks.
        state: optimizer state.
        grads: gradients accumulated over each slot's global batch.
        loss: loss of each slot's global batch.
        ended: slots whose global batch is complete.
        hyper: hyper-parameters.
        norm: norm of each slot's whole gradient, where `grads` is one pipeline stage's part of it.

    Returns:
        The new stacks, the gradients with zeros in the slots that ended, the new state, and what
        was done.
    """
    norm = slot_norms(grads) if norm is None else norm
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    live = ended & ~state.frozen
    good = finite if hyper.loss_limit is None else finite & (loss <= hyper.loss_limit)
    applied, rejected = live & good, live & ~good
    lr = learning_rate(hyper, state.count)
    gates = {n: applied & (hyper.kind == OPTIMIZERS.index(n)) for n in state.moments}
    per_slot = _PerSlot(hyper, lr, norm, ended, gates)
    params, grads, moments = _update_stacks(per_slot, state.moments, params, grads)
    new_state = OptState(
        moments=moments,
        count=state.count + applied,
        rejected=state.rejected + rejected,
        frozen=state.frozen | (live & ~finite & hyper.freeze_on_nonfinite),
    )
    return params, grads, new_state, UpdateInfo(applied, norm, lr)


def reset_slot[T: PyTree](state: T, slot: int) -> T:
    """Returns a tree of per-slot arrays with one slot zeroed, whatever lay there."""
    return jax.tree.map(lambda x: x.at[slot].set(jnp.zeros((), x.dtype)), state)
