"""PackedBatch: what crosses from the planner to the jitted step. Static shapes, one per bucket."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, UInt32


class PackedBatch(NamedTuple):
    """One microbatch of C rows in tiles of P, holding samples of several jobs.

    Tokens of a job are contiguous and padded to whole tiles. Padding rows have weight 0, position
    0, segment_start = own row and row_key 0; they influence nothing, even if they hold NaN.

    Attributes:
        tokens: token ids.
        positions: position of the token in its own sample.
        labels: the token after this one in its own sample (already shifted).
        segment_start: first row of the token's sample.
        segment_offsets: first row of each sample and one past the last, padded with C; its static
            length M + 1 is bucketed.
        loss_weight: 1 / supervised tokens of the job's whole global batch, 0 where unsupervised.
        row_key: dropout identity of the token, 0 for padding.
        tile_adapter: slot of each tile, -1 for none.
        batch_end: per slot, whether the slot's global batch ends with this microbatch.
    """

    tokens: Int[Array, " C"]
    positions: Int[Array, " C"]
    labels: Int[Array, " C"]
    segment_start: Int[Array, " C"]
    segment_offsets: Int[Array, " M1"]
    loss_weight: Float[Array, " C"]
    row_key: UInt32[Array, " C"]
    tile_adapter: Int[Array, " tiles"]
    batch_end: Bool[Array, " slots"]
