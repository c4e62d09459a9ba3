"""Packed attention on a GPU: right, no leak between samples, and which paths repeat their bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.models import attention_cudnn
from lorafusion_jax.models.attention import Demands, Segments, attention

pytestmark = pytest.mark.gpu

ROWS, LENGTHS = 2048, (300, 700, 129, 819)  # 100 rows of padding
SECOND = slice(300, 1000)
OTHERS = np.r_[0:300, 1000:1948]
MODELS = {"llama": (32, 8, 128), "smollm": (9, 3, 64), "gemma": (8, 4, 256)}
NO_NONDETERMINISM = {"xla_gpu_exclude_nondeterministic_ops": True}


def where(segments=16):
    start = np.arange(ROWS)
    offsets = np.full(segments + 1, ROWS)
    first = 0
    for i, length in enumerate(LENGTHS):
        start[first : first + length], offsets[i], first = first, first, first + length
    offsets[len(LENGTHS)] = first
    return Segments(jnp.asarray(start, jnp.int32), jnp.asarray(offsets, jnp.int32))


def inputs(heads, groups, width, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    counts = (heads, groups, groups, heads)
    return tuple(
        jax.random.normal(key, (ROWS, count, width), jnp.bfloat16)
        for key, count in zip(keys, counts, strict=True)
    )


def compiled(args, segments, *, options=None, **scoring):
    def run(q, k, v, dout, segments):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, **scoring), q, k, v)
        return (out, *pull(dout))

    return jax.jit(run).lower(*args, segments).compile(compiler_options=options)


def real_rows(results):
    return [np.asarray(x, np.float32)[: sum(LENGTHS)] for x in jax.device_get(results)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_agrees_with_xla(model, window, deterministic):
    """Deterministic gradients are those of a call of our own."""
    args, segments = inputs(*MODELS[model]), where()
    asked = segments._replace(demands=Demands(deterministic=deterministic))
    ours = compiled(args, asked, implementation="cudnn", window=window)(*args, asked)
    wide = tuple(x.astype(jnp.float32) for x in args)
    with jax.default_matmul_precision("highest"):
        truth = compiled(wide, segments, implementation="xla", window=window)(*wide, segments)
    for got, want in zip(real_rows(ours), real_rows(truth), strict=True):
        assert np.linalg.norm(got - want) < 8e-3 * np.linalg.norm(want)


def changed_second_sample(args, poison):
    other = inputs(*MODELS["llama"], seed=1) if poison != "nan" else [jnp.nan * x for x in args]
    return tuple(x.at[SECOND].set(4 * y[SECOND]) for x, y in zip(args, other, strict=True))


@pytest.mark.scenario("C10")
@pytest.mark.parametrize("poison", ["other values", "nan"])
@pytest.mark.parametrize("implementation", ["cudnn", "xla"])
def test_nothing_leaks_between_samples(implementation, poison):
    """What the second sample holds changes no bit of the others, where runs repeat their bits."""
    args, segments = inputs(*MODELS["llama"]), where()
    segments = segments._replace(demands=Demands(deterministic=True))
    run = compiled(args, segments, options=NO_NONDETERMINISM, implementation=implementation)
    clean = real_rows(run(*args, segments))
    dirty = real_rows(run(*changed_second_sample(args, poison), segments))
    for before, after in zip(clean, dirty, strict=True):
        assert before[OTHERS].tobytes() == after[OTHERS].tobytes()
        assert before[SECOND].tobytes() != after[SECOND].tobytes()


@pytest.mark.scenario("C10")
@pytest.mark.parametrize("poison", ["other values", "nan"])
def test_nothing_leaks_where_sums_have_no_order(poison):
    """cuDNN's dQ is then a sum in the order of arrival: some values round the other way."""
    args, segments = inputs(*MODELS["llama"]), where()
    run = compiled(args, segments, implementation="cudnn")
    clean = real_rows(run(*args, segments))
    dirty = real_rows(run(*changed_second_sample(args, poison), segments))
    for name, before, after in zip(("out", "dq", "dk", "dv"), clean, dirty, strict=True):
        before, after = before[OTHERS], after[OTHERS]
        step = 2.0**-7 * np.abs(before) + 1e-6 * np.abs(before).max()  # of bfloat16
        assert (np.abs(before - after) <= step).all(), name
        assert np.mean(before != after) < (0.01 if name == "dq" else 1e-9), name


def repeats(run, args, segments, times=20) -> bool:
    first = [np.asarray(x).tobytes() for x in jax.device_get(run(*args, segments))]
    return all(
        first == [np.asarray(x).tobytes() for x in jax.device_get(run(*args, segments))]
        for _ in range(times)
    )


def test_xla_repeats_its_bits():
    args, segments = inputs(*MODELS["llama"]), where()
    run = compiled(args, segments, options=NO_NONDETERMINISM, implementation="xla")
    assert repeats(run, args, segments)


def test_two_equal_layers_run_deterministically():
    """XLA sets the flag of the first of equal calls only, and has no program for the second."""
    args, segments = inputs(*MODELS["llama"]), where()
    segments = segments._replace(demands=Demands(deterministic=True))

    def run(q, k, v, dout, segments):
        def layers(q, k, v):
            return attention(attention(q, k, v, segments), k, v, segments)

        out, pull = jax.vjp(layers, q, k, v)
        return (out, *pull(dout))

    step = jax.jit(run).lower(*args, segments).compile(compiler_options=NO_NONDETERMINISM)
    assert repeats(step, args, segments, times=5)


def test_the_note_on_cudnn_is_true():
    """While `REPEATS_ITS_BITS` is True, deterministic runs use cuDNN.

    The control is the same call without the flag: it has been seen to differ.
    """
    args, segments = inputs(*MODELS["llama"]), where()
    asked = segments._replace(demands=Demands(deterministic=True))
    flagged = compiled(args, asked, options=NO_NONDETERMINISM, implementation="cudnn")
    plain = compiled(args, segments, implementation="cudnn")
    found = repeats(flagged, args, asked)
    print(
        f"cudnn repeats its bits: {found} with the flag, {repeats(plain, args, segments)} without"
    )
    assert found or not attention_cudnn.REPEATS_ITS_BITS
