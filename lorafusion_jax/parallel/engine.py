"""A base model and its mesh, ready to train: what a run needs of this room."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from lorafusion_jax.lora.bank import AdapterBank, multi_linears
from lorafusion_jax.models import Base
from lorafusion_jax.models.decoder import Remat
from lorafusion_jax.parallel.convert import Names, from_one_device, make_names, to_one_device
from lorafusion_jax.parallel.layout import even_layout
from lorafusion_jax.parallel.loading import place_base
from lorafusion_jax.parallel.mesh import Device, make_mesh
from lorafusion_jax.parallel.pipeline import Order, Pipeline
from lorafusion_jax.parallel.stage import Residuals, StageModel, policies_at
from lorafusion_jax.parallel.state import StreamState, bank_shapes, mesh_sizes
from lorafusion_jax.parallel.weights import Frozen
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.step import TrainState, loss_chunk


@dataclass(frozen=True)
class MeshEngine:
    """The engine with its weights.

    Attributes:
        pipeline: its settings and programs.
        names: of the modules with adapters.
        frozen: the base model's weights on the mesh.
        widths: (in, out) of the modules with adapters, by place path.
    """

    pipeline: Pipeline
    names: Names
    frozen: Frozen
    widths: Mapping[str, tuple[int, int]]

    @property
    def ranks(self) -> int:
        """Copies of the pipeline."""
        return mesh_sizes(self.pipeline.mesh)[0]

    def put(
        self, state: TrainState, batch: PackedBatch, versions: Int[np.ndarray, " slots"]
    ) -> StreamState:
        """Puts a state on the mesh, in front of an empty pipeline.

        Args:
            state: on the host, by the model's own names.
            batch: a microbatch, for its shapes.
            versions: global batches that ended since each slot's job began.
        """
        r_max = next(iter(state.bank.a.values())).shape[1]
        shapes = bank_shapes(
            dict(self.widths), len(state.bank.rank), r_max, self.names.patterned_places
        )
        empty = self.pipeline.empty_state(batch, shapes, tuple(state.opt.moments))
        return from_one_device(state, empty, self.names, self.pipeline.mesh, versions)

    def fetch(self, state: StreamState) -> TrainState:
        """Returns the state of a drained pipeline on the host, by the model's own names."""
        return on_host(to_one_device(state, self.names, self.pipeline.mesh))


def make_engine(
    base: Base,
    bank: AdapterBank,
    *,
    data: int,
    stage: int,
    order: Order,
    residuals: Residuals = "save",
    remat: Remat | Sequence[Remat],
    capacity: int,
    deterministic: bool = False,
) -> MeshEngine:
    """Puts a base model on a mesh.

    Args:
        base: loaded, or opened (`open_base`): then each stage reads its own weights.
        bank: adapters, for the names of their modules.
        data: copies of the pipeline.
        stage: stages of the pipeline.
        order: of the phases in a tick.
        residuals: what waits for the backward.
        remat: what each layer computes again in the backward, or each layer place of a stage.
        capacity: rows of a microbatch.
        deterministic: take only what repeats its bits.

    Raises:
        ConfigError: the mesh cannot work, or adapters lie outside the layers.
    """
    config = base.config
    mesh = make_mesh(data, stage, num_layers=config.num_hidden_layers)
    layout = even_layout(config.num_hidden_layers, stage)
    names = make_names(layout, bank.a, bank.ranks)
    linears = multi_linears(base.model)
    widths = {}
    for path in names.paths:
        (place,) = layout.place_paths([path])
        widths[place] = (linears[path].in_features, linears[path].out_features)
    policies = policies_at(remat, layout.places)
    model = StageModel(
        config, base.dtype, layout.places, names.places, residuals, policies, deterministic
    )
    chunk = loss_chunk(-(-config.vocab_size // stage), capacity)
    pipeline = Pipeline(mesh, model, layout.first, order, chunk)
    return MeshEngine(pipeline, names, place_base(base, layout, mesh), widths)


def host_device() -> Device:
    """Returns a device of the host, where a run keeps the state between two stretches of ticks."""
    return jax.local_devices(backend="cpu")[0]


def on_host[T](tree: T) -> T:
    """Puts a tree of arrays on the host: what is computed with them is computed there."""
    return jax.device_put(tree, host_device())


def versions_at(
    stretches: Sequence[tuple[str, int, bool]], slot: Mapping[str, int], num_slots: int
) -> Int[np.ndarray, " slots"]:
    """Returns the version of each slot's adapter after these (job, global batch, end), in order."""
    versions = np.zeros(num_slots, np.int32)
    for job, batch, ends in stretches:
        if job in slot:
            versions[slot[job]] = batch + ends
    return versions
