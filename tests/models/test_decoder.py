"""The decoder: samples stay apart, policies agree, paths and dropout sites are as promised."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax.lora import linear
from lorafusion_jax.lora.bank import (
    LoraSpec,
    attach_adapters,
    lora_context,
    merge_adapters,
    multi_linears,
    split_adapters,
    write_slot,
)
from lorafusion_jax.models import decoder, random_base
from pallas_kernels import fused_gated_mlp
from tests.models.tiny import TINY, packed
from tests.tolerance import assert_bit_equal, assert_error_ratio

ROWS, LENGTHS = 32, (9, 14)
FIRST, SECOND, PADDING = slice(0, 9), slice(9, 23), slice(23, 32)


@pytest.fixture(scope="module")
def split():
    return nnx.split(random_base(TINY).model)


def hidden_from(split, embeddings, positions, segments):
    """The decoder's hidden states as a function of its embedded tokens."""
    model = nnx.merge(*split)
    model.model.embed_tokens = lambda _: embeddings
    return model(jnp.zeros(embeddings.shape[0], jnp.int32), positions, segments)


def reach(split, positions, segments, embeddings) -> np.ndarray:
    """Which row's embedding each sample's hidden states depend on, by gradients."""

    @jax.jit
    def gradients(embeddings):
        def total(embeddings, rows):
            return jnp.sum(hidden_from(split, embeddings, positions, segments)[rows] ** 3)

        return [jax.grad(total)(embeddings, rows) for rows in (FIRST, SECOND)]

    return np.asarray([jnp.any(g != 0, axis=1) for g in gradients(embeddings)])


@pytest.fixture
def embeddings(rng):
    return jnp.asarray(rng.normal(size=(ROWS, 32)), jnp.float32)


@pytest.mark.scenario("C10")
def test_no_gradient_between_samples(split, embeddings):
    depends = reach(split, *packed(LENGTHS, ROWS), embeddings)
    assert np.flatnonzero(depends[0]).tolist() == list(range(9))
    assert np.flatnonzero(depends[1]).tolist() == list(range(9, 23))


@pytest.mark.scenario("C10")
def test_leak_would_be_seen(split, embeddings):
    """Control: with both samples declared one, the second depends on the first."""
    depends = reach(split, *packed([23], ROWS), embeddings)
    assert depends[1, FIRST].all()


@pytest.mark.scenario("C10")
def test_neighbours_and_padding_change_no_bit(split, embeddings):
    run = jax.jit(lambda x: hidden_from(split, x, *packed(LENGTHS, ROWS)))
    hidden = run(embeddings)
    poisoned = run(embeddings.at[PADDING].set(jnp.nan).at[FIRST].set(jnp.inf))
    assert_bit_equal(poisoned[SECOND], hidden[SECOND])
    assert jnp.isnan(poisoned[FIRST]).all()


def test_a_sample_is_the_same_wherever_it_lies(split, embeddings):
    """Positions restart with each sample."""
    moved = jnp.concatenate([embeddings[SECOND], embeddings[FIRST], embeddings[PADDING]])
    run = jax.jit(lambda x, where: hidden_from(split, x, *where))
    hidden = run(embeddings, packed(LENGTHS, ROWS))
    np.testing.assert_allclose(
        run(moved, packed(LENGTHS[::-1], ROWS))[:14], hidden[SECOND], rtol=1e-4, atol=1e-5
    )


def adapted(num_layers: int, targets=("q_proj", "v_proj", "down_proj")):
    """A model, the bank of its two adapters, and the routing of 32 rows."""
    model = random_base(dataclasses.replace(TINY, num_hidden_layers=num_layers)).model
    paths = [p for p in multi_linears(model) if p.endswith(targets)]
    bank = attach_adapters(model, paths, 2, 4)
    for slot in range(2):
        bank = write_slot(bank, slot, LoraSpec(r=4, alpha=8, dropout=0.25), slot + 1)
    bank = bank._replace(b=jax.tree.map(lambda b: b + 0.1, bank.b))
    model = merge_adapters(*split_adapters(model), bank)
    keys = jnp.arange(1, ROWS + 1, dtype=jnp.uint32)
    return model, bank, lora_context(bank, jnp.array([0, 1, -1, 1]), keys, train=True)


def test_remat_policies_agree(rng):
    model, bank, lora = adapted(1)
    graphdef, frozen = split_adapters(model)
    tokens = jnp.asarray(rng.integers(0, 97, ROWS))
    where = packed(LENGTHS, ROWS)

    def gradients(remat):
        def loss(a, b):
            merged = merge_adapters(graphdef, frozen, bank._replace(a=a, b=b))
            return jnp.sum(merged(tokens, *where, lora, remat=remat) ** 2)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(bank.a, bank.b)

    expected = gradients("none")
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(expected))
    wider = jax.tree.map(lambda x: np.asarray(x, np.float64), expected)
    for remat in ("mlp", "attention", "full"):
        assert_error_ratio(gradients(remat), expected, wider, floor_ulp=16.0)


def test_remat_stores_less(rng):
    model, bank, lora = adapted(1)
    graphdef, frozen = split_adapters(model)
    where = packed(LENGTHS, ROWS)

    def stored(remat):
        def pull(a):
            def hidden(a):
                merged = merge_adapters(graphdef, frozen, bank._replace(a=a))
                return merged(jnp.zeros(ROWS, jnp.int32), *where, lora, remat=remat)

            return jax.vjp(hidden, a)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pull, bank.a))
        return sum(leaf.size for leaf in leaves if leaf.shape[:1] == (ROWS,))

    assert stored("full") < stored("attention") < stored("mlp") < stored("none")


