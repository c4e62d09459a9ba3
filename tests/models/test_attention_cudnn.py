"""The cuDNN path without a GPU: what it refuses, what it asks cuDNN for, and that this lowers.

An emulator stands in for cuDNN. Like the real one it knows samples by offsets and lengths only;
unlike it, it mixes neighbours' NaN into everything, which the guard around it must prevent.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.models import attention_cudnn
from lorafusion_jax.models.attention import Demands, Segments, attention, choose
from lorafusion_jax.models.attention_xla import Scoring
from tests.models.tiny import packed
from tests.tolerance import assert_bit_equal

cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

ROWS, LENGTHS = 40, (11, 1, 17, 5)
REAL = sum(LENGTHS)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(attention_cudnn, "_on_hopper", lambda: True)


class Emulator:
    """Stands in for cuDNN's two primitives; keeps what it was asked for."""

    def __init__(self):
        self.pages, self.statistics = 0, ()

    def install(self, monkeypatch):
        monkeypatch.setattr(cudnn, "_dot_product_attention_fwd_p", Primitive(self.forward))
        monkeypatch.setattr(cudnn, "_dot_product_attention_bwd_p", Primitive(self.backward))
        return self

    def forward(self, q, k, v, *rest, is_training, **parameters):
        assert is_training
        self.pages, per_page = rest[1].shape
        self.statistics = (self.pages * per_page, q.shape[2], q.shape[1])
        return attended(q, k, v, *rest, **parameters), jnp.zeros(self.statistics, jnp.float32)

    def backward(self, q, k, v, *rest, **parameters):
        *rest, statistics, out, dout = rest
        assert statistics.shape == self.statistics and out.shape == dout.shape
        return jax.vjp(lambda *x: attended(*x, *rest, **parameters), q, k, v)[1](dout)


class Primitive:
    def __init__(self, function):
        self.bind = function


def attended(q, k, v, bias, q_lengths, k_lengths, q_offsets, k_offsets, *_, scale, seed,
             dropout_rate, variadic_args, mask_type, layout, sliding_window_length):  # fmt: skip
    assert layout == cudnn.AttentionLayout.BTNH.value and not any(variadic_args)
    assert mask_type is cudnn.MaskType.PADDING_CAUSAL and dropout_rate == 0
    assert q_offsets.shape == (q.shape[0], q_lengths.shape[1] + 1)
    longest, shape = q.shape[1], q.shape
    count = q_lengths.size
    length = jnp.minimum(q_lengths.reshape(-1, 1), longest)  # rows beyond are not looked at
    first = (q_offsets.reshape(-1)[:count] // (q.shape[2] * q.shape[3]))[:, None]
    assert jnp.issubdtype(k_offsets.dtype, jnp.integer) and k_lengths.shape == q_lengths.shape
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    rows = jnp.arange(q.shape[0])
    member = (rows >= first) & (rows < first + length)
    visible = jnp.einsum("mq,mk->qk", member.astype(int), member.astype(int)) > 0
    visible &= rows[:, None] >= rows
    if sliding_window_length is not None:
        visible &= rows[:, None] - rows < sliding_window_length
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k).astype(jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(shape)


def random_inputs(rng, rows=ROWS, dtype=jnp.bfloat16):
    shapes = ((rows, 6, 8), (rows, 2, 8), (rows, 2, 8), (rows, 6, 8))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def value_and_gradients(q, k, v, dout, segments, rows=REAL, **options):
    @jax.jit
    def run(q, k, v, dout, segments):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, **options), q, k, v)
        return (out, *pull(dout))

    return [x[:rows] for x in run(q, k, v, dout, segments)]


@pytest.mark.parametrize("options", [{}, {"window": 4, "scale": 0.7}])
def test_asks_for_the_same_attention_as_xla(rng, on_hopper, monkeypatch, options):
    Emulator().install(monkeypatch)
    _, segments = packed(LENGTHS, ROWS)
    inputs = random_inputs(rng)
    for ours, theirs in zip(
        value_and_gradients(*inputs, segments, implementation="cudnn", **options),
        value_and_gradients(*inputs, segments, implementation="xla", **options),
        strict=True,
    ):
        np.testing.assert_allclose(
            np.float32(ours), np.float32(theirs), atol=4e-2 * float(jnp.abs(theirs).max())
        )


@pytest.mark.parametrize("longest, pages", [(None, 1), (257, 1), (256, 2), (17, 2)])
def test_a_bound_of_the_lengths_cuts_the_row_into_pages(
    rng, on_hopper, monkeypatch, longest, pages
):
    """Samples lie across the pages' borders; too small a bound cuts samples off (control)."""
    emulator = Emulator().install(monkeypatch)
    lengths = (200, 100, 150, 10)
    _, segments = packed(lengths, 512)
    segments = segments._replace(demands=Demands(longest=longest))
    inputs = random_inputs(rng, 512)
    ours = value_and_gradients(*inputs, segments, sum(lengths), implementation="cudnn")
    assert emulator.pages == pages and emulator.statistics[2] == 512 // pages
    assert emulator.statistics[0] >= len(lengths) + 1
    theirs = value_and_gradients(*inputs, segments, sum(lengths), implementation="xla")
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            np.float32(a), np.float32(b), atol=4e-2 * float(jnp.abs(b).max())
        )
    monkeypatch.setattr(attention_cudnn, "num_pages", lambda rows, longest: 4)
    cut = value_and_gradients(*inputs, segments, sum(lengths), implementation="cudnn")[0]
    assert not np.allclose(np.float32(cut), np.float32(theirs[0]), atol=0.1)


