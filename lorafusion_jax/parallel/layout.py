"""Which layers lie on which stage, and the names that modules have there.

Every stage runs the same program, so every stage has the same number of layer *places*. A stage
with fewer layers has empty places: layers whose weights are all zero, which add exactly nothing to
the residual stream. In lockstep they cost no time, because the fullest stage sets the pace.

A module at `model.layers.7.mlp.up_proj` has the path `layers.1.mlp.up_proj` on the stage that holds
layer 7 at place 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lorafusion_jax.errors import ConfigError

_LAYERS = "model.layers."


@dataclass(frozen=True)
class Layout:
    """Consecutive layers on consecutive stages.

    Attributes:
        layers: how many layers each stage has.
    """

    layers: tuple[int, ...]

    def __post_init__(self):
        if not self.layers or min(self.layers) < 1:
            raise ConfigError(f"layers per stage {list(self.layers)}: each needs at least one")

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.layers)

    @property
    def places(self) -> int:
        """Layer places of every stage."""
        return max(self.layers)

    @property
    def first(self) -> tuple[int, ...]:
        """First layer of each stage."""
        return tuple(accumulate(self.layers[:-1], initial=0))

    def layer(self, stage: int, place: int) -> int | None:
        """Returns the layer at a place of a stage, or None for an empty place."""
        return self.first[stage] + place if place < self.layers[stage] else None

    def place_paths(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Returns the paths on a stage that any of these modules has there, place by place."""
        found = set()
        for path in paths:
            layer, suffix = split_path(path)
            stage = max(s for s, first in enumerate(self.first) if first <= layer)
            found.add((layer - self.first[stage], suffix))
        return tuple(f"layers.{place}.{suffix}" for place, suffix in sorted(found))

    def module_path(self, stage: int, place_path: str) -> str | None:
        """Returns the model's path of a module on a stage, or None for an empty place."""
        _, place, suffix = place_path.split(".", 2)
        layer = self.layer(stage, int(place))
        return None if layer is None else f"{_LAYERS}{layer}.{suffix}"


def even_layout(num_layers: int, stages: int) -> Layout:
    """Spreads layers evenly; earlier stages take one more where they do not divide."""
    least, more = divmod(num_layers, stages)
    return Layout(tuple(least + (stage < more) for stage in range(stages)))


def split_path(path: str) -> tuple[int, str]:
    """Returns the layer and the path inside the layer of a module path.

    Raises:
        ConfigError: the module lies outside the layers.
    """
    layer, _, suffix = path.removeprefix(_LAYERS).partition(".")
    if not path.startswith(_LAYERS) or not layer.isdigit():
        raise ConfigError(f"{path} lies outside the decoder layers and cannot be pipelined")
    return int(layer), suffix


def suffixes_at(place: int, place_paths: Sequence[str]) -> tuple[str, ...]:
    """Returns the paths inside the layer of the modules at one place."""
    start = f"layers.{place}."
    return tuple(path.removeprefix(start) for path in place_paths if path.startswith(start))
