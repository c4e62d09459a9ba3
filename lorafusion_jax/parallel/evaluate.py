"""Held-out losses on the mesh: microbatches pass through the stages forward only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from lorafusion_jax.lora.bank import AdapterBank
from lorafusion_jax.parallel import vocabulary
from lorafusion_jax.parallel.mesh import DATA, STAGE
from lorafusion_jax.parallel.pipeline import WINDOW_SPECS, DeviceProgram, Pipeline, Window
from lorafusion_jax.parallel.processes import gathered
from lorafusion_jax.parallel.stage import apply_final_norm
from lorafusion_jax.parallel.state import bank_specs, mesh_sizes
from lorafusion_jax.parallel.stream import put_global
from lorafusion_jax.parallel.weights import Frozen, frozen_specs
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.loss import TokenLosses
from lorafusion_jax.train.programs import REPEATABLE

_LOSSES: PyTree = PartitionSpec(None, DATA)


@dataclass(frozen=True)
class ForwardPipeline:
    """The forward half of a pipeline, without dropout.

    Attributes:
        pipeline: the engine's settings.
        slots: slots of a call.
    """

    pipeline: Pipeline
    slots: int

    def losses(
        self, bank: AdapterBank, frozen: Frozen, batches: Sequence[PackedBatch]
    ) -> list[TokenLosses]:
        """Returns each row's loss and whether its label is the arg-max, per microbatch.

        Args:
            bank: the stages' adapters, on the mesh.
            frozen: the base model on the mesh.
            batches: on the host, of one shape.
        """
        ranks = mesh_sizes(self.pipeline.mesh)[0]
        per_call = self.slots * ranks
        found: list[TokenLosses] = []
        for start in range(0, len(batches), per_call):
            part = list(batches[start : start + per_call])
            filled = part + [part[0]] * (per_call - len(part))
            rows = jax.tree.map(
                lambda *x: np.stack(x).reshape(self.slots, ranks, *x[0].shape), *filled
            )
            valid = (np.arange(per_call) < len(part)).reshape(self.slots, ranks)
            none = np.zeros((self.slots, len(bank.rank)), np.int32)
            host = Window(*jax.tree.map(np.asarray, (rows, valid, none != 0, none, none * 0.0)))
            window = put_global(host, WINDOW_SPECS, self.pipeline.mesh)
            losses = jax.tree.map(gathered, _program(self)(bank, frozen, window))
            flat = jax.tree.map(lambda x: x.reshape(per_call, *x.shape[2:]), losses)
            found += [jax.tree.map(lambda x, i=i: x[i], flat) for i in range(len(part))]
        return found

    def _run(self, bank, frozen, window) -> TokenLosses:
        chunk = jax.shard_map(
            self._chunk,
            mesh=self.pipeline.mesh,
            in_specs=(bank_specs(bank), frozen_specs(frozen), WINDOW_SPECS),
            out_specs=TokenLosses(_LOSSES, _LOSSES),
            check_vma=False,  # as in training
        )
        return chunk(bank, frozen, window)

    def _chunk(self, bank: AdapterBank, frozen: Frozen, window) -> TokenLosses:
        window = window._replace(
            batch=jax.tree.map(lambda x: x[:, 0], window.batch), valid=window.valid[:, 0]
        )
        stage = lax.axis_index(STAGE)
        device = DeviceProgram(self.pipeline, frozen, None, window, jnp.int32(0), stage)
        stages = self.pipeline.stages

        def tick(activation: Array, t):
            x = jnp.where(stage == 0, device.embed(t), activation)
            y = self._forward(device, bank, x, t - stage)
            losses = self._head(device, device.from_last(y), t - (stages - 1))
            return device.send_up(y), losses

        shape = (*window.batch.tokens.shape[1:], self.pipeline.model.config.hidden_size)
        empty = jnp.zeros(shape, self.pipeline.model.dtype)
        losses = lax.scan(tick, empty, jnp.arange(self.slots + stages - 1))[1]
        return jax.tree.map(lambda x: x[stages - 1 :, None], losses)

    def _forward(self, device: DeviceProgram, bank: AdapterBank, x: Array, slot) -> Array:
        row, model = device.row(slot), self.pipeline.model

        def run(x):
            inputs = model.inputs(row.batch, bank, train=False)
            adapters = {"a": bank.a, "b": bank.b}
            return model.forward(x, adapters, device.layers, inputs, device.first_layer)

        return lax.cond(row.valid, run, lambda x: x, x)

    def _head(self, device: DeviceProgram, hidden: Array, slot) -> TokenLosses:
        row, config = device.row(slot), self.pipeline.model.config
        weight = jnp.where(row.valid, row.batch.loss_weight, 0)
        order = vocabulary.supervised_first(weight)
        labels, sorted_weight = row.batch.labels[order], weight[order]
        normed = apply_final_norm(config, hidden, device.frozen.norm)[order]
        mine = device.head_slice(normed, labels, sorted_weight, gradient=False)
        softmax = vocabulary.softmax_over_stages(mine)
        losses = vocabulary.losses_over_stages(mine, softmax, labels, sorted_weight)
        return jax.tree.map(lambda x: vocabulary.unsorted(x, order), losses)


@cache
def _program(forward: ForwardPipeline) -> Callable[..., TokenLosses]:
    options = REPEATABLE if forward.pipeline.model.deterministic else None
    return jax.jit(forward._run, compiler_options=options)
