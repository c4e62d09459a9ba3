"""The fused feed-forward block without a GPU: as separate calls, refusals, what it keeps."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_gated_mlp
from pallas_kernels.tuning import (
    DownTiles,
    GatedGradTiles,
    gated_down_tiles,
    gated_grad_tiles,
)
from tests.kernels import mlps, shipped
from tests.kernels.mlps import block, errors, make_mlp, mlp_truth, run, separate
from tests.tolerance import assert_bit_equal

P = jax.sharding.PartitionSpec
CASE = {"padding": (3, 17), "biased": True}


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("activation", [pytest.param("silu", marks=pytest.mark.slow), "gelu_tanh"])
def test_without_a_gpu_it_is_two_linears_and_an_activation(activation, implementation):
    p = make_mlp(activation=activation, **CASE)
    once, apart = (run(jax.jit(make(p, implementation)), p) for make in (block, separate))
    assert_bit_equal(once, apart)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_agrees_with_the_truth_row_by_row(activation):
    p = make_mlp(activation=activation, **CASE)
    got, want = run(block(p, "xla"), p), mlp_truth(p)
    assert max(errors(got, want).values()) < 2e-6
    mistaken = p._replace(outof=p.outof._replace(routing=p.into.routing))  # another site
    assert max(errors(run(block(mistaken, "xla"), p), want).values()) > 1e-3


def test_says_why_the_fused_kernels_cannot():
    p = make_mlp(tiles=(0, 1))
    with pytest.raises(ExceptionGroup, match="fused_gated_mlp") as caught:
        run(block(p, "mosaic_gpu"), p)
    assert "compute capability 9.0" in str(caught.value.exceptions[0])
    with shipped.lowering_for((9, 0)), pytest.raises(ExceptionGroup) as caught:
        jax.eval_shape(block(p, "mosaic_gpu"), p.into.x, *p.operands()[1:3])
    assert "float32" in str(caught.value.exceptions[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation='relu' is unknown"),
        ({"ws": 2}, "need gate, up and down"),
        ({"ws": (0, 2, 1)}, "are not the inputs of down"),
        ({"a": (2, 1, 0)}, "do not fit w"),
        ({"row_key": 0}, "row_key.shape"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    p = make_mlp(tiles=(0, 1))
    ws, a, b, _ = p.operands()
    routing = dict(zip(p.into.routing._fields[:4], p.into.routing[:4], strict=True))
    given = {"ws": ws, "a": a, "b": b, "sites": p.sites(), **routing}
    for name, value in change.items():
        old = given.get(name)
        match value:
            case int(count):
                given[name] = old[:count]
            case tuple():
                given[name] = tuple(old[i] for i in value)
            case _:
                given[name] = value
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(fused_gated_mlp)(p.into.x, **given)  # without the tests' own type checks


def _kept(policy, implementation: str) -> list[tuple[int, ...]]:
    """Shapes of more than one dimension that the backward pass is handed beside its operands."""
    rows, k, inner = 256, 128, 192
    x, ws, a, b, routing, _ = shipped.mlp_arguments(rows, k, inner, 16, 2)

    def forward(x, a, b, ws, routing):
        def inside(x, a, b):
            return fused_gated_mlp(
                x, ws, a, b, *routing[:4], (routing.site, routing.site),
                implementation=implementation,
            )  # fmt: skip

        if policy is not None:
            inside = jax.checkpoint(inside, policy=policy)
        return jax.vjp(inside, x, a, b)[1]

    with shipped.lowering_for((9, 0)):
        pull = jax.eval_shape(forward, x, a, b, ws, routing)
    shapes = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (rows,)]
    return sorted(shape for shape in shapes if len(shape) > 1)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
def test_keeps_what_separate_calls_keep(implementation):
    """X; gate, up and the input of down; S of three. Under a policy X, gate and up."""
    x, wide, s = (256, 128), (256, 192), (256, 16)
    keep = jax.checkpoint_policies.save_only_these_names("gate", "up")
    assert _kept(None, implementation) == sorted([x, wide, wide, wide, s, s, s])
    assert _kept(keep, implementation) == sorted([x, wide, wide])


def test_the_policy_recomputes_no_large_product():
    x, ws, a, b, routing, dy = shipped.mlp_arguments(256, 128, 192, 16, 2)
    keep = jax.checkpoint_policies.save_only_these_names("gate", "up")

    def step(policy, x, a, b, ws, routing, dy):
        def inside(x, a, b):
            return fused_gated_mlp(
                x, ws, a, b, *routing[:4], (routing.site, routing.site),
                implementation="mosaic_gpu",
            )  # fmt: skip

        y, pull = jax.vjp(jax.checkpoint(inside, policy=policy), x, a, b)
        return y, pull(dy)

    def count(policy, kernel):
        with shipped.lowering_for((9, 0)):
            traced = jax.jit(partial(step, policy)).trace(x, a, b, ws, routing, dy)
        return str(traced.jaxpr).count(f"name={kernel}")

    for kernel in ("base_up", "gated_down"):
        assert count(keep, kernel) == {"base_up": 2, "gated_down": 2}[kernel], kernel
        assert count(jax.checkpoint_policies.nothing_saveable, kernel) > 2 - (kernel != "base_up")


@pytest.mark.slow
def test_scan_vmap_and_shard_map():
    p = make_mlp(tiles=(0, 1))
    _, a, b, _ = p.operands()
    gradient = jax.grad(lambda *args: block(p, None)(*args).sum(), (0, 1, 2))
    want = gradient(p.into.x, a, b)
    batched = jax.vmap(gradient, in_axes=(0, None, None))(jnp.stack([p.into.x] * 2), a, b)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P("d"), P(), P()), out_specs=(P("d"), P(), P()),
        check_vma=False,
    )  # fmt: skip
    for other in (jax.tree.map(lambda v: v[1], batched), jax.jit(sharded)(p.into.x, a, b)):
        for got, expected in zip(*map(jax.tree.leaves, (other, want)), strict=True):
            assert mlps.relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("ranks", [8, 16, 64, 128, 256])
@pytest.mark.parametrize("tile_k", [64, 128, 256])
def test_sizes_fit_into_shared_memory(ranks, tile_k):
    sizes = gated_down_tiles(DownTiles(tile_k, splits=3), ranks)
    used = sizes.stages * (128 + ranks) * sizes.tile_k * 2 + 64 * ranks * 8
    assert used <= 231_424 and sizes.splits == 3
    assert sizes.tile_k in (64, tile_k) and (sizes.stages >= 4 or ranks > 128)
    assert np.gcd(sizes.stages, 2) == 2


@pytest.mark.parametrize(
    ("rows", "width", "rank", "panel", "splits"),
    [(8192, 14336, 16, 448, 4), (8192, 14336, 32, 256, 2), (128, 64, 8, 64, 1)],
)
def test_gradients_are_shared_out_evenly(rows, width, rank, panel, splits):
    sizes = gated_grad_tiles(rows, width, rank)
    assert (sizes.panel, sizes.splits) == (panel, splits)
    ring = sizes.stages * (3 * 128 * 64 + 2 * rank * 64) * 2
    assert ring + 2 * 2 * rank * 128 * 2 + 2 * 64 * rank * 4 <= 231_424 and sizes.stages >= 3


@pytest.mark.parametrize("change", [{"panel": 32}, {"panel": 576}, {"stages": 1}, {"splits": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GatedGradTiles(**change)
