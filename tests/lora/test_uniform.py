"""Adapters of patterns, written at one rank and scale."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.lora.bank import (
    attach_adapters,
    lora_context,
    merge_adapters,
    put_slot,
    split_adapters,
)
from lorafusion_jax.lora.peft_io import load_peft, save_peft
from lorafusion_jax.lora.targets import LoraSpec, target_paths
from lorafusion_jax.lora.uniform import uniform_adapter
from lorafusion_jax.models import random_base
from tests.models.tiny import TINY, packed
from tests.tolerance import assert_bit_equal

SPECS = {
    # Scales 2 (r 4), 4 (r 2) and 1 (r 8): quotients are powers of two.
    "ranks": LoraSpec(r=4, alpha=8, rank_pattern={"q_proj": 2, "down_proj": 8}),
    "alphas": LoraSpec(r=4, alpha=8, alpha_pattern={r"layers\.1.*up_proj": 3}),
    "rslora": LoraSpec(r=3, alpha=4, use_rslora=True, rank_pattern={"v_proj": 5}),
    "regex": LoraSpec(r=2, alpha=4, target_modules=r".*\.[qv]_proj", rank_pattern={"v_proj": 4}),
}


def random_adapter(model, spec, rng) -> dict:
    from lorafusion_jax.lora.bank import multi_linears

    linears = multi_linears(model)
    return {
        path: tuple(
            rng.normal(size=(spec.rank_of(path), width)).astype(np.float32)
            for width in (linears[path].in_features, linears[path].out_features)
        )
        for path in target_paths(model, spec)
    }


def logits(base, adapter, spec) -> np.ndarray:
    bank = attach_adapters(base.model, list(adapter), 1, spec.max_rank(adapter))
    bank = put_slot(bank, 0, spec, adapter)
    model = merge_adapters(*split_adapters(base.model), bank)
    attach_adapters(base.model, (), 0, 1)
    positions, segments = packed([16], 16)
    context = lora_context(bank, jnp.zeros(1, jnp.int32), jnp.ones(16, jnp.uint32), train=False)
    return np.asarray(model.logits(model(positions * 5 % 97, positions, segments, context)))


@pytest.mark.parametrize("name", list(SPECS))
def test_the_same_products(name, rng):
    """scale * B A of every module, by the two descriptions."""
    base, spec = random_base(TINY), SPECS[name]
    adapter = random_adapter(base.model, spec, rng)
    same, uniform = uniform_adapter(adapter, spec)
    assert not uniform.rank_pattern and not uniform.alpha_pattern and not uniform.use_rslora
    assert {x.shape[0] for pair in same.values() for x in pair} == {uniform.r}
    assert uniform.r == spec.max_rank(adapter)
    for path, (a, b) in adapter.items():
        wide = [np.asarray(x, np.float64) for x in (a, b, *same[path])]
        before = spec.scale_of(path) * wide[1].T @ wide[0]
        after = uniform.scale * wide[3].T @ wide[2]
        if name == "ranks":
            np.testing.assert_array_equal(after, before)
        np.testing.assert_allclose(after, before, atol=1e-7 * np.abs(before).max())
        wrong = spec.scale * wide[1].T @ wide[0]  # what a server that ignores patterns computes
        if spec.patterned([path]):
            assert np.abs(wrong - before).max() > 1e-2 * np.abs(before).max()


def test_the_file_has_no_patterns_and_computes_the_same(tmp_path, rng):
    base, spec = random_base(TINY), SPECS["ranks"]
    adapter = random_adapter(base.model, spec, rng)
    folder = save_peft(tmp_path / "u", *uniform_adapter(adapter, spec), "base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {}, {})
    assert isinstance(config["lora_alpha"], int)
    loaded = load_peft(folder, base.model)
    assert loaded.spec.scale == config["lora_alpha"] / 8
    np.testing.assert_allclose(
        logits(base, loaded.adapter, loaded.spec), logits(base, adapter, spec), rtol=0, atol=1e-3
    )


def test_an_adapter_without_patterns_stays_as_it_is(rng):
    base, spec = random_base(TINY), LoraSpec(r=4, alpha=8)
    adapter = random_adapter(base.model, spec, rng)
    same, uniform = uniform_adapter(adapter, spec)
    assert uniform == spec
    assert_bit_equal(same, adapter)


def test_an_expression_becomes_paths(rng):
    base, spec = random_base(TINY), SPECS["regex"]
    _, uniform = uniform_adapter(random_adapter(base.model, spec, rng), spec)
    assert len(uniform.target_modules) == 4
    assert set(uniform.target_modules) == set(target_paths(base.model, spec))
