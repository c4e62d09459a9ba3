"""Tile sizes of the kernels: classes that refuse impossible values."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

_SMS = 132
_TILE_ROWS = 128
_SMEM_BYTES = 231_424  # of 232,448; the rest is barriers and alignment
_SMEM_TARGET = 220_000  # what the heuristics below stay under
_TILE_US = 42 / 4096  # time of a tile of a product, per column that it contracts over


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
        staged: pieces of 64 x 64 outputs that a warpgroup may have on their way to memory.
        minor: dimension of the outputs that neighbouring blocks walk along first.
        width: tiles in that dimension before the walk turns.
        absorb: whether the launch does another kernel's work, mostly in blocks that have a tile
            less than others: `base_up` that of `down`, `dx` that of `grad_down`. At most
            32 ranks side by side for S, and 64 for dA.
    """

    split: Literal["m", "n"] = "n"
    stages: int = 4
    staged: int = 2
    minor: Literal["m", "n"] = "n"
    width: int = 8
    absorb: bool = False

    def __post_init__(self):
        if self.split not in ("m", "n") or self.minor not in ("m", "n"):
            raise ValueError(f"split={self.split!r} and minor={self.minor!r} must be 'm' or 'n'")
        for name in ("stages", "width"):
            _multiple(name, getattr(self, name), 1)
        if self.staged not in (1, 2, 4):  # they go round in a tile's four pieces
            raise ValueError(f"staged={self.staged} must be 1, 2 or 4")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: one slot cannot be filled while it is read")
        if self.absorb and self.stages % 2:
            raise ValueError(f"stages={self.stages}: absorb takes an even number of slots")
        if self.smem_bytes > _SMEM_BYTES:
            raise ValueError(
                f"stages={self.stages}, staged={self.staged} and absorb={self.absorb} take "
                f"{self.smem_bytes} bytes of shared memory, {_SMEM_BYTES} are there"
            )

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a block, without barriers."""
        keys = self.stages * 512 if self.absorb else 0
        return self.stages * 384 * 64 * 2 + self.staged * 2 * 64 * 64 * 2 + keys


@dataclass(frozen=True)
class GradUpTiles:
    """Sizes of `grad_up`.

    Attributes:
        panel: columns of dY that a block owns; its dB stays in registers.
        stages: slots of the ring, each 128 x 128.
        splits: parts that the row tiles are divided into over blocks.
        atomic: whether parts of dB are added in memory, in the order in which they come: faster,
            but not the same bits from one run to the next, and not under vmap.
    """

    panel: int = 512
    stages: int = 3
    splits: int = 16
    atomic: bool = False

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
        atomic: as in `GradUpTiles`, for dA.
    """

    panel: int = 128
    stages: int = 4
    splits: int = 4
    atomic: bool = False

    def __post_init__(self):
        _multiple("panel", self.panel, 128)
        _multiple("stages", self.stages, 1)
        _multiple("splits", self.splits, 1)
        if self.panel > 256:
            raise ValueError(f"panel={self.panel}: more than 256 columns of dA spill registers")


@dataclass(frozen=True)
class GatedGradTiles:
    """Sizes of `gated_grad`.

    Attributes:
        panel: columns of gate and up that a block owns; dB of both stays in registers.
        stages: slots of the ring, each 128 x 64 of gate, up and the gradient.
        splits: parts that the row tiles are divided into over blocks.
    """

    panel: int = 448
    stages: int = 3
    splits: int = 4

    def __post_init__(self):
        _multiple("panel", self.panel, 64)
        _multiple("stages", self.stages, 1)
        _multiple("splits", self.splits, 1)
        if self.panel > 512:
            raise ValueError(f"panel={self.panel}: more than 512 columns of dB spill registers")
        if self.stages < 2:
            raise ValueError("stages=1: a slot is free again only during the next step")


