"""Packed attention by cuDNN, through jax's own binding of it.

`jax.nn.dot_product_attention` does not expose cuDNN's packed layout (samples side by side in one
row, told apart by offsets), which jax has internally. This is the only file that imports from
`jax._src`; versions of jax that nobody has tried are refused.

cuDNN launches blocks for every segment as if it were as long as the static bound says, and most of
them find nothing to do; its saved statistics are [M, H, bound] in float32. So both static numbers
count: `lorafusion_jax.train.batch` keeps the segments M and the longest of them small.
"""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorafusion_jax.models.attention_xla import Scoring

type Operand = jax.Array | jax.ShapeDtypeStruct

TRIED = ((0, 11), (0, 12))  # from, to: versions of jax that this was run or lowered with
MAX_SEGMENTS = 128

# Without a flag cuDNN adds up dQ in the order in which blocks finish: two runs were seen to differ
# by 2e-6 at 32 heads of 128. With it, it repeated its bits: `test_the_note_on_cudnn_is_true` on two
# H200. False sends deterministic runs to XLA.
#
# The flag is set on each call here, because XLA 0.11.2's own way (deterministic runs exclude
# nondeterministic operations) writes it to the first of several equal calls only, and then finds no
# compiled graph for the others when they run (an IndexError).
REPEATS_ITS_BITS = True


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
    longest: int | None = None,
    deterministic: bool = False,
) -> Float[Array, "T H D"]:
    """Attends from each row to the rows of its own segment up to itself; inputs must be finite.

    A run of padding is one segment or several here: rows of one see one another, and nobody sees
    them.

    Args:
        q: queries.
        k: keys.
        v: values.
        offsets: as in `Segments`.
        scoring: of the attention.
        longest: no segment has more rows; None for no bound but T.
        deterministic: the backward pass repeats its bits.
    """
    rows, (segments,) = q.shape[0], (offsets.shape[0] - 1,)
    pages = num_pages(rows, rows if longest is None else longest)
    per_page = max(2, -(-segments // pages))  # one segment would not be the packed layout
    offsets = jnp.pad(offsets, (0, pages * (per_page + 1) - offsets.shape[0]), constant_values=rows)
    lengths = jnp.diff(offsets)[: pages * per_page].reshape(pages, per_page)
    where = (lengths, offsets.reshape(pages, per_page + 1))
    q, k, v = (x.reshape(pages, rows // pages, *x.shape[1:]) for x in (q, k, v))
    out = _packed((scoring, deterministic), q, k, v, where)
    return jnp.asarray(out).reshape(rows, *q.shape[2:])


def num_pages(rows: int, longest: int) -> int:
    """Returns into how many equal pages of at least `longest` rows a row of samples is cut.

    cuDNN is told that it has a batch of so many rows of the page's length. Its offsets count from
    the beginning of all pages, so samples may lie across them: pages only bound the lengths.
    """
    pages = 1
    while rows % (2 * pages * 64) == 0 and rows // (2 * pages) >= max(longest, 256):
        pages *= 2
    return pages


type _Asked = tuple[Scoring, bool]  # of attention, and whether it repeats its bits


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(asked: _Asked, q, k, v, where):
    return _packed_forward(asked, q, k, v, where)[0]


def _packed_forward(asked: _Asked, q, k, v, where):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    operands = (q, k, v, *_operands(q, k, where))
    out, statistics = cudnn._dot_product_attention_fwd_p.bind(
        *operands, is_training=True, **_parameters(asked[0])
    )
    return out, (operands, statistics, out)


def _packed_backward(asked: _Asked, residuals, dout):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    scoring, deterministic = asked
    operands, statistics, out = residuals
    if deterministic:
        return (*_repeatable_gradients(scoring, operands, statistics, out, dout), None)
    gradients = cudnn._dot_product_attention_bwd_p.bind(
        *operands, statistics, out, dout, **_parameters(scoring)
    )
    return (*gradients[:3], None)


_packed.defvjp(_packed_forward, _packed_backward)


def _repeatable_gradients(scoring: Scoring, operands, statistics, out, dout):
    """The same call as jax's own, with the flag that jax does not set."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jaxlib.mlir import ir

    q, k, v, _, *lengths_and_offsets = operands[:8]
    pages, rows, heads, width = q.shape
    groups, asked = k.shape[2], _parameters(scoring)
    with ir.Context():
        kind = ir.BF16Type.get() if q.dtype == jnp.bfloat16 else ir.F16Type.get()
        config = cudnn.create_dot_product_attention_backend_config(
            pages, heads, rows, rows, kind, asked["scale"], asked["seed"], asked["dropout_rate"],
            asked["mask_type"], asked["layout"], asked["sliding_window_length"],
            lengths_and_offsets[0].shape[1], False, is_bwd=True,
        )  # fmt: skip
    config = json.loads(config)
    config["cudnn_fmha_backend_config"]["force_deterministic"] = True
    # cuDNN numbers the axes of a gradient with the heads before the rows, and stores them after.
    by_head = [(pages, count, rows, width) for count in (heads, groups, groups)]
    call = jax.ffi.ffi_call(
        "__cudnn$fmhaSoftmaxBackward",
        [*(jax.ShapeDtypeStruct(shape, q.dtype) for shape in by_head), _NO_WORKSPACE],
        output_layouts=[*[(0, 2, 1, 3)] * 3, (0,)],
        custom_call_api_version=2,
        legacy_backend_config=json.dumps(config),
        vmap_method="sequential",
    )
    gradients = call(q, k, v, statistics, dout, out, *lengths_and_offsets)[:3]
    return tuple(gradient.transpose(0, 2, 1, 3) for gradient in gradients)


_NO_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)


def _operands(q, k, where) -> tuple:
    """What comes after q, k and v: bias, lengths, offsets in elements, and two page tables."""
    lengths, offsets = where
    none = jnp.zeros(0, q.dtype)
    in_elements = (offsets * (x.shape[2] * x.shape[3]) for x in (q, k))
    return (none, lengths, lengths, *in_elements, none, none)


def _parameters(scoring: Scoring) -> dict[str, Any]:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return {
        "scale": scoring.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, and no gradient of it
        "mask_type": cudnn.MaskType.PADDING_CAUSAL,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": scoring.window,
    }


def _on_hopper() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0.0")
    return tuple(map(int, capability.split("."))) >= (9, 0)
