"""Base models: loaded from Hugging Face directories and GGUF files, or made at random.

Only safetensors and GGUF are read, never pickle.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models.config import ModelConfig, token_ids
from lorafusion_jax.models.decoder import Decoder
from lorafusion_jax.models.gguf_weights import read_gguf
from lorafusion_jax.models.hub import hub_id, local_model
from lorafusion_jax.models.tokenizer import gguf_tokenizer, load_tokenizer
from lorafusion_jax.models.weights import (
    LazyTensor,
    build_decoder,
    outline_decoder,
    random_decoder,
    tensors_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

type Dtype = Literal["float32", "bfloat16"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("float32", "bfloat16")
_FLOATS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen base model with its tokenizer.

    Attributes:
        model: the decoder.
        config: its shape.
        path: where it was loaded from, a path or a hub id; "" for a random one.
        name: what to call it.
        make_tokenizer: builds the tokenizer; None if the model has none.
        unread: weights that are still in their files, by Hugging Face's names; the model is an
            outline then (`open_base`). None where it is loaded.
    """

    model: Decoder
    config: ModelConfig
    path: str
    name: str
    make_tokenizer: Callable[[], "PreTrainedTokenizerFast"] | None = None
    unread: Mapping[str, LazyTensor] | None = None

    @property
    def dtype(self) -> np.dtype:
        """Dtype of weights and activations."""
        return self.model.model.norm.weight.get_value().dtype

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """The weights by Hugging Face's names, loaded or not; of a loaded model in its dtype."""
        return tensors_of(self.model) if self.unread is None else self.unread

    @property
    def reference(self) -> str:
        """What adapters call their base: its path, or its name on the hub."""
        return self.name if hub_id(self.path) else self.path or self.name

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, loaded on first use."""
        if self.make_tokenizer is None:
            raise ModelError(f"base model {self.name!r} has no tokenizer")
        return self.make_tokenizer()


def load_base(path: str | Path, dtype: Dtype = "float32") -> Base:
    """Loads a model from a Hugging Face directory, a GGUF file or the hub.

    Args:
        path: directory with config.json, safetensors (sharded or not) and tokenizer.json; a
            .gguf file; or hf://org/name to download it, with @revision behind it if wanted.
        dtype: dtype of weights and activations.

    Returns:
        The model on the default device; its tokenizer is loaded on first use.

    Raises:
        ModelError: the path, architecture, weights or dtype cannot be used.
    """
    found = _find(path, dtype)
    model = build_decoder(found.config, found.tensors, jnp.dtype(dtype), found.where)
    return Base(model, found.config, str(path), found.name, found.make_tokenizer)


def open_base(path: str | Path, dtype: Dtype = "float32") -> Base:
    """Opens a model without reading its weights; whoever wants some reads them from `unread`.

    Args: see `load_base`, whose checks are made here too.

    Returns:
        The model, its leaves `jax.ShapeDtypeStruct`s.

    Raises:
        ModelError: see `load_base`.
    """
    found = _find(path, dtype)
    model, tensors = outline_decoder(found.config, found.tensors, jnp.dtype(dtype), found.where)
    return Base(model, found.config, str(path), found.name, found.make_tokenizer, tensors)


class _Found(NamedTuple):
    """What a path holds; of the weights, only the headers were read."""

    config: ModelConfig
    tensors: dict[str, LazyTensor]
    where: str
    name: str
    make_tokenizer: Callable[[], "PreTrainedTokenizerFast"]


def _find(path: str | Path, dtype: str) -> _Found:
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported: expected one of {list(_DTYPES)}")
    if (hub := hub_id(path)) is not None:
        return _find_directory(local_model(path))._replace(name=hub.repo)
    path = Path(path)
    if path.is_dir():
        return _find_directory(path)
    if path.suffix == ".gguf" and path.is_file():
        config, tensors, metadata = read_gguf(path)
        tokenizer = partial(gguf_tokenizer, metadata, str(path))
        return _Found(config, tensors, str(path), path.stem, tokenizer)
    raise ModelError(
        f"{path}: no such model: expected a Hugging Face directory, a .gguf file, or hf://ORG/NAME "
        "for a model to be downloaded from the hub"
    )


def random_base(
    config: ModelConfig,
    seed: int = 0,
    dtype: Dtype = "float32",
    tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> Base:
    """Makes a model of random weights, for tests and benchmarks.

    Args:
        config: its shape.
        seed: same seed, same weights.
        dtype: dtype of weights and activations.
        tokenizer: tokenizer to go with it.
    """
    model = random_decoder(config, seed, jnp.dtype(dtype))
    return Base(model, config, "", "random", None if tokenizer is None else lambda: tokenizer)


def _find_directory(directory: Path) -> _Found:
    values = read_json(directory / "config.json")
    config = ModelConfig.from_hf(values)
    generation = directory / "generation_config.json"
    if generation.is_file():
        more = token_ids(read_json(generation), "eos_token_id")
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
    name, tokenizer = directory.resolve().name, partial(load_tokenizer, directory)
    return _Found(config, read_tensors(directory), str(directory), name, tokenizer)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model directory.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ModelError(f"{path.parent}: no {path.name}: expected a Hugging Face model directory")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_tensors(directory: Path) -> dict[str, LazyTensor]:
    """Reads the headers of all shards of a directory; data is read tensor by tensor.

    Raises:
        ModelError: weights are missing, damaged or of another kind.
    """
    if (directory / _SINGLE).is_file():
        return _read_shard(directory / _SINGLE)
    if not (directory / _INDEX).is_file():
        raise ModelError(
            f"{directory}: neither {_SINGLE} nor {_INDEX}: expected safetensors weights; pickled "
            "ones (pytorch_model.bin) are not read, convert them with transformers' "
            "save_pretrained"
        )
    tensors: dict[str, LazyTensor] = {}
    weight_map = _weight_map(directory / _INDEX)
    for shard in sorted(set(weight_map.values())):
        # A shard's name is data of the index file: it must not lead out of the directory.
        if Path(shard).name != shard or not (directory / shard).is_file():
            raise ModelError(
                f"{directory / _INDEX}: names {shard!r}, which is not in the directory"
            )
        tensors |= _read_shard(directory / shard)
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise ModelError(f"{directory / _INDEX}: {missing[0]} ({len(missing)} such) in no shard")
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor, as the index file says."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        got = "none" if found in (None, {}) else type(found).__name__
        raise ModelError(f"{path}: weight_map: expected an object of shards by tensor, got {got}")
    for name, shard in found.items():
        if not isinstance(shard, str):
            raise ModelError(
                f"{path}: weight_map: {name[:80]}: expected a file's name, got {str(shard)[:80]!r}"
            )
    return found


def _read_shard(path: Path) -> dict[str, LazyTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error
    tensors = {}
    for name in file.keys():
        header = file.get_slice(name)
        if header.get_dtype() not in _FLOATS:
            raise ModelError(
                f"{path}: {name} is {header.get_dtype()}: expected one of {list(_FLOATS)}"
            )
        tensors[name] = LazyTensor(
            tuple(header.get_shape()),
            partial(file.get_tensor, name),
            _FLOATS[header.get_dtype()],
            partial(_read_rows, header),
        )
    return tensors


def _read_rows(header, start: int, stop: int) -> np.ndarray:
    return header[start:stop]
