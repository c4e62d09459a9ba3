"""A base model's weights onto the mesh, each tensor straight to the devices that own it.

A process reads what its own stages hold and no more: the tensors of their layers, and their rows of
embedding and head. One tensor at a time is in host memory, and waits there until its devices have
it. Nothing is ever put together, neither on a device nor on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Shaped

from lorafusion_jax.models import Base
from lorafusion_jax.models.weights import LazyTensor, tensor_name
from lorafusion_jax.parallel.layout import Layout
from lorafusion_jax.parallel.mesh import PER_STAGE, REPLICATED, Device
from lorafusion_jax.parallel.stage import flat_arrays, layer_shapes
from lorafusion_jax.parallel.state import mesh_sizes
from lorafusion_jax.parallel.vocabulary import padded_vocabulary
from lorafusion_jax.parallel.weights import Frozen

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

type Devices = Sequence[Device]


def place_base(base: Base, layout: Layout, mesh: Mesh) -> Frozen:
    """Puts a base model's weights on the mesh; arrays that lie right already are not copied.

    Args:
        base: loaded, or opened (`open_base`): then it is read here, stage by stage.
        layout: layers of each stage.
        mesh: to put them on.
    """
    source = InMemory(base) if base.unread is None else InFiles(base.unread, base.dtype)
    owners = own_devices(mesh)
    everywhere = [device for devices in owners.values() for device in devices]
    shapes = layer_shapes(base.config, base.dtype)

    def layer_array(place: int, name: str) -> Array:
        def parts(stage: int, devices: Devices) -> list[Array]:
            layer = layout.layer(stage, place)
            if layer is None:
                return [jnp.zeros(shapes[name].shape, base.dtype, device=d) for d in devices]
            return source.whole(f"model.layers.{layer}.{name}", devices)

        return _by_stage(mesh, owners, parts, shapes[name].shape)

    def table(path: str) -> Array:
        width = base.config.hidden_size
        rows = padded_vocabulary(base.config.vocab_size, layout.stages) // layout.stages

        def parts(stage: int, devices: Devices) -> list[Array]:
            found = source.rows(path, stage * rows, (stage + 1) * rows, devices)
            filling = [(0, rows - found[0].shape[0]), (0, 0)]  # the last stages may have fewer
            return [jnp.pad(x, filling) for x in found] if filling[0][1] else found

        return _by_stage(mesh, owners, parts, (rows, width))

    layers = [{name: layer_array(place, name) for name in shapes} for place in range(layout.places)]
    norm = jax.make_array_from_single_device_arrays(
        (base.config.hidden_size,),
        NamedSharding(mesh, REPLICATED),
        source.whole("model.norm.weight", everywhere),
    )
    head = None if base.config.tie_word_embeddings else table(_HEAD)
    return Frozen(layers, norm, table(_EMBEDDING), head)


def own_devices(mesh: Mesh) -> dict[int, list[Device]]:
    """Returns this process's devices of the mesh, by stage."""
    me = jax.process_index()
    own = [[device for device in ranks if device.process_index == me] for ranks in mesh.devices.T]
    return {stage: devices for stage, devices in enumerate(own) if devices}


def _by_stage(
    mesh: Mesh,
    owners: Mapping[int, Devices],
    parts: Callable[[int, Devices], list[Array]],
    shape: tuple[int, ...],
) -> Array:
    """An array that concatenates one part of this shape per stage; no part is moved."""
    shards = [array for stage, devices in owners.items() for array in parts(stage, devices)]
    whole = (mesh_sizes(mesh)[1] * shape[0], *shape[1:])
    return jax.make_array_from_single_device_arrays(whole, NamedSharding(mesh, PER_STAGE), shards)


class Source(Protocol):
    """Where a base model's arrays come from, by their paths in the decoder."""

    def whole(self, path: str, devices: Devices) -> list[Array]:
        """Returns an array on each of these devices."""
        ...

    def rows(self, path: str, start: int, stop: int, devices: Devices) -> list[Array]:
        """Returns rows of a table on each of these devices; fewer where it ends."""
        ...


class InMemory:
    """The arrays of a loaded model."""

    def __init__(self, base: Base):
        self._arrays = flat_arrays(base.model)

    def whole(self, path: str, devices: Devices) -> list[Array]:
        """See `Source`."""
        return [jax.device_put(self._arrays[path], device) for device in devices]

    def rows(self, path: str, start: int, stop: int, devices: Devices) -> list[Array]:
        """See `Source`."""
        part = self._arrays[path][start:stop]
        return [jax.device_put(part, device) for device in devices]


class InFiles:
    """Tensors of a model's files; each is read when it is asked for, once for all its devices.

    Args:
        tensors: by Hugging Face's names.
        dtype: to give the arrays.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], dtype: np.dtype):
        self._tensors, self._dtype = tensors, dtype

    def whole(self, path: str, devices: Devices) -> list[Array]:
        """See `Source`."""
        name, transposed = tensor_name(path.split("."))
        return self._put(self._tensors[name].read(), transposed, devices)

    def rows(self, path: str, start: int, stop: int, devices: Devices) -> list[Array]:
        """See `Source`."""
        return self._put(self._tensors[path].rows(start, stop), False, devices)

    def _put(self, value: np.ndarray, transposed: bool, devices: Devices) -> list[Array]:
        """Puts a tensor on devices, which transpose it; the host may forget it then."""
        copies = [jax.device_put(value, device, may_alias=False) for device in devices]
        found = [_oriented(copy, transposed, self._dtype) for copy in copies]
        return jax.block_until_ready(found)


@partial(jax.jit, static_argnums=(1, 2))
def _oriented(value: Shaped[Array, "..."], transposed: bool, dtype: np.dtype) -> Array:
    return (value.T if transposed else value).astype(dtype)
