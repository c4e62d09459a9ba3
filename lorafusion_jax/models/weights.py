"""From named tensors in Hugging Face's layout to a Decoder on the device; strict."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import Decoder

_TIED_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_MAX_NAMED = 5
_COMPARED_ROWS = 8192


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file that is read when needed.

    Attributes:
        shape: its shape in Hugging Face's layout (linears are [out, in]).
        read: returns it.
        dtype: that it comes in.
        read_rows: returns rows start to stop without reading the others, where that can be done.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: np.dtype = np.dtype(np.float32)  # noqa: RUF009  (never changed)
    read_rows: Callable[[int, int], np.ndarray] | None = None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Returns rows start to stop of axis 0, reading no more than must be."""
        stop = min(stop, self.shape[0])
        if start >= stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return self.read()[start:stop] if self.read_rows is None else self.read_rows(start, stop)


class _Slot(NamedTuple):
    """Where a tensor goes: kernels are stored transposed, [in, out]."""

    variable: nnx.Variable
    shape: tuple[int, ...]
    transposed: bool


def build_decoder(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], dtype: DTypeLike, where: str
) -> Decoder:
    """Makes a decoder of exactly the given tensors.

    Args:
        config: the shape.
        tensors: weights by Hugging Face's names.
        dtype: dtype of weights and activations.
        where: file or directory, for messages.

    Returns:
        The decoder, its weights on the default device.

    Raises:
        ModelError: a tensor is missing, unexpected or misshapen; all such are named.
    """
    graphdef, state, slots = _slots(config, dtype)
    tensors = _checked(config, slots, tensors, where)
    for name, slot in slots.items():
        value = jnp.array(tensors[name].read())
        slot.variable.set_value((value.T if slot.transposed else value).astype(dtype))
    return nnx.merge(graphdef, state)


def outline_decoder(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], dtype: DTypeLike, where: str
) -> tuple[Decoder, dict[str, LazyTensor]]:
    """Makes a decoder without its weights, and finds the tensors that belong to it.

    Args: see `build_decoder`, whose checks are made here too.

    Returns:
        The decoder, its leaves `jax.ShapeDtypeStruct`s, and the tensors, none of which was read.

    Raises:
        ModelError: see `build_decoder`.
    """
    graphdef, state, slots = _slots(config, dtype)
    return nnx.merge(graphdef, state), _checked(config, slots, tensors, where)


def tensors_of(model: Decoder) -> dict[str, LazyTensor]:
    """Returns a loaded decoder's weights as tensors by Hugging Face's names."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array, (name, transposed) = variable.get_value(), tensor_name(path)
        found[name] = LazyTensor(
            array.shape[::-1] if transposed else array.shape,
            partial(_read_leaf, array, transposed, 0, None),
            array.dtype,
            partial(_read_leaf, array, transposed),
        )
    return found


def _read_leaf(array: Array, transposed: bool, start: int, stop: int | None) -> np.ndarray:
    return np.asarray(array[:, start:stop].T if transposed else array[start:stop])


def tensor_name(path: Sequence[object]) -> tuple[str, bool]:
    """Returns Hugging Face's name of a decoder's array, and whether it is stored transposed."""
    transposed = path[-1] == "kernel"
    return ".".join(map(str, (*path[:-1], "weight" if transposed else path[-1]))), transposed


def random_decoder(config: ModelConfig, seed: int, dtype: DTypeLike) -> Decoder:
    """Makes a decoder of normal weights, each of variance 1 / inputs; made on the device.

    A tensor is a function of the seed, its name, shape and dtype only.
    """
    graphdef, state, slots = _slots(config, dtype)
    root = jax.random.key(seed, impl="threefry2x32")
    for name, slot in slots.items():
        shape = slot.variable.get_value().shape
        if len(shape) == 1 and name.endswith("norm.weight"):
            value = jnp.full(shape, 1 - config.norm_offset, dtype)
        else:
            word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            fan_in = slot.shape[-1]
            value = _normal(jax.random.fold_in(root, word), fan_in**-0.5, shape, dtype)
        # One after the other: the random bits of many at once would scatter the weights over the
        # device's memory, and leave no room in one piece for the step.
        slot.variable.set_value(jax.block_until_ready(value))
    return nnx.merge(graphdef, state)


@partial(jax.jit, static_argnums=(2, 3))
def _normal(key, deviation, shape: tuple[int, ...], dtype):
    return (deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _slots(config: ModelConfig, dtype: DTypeLike):
    """An abstract decoder (nothing allocated) and its variables by Hugging Face's names."""
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    slots = {}
    for path, variable in nnx.to_flat_state(state):
        name, transposed = tensor_name(path)
        shape = variable.get_value().shape
        slots[name] = _Slot(variable, shape[::-1] if transposed else shape, transposed)
    return graphdef, state, slots


def _checked(
    config: ModelConfig,
    slots: Mapping[str, _Slot],
    tensors: Mapping[str, LazyTensor],
    where: str,
) -> dict[str, LazyTensor]:
    """The tensors that are the decoder's, after all checks."""
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and _TIED_HEAD in tensors:
        _check_tied(tensors, where)
        del tensors[_TIED_HEAD]
    _check_names_and_shapes(slots, tensors, where)
    return tensors


def _check_names_and_shapes(
    slots: Mapping[str, _Slot], tensors: Mapping[str, LazyTensor], where: str
) -> None:
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(slot.shape)}"
        for name, slot in slots.items()
        if name in tensors and tuple(tensors[name].shape) != slot.shape
    ]
    problems = {
        "missing": sorted(slots.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - slots.keys()),
        "misshapen": misshapen,
    }
    lines = [f"{len(found)} {kind}: {_some(found)}" for kind, found in problems.items() if found]
    if lines:
        raise ModelError(
            f"{where}: the weights do not fit the model's configuration\n  " + "\n  ".join(lines)
        )


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return "; ".join(names[:_MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _check_tied(tensors: Mapping[str, LazyTensor], where: str) -> None:
    """Some tools write the shared head too; anything but a copy means that it is not shared."""
    if _EMBEDDING in tensors and not _equal(tensors[_TIED_HEAD], tensors[_EMBEDDING]):
        raise ModelError(
            f"{where}: the configuration ties the output head to the embedding, but {_TIED_HEAD} "
            "differs from it: set tie_word_embeddings to false in config.json"
        )


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Compares a stretch of rows at a time: whole tables may be too large to hold twice."""
    return one.shape == other.shape and all(
        np.array_equal(one.rows(i, i + _COMPARED_ROWS), other.rows(i, i + _COMPARED_ROWS))
        for i in range(0, one.shape[0], _COMPARED_ROWS)
    )
