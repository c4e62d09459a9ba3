"""The jitted programs: gradients of a microbatch, updates where global batches end, evaluation.

A microbatch adds its gradients to each slot's accumulator. The planner knows which global batches
end with it, so the host runs the update only then, as a program of its own: inside a conditional it
would be compiled again for every bucket. The frozen weights come in as arguments: closed over, they
would be baked into every program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from lorafusion_jax.lora.bank import (
    AdapterBank,
    lora_context,
    mask_gradients,
    merge_adapters,
)
from lorafusion_jax.models.attention import Demands, Segments
from lorafusion_jax.train import optimizer
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.loss import TokenLosses, sum_by_slot, token_losses
from lorafusion_jax.train.optimizer import Adapters, Hyper, OptState

LOGITS_PER_CHUNK = {"cpu": 1 << 25, "gpu": 1 << 28}
"""Logits that exist at a time: 128 MiB of float32 on a CPU, 1 GiB on a GPU."""


class TrainState(NamedTuple):
    """All that training changes; donated to every step.

    Attributes:
        bank: the adapters.
        opt: moments, counts and flags of every slot.
        grads: float32 gradients of each slot's global batch so far.
        loss: weighted loss of each slot's global batch so far.
        tokens: supervised tokens of each slot's global batch so far.
    """

    bank: AdapterBank
    opt: OptState
    grads: Adapters
    loss: Float[Array, " slots"]
    tokens: Int[Array, " slots"]


class StepReport(NamedTuple):
    """What an update did, per slot; meaningful where the slot's global batch ended.

    Attributes:
        applied: the update was applied; False for a rejected or frozen one.
        loss: mean loss over the supervised tokens of the global batch.
        tokens: supervised tokens of the global batch.
        grad_norm: norm of its gradient before clipping.
        lr: learning rate of the update.
    """

    applied: Bool[Array, " slots"]
    loss: Float[Array, " slots"]
    tokens: Int[Array, " slots"]
    grad_norm: Float[Array, " slots"]
    lr: Float[Array, " slots"]


class Model(NamedTuple):
    """The static half of a base model.

    Attributes:
        graphdef: of the decoder with adapter stacks attached.
        remat: rematerialisation policy of the backward pass.
        loss_chunk: rows whose logits exist at a time.
        deterministic: take only what repeats its bits.
    """

    graphdef: nnx.GraphDef
    remat: str
    loss_chunk: int
    deterministic: bool = False


def loss_chunk(vocab_size: int, capacity: int) -> int:
    """Returns how many rows of logits to hold at a time: a power of two from 16 to 2048."""
    rows = LOGITS_PER_CHUNK.get(jax.default_backend(), 1 << 25) // vocab_size
    return max(16, min(2048, 1 << max(rows, 1).bit_length() - 1, capacity))


def init_state(bank: AdapterBank, optimizers: tuple[str, ...]) -> TrainState:
    """Returns the state of a bank before its first microbatch."""
    params = adapters_of(bank)
    num_slots = bank.rank.shape[0]
    return TrainState(
        bank=bank,
        opt=optimizer.init(params, optimizers, num_slots),
        grads=jax.tree.map(jnp.zeros_like, params),
        loss=jnp.zeros(num_slots, jnp.float32),
        tokens=jnp.zeros(num_slots, jnp.int32),
    )


def adapters_of(bank: AdapterBank) -> Adapters:
    """Returns what is trained of a bank."""
    return {"a": bank.a, "b": bank.b}


def _token_losses(
    model: Model,
    adapters: Adapters,
    bank: AdapterBank,
    frozen: PyTree,
    batch: PackedBatch,
    *,
    train: bool,
) -> TokenLosses:
    bank = bank._replace(a=adapters["a"], b=adapters["b"])
    decoder = merge_adapters(model.graphdef, frozen, bank)
    context = lora_context(bank, batch.tile_adapter, batch.row_key, train=train)
    demands = Demands(deterministic=model.deterministic, longest=batch.longest.rows)
    segments = Segments(batch.segment_start, batch.segment_offsets, demands)
    remat = model.remat if train else "none"
    hidden = decoder(batch.tokens, batch.positions, segments, context, remat=remat)  # pyright: ignore[reportCallIssue]
    head = decoder.head_weight()  # pyright: ignore[reportAttributeAccessIssue]
    softcap = decoder.config.logit_softcap  # pyright: ignore[reportAttributeAccessIssue]
    weight = batch.loss_weight
    return token_losses(hidden, head, batch.labels, weight, model.loss_chunk, softcap)


def train_step(
    model: Model, state: TrainState, frozen: PyTree, batch: PackedBatch
) -> tuple[TrainState, Float[Array, ""]]:
    """Adds the gradients of one microbatch to the accumulators.

    Args:
        model: static; jit over the rest.
        state: donated.
        frozen: weights of the base model.
        batch: one bucket's static shapes.

    Returns:
        The new state, and the microbatch's weighted loss: something small to wait for.
    """
    num_slots = batch.batch_end.shape[0]

    def total(adapters):
        losses = _token_losses(model, adapters, state.bank, frozen, batch, train=True).weighted
        # A sum over rows: each adapter's gradient sees its own rows only.
        return losses.sum(), losses

    (loss, losses), grads = jax.value_and_grad(total, has_aux=True)(adapters_of(state.bank))
    supervised = (batch.loss_weight != 0).astype(jnp.int32)
    gained = (
        grads,
        sum_by_slot(losses, batch.tile_adapter, num_slots),
        sum_by_slot(supervised, batch.tile_adapter, num_slots),
    )
    held = (state.grads, state.loss, state.tokens)
    held = jax.tree.map(lambda x, gain: x + gain.astype(x.dtype), held, gained)
    state = state._replace(grads=held[0], loss=held[1], tokens=held[2])
    return state, loss


def update_step(
    state: TrainState, hyper: Hyper, ended: Bool[Array, " slots"]
) -> tuple[TrainState, StepReport]:
    """Updates the slots whose global batch ended, and empties their accumulators.

    Args:
        state: donated.
        hyper: hyper-parameters of every slot.
        ended: slots whose global batch is complete.
    """
    bank = state.bank
    a, b = mask_gradients(bank, state.grads["a"], state.grads["b"])
    params, grads, opt, info = optimizer.gated_update(
        adapters_of(bank), state.opt, {"a": a, "b": b}, state.loss, ended, hyper
    )
    report = StepReport(info.applied, state.loss, state.tokens, info.grad_norm, info.lr)
    state = TrainState(
        bank=bank._replace(a=params["a"], b=params["b"]),
        opt=opt,
        grads=grads,
        loss=jnp.where(ended, 0.0, state.loss),
        tokens=jnp.where(ended, 0, state.tokens),
    )
    return state, report


def eval_step(model: Model, bank: AdapterBank, frozen: PyTree, batch: PackedBatch) -> TokenLosses:
    """Returns each row's loss and whether its label is the arg-max, without dropout."""
    return _token_losses(model, adapters_of(bank), bank, frozen, batch, train=False)
