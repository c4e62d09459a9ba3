"""The jitted programs: one training step per bucket, one evaluation per bucket.

A training step runs forward and backward of one microbatch, adds its gradients to each slot's
accumulator and, where a slot's global batch ends, updates that slot inside the same program. The
frozen weights come in as arguments: closed over, they would be baked into every program.
"""

import time
from collections.abc import Callable
from functools import partial
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
from lorafusion_jax.models.attention import Segments
from lorafusion_jax.train import optimizer
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.loss import TokenLosses, sum_by_slot, token_losses
from lorafusion_jax.train.optimizer import Adapters, Hyper, OptState

LOGITS_PER_CHUNK = 1 << 25  # 128 MiB of float32 logits at a time


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
    """What a step did, per slot; everything but `ended` is meaningful only where it is true.

    Attributes:
        ended: the slot's global batch ended with this microbatch.
        applied: its update was applied; False for a rejected or frozen one.
        loss: mean loss over the supervised tokens of the global batch.
        tokens: supervised tokens of the global batch.
        grad_norm: norm of its gradient before clipping.
        lr: learning rate of the update.
        frozen: the slot is frozen by its non-finite policy.
    """

    ended: Bool[Array, " slots"]
    applied: Bool[Array, " slots"]
    loss: Float[Array, " slots"]
    tokens: Int[Array, " slots"]
    grad_norm: Float[Array, " slots"]
    lr: Float[Array, " slots"]
    frozen: Bool[Array, " slots"]


class Model(NamedTuple):
    """The static half of a base model.

    Attributes:
        graphdef: of the decoder with adapter stacks attached.
        remat: rematerialisation policy of the backward pass.
        loss_chunk: rows whose logits exist at a time.
    """

    graphdef: nnx.GraphDef
    remat: str
    loss_chunk: int


def loss_chunk(vocab_size: int, capacity: int) -> int:
    """Returns how many rows of logits to hold at a time: a power of two from 16 to 1024."""
    rows = LOGITS_PER_CHUNK // vocab_size
    return max(16, min(1024, 1 << max(rows, 1).bit_length() - 1, capacity))


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
    model: Model, adapters: Adapters, bank: AdapterBank, frozen: PyTree, batch: PackedBatch, train
) -> TokenLosses:
    bank = bank._replace(a=adapters["a"], b=adapters["b"])
    decoder = merge_adapters(model.graphdef, frozen, bank)
    context = lora_context(bank, batch.tile_adapter, batch.row_key, train=train)
    segments = Segments(batch.segment_start, batch.segment_offsets)
    remat = model.remat if train else "none"
    hidden = decoder(batch.tokens, batch.positions, segments, context, remat=remat)  # pyright: ignore[reportCallIssue]
    head = decoder.head_weight()  # pyright: ignore[reportAttributeAccessIssue]
    weight = batch.loss_weight
    return token_losses(hidden, head, batch.labels, weight, model.loss_chunk)


def train_step(
    model: Model, state: TrainState, hyper: Hyper, frozen: PyTree, batch: PackedBatch
) -> tuple[TrainState, StepReport]:
    """Trains on one microbatch.

    Args:
        model: static; jit over the rest.
        state: donated.
        hyper: hyper-parameters of every slot.
        frozen: weights of the base model.
        batch: one bucket's static shapes.

    Returns:
        The new state, and what happened to each slot.
    """
    num_slots = batch.batch_end.shape[0]

    def total(adapters):
        losses = _token_losses(model, adapters, state.bank, frozen, batch, True).weighted
        # A sum over rows: each adapter's gradient sees its own rows only.
        return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(adapters_of(state.bank))
    grads = jax.tree.map(lambda acc, g: acc + g.astype(acc.dtype), state.grads, grads)
    loss = state.loss + sum_by_slot(losses, batch.tile_adapter, num_slots)
    supervised = (batch.loss_weight != 0).astype(jnp.int32)
    tokens = state.tokens + sum_by_slot(supervised, batch.tile_adapter, num_slots)
    state = state._replace(grads=grads, loss=loss, tokens=tokens)
    return jax.lax.cond(
        batch.batch_end.any(), _end_batches, _continue_batches, state, hyper, batch.batch_end
    )


def _continue_batches(state: TrainState, hyper: Hyper, ended: Array):
    zeros = jnp.zeros_like(state.loss)
    no = jnp.zeros_like(ended)
    return state, StepReport(no, no, state.loss, state.tokens, zeros, zeros, state.opt.frozen)


def _end_batches(state: TrainState, hyper: Hyper, ended: Array):
    """Updates the slots whose global batch ended and empties their accumulators."""
    bank = state.bank
    a, b = mask_gradients(bank, state.grads["a"], state.grads["b"])
    params, opt, info = optimizer.gated_update(
        adapters_of(bank), state.opt, {"a": a, "b": b}, state.loss, ended, hyper
    )

    def emptied(x):
        return jnp.where(ended.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros((), x.dtype), x)

    report = StepReport(
        ended, info.applied, state.loss, state.tokens, info.grad_norm, info.lr, opt.frozen
    )
    state = TrainState(
        bank=bank._replace(a=params["a"], b=params["b"]),
        opt=opt,
        grads=jax.tree.map(emptied, state.grads),
        loss=emptied(state.loss),
        tokens=emptied(state.tokens),
    )
    return state, report


def eval_step(model: Model, bank: AdapterBank, frozen: PyTree, batch: PackedBatch) -> TokenLosses:
    """Returns each row's loss and whether its label is the arg-max, without dropout."""
    return _token_losses(model, adapters_of(bank), bank, frozen, batch, False)


class Programs:
    """The two steps, compiled ahead of time: one program each per bucket, never silently another.

    Args:
        model: static half of the base model.
        frozen: its weights.
        on_compile: called with name and capacity before a compilation, and with the seconds after.
    """

    def __init__(
        self,
        model: Model,
        frozen: PyTree,
        on_compile: Callable[[str, int, float | None], None] = lambda *_: None,
    ):
        self._frozen, self._on_compile = frozen, on_compile
        self._jitted = {
            "train": jax.jit(partial(train_step, model), donate_argnums=0),
            "eval": jax.jit(partial(eval_step, model)),
        }
        self._compiled: dict[tuple[str, int, int], jax.stages.Compiled] = {}

    def train(
        self, state: TrainState, hyper: Hyper, batch: PackedBatch
    ) -> tuple[TrainState, StepReport]:
        """Runs `train_step`; `state` is donated."""
        return self._program("train", batch, state, hyper, self._frozen, batch)

    def evaluate(self, bank: AdapterBank, batch: PackedBatch) -> TokenLosses:
        """Runs `eval_step`."""
        return self._program("eval", batch, bank, self._frozen, batch)

    @property
    def num_compiled(self) -> int:
        """How many programs were compiled so far."""
        return len(self._compiled)

    def memory(self) -> dict[str, int]:
        """Returns temporary bytes of each compiled program, by name and capacity."""
        return {
            f"{name} {capacity}": analysis.temp_size_in_bytes
            for (name, capacity, _), program in self._compiled.items()
            if (analysis := program.memory_analysis()) is not None
        }

    def _program(self, name: str, batch: PackedBatch, *args):
        capacity = batch.tokens.shape[0]
        key = (name, capacity, batch.segment_offsets.shape[0])
        if key not in self._compiled:
            self._on_compile(name, capacity, None)
            start = time.perf_counter()
            self._compiled[key] = self._jitted[name].lower(*args).compile()
            self._on_compile(name, capacity, time.perf_counter() - start)
        return self._compiled[key](*args)
