"""The lockstep engine: one stream of microbatches through all stages, exact optimizer steps.

In tick t, stage s of S runs

    forward   of microbatch  t - s
    backward  of microbatch  t - lag + s            lag = 2S - 1
    head      of microbatch  t - (S - 1)            each stage its share of the vocabulary
    update    of the slots whose global batch ends with microbatch t - lag, on all stages at once

and then sends activations up and gradients down. Stage 0 is the last to finish a backward, so in
that tick every stage has its part of the gradient: one reduction over the mesh gives the exact norm
and finite flag, and the whole pipeline has one version of each adapter at every tick boundary.

A forward must come after the update before it: a job's next global batch may enter `distance` slots
after the last microbatch of the one before. Two orders inside a tick:

    fbh   forward, backward, update, head   distance 2S       exchanges travel behind computation
    bfh   backward, update, forward, head   distance 2S - 1   the head's exchanges do not

The stream has no flush: state crosses calls, and a call is a scan over ticks. The schedule is data:
which microbatch, whether it is real, where global batches end. A tick without work costs next to
nothing, because each phase is a conditional without collectives; only the update has some, under a
predicate that is the same on all devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lorafusion_jax.lora.bank import AdapterBank, mask_gradients
from lorafusion_jax.models.decoder import scaled_embedding
from lorafusion_jax.parallel import vocabulary
from lorafusion_jax.parallel.mesh import DATA, PER_RANK, REPLICATED, STAGE
from lorafusion_jax.parallel.stage import LayerWeights, StageModel, apply_final_norm, put_at
from lorafusion_jax.parallel.state import (
    Flow,
    StreamState,
    Sums,
    mesh_sizes,
    state_specs,
    zero_state,
)
from lorafusion_jax.parallel.weights import Frozen, frozen_specs
from lorafusion_jax.train import optimizer
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.loss import sum_by_slot
from lorafusion_jax.train.optimizer import Adapters, Hyper
from lorafusion_jax.train.programs import REPEATABLE
from lorafusion_jax.train.step import StepReport
from lorafusion_sched import distance_of

type Order = Literal["fbh", "bfh"]


def ring_of(order: Order, stages: int) -> int:
    """Returns how many microbatches are alive at the first stage."""
    return 2 * stages - (order == "bfh")


class Window(NamedTuple):
    """Rows of the schedule that a chunk of ticks needs: slots t0 - lag to t0 + ticks.

    Attributes:
        batch: packed microbatches, [slot, rank, ...].
        valid: the rank has work in this slot.
        ends: global batches that end with this slot, on whatever rank.
        expected: version of the adapter that this slot's forward must use, -1 where it is absent.
        limit: loss above which a global batch that ends with this slot is rejected.
    """

    batch: PackedBatch
    valid: Bool[Array, "W data"]
    ends: Bool[Array, "W slots"]
    expected: Int[Array, "W slots"]
    limit: Float[Array, "W slots"]


# A tree of specs has the structure of the arrays that it places, in whose words it is annotated.
_BY_RANK: Any = PER_RANK
_EVERYWHERE: Any = REPLICATED
WINDOW_SPECS = Window(
    PackedBatch(*[_BY_RANK] * len(PackedBatch._fields)), _BY_RANK, *[_EVERYWHERE] * 3
)


@dataclass(frozen=True)
class Pipeline:
    """The engine's static settings.

    Attributes:
        mesh: (data, stage).
        model: what a stage computes.
        first_layer: first layer of each stage.
        order: of the phases in a tick.
        head_chunk: rows whose logits exist at the same time, at most.
    """

    mesh: Mesh
    model: StageModel
    first_layer: tuple[int, ...]
    order: Order
    head_chunk: int

    @property
    def stages(self) -> int:
        """Stages of the pipeline."""
        return mesh_sizes(self.mesh)[1]

    @property
    def lag(self) -> int:
        """Ticks from a microbatch's entry to its update."""
        return 2 * self.stages - 1

    @property
    def ring(self) -> int:
        """Microbatches alive at stage 0."""
        return ring_of(self.order, self.stages)

    @property
    def distance(self) -> int:
        """Slots that the planner must keep between two global batches of a job."""
        return distance_of(self.order, self.stages)

    @property
    def run(self) -> Callable[..., tuple[StreamState, StepReport]]:
        """`run(state, hyper, frozen, window, t0, count, ticks=n)`: ticks from t0 on.

        `ticks` is the static number of a window; of them the first `count` are run, or all where it
        is None. The stream starts at tick -1, because the embedding is fetched one tick ahead.
        Donates `state`. Returns the new state and the report of every tick, [ticks, slots], zeros
        for those not run. Equal settings share one compiled program.
        """
        return _program(self)

    def empty_state(
        self, batch: PackedBatch, bank: AdapterBank, optimizers: tuple[str, ...]
    ) -> StreamState:
        """Makes the state of free slots and an empty pipeline.

        Args:
            batch: a packed microbatch, for its shapes.
            bank: shapes of a stage's adapters (`state.bank_shapes`).
            optimizers: names in use.
        """
        hidden, saved = self.model.saved_shapes(batch, bank)
        return zero_state(self.mesh, bank, optimizers, self.ring, hidden, saved)

    def _run(self, state, hyper, frozen, window, t0, count=None, *, ticks: int):
        specs = state_specs(state)
        chunk = jax.shard_map(
            partial(self._chunk, ticks),
            mesh=self.mesh,
            in_specs=(
                specs,
                REPLICATED,
                frozen_specs(frozen),
                WINDOW_SPECS,
                REPLICATED,
                REPLICATED,
            ),
            out_specs=(specs, REPLICATED),
            check_vma=False,  # the fused kernels do not say how their outputs vary
        )
        return chunk(state, hyper, frozen, window, t0, ticks if count is None else count)

    def _chunk(self, ticks: int, state, hyper, frozen, window, t0, count):
        window = window._replace(
            batch=jax.tree.map(lambda x: x[:, 0], window.batch), valid=window.valid[:, 0]
        )
        device = DeviceProgram(self, frozen, hyper, window, t0 - self.lag, lax.axis_index(STAGE))
        tick = device.tick_fbh if self.order == "fbh" else device.tick_bfh

        def one(i, carry):
            state, reports = carry
            state, report = tick(state, t0 + i)
            return state, jax.tree.map(lambda whole, x: put_at(whole, x, i), reports, report)

        report = jax.eval_shape(tick, state, t0)[1]
        empty = jax.tree.map(lambda x: jnp.zeros((ticks, *x.shape), x.dtype), report)
        return lax.fori_loop(0, count, one, (state, empty))