def _splits(blocks: int, tiles: int) -> int:
    """Parts of `tiles` row tiles that fill one wave of multiprocessors with `blocks` columns."""
    return max(1, min(tiles, _SMS // blocks))


class Shape(NamedTuple):
    """What sizes depend on.

    Attributes:
        rows: of X.
        k: inputs.
        widths: outputs of each projection that shares X.
        rank: of each of them, as padded for the kernels.
    """

    rows: int
    k: int
    widths: tuple[int, ...]
    rank: int

    @property
    def ranks(self) -> int:
        """Ranks of all projections side by side."""
        return self.rank * len(self.widths)


type Sizes = DownTiles | GemmTiles | GradUpTiles | GradDownTiles


def down_tiles(shape: Shape) -> DownTiles:
    """Returns the sizes of `down`; few rows are split along k, to fill the multiprocessors."""
    row_blocks = -(-shape.rows // 64)
    splits = max(1, min(_SMS // row_blocks, shape.k // 512))
    tile_k = 128 if shape.ranks <= 64 else 64
    fixed, per_stage = 64 * shape.ranks * 6, (64 + shape.ranks) * tile_k * 2
    stages = min(4, (_SMEM_TARGET - fixed) // per_stage // 2 * 2)
    return DownTiles(tile_k, stages, splits)


def gated_down_tiles(down: DownTiles, ranks: int) -> DownTiles:
    """Returns the sizes of `gated_down`: steps and splits of `down`, and so its sums, if they fit.

    A slot holds gate and up. It is free again once H has left it, so there are as many as fit.

    Args:
        down: sizes of `down` for H.
        ranks: of A.
    """
    for tile_k in (down.tile_k, 64):
        stages = (_SMEM_BYTES - 64 * ranks * 8) // ((2 * 64 + ranks) * tile_k * 2) // 2 * 2
        if stages >= 4:
            return replace(down, tile_k=tile_k, stages=min(stages, 8))
    return replace(down, tile_k=64, stages=2)


def gated_grad_tiles(rows: int, width: int, rank: int) -> GatedGradTiles:
    """Returns the sizes of `gated_grad` that give the busiest multiprocessor the least to do.

    Args:
        rows: of gate and up.
        width: of each.
        rank: of each projection's LoRA, at most 32.
    """
    tiles, columns, found = -(-rows // _TILE_ROWS), -(-width // 64), []
    for steps in range(1, min(columns, 8 if rank <= 16 else 4) + 1):
        panels = -(-columns // steps)
        splits = max(1, min(tiles, _SMS // panels))
        length = -(-tiles // splits)
        work = -(-panels * splits // _SMS) * steps * length
        found.append((work, -steps, splits))  # wide panels: fewer partial sums of dS
    _, steps, splits = min(found)
    per_stage, fixed = 3 * _TILE_ROWS * 128 + 256 * rank, (1024 + 512) * rank
    stages = min(4, (_SMEM_BYTES - fixed) // per_stage)
    return GatedGradTiles(64 * -steps, stages, splits)


class Pass(NamedTuple):
    """A skinny pass that a product may absorb, at a dropout rate of 0.1.

    Attributes:
        jobs: parts that it is done in; a block does a whole one.
        job_us: time of one.
        alone_us: time of the kernel of its own, with what else it needs and the launches.
    """

    jobs: int
    job_us: float
    alone_us: float


def jobs_per_tile(length: int, contracted: int) -> int:
    """Jobs over 128 x length elements that a block with a tile less takes before others take any.

    Args:
        length: of a job.
        contracted: contraction size of a tile.
    """
    return max(1, contracted // length)


def absorbing_pays(work: Pass, length: int, contracted: int, tiles: int) -> bool:
    """Whether a product of so many tiles takes less time with the pass than the two one by one.

    The blocks with a tile less take the first jobs, all blocks the rest: see `gemm.share_jobs`.

    Args:
        work: the pass.
        length: of a job.
        contracted: contraction size of a tile.
        tiles: of the product's outputs.
    """
    light = _SMS - tiles % _SMS
    first = min(work.jobs, light * jobs_per_tile(length, contracted))
    rest = -(-(work.jobs - first) // _SMS) * work.job_us
    missing = contracted * _TILE_US if light < _SMS else 0.0
    return max(0.0, -(-first // light) * work.job_us - missing) + rest < work.alone_us


def base_up_tiles(shape: Shape) -> GemmTiles:
    """Returns the sizes of `base_up`; S is absorbed nowhere, as it has not won where measured."""
    return GemmTiles("m", minor="m", width=16)


def dx_tiles(shape: Shape) -> GemmTiles:
    """Returns the sizes of `dx`."""
    share = shape.rows * shape.k / 8192 / 4096
    work = Pass(-(-shape.k // 128), 80 * shape.rows / 8192, 31 * share + 8)
    tiles = -(-shape.rows // _TILE_ROWS) * -(-shape.k // 256)
    return GemmTiles(absorb=absorbing_pays(work, shape.rows, sum(shape.widths), tiles))


def grad_up_tiles(shape: Shape) -> GradUpTiles:
    """Returns the sizes of `grad_up`."""
    panel = 512 if min(shape.widths) >= 512 else 128
    chunks = -(-shape.rank // 64)
    blocks = sum(-(-width // panel) for width in shape.widths) * chunks
    return GradUpTiles(panel, stages=3, splits=_splits(blocks, -(-shape.rows // _TILE_ROWS)))


def grad_down_tiles(shape: Shape) -> GradDownTiles:
    """Returns the sizes of `grad_down`."""
    chunks = min(3, -(-shape.ranks // 64))
    blocks = -(-shape.k // 128) * -(-shape.ranks // (64 * chunks))
    stages = min(4, (_SMEM_TARGET - 32_768) // (2 * _TILE_ROWS * (128 + 64 * chunks)))
    return GradDownTiles(128, stages, _splits(blocks, -(-shape.rows // _TILE_ROWS)))


# Class and heuristic of each operation, for compute capability 9.0.
OPERATIONS: dict[str, tuple[type[Sizes], Callable[[Shape], Sizes]]] = {
    "down": (DownTiles, down_tiles),
    "base_up": (GemmTiles, base_up_tiles),
    "grad_up": (GradUpTiles, grad_up_tiles),
    "grad_down": (GradDownTiles, grad_down_tiles),
    "dx": (GemmTiles, dx_tiles),
}


def _gemm_candidates(start: GemmTiles) -> list[GemmTiles]:
    """One change at a time."""
    other = {"minor": "n", "width": 8} if start.minor == "m" else {"minor": "m", "width": 16}
    return [
        start,
        replace(start, absorb=not start.absorb),
        replace(start, split="n" if start.split == "m" else "m"),
        # All of a tile's outputs leave without a wait.
        replace(start, stages=3, staged=4, absorb=False),
        replace(start, **other),
        replace(start, width=24 - start.width),
    ]


def candidates(op: str, shape: Shape) -> list[Sizes]:
    """Returns the sizes that tuning compares for a shape, the heuristic's first."""
    start = OPERATIONS[op][1](shape)
    if isinstance(start, GemmTiles):
        return list(_gemm_candidates(start))
    if isinstance(start, DownTiles):
        other = 192 - start.tile_k
        return [start, replace(start, tile_k=other, stages=2 if other == 128 else start.stages)]
    fewer = replace(start, splits=max(1, start.splits // 2))
    return [start, fewer] if fewer != start else [start]
