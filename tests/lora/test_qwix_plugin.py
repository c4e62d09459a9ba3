"""Models adapted by Qwix compute the same with the fused op, and really use it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

qwix = pytest.importorskip("qwix", reason="qwix is not installed")

from lorafusion_jax.lora import qwix_plugin  # noqa: E402
from lorafusion_jax.lora.qwix_plugin import FusedLoraProvider  # noqa: E402

# Qwix calls methods of flax that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RULE = {"module_path": ".*", "rank": 3, "alpha": 6.0}


class Mixer(nnx.Module):
    """Products of every kind: linear, einsums in and out of heads, and one the op can't take."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 12, rngs=rngs)
        self.split = nnx.Einsum("btd,dnh->btnh", (12, 2, 6), None, rngs=rngs)
        self.join = nnx.Einsum("btnh,nhd->tbd", (2, 6, 8), None, rngs=rngs)
        self.stacked = nnx.Einsum("tbd,cdf->ctbf", (2, 8, 4), None, rngs=rngs)

    def __call__(self, x):
        return self.stacked(self.join(self.split(nnx.gelu(self.linear(x)))))


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.gelu(linen.Dense(16)(x))
        return linen.DenseGeneral((2, 4), axis=(-1,))(x)


@pytest.fixture
def fused_calls(monkeypatch):
    """Shapes of the weights that went through the fused op."""
    shapes = []

    def counted(x, w, *args, **kwargs):
        shapes.append(w.shape)
        return qwix_plugin_fused(x, w, *args, **kwargs)

    qwix_plugin_fused = qwix_plugin.fused_lora
    monkeypatch.setattr(qwix_plugin, "fused_lora", counted)
    return shapes


def adapted(provider_type, x, **rule):
    """Returns a Mixer with adapters whose B is not zero; the same ones for every provider."""
    provider = provider_type(**{**RULE, **rule})
    model = qwix.apply_lora_to_model(Mixer(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    values = np.random.default_rng(0)
    state = nnx.state(model, nnx.LoRAParam)
    fill = jax.tree.map(
        lambda p: jnp.asarray(values.normal(0, 0.3, p.shape), p.dtype), nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, fill)
    nnx.update(model, state)
    return model


def loss_and_gradients(model, x):
    def loss(model, x):
        return jnp.sin(model(x)).sum()

    adapters = nnx.DiffState(0, nnx.LoRAParam)
    value, gradients = nnx.jit(nnx.value_and_grad(loss, argnums=adapters))(model, x)
    return value, nnx.to_pure_dict(gradients)


def largest_difference(one, other):
    return max(
        jax.tree.leaves(
            jax.tree.map(
                lambda a, b: float(jnp.abs(a - b).max() / (1e-6 + jnp.abs(b).max())), one, other
            )
        )
    )


def test_nnx_model_matches_qwix(rng, fused_calls):
    x = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)
    theirs = loss_and_gradients(adapted(qwix.LoraProvider, x), x)
    assert not fused_calls
    ours = loss_and_gradients(adapted(FusedLoraProvider, x), x)
    # The fourth weight is contracted over its second axis: Qwix's own path.
    assert fused_calls == [(8, 12), (12, 12), (12, 8)]
    assert largest_difference(ours, theirs) < 1e-5
    # A broken twin, for the comparison's sake: another scale is seen.
    wrong = loss_and_gradients(adapted(FusedLoraProvider, x, alpha=6.1), x)
    assert largest_difference(wrong, theirs) > 1e-3


def test_linen_model_matches_qwix_and_trains(rng, fused_calls):
    x = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
    models = {
        kind: qwix.apply_lora_to_model(LinenMlp(), kind(**RULE))
        for kind in (qwix.LoraProvider, FusedLoraProvider)
    }
    params = models[FusedLoraProvider].init(jax.random.key(0), x)["params"]
    assert not fused_calls  # in the first call Qwix creates the factors
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names == {"kernel", "bias", "kernel_lora_a", "kernel_lora_b"}
    params = jax.tree.map(lambda p: p + 0.1, params)
    outputs, gradients = {}, {}
    for kind, model in models.items():
        outputs[kind] = model.apply({"params": params}, x)

        def loss(params, model=model):
            return jnp.sin(model.apply({"params": params}, x)).sum()

        gradients[kind] = jax.jit(jax.grad(loss))(params)
    assert fused_calls[:2] == [(8, 16), (16, 8)]
    ours, theirs = gradients[FusedLoraProvider], gradients[qwix.LoraProvider]
    np.testing.assert_allclose(*outputs.values(), rtol=1e-5, atol=1e-5)
    for layer in ours:
        for name in ("kernel_lora_a", "kernel_lora_b"):
            assert largest_difference(ours[layer][name], theirs[layer][name]) < 1e-4
        assert not ours[layer]["kernel"].any()  # frozen, as documented


def test_starts_as_the_base_with_the_initial_a_of_peft(rng):
    x = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    base = Mixer(nnx.Rngs(0))
    provider = FusedLoraProvider(module_path="linear", rank=64, alpha=64.0)
    model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(x), base(x), rtol=1e-6, atol=1e-6)
    a = model.linear.kernel_lora_a[...]
    assert a.shape == (8, 64) and not hasattr(model.split, "kernel_lora_a")
    bound = 8**-0.5
    assert 0.95 * bound < float(jnp.abs(a).max()) <= bound
    theirs = qwix.LoraProvider(module_path="linear", rank=64, alpha=64.0)
    larger = qwix.apply_lora_to_model(base, theirs, x, rngs=nnx.Rngs(1)).linear.kernel_lora_a[...]
    assert float(jnp.abs(larger).max()) > 2 * bound


