"""Between the engine's state and that of one device, which is also what checkpoints hold.

The conversion moves values and never computes with them, so a state that goes to any number of
stages and back keeps its bits. Microbatches on their way are no part of it: drain the pipeline
first. Accumulators of several data ranks are kept apart, rank by rank along axis 0, because their
sum would not continue to the same bits.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from lorafusion_jax.lora.bank import AdapterBank
from lorafusion_jax.parallel.layout import Layout
from lorafusion_jax.parallel.processes import gathered
from lorafusion_jax.parallel.state import StreamState, Sums, mesh_sizes, state_specs
from lorafusion_jax.parallel.stream import put_global
from lorafusion_jax.train.step import TrainState

type HostArray = Any
"""A numpy array where the annotations of a state, which is also traced, say jax.Array."""


type HostAdapters = dict[str, dict[str, HostArray]]


class Names(NamedTuple):
    """How modules are called on one device and on a stage.

    Attributes:
        layout: layers of each stage.
        paths: modules with adapters, as the model calls them.
        places: the same as a stage calls them.
        patterned: those of `paths` with ranks and scale ratios of their own.
    """

    layout: Layout
    paths: tuple[str, ...]
    places: tuple[str, ...]
    patterned: tuple[str, ...] = ()

    @property
    def patterned_places(self) -> tuple[str, ...]:
        """Places where any stage has a patterned module."""
        return self.layout.place_paths(self.patterned)


def make_names(layout: Layout, paths: Iterable[str], patterned: Iterable[str] = ()) -> Names:
    """Returns the names of the modules at these paths of the model."""
    paths = tuple(paths)
    return Names(layout, paths, layout.place_paths(paths), tuple(patterned))


def to_one_device(state: StreamState, names: Names, mesh: Mesh) -> TrainState:
    """Returns the state by the model's own names, in host memory.

    Args:
        state: of a drained pipeline.
        names: of the modules.
        mesh: it lies on.
    """
    data, stages = mesh_sizes(mesh)
    bank, num_slots = state.bank, state.version.shape[0]
    adapters = _adapters_from_stages(names, {"a": bank.a, "b": bank.b})
    whole = AdapterBank(
        a=adapters["a"],
        b=adapters["b"],
        targeted=_from_stages(names, bank.targeted),
        scale=gathered(bank.scale),
        rate=gathered(bank.rate),
        rank=gathered(bank.rank),
        ranks=_from_stages(names, bank.ranks, names.patterned),
        ratios=_from_stages(names, bank.ratios, names.patterned),
    )
    moments = jax.tree.map(
        lambda x: _adapters_from_stages(names, x) if isinstance(x, dict) else _first(x, stages),
        state.opt.moments,
        is_leaf=_is_adapters,
    )
    opt = state.opt._replace(moments=moments)
    opt = jax.tree.map(gathered, opt)
    return TrainState(
        bank=whole,
        opt=opt,
        grads=_adapters_from_stages(names, state.sums.grads),
        loss=gathered(state.sums.loss)[: data * num_slots],
        tokens=gathered(state.sums.tokens)[: data * num_slots],
    )


def from_one_device(
    saved: TrainState,
    into: StreamState,
    names: Names,
    mesh: Mesh,
    versions: Int[np.ndarray, " slots"],
) -> StreamState:
    """Returns `into`, the state of an empty pipeline, with a saved state's values.

    Args:
        saved: by the model's own names, from any mesh.
        into: zero state of this mesh.
        names: of the modules.
        mesh: of this run.
        versions: global batches that ended since each slot's job began.
    """
    data, stages = mesh_sizes(mesh)
    saved = jax.tree.map(np.asarray, saved)
    grads, loss, tokens = jax.tree.map(
        lambda x: _ranks(x, data, len(versions)), (saved.grads, saved.loss, saved.tokens)
    )
    bank = saved.bank
    staged = _adapters_to_stages(names, {"a": bank.a, "b": bank.b})
    moments = jax.tree.map(
        lambda x: _adapters_to_stages(names, x) if isinstance(x, dict) else _on_all(stages, x),
        saved.opt.moments,
        is_leaf=_is_adapters,
    )
    host = into._replace(
        bank=AdapterBank(
            a=staged["a"],
            b=staged["b"],
            targeted=_to_stages(names, bank.targeted),
            scale=bank.scale,
            rate=bank.rate,
            rank=bank.rank,
            ranks=_to_stages(names, bank.ranks, names.patterned_places, bank.rank),
            ratios=_to_stages(names, bank.ratios, names.patterned_places, np.ones_like(bank.scale)),
        ),
        opt=saved.opt._replace(moments=moments),
        version=np.asarray(versions, np.int32),
        sums=Sums(
            _adapters_to_stages(names, grads), _on_all(stages, loss), _on_all(stages, tokens)
        ),
    )
    specs = state_specs(into)
    parts = {
        name: put_global(getattr(host, name), getattr(specs, name), mesh)
        for name in ("bank", "opt", "version", "sums")
    }
    return into._replace(**parts)


def _is_adapters(tree: PyTree) -> bool:
    return isinstance(tree, dict) and tree.keys() == {"a", "b"}


def _first(array: Array, parts: int) -> HostArray:
    """The first of equal parts along axis 0."""
    return np.split(gathered(array), parts)[0]


def _on_all(parts: int, array: np.ndarray) -> HostArray:
    """The inverse of `_first`."""
    return np.concatenate([array] * parts)


def _adapters_from_stages(
    names: Names, tree: Mapping[str, Mapping]
) -> dict[str, dict[str, HostArray]]:
    return {key: _from_stages(names, leaves) for key, leaves in tree.items()}


def _adapters_to_stages(
    names: Names, tree: Mapping[str, Mapping]
) -> dict[str, dict[str, HostArray]]:
    return {key: _to_stages(names, leaves) for key, leaves in tree.items()}


def _from_stages(
    names: Names, leaves: Mapping[str, Array], paths: Sequence[str] | None = None
) -> dict[str, HostArray]:
    """Cuts each place's leaf by stage."""
    paths = names.paths if paths is None else paths
    found = {}
    for place, leaf in leaves.items():
        for stage, array in enumerate(np.split(gathered(leaf), names.layout.stages)):
            path = names.layout.module_path(stage, place)
            if path in paths:
                found[path] = np.ascontiguousarray(array)
    return {path: found[path] for path in paths}


def _to_stages(
    names: Names,
    leaves: Mapping[str, HostArray],
    places: Sequence[str] | None = None,
    absent: HostArray = None,
) -> dict[str, HostArray]:
    """Concatenates each place's leaves over stages; `absent` or zeros where there is no such."""
    found = {}
    for place in names.places if places is None else places:
        paths = [names.layout.module_path(s, place) for s in range(names.layout.stages)]
        arrays = [None if path is None else leaves.get(path) for path in paths]
        like = next(array for array in arrays if array is not None)
        filling = np.zeros_like(like) if absent is None else absent
        found[place] = np.concatenate([filling if x is None else x for x in arrays])
    return found


def _ranks(array: np.ndarray, data: int, num_slots: int) -> np.ndarray:
    """Accumulators of `data` ranks from those of another number: all in rank 0."""
    if array.shape[0] == data * num_slots:
        return array
    parts = array.reshape(-1, num_slots, *array.shape[1:])
    whole = np.zeros((data, *parts.shape[1:]), array.dtype)
    whole[0] = parts.sum(axis=0, dtype=array.dtype)
    return whole.reshape(-1, *array.shape[1:])