@cache
def _program(pipeline: Pipeline) -> Callable[..., tuple[StreamState, StepReport]]:
    options = REPEATABLE if pipeline.model.deterministic else None
    return jax.jit(
        pipeline._run, static_argnames="ticks", donate_argnums=0, compiler_options=options
    )


class Row(NamedTuple):
    """One slot of the schedule as one rank sees it."""

    batch: PackedBatch
    valid: Bool[Array, ""]
    ends: Bool[Array, " slots"]
    expected: Int[Array, " slots"]
    limit: Float[Array, " slots"]


@dataclass
class DeviceProgram:
    """One device's program; exists only while it is traced."""

    pipeline: Pipeline
    frozen: Frozen
    hyper: Hyper | None  # None for a forward without training
    window: Window
    first: Int[Array, ""]
    stage: Int[Array, ""]

    def __post_init__(self):
        self.model, self.stages = self.pipeline.model, self.pipeline.stages
        self.is_last = self.stage == self.stages - 1
        self.first_layer = jnp.asarray(self.pipeline.first_layer, jnp.int32)[self.stage]
        self.layers: list[LayerWeights] = self.frozen.layers

    def tick_fbh(self, state: StreamState, t):
        """Forward, backward, update, head: each exchange has a phase to travel behind."""
        flow = state.flow
        gradient = self.send_down(flow.gradient)
        head_gradient = self.sum_stages(flow.head_gradient)
        flow, y = self.forward(state, t)
        activation, hidden = self.send_up(y), self.from_last(y)
        state = state._replace(flow=flow)
        state, dx = self.backward(state, t, gradient, head_gradient)
        # Else XLA may put the head before the backward: nothing to hide the broadcast behind.
        hidden, dx = lax.optimization_barrier((hidden, dx))
        state, report = self.update(state, t)
        sums, part = self.head(state.sums, t, hidden)
        flow = state.flow._replace(
            activation=activation,
            gradient=dx,
            hidden=hidden,
            head_gradient=part,
            embedded=self.embed(t + 1),
        )
        return state._replace(sums=sums, flow=flow), report

    def tick_bfh(self, state: StreamState, t):
        """Backward, update, forward, head: one slot less between batches, exchanges in the open."""
        state, dx = self.backward(state, t, state.flow.gradient, state.flow.head_gradient)
        gradient = self.send_down(dx)
        state, report = self.update(state, t)
        flow, y = self.forward(state, t)
        activation, hidden = self.send_up(y), self.from_last(y)
        sums, part = self.head(state.sums, t, hidden)
        flow = flow._replace(
            activation=activation,
            gradient=gradient,
            hidden=hidden,
            head_gradient=self.sum_stages(part),
            embedded=self.embed(t + 1),
        )
        return state._replace(sums=sums, flow=flow), report

    def row(self, slot) -> Row:
        """The schedule's row of a slot."""
        window = self.window
        at = jnp.clip(slot - self.first, 0, window.ends.shape[0] - 1)
        rows = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, at, keepdims=False), window)
        return Row(*rows)

    def forward(self, state: StreamState, t) -> tuple[Flow, Array]:
        """Runs this stage's forward of slot t - s and keeps what its backward needs."""
        slot, flow, bank = t - self.stage, state.flow, state.bank
        row, at = self.row(slot), slot % self.pipeline.ring
        x = jnp.where(self.stage == 0, flow.embedded, flow.activation)
        args = ({"a": bank.a, "b": bank.b}, self.layers)

        def run(inputs, saved, versions):
            rest = (*args, self.model.inputs(row.batch, bank, train=True), self.first_layer)
            if self.model.residuals == "save":
                y, saved = self.model.forward_saving(saved, at, x, *rest)
            else:
                y = self.model.forward(x, *rest)
            return y, put_at(inputs, x, at), saved, put_at(versions, state.version, at)

        def skip(inputs, saved, versions):
            return x, inputs, saved, versions

        rings = (flow.inputs, flow.saved, flow.versions)
        y, inputs, saved, versions = lax.cond(row.valid, run, skip, *rings)
        wrong = (row.expected >= 0) & (row.expected != state.version) & row.valid
        stale = flow.stale.at[0].add(wrong.sum())
        return flow._replace(inputs=inputs, saved=saved, versions=versions, stale=stale), y

    def backward(self, state: StreamState, t, gradient, head_gradient) -> tuple[StreamState, Array]:
        """Runs this stage's backward of slot t - lag + s and adds up its gradients.

        What arrived is first touched inside the conditional: so its journey may last until there.
        """
        slot, flow, bank = t - self.pipeline.lag + self.stage, state.flow, state.bank
        row, at = self.row(slot), slot % self.pipeline.ring

        def run(grads, inputs, saved, gradient, head_gradient, hidden):
            pulled = self.through_norm(head_gradient, hidden)
            dy = jnp.where(self.is_last, pulled, gradient)
            rest = (self.layers, self.model.inputs(row.batch, bank, train=True), self.first_layer)
            args = (inputs[at], {"a": bank.a, "b": bank.b}, *rest)
            if self.model.residuals == "save":
                dx, new = self.model.backward_saved(saved, at, dy, *args)
            else:
                dx, new = self.model.backward_recomputing(dy, *args)
            return dx, jax.tree.map(lambda g, d: g + d.astype(g.dtype), grads, new)

        def skip(grads, inputs, saved, gradient, *_):
            return jnp.zeros_like(gradient), grads

        arrived = (gradient, head_gradient, flow.hidden)
        rings = (flow.inputs, flow.saved)
        dx, grads = lax.cond(row.valid, run, skip, state.sums.grads, *rings, *arrived)
        moved = (row.expected >= 0) & (flow.versions[at] != state.version) & row.valid
        flow = flow._replace(stale=flow.stale.at[1].add(moved.sum()))
        return state._replace(sums=state.sums._replace(grads=grads), flow=flow), dx

    def head(self, sums: Sums, t, hidden) -> tuple[Sums, Array]:
        """Runs this stage's share of the head on slot t - (S - 1).

        Returns the sums with its losses, and this share's part of the gradient after the norm.
        """
        row = self.row(t - (self.stages - 1))
        batch, num_slots = row.batch, row.ends.shape[0]
        weight = jnp.where(row.valid, batch.loss_weight, 0)
        order = vocabulary.supervised_first(weight)
        labels, sorted_weight = batch.labels[order], weight[order]
        normed = apply_final_norm(self.model.config, hidden, self.frozen.norm)[order]
        mine = self.head_slice(normed, labels, sorted_weight, gradient=True)
        softmax = vocabulary.softmax_over_stages(mine)
        part = vocabulary.hidden_gradient(
            mine,
            softmax,
            self.frozen.head_rows,
            labels,
            sorted_weight,
            self.stage,
            self.model.config.logit_softcap,
        )
        losses = vocabulary.unsorted(
            jnp.where(sorted_weight != 0, sorted_weight * softmax.loss, 0), order
        )
        supervised = (weight != 0).astype(jnp.float32)
        tokens = sum_by_slot(supervised, batch.tile_adapter, num_slots).astype(jnp.int32)
        sums = sums._replace(
            loss=sums.loss + sum_by_slot(losses, batch.tile_adapter, num_slots),
            tokens=sums.tokens + tokens,
        )
        return sums, vocabulary.unsorted(part, order).astype(hidden.dtype)

    def head_slice(self, normed, labels, weight, *, gradient: bool) -> vocabulary.HeadSlice:
        """Applies this stage's share of the head to rows, those with a weight first."""
        return vocabulary.head_slice(
            jnp.where((weight != 0)[:, None], normed, 0),
            self.frozen.head_rows,
            labels,
            jnp.count_nonzero(weight),
            self.stage,
            vocab_size=self.model.config.vocab_size,
            chunk=self.pipeline.head_chunk,
            gradient=gradient,
            softcap=self.model.config.logit_softcap,
        )

    def through_norm(self, gradient, hidden):
        """Takes the head's gradient back through the final norm."""
        norm = partial(apply_final_norm, self.model.config, weight=self.frozen.norm)
        return jax.vjp(norm, hidden)[1](gradient)[0]

    def embed(self, slot):
        """Embeds a slot's tokens: each stage those it has, summed."""
        tokens = self.row(slot).batch.tokens
        x = self.sum_stages(vocabulary.embed_share(tokens, self.frozen.embedding, self.stage))
        return scaled_embedding(x, self.model.config.embedding_scale)

    def update(self, state: StreamState, t) -> tuple[StreamState, StepReport]:
        """Updates the slots whose global batch ended with slot t - lag, on all stages at once."""
        last = self.row(t - self.pipeline.lag)
        ended = last.ends
        nothing = jnp.zeros(ended.shape, jnp.float32)
        report = StepReport(ended & False, nothing, state.version * 0, nothing, nothing)

        # A loop of no or one turn: a conditional would copy masters and moments in every tick.
        def once(carry):
            pending, bank, opt, sums, _ = carry
            return (pending & False, *self._update(bank, opt, sums, ended, last.limit))

        carry = (ended.any(), state.bank, state.opt, state.sums, report)
        _, bank, opt, sums, report = lax.while_loop(lambda c: c[0], once, carry)
        version = state.version + ended
        return StreamState(bank, opt, version, sums, state.flow), report

    def _update(self, bank, opt, sums: Sums, ended, limit):
        grads = self.sum_ranks(sums.grads, ended)
        a, b = mask_gradients(bank, grads["a"], grads["b"])
        squares = sum(jnp.sum(g * g, axis=(1, 2)) for g in jax.tree.leaves((a, b)))
        norm = jnp.sqrt(lax.psum(squares, STAGE))
        loss, tokens = lax.psum((sums.loss, sums.tokens), DATA)
        assert self.hyper is not None
        hyper = self.hyper._replace(loss_limit=limit.astype(loss.dtype))
        params, grads, opt, info = optimizer.gated_update(
            {"a": bank.a, "b": bank.b}, opt, {"a": a, "b": b}, loss, ended, hyper, norm
        )
        bank = bank._replace(a=params["a"], b=params["b"])
        report = StepReport(info.applied, loss, tokens, info.grad_norm, info.lr)
        loss, tokens = jnp.where(ended, 0.0, sums.loss), jnp.where(ended, 0, sums.tokens)
        return bank, opt, Sums(grads, loss, tokens), report

    def sum_ranks(self, grads: Adapters, ended) -> Adapters:
        """Sums the gradients of the ended slots, and of no others, over the data ranks."""
        if mesh_sizes(self.pipeline.mesh)[0] == 1:
            return grads
        slots = jnp.argsort(~ended, stable=True)

        def one(i, grads):
            part = jax.tree.map(lambda g: g[slots[i]], grads)
            whole = lax.psum(part, DATA)
            return jax.tree.map(lambda g, new: put_at(g, new, slots[i]), grads, whole)

        return lax.fori_loop(0, jnp.count_nonzero(ended), one, grads)

    def send_up(self, x):
        """To the next stage."""
        if self.stages == 1:
            return x
        return lax.ppermute(x, STAGE, [(i, i + 1) for i in range(self.stages - 1)])

    def send_down(self, x):
        """To the stage before."""
        if self.stages == 1:
            return x
        return lax.ppermute(x, STAGE, [(i + 1, i) for i in range(self.stages - 1)])

    def from_last(self, x):
        """The last stage's value, on all stages: the sum with zeros is exact."""
        if self.stages == 1:
            return x
        if self.pipeline.mesh.devices.flat[0].platform != "cpu":
            return lax.pbroadcast(x, (STAGE,), self.stages - 1)
        return lax.psum(jnp.where(self.is_last, x, jnp.zeros_like(x)), STAGE)

    def sum_stages(self, x):
        """The sum over stages."""
        return x if self.stages == 1 else lax.psum(x, STAGE)