def test_what_the_op_cannot_take_goes_qwix_own_way(rng, fused_calls):
    x = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
    quantised = adapted(FusedLoraProvider, x, module_path="linear", weight_qtype=jnp.int8)
    assert jnp.isfinite(quantised(x)).all()
    model = Mixer(nnx.Rngs(0))
    model.linear.precision = "highest"
    provider = FusedLoraProvider(**{**RULE, "module_path": "linear"})
    assert jnp.isfinite(qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))(x)).all()
    assert not fused_calls


@pytest.mark.parametrize(
    "subscripts, right",
    [("...d,df->...f", (8, 3)), ("btd,df->bft", (8, 3)), ("btd,td->b", (5, 8))],
)
def test_einsum_is_read_right(rng, subscripts, right):
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
    w = jnp.asarray(rng.normal(size=right), jnp.float32)
    found = qwix_plugin._from_einsum(subscripts, x, w)
    if subscripts == "btd,td->b":  # nothing of the weight is left over: no linear
        assert found is None
        return
    y = (found.x @ found.w).reshape(found.shape).transpose(found.order)
    np.testing.assert_allclose(y, jnp.einsum(subscripts, x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subscripts", ["btd,bdf->btf", "btd,fd->btf", "btd,df->bf", "btd,df"])
def test_other_einsums_are_left_alone(subscripts):
    shapes = {"bdf": (2, 8, 3), "fd": (3, 8), "df": (8, 3)}
    right = subscripts.partition("->")[0].partition(",")[2]
    x, w = jnp.ones((2, 5, 8)), jnp.ones(shapes[right])
    assert qwix_plugin._from_einsum(subscripts, x, w) is None


def test_dropout_draws_new_masks_of_the_rate(rng, monkeypatch):
    x = jnp.asarray(rng.normal(size=(16, 8, 8)), jnp.float32)
    calls = []
    fused = qwix_plugin.fused_lora
    monkeypatch.setattr(
        qwix_plugin,
        "fused_lora",
        lambda *args, rate, row_key: (
            calls.append((rate, row_key)) or fused(*args, rate=rate, row_key=row_key)
        ),
    )
    model = adapted(FusedLoraProvider, x, module_path="linear", dropout=0.5)
    model.set_attributes(qwix_rngs=nnx.Rngs(dropout=0))
    assert not jnp.array_equal(model(x), model(x))
    (rate, first), (_, second) = calls
    assert rate == 0.5 and first.shape == (16 * 8,)
    assert len(set(first.tolist()) | set(second.tolist())) == 2 * 16 * 8
