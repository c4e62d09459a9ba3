"""loraize in a user's own model and training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.inject import get_adapter, loraize, set_adapter
from lorafusion_jax.lora.linear import LoRALinear
from lorafusion_jax.lora.targets import LoraSpec
from pallas_kernels import row_keys
from tests.tolerance import assert_bit_equal, assert_error_ratio


class Tower(nnx.Module):
    """A user's model: linears in a Sequential, in an attribute, and one shared by two names."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Sequential(
            nnx.Linear(6, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 6, rngs=rngs)
        )
        self.left = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.right = self.left
        self.lm_head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.lm_head(self.right(nnx.relu(self.left(self.inner(x)))))


X = jax.random.normal(jax.random.key(0), (2, 5, 6))


def _randomise_b(model):
    """Adapters with non-zero B, as after training."""
    adapter = get_adapter(model)
    set_adapter(
        model,
        {
            path: (a, jax.random.normal(jax.random.key(i), b.shape))
            for i, (path, (a, b)) in enumerate(adapter.items())
        },
    )


def test_output_is_unchanged_and_shared_modules_stay_shared():
    model, before = Tower(), Tower()(X)
    paths = loraize(model, LoraSpec(r=2, dropout=0.5))
    assert sorted(paths) == ["inner.layers.0", "inner.layers.2", "left"]
    assert model.left is model.right and isinstance(model.left, LoRALinear)
    assert isinstance(model.lm_head, nnx.Linear)
    assert_error_ratio(model(X), before, before, floor_ulp=8)


def test_adapted_output_equals_merged_weights():
    model, merged = Tower(), Tower()
    spec = LoraSpec(r=3, alpha=6, use_rslora=True, target_modules=("left",))
    loraize(model, spec)
    _randomise_b(model)
    a, b = get_adapter(model)["left"]
    merged.left.kernel[...] += spec.scale * a.T @ b
    assert_error_ratio(model(X), merged(X), merged(X), floor_ulp=16)
    assert np.abs(model(X) - Tower()(X)).max() > 0.1


def test_users_own_loop_trains_adapters_and_nothing_else():
    model = Tower()
    frozen_before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    loraize(model, LoraSpec(r=4, alpha=8, dropout=0.1))
    optimizer = nnx.Optimizer(model, optax.adamw(0.02), wrt=nnx.LoRAParam)

    def loss(model):
        return jnp.mean((model(X) - 1) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    frozen = nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    assert_bit_equal(nnx.to_pure_dict(frozen), nnx.to_pure_dict(frozen_before))


@pytest.mark.scenario("C9")
def test_kernel_has_no_gradient():
    model = Tower()
    loraize(model, LoraSpec(target_modules=("left",)))
    _randomise_b(model)
    gradient = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(model)
    assert not np.any(gradient["left"]["kernel"][...]) and np.any(
        gradient["lm_head"]["kernel"][...]
    )
    assert np.any(gradient["left"]["lora_a"][...])


def test_dropout_follows_train_eval_and_view():
    model = Tower()
    loraize(model, LoraSpec(dropout=0.5))
    _randomise_b(model)
    assert not np.array_equal(model(X), model(X))
    still = nnx.view(model, deterministic=True)
    assert_bit_equal(still(X), still(X))
    model.eval()
    assert_bit_equal(model(X), still(X))
    model.train()
    assert not np.array_equal(model(X), still(X))


def test_dropout_keys_advance_under_jit_and_repeat_with_the_seed():
    def two_calls():
        model = Tower()
        loraize(model, LoraSpec(dropout=0.5), rngs=nnx.Rngs(dropout=7))
        _randomise_b(model)
        call = nnx.jit(lambda model: model(X))
        return call(model), call(model)

    first, second = two_calls()
    assert not np.array_equal(first, second)
    assert_bit_equal(two_calls(), (first, second))


def test_row_key_fixes_the_mask_of_a_row_wherever_it_stands():
    model = Tower()
    loraize(model, LoraSpec(dropout=0.5, target_modules=("left",)))
    _randomise_b(model)
    rows = X.reshape(10, 6)
    index = jnp.arange(10)
    keys = row_keys(jnp.full(10, 5, jnp.uint32), 0 * index, index, 0 * index)
    y = model.left(rows, row_key=keys)
    assert_bit_equal(model.left(rows[::-1], row_key=keys[::-1])[::-1], y)
    assert not np.array_equal(model.left(rows, row_key=keys[::-1]), y)


def test_initial_adapter_is_a_function_of_seed_and_path():
    one, two, other = Tower(0), Tower(1), Tower(0)
    loraize(one, LoraSpec(r=2))
    loraize(two, LoraSpec(r=2, target_modules=("left",)))
    loraize(other, LoraSpec(r=2), seed=1)
    assert_bit_equal(get_adapter(one)["left"], get_adapter(two)["left"])
    assert not np.array_equal(get_adapter(one)["left"][0], get_adapter(other)["left"][0])


class Precise(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(4, 4, precision="highest", rngs=nnx.Rngs(0))


class Own(nnx.Linear):
    pass


class Subclassed(nnx.Module):
    def __init__(self):
        self.fc = Own(4, 4, rngs=nnx.Rngs(0))


class InTuple(nnx.Module):
    def __init__(self):
        self.fcs = nnx.data((nnx.Linear(4, 4, rngs=nnx.Rngs(0)),))


@pytest.mark.parametrize(
    ("make", "words"),
    [(Precise, "precision"), (Subclassed, "is a Own"), (InTuple, "plain container")],
)
def test_linears_that_cannot_be_replaced_are_refused(make, words):
    model = make()
    with pytest.raises(AdapterError, match=words):
        loraize(model, LoraSpec())


def test_loraizing_twice_is_refused():
    model = Tower()
    loraize(model, LoraSpec())
    with pytest.raises(AdapterError, match=r"leaves no linear|LoRALinear"):
        loraize(model, LoraSpec())


def test_set_adapter_refuses_what_does_not_fit():
    model = Tower()
    loraize(model, LoraSpec(r=2))
    adapter = get_adapter(model)
    with pytest.raises(AdapterError, match="differ in 1 modules"):
        set_adapter(model, {path: adapter[path] for path in list(adapter)[1:]})
    a, b = adapter["left"]
    with pytest.raises(AdapterError, match="left"):
        set_adapter(model, adapter | {"left": (a[:1], b[:1])})
