"""Tile sizes of the kernels: classes that refuse impossible values."""

from dataclasses import dataclass
from typing import Literal


def _multiple(name: str, value: int, of: int) -> None:
    if value <= 0 or value % of:
        raise ValueError(f"{name}={value} must be a positive multiple of {of}")


@dataclass(frozen=True)
class DownTiles:
    """Sizes of `down`.

    Attributes:
        tile_k: columns of X per step.
        stages: slots of the ring; even, as two warpgroups take turns.
        splits: parts that the columns of X are divided into over blocks.
    """

    tile_k: int = 128
    stages: int = 4
    splits: int = 1

    def __post_init__(self):
        _multiple("tile_k", self.tile_k, 64)
        _multiple("stages", self.stages, 2)
        _multiple("splits", self.splits, 1)


@dataclass(frozen=True)
class GemmTiles:
    """Sizes of `base_up` and `dx`, whose blocks own 128 x 256 outputs at a time.

    Attributes:
        split: dimension along which the two compute warpgroups share a block's tile.
        stages: slots of the ring, each 64 deep.
        minor: dimension of the outputs that neighbouring blocks walk along first.
        width: tiles in that dimension before the walk turns.
    """

    split: Literal["m", "n"] = "n"
    stages: int = 4
    minor: Literal["m", "n"] = "n"
    width: int = 8

    def __post_init__(self):
        if self.split not in ("m", "n") or self.minor not in ("m", "n"):
            raise ValueError(f"split={self.split!r} and minor={self.minor!r} must be 'm' or 'n'")
        _multiple("stages", self.stages, 1)
        _multiple("width", self.width, 1)
        if self.stages > 4:
            raise ValueError(f"stages={self.stages}: four slots of 48 KiB are all that fit")


@dataclass(frozen=True)
class GradUpTiles:
    """Sizes of `grad_up`.

    Attributes:
        panel: columns of dY that a block owns; its dB stays in registers.
        stages: slots of the ring, each 128 x 128.
        splits: parts that the row tiles are divided into over blocks.
    """

    panel: int = 512
    stages: int = 3
    splits: int = 16

    def __post_init__(self):
        _multiple("panel", self.panel, 128)
        _multiple("stages", self.stages, 1)
        _multiple("splits", self.splits, 1)
        if self.panel > 512:
            raise ValueError(f"panel={self.panel}: more than 512 columns of dB spill registers")


@dataclass(frozen=True)
class GradDownTiles:
    """Sizes of `grad_down`.

    Attributes:
        panel: columns of X that a block owns; its dA stays in registers.
        stages: slots of the ring, each 128 rows.
        splits: parts that the row tiles are divided into over blocks.
    """

    panel: int = 128
    stages: int = 4
    splits: int = 4

    def __post_init__(self):
        _multiple("panel", self.panel, 128)
        _multiple("stages", self.stages, 1)
        _multiple("splits", self.splits, 1)
        if self.panel > 256:
            raise ValueError(f"panel={self.panel}: more than 256 columns of dA spill registers")


_SMS = 132
_TILE_ROWS = 128
_SMEM_BYTES = 220_000  # of 232,448; the rest is barriers and alignment


def _splits(blocks: int, tiles: int) -> int:
    """Parts of `tiles` row tiles that fill one wave of multiprocessors with `blocks` columns."""
    return max(1, min(tiles, _SMS // blocks))


def down_tiles(rows: int, k: int, rank: int) -> DownTiles:
    """Returns the sizes of `down` for an input of `rows` x `k` and all ranks together."""
    row_blocks = -(-rows // 64)
    splits = max(1, min(_SMS // row_blocks, k // 512))
    tile_k = 128 if rank <= 64 else 64
    fixed, per_stage = 64 * rank * 6, (64 + rank) * tile_k * 2
    stages = min(4, (_SMEM_BYTES - fixed) // per_stage // 2 * 2)
    return DownTiles(tile_k, stages, splits)


def gemm_tiles(op: Literal["base_up", "dx"], rows: int, depth: int, columns: int) -> GemmTiles:
    """Returns the sizes of a large product of `rows` x `depth` x `columns`."""
    return GemmTiles("m", minor="m", width=16) if op == "base_up" else GemmTiles()


def grad_up_tiles(rows: int, widths: tuple[int, ...], rank: int) -> GradUpTiles:
    """Returns the sizes of `grad_up` for projections of these widths."""
    panel = 512 if min(widths) >= 512 else 128
    chunks = -(-rank // 64)
    blocks = sum(-(-width // panel) for width in widths) * chunks
    return GradUpTiles(panel, stages=3, splits=_splits(blocks, -(-rows // _TILE_ROWS)))


def grad_down_tiles(rows: int, k: int, rank: int) -> GradDownTiles:
    """Returns the sizes of `grad_down` for an input of `rows` x `k`."""
    chunks = min(3, -(-rank // 64))
    blocks = -(-k // 128) * -(-rank // (64 * chunks))
    stages = min(4, (_SMEM_BYTES - 32_768) // (2 * _TILE_ROWS * (128 + 64 * chunks)))
    return GradDownTiles(128, stages, _splits(blocks, -(-rows // _TILE_ROWS)))
