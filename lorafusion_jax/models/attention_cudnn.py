"""Packed attention by cuDNN, through jax's own binding of it.

`jax.nn.dot_product_attention` does not expose cuDNN's packed layout (samples side by side in one
row, told apart by offsets), which jax has internally. This is the only file that imports from
`jax._src`; versions of jax that nobody has tried are refused.

cuDNN's time and its saved statistics ([M, H, T] float32) grow with the static number of segments M:
`lorafusion_jax.train.batch.segment_bucket` keeps it small.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorafusion_jax.models.attention_xla import Scoring

type Operand = jax.Array | jax.ShapeDtypeStruct

TRIED = ((0, 11), (0, 12))  # from, to: versions of jax that this was run or lowered with
MAX_SEGMENTS = 128

# cuDNN adds up dQ in the order in which blocks finish: two runs were seen to differ by 2e-6 at 32
# heads of 128. XLA asks it for a deterministic algorithm under
# xla_gpu_exclude_nondeterministic_ops (`lorafusion_jax.train.programs`), and
# `tests/models/test_attention_gpu.py` checks whether it gets one. Until that has passed on a GPU,
# runs that must repeat their bits do not use cuDNN.
REPEATS_ITS_BITS = False


def refusal(q: Operand, k: Operand, segments, scoring: Scoring) -> str | None:
    """Returns why cuDNN cannot attend over these operands, or None if it can.

    Args:
        q: queries [T, H, D]; only shape and dtype count.
        k: keys [T, G, D].
        segments: a `lorafusion_jax.models.attention.Segments`.
        scoring: of the attention.
    """
    if not _on_hopper():
        return "the packed layout needs a GPU of compute capability 9.0 or newer, and cuDNN"
    version = jax.__version_info__[:2]
    if not TRIED[0] <= version < TRIED[1]:
        return f"jax {jax.__version__} has not been tried: expected {TRIED[0]} to below {TRIED[1]}"
    if segments.demands.deterministic and not REPEATS_ITS_BITS:
        return "its backward pass is not known to repeat its bits (train.deterministic)"
    if scoring.softcap is not None:
        return "it has no soft cap of scores"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"q and k are {q.dtype} and {k.dtype}: it takes bfloat16 or float16"
    if q.shape[2] % 8 or q.shape[2] > 256:
        return f"heads of {q.shape[2]}: it takes multiples of 8 up to 256"
    if segments.offsets.shape[0] - 1 > MAX_SEGMENTS:
        return f"{segments.offsets.shape[0] - 1} segments: they cost time up to {MAX_SEGMENTS}"
    return None


def attend(
    q: Float[Array, "T H D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    offsets: Int[Array, " M1"],
    scoring: Scoring,
) -> Float[Array, "T H D"]:
    """Attends from each row to the rows of its own segment up to itself; inputs must be finite.

    A run of padding is one segment here: its rows see one another, and nobody sees them.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    if offsets.shape[0] < 3:  # one segment would not be the packed layout
        offsets = jnp.pad(offsets, (0, 3 - offsets.shape[0]), constant_values=q.shape[0])
    lengths = jnp.diff(offsets)[None]
    out = cudnn.dot_product_attention(
        q[None],
        k[None],
        v[None],
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets[None],
        kv_offsets=offsets[None],
        scale=scoring.scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=scoring.window,
        qkv_layout="BTNH",
    )
    return jnp.asarray(out)[0]


def _on_hopper() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0.0")
    return tuple(map(int, capability.split("."))) >= (9, 0)