def test_without_a_gpu_a_joined_block_is_the_same_program(monkeypatch):
    """To the compiler, which drops where in the source an instruction comes from."""
    model, bank, lora = adapted(1, targets=("proj",))
    graphdef, frozen = split_adapters(model)
    where, joined = packed(LENGTHS, ROWS), []

    def recorded(*args, **kwargs):
        joined.append(args)
        return fused_gated_mlp(*args, **kwargs)

    def compiled() -> str:
        def loss(a, b):
            merged = merge_adapters(graphdef, frozen, bank._replace(a=a, b=b))
            return merged(jnp.zeros(ROWS, jnp.int32), *where, lora, remat="mlp").sum()

        jax.clear_caches()  # the layers' trace outlives a switch
        text = jax.jit(jax.grad(loss, (0, 1))).lower(bank.a, bank.b).compile().as_text()
        return re.sub(r", metadata=\{[^}]*\}", "", text).split("FileNames")[0]

    monkeypatch.setattr(linear, "fused_gated_mlp", recorded)
    together, count = compiled(), len(joined)
    monkeypatch.setattr(linear, "fused_gated_mlp", None)
    assert compiled() == together and count > 0 and len(joined) == count
    jax.clear_caches()


def test_sites_and_groups(monkeypatch):
    """site = 8 * layer + group; q|k|v and gate|up each go through one call."""
    calls = []

    def recorded(linears, x, lora, site):
        calls.append((len(linears), int(site)))
        return grouped(linears, x, lora, site)

    def single(self, x, lora, site):
        calls.append((1, int(site)))
        return call(self, x, lora, site)

    grouped, call = decoder.grouped_linear, decoder.MultiLoRALinear.__call__
    monkeypatch.setattr(decoder, "grouped_linear", recorded)
    monkeypatch.setattr(decoder.MultiLoRALinear, "__call__", single)
    model, tokens, where = random_base(TINY).model, jnp.zeros(4, jnp.int32), packed([4], 4)
    flags = jnp.zeros(4, bool)
    monkeypatch.setattr(decoder, "attention_and_flags", lambda q, k, v, *_, **__: (q, flags))
    with jax.disable_jit():
        model(tokens, *where)
    assert calls == [(3, 0), (1, 1), (2, 2), (1, 3), (3, 8), (1, 9), (2, 10), (1, 11)]


def test_module_paths_are_hugging_faces():
    paths = multi_linears(random_base(TINY).model)
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(paths) == sorted(
        f"model.layers.{i}.{name}" for i in range(2) for name in attention + mlp
    )


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_vocabulary_first_and_no_copy(tied):
    model = random_base(dataclasses.replace(TINY, tie_word_embeddings=tied)).model
    owner = model.model.embed_tokens if tied else model.lm_head
    assert model.head_weight() is owner.weight[...] and model.head_weight().shape == (97, 32)
    hidden = jnp.ones((3, 32))
    np.testing.assert_allclose(
        model.logits(hidden), hidden @ model.head_weight().T, rtol=1e-5, atol=1e-5
    )


def test_layers_share_one_trace():
    """Tracing time does not grow with depth."""
    deep = nnx.split(random_base(dataclasses.replace(TINY, num_hidden_layers=5)).model)
    positions, segments = packed([4], 4)
    jaxpr = jax.make_jaxpr(lambda s: nnx.merge(deep[0], s)(positions, positions, segments))(deep[1])
    layers = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "_run_layer"]
    assert len(layers) == 5 and len({id(eqn.params["jaxpr"]) for eqn in layers}) == 1


def test_random_weights_are_a_function_of_seed_and_name():
    one, same, other = (nnx.split(random_base(TINY, seed).model)[1] for seed in (1, 1, 2))
    assert_bit_equal(one, same)
    differ = [
        bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    ]
    assert sum(differ) == 15  # all but the five norms


def test_decoding_with_a_cache_equals_the_whole_forward(rng):
    """Prompts of different lengths side by side, each with its own adapter."""
    model, bank, _ = adapted(2)
    lengths, total = (5, 3), 8
    tokens = jnp.asarray(rng.integers(0, 97, (2, total)))
    slots = jnp.array([0, -1])

    def context(rows):
        return lora_context(bank, slots, jnp.ones(rows, jnp.uint32), train=False)

    where = packed([total, total], 2 * total)
    whole = jax.jit(model)(tokens.reshape(-1), *where, context(2 * total)).reshape(2, total, -1)
    step = jax.jit(lambda *args: model.decode(*args, context(args[0].size)))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    hidden, caches = step(tokens[:, :5], positions, model.init_cache(2, total))
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[i, :length], whole[i][:length], rtol=1e-4, atol=1e-5)
    for offset in range(3):
        at = jnp.array(lengths)[:, None] + offset
        hidden, caches = step(jnp.take_along_axis(tokens, at, 1), at, caches)
        for i in range(2):
            np.testing.assert_allclose(
                hidden[i, 0], whole[i][lengths[i] + offset], rtol=1e-4, atol=1e-5
            )
    bare = jax.jit(model)(tokens.reshape(-1), *where).reshape(2, total, -1)
    assert not np.allclose(whole[0], bare[0]) and np.allclose(whole[1], bare[1], atol=1e-5)
