"""What a caller may do with the op: transformations, donation, meshes; what backward keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _mgpu, fused_lora, fused_multi_lora
from pallas_kernels.lora import api
from tests.kernels import shipped
from tests.kernels.oracle import make_problem

P = jax.sharding.PartitionSpec


def _loss(p, implementation="xla"):
    def loss(x, a, b, tile_adapter=p.routing.tile_adapter, row_key=p.routing.row_key):
        routing = p.routing._replace(tile_adapter=tile_adapter, row_key=row_key)
        ys = fused_multi_lora(x, p.ws, a, b, *routing, implementation=implementation)
        return sum(jnp.vdot(y, y) for y in ys)

    return loss


def _same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_gradients_in_shard_map_equal_those_outside(kind):
    p = make_problem(tiles=(0, 1, -1, 0), k=16, ns=(16, 8), padding=(3,))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    local = jax.grad(_loss(p), argnums=(0, 1, 2))
    rows, whole = P("data"), P()
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, whole, whole, rows, rows),
        out_specs=(rows, whole, whole),
        check_vma=False,
    )
    arguments = (p.x, p.a, p.b, p.routing.tile_adapter, p.routing.row_key)
    placed = [
        jax.device_put(value, jax.sharding.NamedSharding(mesh, spec))
        for value, spec in zip(arguments, (rows, whole, whole, rows, rows), strict=True)
    ]
    _same(jax.jit(sharded)(*placed), local(*arguments))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_the_xla_path_takes_sharded_rows_as_they_are(kind):
    p = make_problem(tiles=(0, 1), k=16, ns=(16,))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    want = jax.grad(_loss(p))(p.x, p.a, p.b)
    with jax.set_mesh(mesh):
        x = jax.device_put(p.x, jax.sharding.NamedSharding(mesh, P()))
        _same(jax.jit(jax.grad(_loss(p)))(x, p.a, p.b), want)


def test_scan_over_layers_with_remat_and_vmap_over_problems():
    p = make_problem(tiles=(0, 1), k=16, ns=(16,))

    def net(x, a, b):
        def layer(x, site):
            routing = p.routing._replace(site=site)
            (y,) = fused_multi_lora(x, p.ws, a, b, *routing, implementation="xla")
            return jnp.tanh(y), None

        sites = jnp.arange(3, dtype=jnp.uint32)[:, None]
        return jax.lax.scan(jax.checkpoint(layer), x, sites)[0].sum()

    gradients = jax.grad(net, argnums=(0, 1, 2))
    xs = jnp.stack([p.x, 2 * p.x])
    batched = jax.jit(jax.vmap(gradients, in_axes=(0, None, None)))(xs, p.a, p.b)
    _same(jax.tree.map(lambda v: v[1], batched), gradients(xs[1], p.a, p.b))


def test_a_donated_input_becomes_the_output():
    p = make_problem(tiles=(0, 1), k=16, ns=(16,))

    def forward(x):
        return fused_multi_lora(x, p.ws, p.a, p.b, *p.routing, implementation="xla")[0]

    x, want = p.x + 0, forward(p.x)
    _same(jax.jit(forward, donate_argnums=0)(x), want)
    assert x.is_deleted()


def test_backward_keeps_x_s_and_keys_and_nothing_else_of_their_size():
    p = make_problem(tiles=(0, 1, 0), tile_rows=16, k=40, ns=(24, 56), rank=4)

    def forward(x, a, b):
        return fused_multi_lora(x, p.ws, a, b, *p.routing, implementation="xla")

    _, pullback = jax.vjp(forward, p.x, p.a, p.b)
    kept = sorted(v.shape for v in jax.tree.leaves(pullback) if 48 in v.shape)
    assert kept == sorted([(48, 40), (48, 4), (48, 4), (48,)])


@pytest.mark.parametrize("transformation", ["scan, remat and grad", "vmap", "Auto", "Explicit"])
@pytest.mark.slow
def test_the_kernels_lower_inside_transformations(transformation):
    p = make_problem(dtype=jnp.bfloat16, tiles=(0, 1), tile_rows=128, k=128, ns=(128,))
    loss = _loss(p, "mosaic_gpu")
    arguments = (p.x, p.a, p.b)
    if transformation == "vmap":
        function = jax.vmap(jax.grad(loss), in_axes=(0, None, None))
        arguments = (p.x[None], p.a, p.b)
    elif transformation == "scan, remat and grad":

        def function(x, a, b):
            body = jax.checkpoint(lambda c, _: (c + loss(x, a, b), None))
            return jax.lax.scan(body, jnp.bfloat16(0), jnp.arange(2))[0]

        function = jax.grad(function, argnums=(0, 1, 2))
    else:
        kind = getattr(jax.sharding.AxisType, transformation)
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
        function = jax.shard_map(
            jax.grad(loss), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
        )
    with shipped.lowering_for(_mgpu.HOPPER):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "lora_dx" in text and "lora_base_up" in text


def test_dispatch_names_every_reason_and_takes_what_it_is_told():
    p = make_problem(tiles=(0,), k=16, ns=(16,))
    arguments = (p.x, p.ws[0], p.a[0][0], p.b[0][0], 2.0)
    _same(fused_lora(*arguments), fused_lora(*arguments, implementation="xla"))
    for name in ("mosaic_gpu", "mosaic_gpu_portable"):
        with pytest.raises(ExceptionGroup) as refusal:
            fused_lora(*arguments, implementation=name)
        (reason,) = refusal.value.exceptions
        assert (
            "compute capability" in str(reason) and f"implementation '{name}'" in reason.__notes__
        )
    with pytest.raises(ExceptionGroup) as refusal:
        api._call_first(("mosaic_gpu", "mosaic_gpu_portable"), "forward", *p.forward_args())
    assert len(refusal.value.exceptions) == 2