@pytest.mark.parametrize("where", range(4))
def test_guard_keeps_neighbours_apart(rng, on_hopper, monkeypatch, where):
    """No bit of a sample changes, whatever its neighbours hold, and a bad sample shows."""
    Emulator().install(monkeypatch)
    _, segments = packed(LENGTHS, ROWS)
    inputs = list(random_inputs(rng))
    clean = value_and_gradients(*inputs, segments, implementation="cudnn")
    inputs[where] = inputs[where].at[14, 0, 0].set(jnp.nan).at[39].set(jnp.inf)
    dirty = value_and_gradients(*inputs, segments, implementation="cudnn")
    mine, others = slice(12, 29), np.r_[0:12, 29:34]
    assert_bit_equal([x[others] for x in dirty], [x[others] for x in clean])
    for x in dirty[1:] if where == 3 else dirty:
        assert np.isnan(np.float32(x[mine])).all(axis=(1, 2)).all()


def test_wrong_offsets_would_be_seen(rng, on_hopper, monkeypatch):
    """Control: samples that see one another do not compare equal."""
    Emulator().install(monkeypatch)
    _, segments = packed(LENGTHS, ROWS)
    _, joined = packed((12, 22), ROWS)
    inputs = random_inputs(rng)
    ours = value_and_gradients(*inputs, joined, implementation="cudnn")[0]
    theirs = value_and_gradients(*inputs, segments, implementation="xla")[0]
    assert float(jnp.abs(ours - theirs).max()) > 0.1


def shapes(rows=8192, heads=(32, 8), width=128, segments=16, dtype=jnp.bfloat16):
    def struct(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, k = (struct(rows, h, width) for h in heads)
    where = Segments(struct(rows, dtype=jnp.int32), struct(segments + 1, dtype=jnp.int32))
    return q, k, where


def test_takes_cudnn_where_it_can_and_says_why_not(on_hopper, monkeypatch):
    plain = Scoring(1.0)
    q, k, where = shapes()
    assert choose(q, k, where, plain) == "cudnn"
    assert choose(q, k, where, Scoring(1.0, window=512)) == "cudnn"
    repeatable = where._replace(demands=Demands(deterministic=True))
    assert choose(q, k, repeatable, plain) == "cudnn"
    monkeypatch.setattr(attention_cudnn, "REPEATS_ITS_BITS", False)
    refused = {
        "soft cap": (*shapes(), Scoring(1.0, softcap=50.0)),
        "float32": (*shapes(dtype=jnp.float32), plain),
        "heads of 20": (*shapes(width=20), plain),
        "256 segments": (*shapes(segments=256), plain),
        "repeat its bits": (q, k, repeatable, plain),
    }
    for reason, arguments in refused.items():
        assert reason in (attention_cudnn.refusal(*arguments) or "")
        assert choose(*arguments) == "xla"
    monkeypatch.setattr(jax, "__version_info__", (0, 99, 0))
    assert "has not been tried" in (attention_cudnn.refusal(q, k, where, plain) or "")


def test_refused_without_a_gpu(rng):
    _, segments = packed(LENGTHS, ROWS)
    q, k, v, _ = random_inputs(rng)
    with pytest.raises(NotImplementedError, match=r"cudnn: .* compute capability 9\.0"):
        attention(q, k, v, segments, implementation="cudnn")


@pytest.mark.parametrize("heads, width, window", [((32, 8), 128, None), ((9, 3), 64, 512)])
def test_lowers_for_cuda(on_hopper, monkeypatch, heads, width, window):
    """Forward and backward, with the program's own names of cuDNN's calls in it."""
    q, k, where = shapes(heads=heads, width=width)

    def run(q, k, v, dout, segments):
        attend = partial(attention, segments=segments, window=window)
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    text = jax.jit(run).trace(q, k, k, q, where).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text and "PADDING_CAUSAL" in text
    assert f"\\22sliding_window_length\\22: {window or 0}" in text
    assert "\\22max_seg_per_batch\\22: 16" in text


@pytest.mark.parametrize("window", [None, 512])
def test_a_deterministic_call_differs_by_the_flag_alone(on_hopper, window):
    """Or jax has changed its own call since ours was written after it."""
    q, k, where = shapes()
    flag = ", \\22force_deterministic\\22: true"

    def lowered(deterministic: bool) -> str:
        segments = where._replace(demands=Demands(deterministic=deterministic))

        def run(q, k, v, dout, segments):
            return jax.vjp(partial(attention, segments=segments, window=window), q, k, v)[1](dout)

        traced = jax.jit(run).trace(q, k, k, q, segments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    def calls(text: str) -> list[str]:
        return [line.split("custom_call")[1] for line in text.splitlines() if "__cudnn" in line]

    plain, repeatable = lowered(False), lowered(True)
    assert repeatable.count(flag) == 1 and flag not in plain
    assert calls(repeatable.replace(flag, "")) == calls(plain) and len(calls(plain)) == 2
