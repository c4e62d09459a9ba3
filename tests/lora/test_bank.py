"""AdapterBank: initialisation, slots, rank padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.bank import (
    LoraSpec,
    attach_adapters,
    clear_slot,
    empty_bank,
    lora_context,
    mask_gradients,
    merge_adapters,
    put_slot,
    read_slot,
    split_adapters,
    write_slot,
)
from lorafusion_jax.lora.linear import MultiLoRALinear
from pallas_kernels import job_seed
from tests.tolerance import assert_bit_equal

SHAPES = {"layers.0.up": (8, 12), "layers.0.down": (12, 8), "layers.1.up": (8, 12)}
TRANSPOSED = {"layers.0.up": (jnp.ones((2, 12)), jnp.ones((2, 8)))}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = MultiLoRALinear(8, 12, rngs=rngs)
        self.down = MultiLoRALinear(12, 8, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x, lora=None):
        for layer in self.layers:
            x = x + layer.down(jnp.tanh(layer.up(x, lora)), lora)
        return x


def _poisoned(slots=3, r_max=8):
    """A bank in which every slot holds NaN, as a retired job may leave it."""
    return jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if x.dtype == jnp.float32 else x,
        empty_bank(SHAPES, slots, r_max),
    )


def test_init_is_a_function_of_job_and_module_only():
    spec, seed = LoraSpec(r=4, alpha=8), job_seed(0, "sql")
    small = read_slot(write_slot(empty_bank(SHAPES, 1, 4), 0, spec, seed), 0)
    reused = read_slot(write_slot(_poisoned(), 2, spec, seed), 2)
    assert_bit_equal(reused, small)
    assert not np.array_equal(small["layers.0.up"][0], small["layers.1.up"][0])
    other = read_slot(write_slot(empty_bank(SHAPES, 1, 4), 0, spec, job_seed(0, "emoji")), 0)
    assert not np.array_equal(small["layers.0.up"][0], other["layers.0.up"][0])


def test_default_init_has_pefts_distribution():
    bank = write_slot(empty_bank({"m": (256, 4)}, 1, 64), 0, LoraSpec(r=64), 1)
    a, b = read_slot(bank, 0)["m"]
    bound = 256**-0.5
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
    np.testing.assert_allclose(np.std(a), bound / 3**0.5, rtol=0.02)
    assert not np.any(b)


def test_gaussian_init_has_deviation_one_over_r():
    bank = write_slot(empty_bank({"m": (256, 4)}, 1, 64), 0, LoraSpec(r=64, init="gaussian"), 1)
    np.testing.assert_allclose(np.std(read_slot(bank, 0)["m"][0]), 1 / 64, rtol=0.02)


@pytest.mark.scenario("C6")
def test_permuting_slots_permutes_results():
    specs = {"a": LoraSpec(r=1), "b": LoraSpec(r=8, alpha=3, dropout=0.1, use_rslora=True)}
    one, two = empty_bank(SHAPES, 2, 8), empty_bank(SHAPES, 2, 8)
    for slot, name in enumerate("ab"):
        one = write_slot(one, slot, specs[name], job_seed(0, name))
        two = write_slot(two, 1 - slot, specs[name], job_seed(0, name))
    assert_bit_equal(jax.tree.map(lambda x: x[::-1], two), one)


def test_writing_a_slot_leaves_the_others_bits():
    bank = write_slot(_poisoned(), 1, LoraSpec(r=4), 7)
    after = write_slot(bank, 0, LoraSpec(r=2), 8)
    assert_bit_equal(*(jax.tree.map(lambda x: x[1:], b) for b in (after, bank)))


@pytest.mark.scenario("C6")
def test_a_reused_slot_is_zero_beyond_rank_and_targets():
    bank = write_slot(_poisoned(), 0, LoraSpec(r=3), 7, paths=["layers.0.up"])
    assert not np.any(bank.a["layers.0.up"][0, 3:]) and not np.any(bank.a["layers.0.down"][0])
    assert set(read_slot(bank, 0)) == {"layers.0.up"}
    assert_bit_equal(
        jax.tree.map(lambda x: x[0], clear_slot(bank, 0)),
        jax.tree.map(lambda x: x[0], empty_bank(SHAPES, 3, 8)),
    )


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.scenario("C7")
def test_rank_padding_has_no_gradient(rank):
    spec = LoraSpec(r=rank, dropout=0.5)
    model = Model(nnx.Rngs(0))
    paths = ["layers.0.up", "layers.1.down"]
    bank = write_slot(attach_adapters(model, paths, 2, 64), 1, spec, 3, paths=paths[:1])
    bank = bank._replace(b={p: b.at[1, :rank].set(0.1) for p, b in bank.b.items()})
    graphdef, frozen = split_adapters(model)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    keys = jnp.arange(1, 5, dtype=jnp.uint32)

    def loss(a, b):
        model = merge_adapters(graphdef, frozen, bank._replace(a=a, b=b))
        context = lora_context(bank, jnp.array([1, -1]), keys, train=True)
        return jnp.sum(model(x, context) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1))(bank.a, bank.b)
    assert np.any(gradients[0]["layers.1.down"])  # its B was set above: only the mask stops this
    a, b = mask_gradients(bank, *gradients)
    assert np.any(a["layers.0.up"][1, :rank]) and np.any(b["layers.0.up"][1, :rank])
    for stacks in (a, b):
        assert not np.any(stacks["layers.0.up"][1, rank:])
        assert not np.any(stacks["layers.0.up"][0])
        assert not np.any(stacks["layers.1.down"])


@pytest.mark.scenario("C7")
def test_mask_stops_nan_in_padding():
    bank = write_slot(empty_bank(SHAPES, 2, 8), 0, LoraSpec(r=3), 7)
    nan = {path: jnp.full_like(a, jnp.nan) for path, a in bank.a.items()}
    masked, _ = mask_gradients(bank, nan, {})
    assert np.isnan(masked["layers.0.up"][0, :3]).all()
    assert not np.any(masked["layers.0.up"][0, 3:]) and not np.any(masked["layers.0.up"][1])


def test_merged_model_computes_with_the_banks_adapters():
    model = Model(nnx.Rngs(0))
    bank = attach_adapters(model, list(SHAPES), 2, 4)
    graphdef, frozen = split_adapters(model)
    assert not any(isinstance(v, nnx.LoRAParam) for _, v in nnx.to_flat_state(frozen))
    x = jnp.ones((4, 8))
    bank = write_slot(bank, 0, LoraSpec(r=2), 5)
    bank = bank._replace(b=jax.tree.map(jnp.ones_like, bank.b))
    context = lora_context(bank, jnp.array([0, -1]), jnp.ones(4, jnp.uint32), train=False)
    y = jax.jit(lambda bank, frozen: merge_adapters(graphdef, frozen, bank)(x, context))(
        bank, frozen
    )
    assert not np.allclose(y[:2], model(x)[:2])
    np.testing.assert_allclose(y[2:], model(x)[2:], rtol=1e-5)


def test_attaching_again_replaces_the_stacks():
    model = Model(nnx.Rngs(0))
    attach_adapters(model, list(SHAPES), 2, 4)
    bank = attach_adapters(model, ["layers.1.up"], 3, 8)
    assert bank.a["layers.1.up"].shape == (3, 8, 8)
    assert model.layers[0].up.lora_a is None and model.layers[1].up.lora_a.shape == (3, 8, 8)


@pytest.mark.scenario("C7")
def test_put_and_read_round_trip():
    spec = LoraSpec(r=2, alpha=4, use_rslora=True)
    adapter = {"layers.0.up": (jnp.ones((2, 8)), jnp.full((2, 12), 2.0))}
    bank = put_slot(_poisoned(), 1, spec, adapter)
    assert_bit_equal(read_slot(bank, 1), adapter)
    np.testing.assert_allclose(bank.scale[1], 4 / 2**0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda bank: write_slot(bank, 3, LoraSpec(), 0), "slot=3"),
        (lambda bank: write_slot(bank, -1, LoraSpec(), 0), "slot=-1"),
        (lambda bank: write_slot(bank, 0, LoraSpec(r=9), 0), "r_max=8"),
        (lambda bank: write_slot(bank, 0, LoraSpec(), 0, paths=["lm_head"]), "lm_head"),
        (lambda bank: put_slot(bank, 0, LoraSpec(r=2), TRANSPOSED), "do not fit"),
        (lambda bank: attach_adapters(Model(nnx.Rngs(0)), ["nope"], 1, 1), "nope"),
        (lambda bank: LoraSpec(r=0), "r=0"),
        (lambda bank: LoraSpec(alpha=0), "alpha=0"),
        (lambda bank: LoraSpec(dropout=0.001), "1/512"),
        (lambda bank: LoraSpec(init="pissa"), "pissa"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(AdapterError, match=words):
        call(empty_bank(SHAPES, 3, 8))
