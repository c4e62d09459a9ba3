"""NNX modules: frozen linears that carry the LoRA adapters of many jobs."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int, UInt32


class LoraContext(NamedTuple):
    """How the rows of one forward pass are routed to adapter slots; passed down the model.

    Attributes:
        scale: LoRA scale per slot.
        rate: dropout rate per slot (zeros for evaluation and generation).
        tile_adapter: slot of each tile of rows, -1 for none.
        row_key: dropout identity per row, 0 for padding.
    """

    scale: Float[Array, " slots"]
    rate: Float[Array, " slots"]
    tile_adapter: Int[Array, " tiles"]
    row_key: UInt32[Array, " T"]
